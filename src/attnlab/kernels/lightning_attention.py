"""TransNormerLLM, the language model on Lightning Attention (Qin et al. 2024, arXiv:2405.17381; 2023, arXiv:2307.14995).

Taught in the chapter ``kernels/lightning-attention``. The kernel underneath, :func:`~attnlab.kernels.linear_decay.linear_decay_attention`, has a chapter of
its own. Around it the paper changes four things of a Transformer, each a short class here: the denominator becomes an RMS norm
(:class:`SRMSNorm`), positions become a fixed decay a head (:func:`decay_table`) and, in the first layer, a learned rotation
(:class:`LRPE`), a gate multiplies what attention returns (:class:`GatedLinearAttention`), and the channel mixer is bilinear
(:class:`~attnlab.models.language.SGLU`). :func:`tnl` puts them together, :func:`read` and :func:`generate` run the result with
a state that does not grow. The experiments stand in ``lightning_attention_runs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.kernels.linear_decay import linear_decay_attention
from attnlab.mixers import checks, lightning_log_decay
from attnlab.mixers.decays import Schedule
from attnlab.models.language import SGLU, Block, Decoder

Rotations = Literal["first", "all", "none"]


class SRMSNorm(nn.Module):
    """``x / rms(x)`` over the last axis, without a gain (eq. 14), at least in float32.

    A positive factor a row cancels in it. That is why linear attention needs no denominator in front of this norm.

    Args:
        width: D; only remembered, since there is nothing to learn.
        eps: added to the mean square; the code released with the paper has 1e-6.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LRPE(nn.Module):
    """A learned rotation of every feature by its position (eq. 9), in real numbers.

    Eq. 9 multiplies a score by ``e^{i theta (t - s)}``. Its real part factorises: feature j of token t becomes the pair
    ``x_j cos(t theta_j), x_j sin(t theta_j)``, so that a query and a key have the product ``sum_j q_j k_j cos((t - s) theta_j)``,
    which knows t - s alone. A head of d features has 2 d afterwards. The paper leaves open which realisation was trained.

    Args:
        heads: H.
        head_width: d.
        base: the angles theta start at ``base ** (-j / d)``, as those of rotary positions do.
    """

    def __init__(self, heads: int, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        rates = base ** -(torch.arange(head_width, dtype=torch.float64) / head_width)
        self.theta = nn.Parameter(rates.to(torch.get_default_dtype()).repeat(heads, 1))  # [H, d]
        self.theta.no_weight_decay = True  # type: ignore[attr-defined]  # an angle of 0 is no simpler than another

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """x [B, T, H, d], whose first token stands at position ``first`` -> [B, T, H, 2 d]"""
        positions = torch.arange(first, first + x.shape[1], device=x.device, dtype=self.theta.dtype)
        angles = positions[:, None, None] * self.theta  # [T, H, d]
        return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), dim=-1)


class LayerState(NamedTuple):
    """All that a layer keeps of the tokens it has read."""

    memory: Tensor  # [B, H, K, d], K = d or, after LRPE, 2 d
    position: int  # of the next token, by which LRPE turns it


