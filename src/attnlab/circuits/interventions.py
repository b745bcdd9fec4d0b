"""Pattern surgery: force where heads look, and see what the rest of the model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.metrics import Metric, Readout, choice_accuracy
from attnlab.circuits.model import Edit, HookedLM, Node
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import _chunks, _group

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
    weights: Weights,
    *,
    from_position: str | int = "END",
    metric: Metric = choice_accuracy,
) -> np.ndarray:
    """Run the clean prompts with the attention rows of some heads replaced, ``[G, N]`` metric values.

    For each head of a group the row of ``from_position`` becomes ``weights``; values, ``W_O`` and every other position are
    untouched (Merullo et al., section 5). The run restarts at the lowest head and at ``from_position``. An empty group is
    the unforced model.

    Raises:
        ValueError: for unknown heads or positions, or weights that are negative or do not sum to 1.
    """
    chosen = [_group(model, group) if group else () for group in groups]
    if any(node.head is None for group in chosen for node in group):
        raise ValueError("groups must hold heads such as '19.2'; an MLP or the embedding has no attention pattern")
    result = np.empty((len(chosen), len(pairs)))
    with torch.no_grad():
        for batch in pairs.batches():
            base = model.run(batch.clean)
            target = _checked(weights(batch), batch)
            where = batch.mask(from_position)
            first = int(where.any(0).nonzero()[0])
            final = base.resid[model.spec.n_layers]
            plain = metric(Readout(model, final, batch)).cpu().numpy()
            forced = [i for i, group in enumerate(chosen) if group]
            for i in set(range(len(chosen))) - set(forced):
                result[i, batch.index.numpy()] = plain
            for numbers in _chunks(chosen, len(batch) * (where.shape[1] - first), forced):
                layer = min(node.layer for node in chosen[numbers[0]])
                edits = _pattern_edits([chosen[i] for i in numbers], target.to(final), where.to(final.device))
                run = model.resume(base, layer, first, copies=len(numbers), edits=edits)
                values = metric(Readout(model, run.resid[model.spec.n_layers], batch)).view(len(numbers), len(batch))
                result[np.array(numbers)[:, None], batch.index.numpy()] = values.cpu().numpy()
    return result


def _pattern_edits(groups: Sequence[Sequence[Node]], target: Tensor, where: Tensor) -> list[Edit]:
    """Edits of ``pattern`` [R, H, T', T] for copies ``groups`` of the batch."""

    def edit(layer: int) -> Edit:
        rows = [(copy, node.head) for copy, group in enumerate(groups) for node in group if node.layer == layer]

        def change(pattern: Tensor, first: int) -> Tensor:
            pattern = pattern.clone()
            size = len(where)
            for copy, head in rows:
                part = pattern[copy * size : (copy + 1) * size, head]  # [B, T', T]
                part[:] = torch.where(where[:, first:, None], target[:, None], part)
            return pattern

        return Edit("pattern", layer, change)

    return [edit(layer) for layer in sorted({node.layer for group in groups for node in group})]


def _checked(weights: Tensor, batch: Batch) -> Tensor:
    if weights.shape != batch.clean.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; attention over the prompt needs {tuple(batch.clean.shape)}")
    if bool((weights < 0).any()) or not torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=weights.dtype), atol=1e-5):
        raise ValueError("weights must not be negative and must sum to 1 in every row, like attention")
    return weights
