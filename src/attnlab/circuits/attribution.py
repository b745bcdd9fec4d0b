"""First-order maps: all heads at once from two forwards and one backward, and what each head writes to the logits itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.metrics import Metric, Readout, logit_diff
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import Direction, _check_direction, _scores
from attnlab.circuits.scores import Scores
from attnlab.lab import progress


def attribution_patch(
    model: HookedLM,
    pairs: Pairs,
    *,
    metric: Metric = logit_diff,
    positions: str | int = "all",
    direction: Direction = "noise",
) -> Scores:
    r"""First-order estimate of :func:`~attnlab.circuits.patching.activation_patch` for every head at once.

    .. math:: \hat P(h) = \sum_t (z^{source}_{h,t} - z^{base}_{h,t}) \cdot \partial m / \partial z_{h,t}

    with the gradient taken at the base run. Two forwards and one backward, whatever the number of heads. Before the first
    token in which the prompts differ all differences are 0, so beyond one plain forward only the positions from there on are run.
    The estimate underrates heads behind a saturated softmax and cannot see self-repair: confirm the top heads exactly.

    Raises:
        ValueError: for an unknown position or direction, or pairs whose metric does not differ.
    """
    _check_direction(direction)
    heads = [(node,) for node in model.spec.heads]
    gap, base_metric = torch.empty(2, len(pairs), dtype=torch.float64)
    effect = torch.empty(len(heads), len(pairs), dtype=torch.float64)
    for batch in progress(list(pairs.batches(size=16)), f"attribution, {pairs.name}"):
        part = attributed(model, batch, metric=metric, positions=positions, direction=direction)
        effect[:, batch.index], gap[batch.index], base_metric[batch.index] = part
    how = "attribution patching, gradient at the base run"
    return _scores(model, pairs, heads, effect, gap, base_metric, metric, positions, direction, how)


def attributed(
    model: HookedLM,
    batch: Batch,
    *,
    metric: Metric = logit_diff,
    positions: str | int = "all",
    direction: Direction = "noise",
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of :func:`attribution_patch`: the effect of every head ``[L * H, B]``, gap and base ``[B]``, in float64."""
    _check_direction(direction)
    n_layers = model.spec.n_layers
    tokens = [batch.clean, batch.corrupt] if direction == "noise" else [batch.corrupt, batch.clean]
    first = int((batch.clean != batch.corrupt).any(0).nonzero()[0])  # of the batch's first difference
    with torch.no_grad():
        prefix = model.run(tokens[0])
        source = model.run(tokens[1], capture=("z",), base=prefix, first=first)
        m_source = metric(Readout(model, source.resid[n_layers], batch))
    base = model.run(tokens[0], capture=("z",), grad=True, base=prefix, first=first)
    m_base = metric(Readout(model, base.resid[n_layers], batch))
    zs = [base.acts["z", layer] for layer in range(n_layers)]
    grads = torch.autograd.grad(m_base.sum(), zs)  # rows do not interact: the sum gives each its own gradient
    where = batch.mask(positions)[:, first:, None].to(m_base.device)
    rows = []
    for layer, (z, grad) in enumerate(zip(zs, grads, strict=True)):
        products = (source.acts["z", layer] - z.detach()) * grad  # [B, T - first, H, d_head]
        rows.append((products.sum(-1) * where).sum(1).T)  # [H, B]
    m_base = m_base.detach()
    return torch.cat(rows).double().cpu(), (m_source - m_base).double().cpu(), m_base.double().cpu()


def direct_logit_attribution(model: HookedLM, pairs: Pairs, which: Literal["clean", "corrupt"] = "clean") -> np.ndarray:
    """What each head's write at END adds to the logit difference directly, ``[n_layers, n_heads, N]`` in logits.

    The scale of the final norm is held at its value in the full run, so the parts add up: heads + MLPs + embedding = logit
    difference (up to the norm's bias).

    Raises:
        ValueError: if ``which`` is unknown or the final norm is neither LayerNorm nor RMSNorm.
    """
    _check_side(which)
    table = np.empty((model.spec.n_layers, model.spec.n_heads, len(pairs)))
    with torch.no_grad():
        for batch in pairs.batches():
            run = model.run(getattr(batch, which), capture=("z",))
            direction = answer_direction(model, run.resid[model.spec.n_layers][:, -1], batch)  # [B, d_model]
            for layer in range(model.spec.n_layers):
                z = run.acts["z", layer][:, -1]  # [B, H, d_head]
                part = torch.einsum("bhe,hed,bd->hb", z, model.W_O[layer], direction)
                table[layer][:, batch.index.numpy()] = part.cpu().numpy()
    return table


