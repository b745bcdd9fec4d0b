"""Flow attention beside the attentions it is compared with (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Taught in the chapter ``kernels/flowformer``. The mechanism itself stands in :mod:`attnlab.mixers.flow`, its kernel in
:mod:`attnlab.kernels.causal_flow`. Here are the six arms of the comparison, their effective weights, and matrix forms of one
head that show every flow as a sum over the matrix of capacities. The trainings stand in :mod:`attnlab.kernels.flowformer_runs`.

``python -m attnlab.kernels.flowformer --record records/flowformer.json`` repeats the experiments larger, on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.claims import bootstrap_mean
from attnlab.mixers import checks, elu_plus_one, flow_attention, flow_quantities
from attnlab.mixers.flow import Flow

if TYPE_CHECKING:
    import pandas as pd

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, N, H, K], k [B, M, H, K], v [B, M, H, V] -> [B, N, H, V]."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in which every query sees every key, scale K ** -0.5."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2)  # [B, H, N, V] -> [B, N, H, V]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, feature_map: Callable[[Tensor], Tensor]) -> Tensor:
    """Normalised linear attention in which every query sees every key (Katharopoulos et al. 2020, arXiv:2006.16236).

    Args:
        q: [B, N, H, K].
        k, v: [B, M, H, K] and [B, M, H, V].
        feature_map: of q and k, positive.

    Returns:
        [B, N, H, V].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    checks.heads(q, k, v, same_length=False)
    q, k = feature_map(q), feature_map(k)
    memory = torch.einsum("bmhk,bmhv->bhkv", k, v)
    total = torch.einsum("bnhk,bhk->bnh", q, k.sum(1))
    return torch.einsum("bnhk,bhkv->bnhv", q, memory) / total[..., None]


#: the six arms: the attention to beat, two linear attentions, flow attention, and flow attention without one of its halves
ARMS: dict[str, Attention] = {
    "softmax": softmax_attention,
    "elu+1 linear": partial(linear_attention, feature_map=elu_plus_one),
    "sigmoid linear": partial(linear_attention, feature_map=torch.sigmoid),
    "flow": flow_attention,
    "flow, no competition": partial(flow_attention, competition=False),
    "flow, no allocation": partial(flow_attention, allocation=False),
}


class MultiHead(nn.Module):
    """Projections around any attention of heads, so that a comparison of arms changes nothing else.

    Args:
        width: D, a multiple of ``heads``.
        heads: H; K = V = D / H.
        attention: one of :data:`ARMS`, or any other function of this form: the outputs of ``causal_flow`` make a causal layer.

    Raises:
        ValueError: sizes that are not positive, heads that do not divide the width.
    """

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide width={width}, and both be positive; choose a divisor")
        self.heads = heads
        self.attention = attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        qkv = self.qkv(x).to(self.qkv.weight.dtype)  # autocast halves it, and sums over many tokens need all of it
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, T, H, D/H]
        return self.out(self.attention(q, k, v).flatten(2))