class GatedLinearAttention(nn.Module):
    """``Norm([(Q K^T) * M] V) * U``, then a projection (eq. 11), with ``M_ts = decay ** (t - s)`` for s <= t.

    Queries and keys pass through SiLU, values and the gate U do not, and the scores have no scale: the norm removes it.

    Args:
        width: D, a multiple of ``heads``.
        heads: H.
        log_decay: [H], at most 0; left out, nothing decays.
        gate: whether there is a U; without it D * D numbers fewer.
        lrpe: whether queries and keys are turned by :class:`LRPE`.
        norm: ``joint`` over all D channels, as in the released module, or ``head`` by head; the paper's text allows both.

    Raises:
        ValueError: heads that do not divide the width, decays that do not fit or are positive, an unknown norm.
    """

    log_decay: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        log_decay: Tensor | None = None,
        *,
        gate: bool = True,
        lrpe: bool = False,
        norm: Literal["joint", "head"] = "joint",
    ) -> None:
        super().__init__()
        checks.at_least("heads", heads)
        checks.one_of("norm", norm, ("joint", "head"))
        if width < 1 or width % heads:
            raise ValueError(f"heads: {heads} do not divide width={width}; choose a divisor")
        log_decay = torch.zeros(heads) if log_decay is None else log_decay.detach().clone()
        checks.log_decay(log_decay, (1, 1, heads, width // heads))
        self.heads, self.joint = heads, norm == "joint"
        self.register_buffer("log_decay", log_decay, persistent=False)
        self.project = nn.Linear(width, (4 if gate else 3) * width, bias=False)
        self.lrpe = LRPE(heads, width // heads) if lrpe else None
        self.norm = SRMSNorm(width if self.joint else width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        return self.read(x)[0]

    def read(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Go on from ``state`` with the tokens x [B, T, D]: outputs [B, T, D] and the state after them."""
        memory, first = state or (None, 0)
        q, k, v, *u = self.project(x).split(x.shape[-1], dim=-1)  # each [B, T, D]; u is empty without gate
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (F.silu(q), F.silu(k), v))  # [B, T, H, d]
        if self.lrpe is not None:
            q, k = self.lrpe(q, first), self.lrpe(k, first)  # [B, T, H, 2 d]
        o, memory = linear_decay_attention(q, k, v, self.log_decay, scale=1.0, initial_state=memory)
        o = self.norm(o.flatten(2)) if self.joint else self.norm(o).flatten(2)  # [B, T, H, d] -> [B, T, D]
        return self.out(o * u[0] if u else o), LayerState(memory, first + x.shape[1])


def decay_table(layers: int, heads: int, schedule: Schedule = "alibi", *, by_layer: bool = True) -> Tensor:
    """Log decays of a whole model, [L, H], of one of the three schedules of :func:`~attnlab.mixers.decays.lightning_log_decay`.

    Args:
        schedule: by default that of the released code; eq. 10 (``"paper"``) needs many layers before any head sees far.
        by_layer: if False, every layer has the decays of the first (the paper's ablation in Table 5).

    Raises:
        ValueError: what :func:`~attnlab.mixers.decays.lightning_log_decay` raises.
    """
    checks.at_least("layers", layers)
    chosen = range(layers) if by_layer else [0] * layers
    return torch.stack([lightning_log_decay(heads, layer, layers, schedule=schedule) for layer in chosen])


def tnl(
    vocab: int,
    width: int,
    log_decay: Tensor,
    *,
    hidden: int | None = None,
    gate: bool = True,
    lrpe: Rotations = "first",
    positions: Literal["learned"] | None = None,
    max_length: int = 1024,
) -> Decoder:
    """The language model: pre-norm layers of :class:`GatedLinearAttention` and SGLU, norms without gains.

    Args:
        vocab: size of the vocabulary.
        width: D.
        log_decay: [L, H]; as many layers and heads as it has rows and columns. See :func:`decay_table`.
        hidden: F of the SGLU; left out, 2 D.
        gate: see :class:`GatedLinearAttention`.
        lrpe: layers that have it; ``first`` is what the paper uses ("Mix").
        positions: ``learned`` for the ablation without decay.
        max_length: the longest sequence, for learned positions.

    Raises:
        ValueError: sizes that do not fit, a table that is not [L, H], positive log decays.
    """
    checks.rank("log_decay", log_decay, "[L, H]")
    checks.one_of("lrpe", lrpe, ("first", "all", "none"))
    layers, heads = log_decay.shape

    def mixer(layer: int) -> nn.Module:
        turned = lrpe == "all" or (lrpe == "first" and layer == 0)
        return GatedLinearAttention(width, heads, log_decay[layer], gate=gate, lrpe=turned)

    return Decoder(
        vocab,
        width,
        layers,
        mixer,
        make_mlp=lambda _: SGLU(width, 2 * width if hidden is None else hidden),
        norm=SRMSNorm,
        positions=positions,
        max_length=max_length,
    )


def layer_parameters(width: int, hidden: int, *, gate: bool = True) -> int:
    """``5 D^2 + 3 D F``: W_q, W_k, W_v, W_u, W_o and the three matrices of SGLU; 4 D^2 without gate."""
    return (5 if gate else 4) * width**2 + 3 * width * hidden


def parameters(vocab: int, width: int, layers: int, hidden: int, *, gate: bool = True, rotated: int = 1) -> int:
    """Numbers of a whole :func:`tnl`: embedding and head, the layers, and D angles for each of the ``rotated`` layers."""
    return 2 * vocab * width + layers * layer_parameters(width, hidden, gate=gate) + rotated * width


def state_numbers(width: int, layers: int, heads: int, *, rotated: int = 1) -> int:
    """``(L + rotated) D d`` with d = D / H: what decoding keeps for one sequence, however long."""
    return (layers + rotated) * width * (width // heads)


def cache_numbers(width: int, layers: int, length: int) -> int:
    """``2 L D T``: keys and values that a softmax decoder keeps for one sequence of T tokens."""
    return 2 * layers * width * length


def read(
    model: Decoder, tokens: Tensor, state: Sequence[LayerState] | None = None
) -> tuple[Tensor, tuple[LayerState, ...]]:
    """Go on reading with a :func:`tnl` model: the forward pass, with a state a layer handed in and out.

    Args:
        model: made by :func:`tnl` without learned positions.
        tokens: [B, T]; a prompt, or a single token.
        state: what an earlier call returned; left out, nothing was read.

    Returns:
        Logits [B, T, vocab] and the states after the last token.

    Raises:
        ValueError: a model with learned positions or other mixers, or as many states as it has no layers.
    """
    layers = _layers(model)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: [B, T] with at least one token is wanted, not {list(tokens.shape)}")
    if state is not None and len(state) != len(layers):
        raise ValueError(f"state: {len(layers)} layers have as many states, not {len(state)}; pass what read returned")
    x, after = model.embedding(tokens), []
    for number, (block, mixer) in enumerate(layers):
        change, layer_state = mixer.read(block.mixer_norm(x), None if state is None else state[number])
        x = x + change
        x = x + block.mlp(block.mlp_norm(x))
        after.append(layer_state)
    return model.head(model.trunk.norm(x)), tuple(after)


@torch.no_grad()
def generate(
    model: Decoder, prompt: Tensor, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``count`` tokens that follow a prompt, one at a time; memory and time a token do not depend on how many came before.

    Args:
        model: made by :func:`tnl` without learned positions.
        prompt: [B, T].
        count: at least 1.
        temperature: 0 takes the likeliest token.
        generator: draws the tokens, on the model's device.

    Returns:
        [B, count].

    Raises:
        ValueError: a count below 1, a negative temperature, and what :func:`read` raises.
    """
    checks.at_least("count", count)
    if temperature < 0:
        raise ValueError(f"temperature: 0 or more is wanted, not {temperature}")
    drawn: list[Tensor] = []
    logits, state = read(model, prompt)
    for _ in range(count):
        if drawn:
            logits, state = read(model, drawn[-1], state)
        drawn.append(_draw(logits[:, -1], temperature, generator))
    return torch.cat(drawn, 1)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token [B, 1] from logits [B, vocab]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def _layers(model: Decoder) -> list[tuple[Block, GatedLinearAttention]]:
    """Blocks and their mixers, if the model can be read with a constant state."""
    if model.trunk.positions is not None:
        raise ValueError("model: learned positions end at max_length; read with a model that has positions=None")
    blocks = [cast(Block, block) for block in model.trunk.blocks]
    mixers = [block.mixer for block in blocks]
    if others := {type(mixer).__name__ for mixer in mixers if not isinstance(mixer, GatedLinearAttention)}:
        raise ValueError(f"model: {sorted(others)} keep no state of constant size; build the model with tnl")
    return list(zip(blocks, cast(list[GatedLinearAttention], mixers), strict=True))
