"""Pattern surgery: force where heads look, and see what the rest of the model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.metrics import Metric, Readout, choice_accuracy
from attnlab.circuits.model import Edit, HookedLM, Node
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import _chunks, _group, _start
from attnlab.lab import progress

Weights = Callable[[Batch], Tensor]  # attention to force, [B, T], each row summing to 1


def uniform_over(name: str) -> Weights:
    """Equal attention to all tokens of a named position, ``1 / |W|`` each, and none elsewhere."""

    def weights(batch: Batch) -> Tensor:
        mask = batch.mask(name).float()
        return mask / mask.sum(1, keepdim=True)

    return weights


def force_pattern(
    model: HookedLM,
    pairs: Pairs,
    groups: Sequence[Sequence[str | Node]],
    weights: Weights | Sequence[Weights],
    *,
    from_position: str | int = "END",
    metrics: Sequence[Metric] = (choice_accuracy,),
) -> np.ndarray:
    """Run the clean prompts with the attention rows of some heads replaced, ``[M, G, N]`` values of M metrics.

    For each head of a group the row of ``from_position`` becomes ``weights`` (one for all groups, or one a group); values,
    ``W_O`` and every other position are untouched (Merullo et al., section 5). The run restarts at the lowest head and at
    ``from_position``. An empty group is the unforced model.

    Raises:
        ValueError: for unknown heads or positions, or weights that are negative or do not sum to 1.
    """
    chosen = [_group(model, group) if group else () for group in groups]
    if any(node.head is None for group in chosen for node in group):
        raise ValueError("groups must hold heads such as '19.2'; an MLP or the embedding has no attention pattern")
    targets = [weights] * len(chosen) if callable(weights) else list(weights)
    if len(targets) != len(chosen):
        raise ValueError(
            f"weights has {len(targets)} entries for {len(chosen)} groups; give one for all or one a group"
        )
    result = np.empty((len(metrics), len(chosen), len(pairs)))
    with torch.no_grad():
        for batch in progress(list(pairs.batches(size=32)), f"forcing patterns, {pairs.name}"):
            base = model.run(batch.clean)
            final = base.resid[model.spec.n_layers]
            where = batch.mask(from_position).to(final.device)
            first = int(where.any(0).nonzero()[0])
            forced = [i for i, group in enumerate(chosen) if group]
            plain = [i for i, group in enumerate(chosen) if not group]
            result[:, plain, batch.index.numpy()[:, None]] = _measure(model, final, batch, metrics)[:, 0, :, None]
            for numbers in _chunks(chosen, where, forced):
                starts = [_start(chosen[i]) for i in numbers]
                target = torch.cat([_checked(targets[i](batch), batch) for i in numbers]).to(final)  # [C * B, T]
                edits = _pattern_edits([chosen[i] for i in numbers], target, where)
                run = model.resume(base, starts, first, edits)
                values = _measure(model, run.resid[model.spec.n_layers], batch, metrics)
                result[:, np.array(numbers)[:, None], batch.index.numpy()] = values
    return result


def _measure(model: HookedLM, resid: Tensor, batch: Batch, metrics: Sequence[Metric]) -> np.ndarray:
    """All metrics of one readout, ``[M, copies, B]``."""
    end = Readout(model, resid, batch)
    return np.stack([metric(end).view(end.copies, len(batch)).cpu().numpy() for metric in metrics])


def _pattern_edits(groups: Sequence[Sequence[Node]], target: Tensor, where: Tensor) -> list[Edit]:
    """Edits of ``pattern`` [C * B, H, T', T] that give copy ``c`` the rows ``target`` [C * B, T] in the heads ``groups[c]``."""
    size = len(where)

    def edit(layer: int) -> Edit:
        cells = [(copy, node.head) for copy, group in enumerate(groups) for node in group if node.layer == layer]

        def change(pattern: Tensor, first: int) -> Tensor:
            pattern = pattern.clone()
            for copy, head in cells:
                rows = slice(copy * size, (copy + 1) * size)
                pattern[rows, head] = torch.where(where[:, first:, None], target[rows, None], pattern[rows, head])
            return pattern

        return Edit("pattern", layer, change)

    return [edit(layer) for layer in sorted({node.layer for group in groups for node in group})]


def _checked(weights: Tensor, batch: Batch) -> Tensor:
    if weights.shape != batch.clean.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; attention over the prompt needs {tuple(batch.clean.shape)}"
        )
    if bool((weights < 0).any()) or not torch.allclose(
        weights.sum(1), torch.ones(len(weights), dtype=weights.dtype), atol=1e-5
    ):
        raise ValueError("weights must not be negative and must sum to 1 in every row, like attention")
    return weights