def effective_weights(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """What output i holds of value j: any attention that is linear in v, asked about one-hot values.

    Args:
        attention: of :data:`ARMS`, say.
        q, k: [B, N, H, K] and [B, M, H, K].

    Returns:
        [B, N, H, M].
    """
    batch, sources, heads, _ = k.shape
    one_hot = torch.eye(sources, dtype=k.dtype, device=k.device)[None, :, None]  # [1, M, 1, M]
    return attention(q, k, one_hot.expand(batch, sources, heads, sources))


def evenness(weights: Tensor) -> Tensor:
    """Entropy of weights [..., M] as a share of log M: 1 for an average of all, 0 for a choice of one. [...]

    Rows are scaled to sum 1 first, so a gate on the output does not count.
    """
    p = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / torch.tensor(weights.shape[-1], dtype=weights.dtype).log()


def situations(
    draws: int = 32, tokens: int = 64, channels: int = 16, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and keys [draws, T, 1, K] without training, in three situations of equal size.

    ``random``: standard normal. ``a key for each query``: query i and key i are one vector, another for every i. ``one key for
    all``: every query points to key 0, give or take some noise. In the last two the aligned vectors have norm 2 sqrt(K).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(length: int) -> Tensor:
        return torch.randn(draws, length, 1, channels, generator=generator, dtype=torch.float64)

    def long(x: Tensor) -> Tensor:
        return 2 * channels**0.5 * x / x.norm(dim=-1, keepdim=True)

    own, shared = long(normal(tokens)), long(normal(1))
    crowd = normal(tokens)
    crowd[:, :1] = shared
    return {
        "random": (normal(tokens), normal(tokens)),
        "a key for each query": (own, own),
        "one key for all": (shared + 0.3 * normal(tokens), crowd),
    }


def evenness_table(draws: int = 32) -> pd.DataFrame:
    """How even the weights of four attentions are in each of the :func:`situations`, and of flow attention with a wide clamp.

    One row an attention and situation: ``situation, arm``; ``even`` with its 95 % interval ``low, high`` over the draws; ``share``,
    the mean weight of the aligned key in units of an average key's (meaningless for ``random``).
    """
    import pandas as pd

    arms = {name: ARMS[name] for name in ("softmax", "elu+1 linear", "sigmoid linear", "flow")}
    arms["flow, clamp 10"] = partial(flow_attention, clamp=10.0)
    rows = []
    for situation, (q, k) in situations(draws).items():
        for arm, attention in arms.items():
            weights = effective_weights(attention, q, k)[:, :, 0]  # [draws, N, M]
            even = evenness(weights).mean(1).numpy()
            low, high = bootstrap_mean(even)
            p = weights / weights.sum(-1, keepdim=True)
            aligned = p[:, :, 0] if situation == "one key for all" else p.diagonal(dim1=1, dim2=2)
            share = float(aligned.mean()) * weights.shape[-1]
            rows.append(
                {"situation": situation, "arm": arm, "even": even.mean(), "low": low, "high": high, "share": share}
            )
    return pd.DataFrame(rows)


def capacities(q: Tensor, k: Tensor) -> Tensor:
    """A = phi(Q) phi(K)^T of one head, phi = sigmoid: [N, K], [M, K] -> [N, M]."""
    return q.sigmoid() @ k.sigmoid().T


def flow_steps(q: Tensor, k: Tensor, *, clamp: float = 1.0) -> dict[str, Tensor]:
    """The weights [N, M] of one head after each step that makes flow attention of capacities, eps = 0.

    ``sinks fixed`` and ``sources fixed`` start from the capacities; ``competition`` goes on from ``sinks fixed``, and
    ``allocation`` from ``competition``: its rows are what the outputs are made of.

    Args:
        q, k: [N, K] and [M, K].
        clamp: bound on the conserved outgoing flow before the softmax.
    """
    a = capacities(q, k)
    n, m = a.shape
    per_sink = a / a.sum(1, keepdim=True)  # rows sum to 1; columns to the conserved outgoing flow
    per_source = a / a.sum(0)  # columns sum to 1; rows to the conserved incoming flow
    contested = per_sink * m * per_sink.sum(0).clamp(-clamp, clamp).softmax(0)
    gate = (per_source.sum(1) * n / m).sigmoid()
    return {
        "capacities": a,
        "sinks fixed": per_sink,
        "sources fixed": per_source,
        "competition": contested,
        "allocation": contested * gate[:, None],
    }


def triangle_flows(q: Tensor, k: Tensor) -> Flow:
    """The four flows of the causal form, each [T], from two triangles of one matrix; eps = 0, quadratic, for reading.

    The kernel does this inside a chunk and carries sums for what came before it.

    Args:
        q, k: [T, K] of one head.
    """
    a = capacities(q, k)  # [T, T]: sinks down, sources across
    past, future = a.tril(), a.triu()  # what sink i gets from j <= i; what source j gave to i <= j
    t = torch.arange(1, len(a) + 1, dtype=a.dtype, device=a.device)
    incoming, outgoing = past.sum(1) / t, future.sum(0) / t
    return Flow(
        incoming,
        outgoing,
        conserved_incoming=(past / outgoing).sum(1) / t,
        conserved_outgoing=(future / incoming[:, None]).sum(0) / t,
    )


def triangle_form(q: Tensor, k: Tensor, v: Tensor, *, clamp: float = 1.0) -> Tensor:
    """Causal flow attention of one head from its :func:`triangle_flows`: [T, K], [T, K], [T, V] -> [T, V]."""
    flow = triangle_flows(q, k)
    t = torch.arange(1, len(q) + 1, dtype=q.dtype, device=q.device)
    strength = flow.conserved_outgoing.clamp(-clamp, clamp).exp()
    weight = t * strength / strength.cumsum(0)  # of each source, in its own prefix
    o = (capacities(q, k).tril() * weight) @ v / (t * flow.incoming)[:, None]
    return o * flow.conserved_incoming.sigmoid()[:, None]


def running_means(q: Tensor, k: Tensor) -> pd.DataFrame:
    """Mean conserved flow of the first t tokens, for every t: 1 in the normal form, by conservation; and in the causal form?

    Args:
        q, k: [T, K] of one head.

    Returns:
        One row a length t, form and side: ``t, form`` (``normal`` is computed anew on every prefix, ``causal`` keeps what earlier
        tokens found), ``side`` (``sinks receive`` or ``sources send``), ``mean``.
    """
    import pandas as pd

    length = len(q)
    kept = triangle_flows(q, k)
    fresh = [flow_quantities(q[None, :t, None], k[None, :t, None], eps=0.0) for t in range(1, length + 1)]
    count = torch.arange(1, length + 1, dtype=q.dtype, device=q.device)
    parts = []
    for side, name in (("sinks receive", "conserved_incoming"), ("sources send", "conserved_outgoing")):
        means = {
            "normal": [float(getattr(flow, name).mean()) for flow in fresh],
            "causal": (getattr(kept, name).cumsum(0) / count).tolist(),
        }
        parts += [
            pd.DataFrame({"t": range(1, length + 1), "form": form, "side": side, "mean": mean})
            for form, mean in means.items()
        ]
    return pd.concat(parts, ignore_index=True)


def last_token(
    q: Tensor, k: Tensor, v: Tensor, *, frozen_flows: bool, frozen_weights: bool, clamp: float = 1.0
) -> Tensor:
    """The last output of one head when what earlier tokens computed is kept, or revised now that all tokens are known.

    Both frozen: the last row of the causal form. Neither: the last row of the normal form.

    Args:
        q, k, v: [T, K], [T, K] and [T, V].
        frozen_flows: every token's flows are means over its own prefix, not over all tokens.
        frozen_weights: every source competes with its own prefix, not with all sources.

    Returns:
        [V].
    """
    a = capacities(q, k)
    t = torch.arange(1, len(a) + 1, dtype=a.dtype, device=a.device)
    past, future, count = (a.tril(), a.triu(), t) if frozen_flows else (a, a, t[-1])
    incoming, outgoing = past.sum(1) / count, future.sum(0) / count
    conserved_out = (future / incoming[:, None]).sum(0) / count
    strength = conserved_out.clamp(-clamp, clamp).exp()
    weight = t * strength / strength.cumsum(0) if frozen_weights else t[-1] * strength / strength.sum()
    o = (a[-1] * weight) @ v / a[-1].sum()
    return o * (a[-1] / outgoing).mean().sigmoid()


if __name__ == "__main__":
    from attnlab.kernels.flowformer_record import main

    sys.exit(main())