def answer_direction(model: HookedLM, resid: Tensor, batch: Batch) -> Tensor:
    """The vector whose product with a write is the write's share of the logit difference, ``[B, d_model]``.

    ``resid`` [B, d_model] is the final residual that fixes the scale of the norm.
    """
    weight, _ = model._unembed
    answer, foil = (weight[tokens[:, 0].to(weight.device)] for tokens in (batch.answers, batch.foils))
    return through_final_norm(model, resid, answer - foil)


def through_final_norm(model: HookedLM, resid: Tensor, direction: Tensor) -> Tensor:
    """A direction after the final norm as a direction before it, ``[B, d_model]``, with the scale that ``resid`` [B, d_model] gives.

    Raises:
        ValueError: if the final norm is neither LayerNorm nor RMSNorm.
    """
    gain = model.bridge.ln_final.weight * direction  # [B, d_model]
    kind = model.bridge.cfg.normalization_type or ""
    eps = model.bridge.cfg.eps
    if kind.startswith("RMS"):
        return gain / (resid.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if kind.startswith("LN"):
        gain = gain - gain.mean(-1, keepdim=True)  # the mean that LayerNorm takes off every write
        return gain / (resid.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    raise ValueError(
        f"final norm {kind!r} is neither LayerNorm nor RMSNorm; direct logit attribution cannot hold its scale"
    )


def attention_to(
    model: HookedLM,
    pairs: Pairs,
    heads: Iterable[str | Node],
    to: Sequence[str],
    from_position: str | int = "END",
    which: Literal["clean", "corrupt"] = "clean",
) -> dict[Node, dict[str, np.ndarray]]:
    """Attention that each head pays from one position to named positions: ``{head: {name: [N]}}`` (summed over a name's tokens).

    Raises:
        ValueError: for an unknown head or position.
    """
    _check_side(which)
    chosen = [model.spec.check(head) for head in heads]
    if others := [str(node) for node in chosen if node.head is None]:
        raise ValueError(f"heads holds {', '.join(others)}, which has no attention pattern; name heads such as '19.2'")
    result = {node: {name: np.empty(len(pairs)) for name in to} for node in chosen}
    with torch.no_grad():
        for batch in pairs.batches():
            run = model.run(getattr(batch, which), capture=("pattern",))
            source = batch.mask(from_position)
            if not bool((source.sum(1) == 1).all()):
                raise ValueError(f"from_position={from_position!r} must be one position a prompt")
            row = source.long().argmax(1)
            for node in chosen:
                pattern = run.acts["pattern", node.layer][torch.arange(len(batch)), node.head, row]  # [B, T]
                for name in to:
                    result[node][name][batch.index.numpy()] = (pattern.cpu() * batch.mask(name)).sum(1).numpy()
    return result


def attention_rows(model: HookedLM, pairs: Pairs, heads: Iterable[str | Node]) -> dict[Node, list[np.ndarray]]:
    """Attention from END to every token of the clean prompt, for each head one array ``[T]`` a pair.

    Raises:
        ValueError: for an unknown head.
    """
    chosen = [model.spec.check(head) for head in heads]
    rows: dict[Node, list[np.ndarray]] = {node: [np.empty(0)] * len(pairs) for node in chosen}
    with torch.no_grad():
        for batch in pairs.batches():
            run = model.run(batch.clean, capture=("pattern",))
            for node in chosen:
                for number, row in zip(
                    batch.index.tolist(), run.acts["pattern", node.layer][:, node.head, -1], strict=True
                ):
                    rows[node][number] = row.cpu().numpy()
    return rows


def _check_side(which: str) -> None:
    if which not in ("clean", "corrupt"):
        raise ValueError(f"which={which!r} is unknown; use 'clean' or 'corrupt'")
