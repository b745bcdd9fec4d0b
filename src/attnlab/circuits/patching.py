"""Activation patching and path patching, exact and restarted where they can be.

The direction is an argument and is recorded: ``"noise"`` runs the clean prompt and writes corrupt activations into it (what
breaks?), ``"denoise"`` runs the corrupt prompt and writes clean ones (what repairs?).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnlab.circuits.metrics import Metric, Readout, logit_diff
from attnlab.circuits.model import INPUT, Edit, HookedLM, Node, Run
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.scores import Group, Scores
from attnlab.lab import progress

Direction = Literal["noise", "denoise"]
#: rows x prompt tokens of one patched forward: their keys and values are held at once; larger is no faster on two cores
TOKENS_AT_ONCE = 16384
#: bytes of a GPU's memory for each of them, if it takes more at once: small sweeps leave it waiting for Python
GPU_BYTES = 2**19


def activation_patch(
    model: HookedLM,
    pairs: Pairs,
    groups: Iterable[str | Node | Sequence[str | Node]] | None = None,
    *,
    metric: Metric = logit_diff,
    positions: str | int = "END",
    direction: Direction = "noise",
) -> Scores:
    """Replace what a group of nodes writes by what it writes on the other prompt, and measure the effect. Exact.

    Each patched run restarts at the lowest layer of its group and at the first patched position, and all of them go through
    the model in one sweep. Patching END only, a run costs one token instead of the whole prompt.

    Args:
        model: the model.
        pairs: the prompts.
        groups: nodes, or lists of nodes to patch together; all heads one by one if left out.
        metric: what to measure.
        positions: where to patch, see :meth:`~attnlab.circuits.pairs.Batch.mask`.
        direction: ``"noise"`` or ``"denoise"``.

    Raises:
        ValueError: for a node the model does not have, an unknown position, or pairs whose metric does not differ.
    """
    chosen = [_group(model, group) for group in (model.spec.heads if groups is None else groups)]
    gap, base_metric = torch.empty(2, len(pairs), dtype=torch.float64)
    effect = torch.empty(len(chosen), len(pairs), dtype=torch.float64)
    for batch in progress(list(pairs.batches()), f"patching, {pairs.name}"):
        for part in patched_parts(model, batch, chosen, metric=metric, positions=positions, direction=direction):
            effect[torch.tensor(part.numbers)[:, None], batch.index] = part.effect
            gap[batch.index], base_metric[batch.index] = part.gap, part.base
    return _scores(model, pairs, chosen, effect, gap, base_metric, metric, positions, direction, "activation patching")


class PatchedPart(NamedTuple):
    """Some groups patched on one batch: ``effect`` [len(numbers), B], and ``gap`` and ``base`` [B] of the batch; float64."""

    numbers: list[int]
    effect: Tensor
    gap: Tensor
    base: Tensor


def patched_parts(
    model: HookedLM,
    batch: Batch,
    groups: Sequence[Group],
    *,
    metric: Metric = logit_diff,
    positions: str | int = "END",
    direction: Direction = "noise",
    tokens_at_once: int | None = None,
) -> Iterator[PatchedPart]:
    """The sweeps of :func:`activation_patch` on one batch, one by one, for work that wants to stop in between.

    ``tokens_at_once`` bounds rows x prompt tokens of a sweep (:data:`TOKENS_AT_ONCE` if left out). At least one part is given.
    """
    kinds = ("z", "mlp_out") if any(node.head is None for group in groups for node in group) else ("z",)
    with torch.no_grad():
        base, source = _both_runs(model, batch, direction, kinds)
        m_base, m_source = (metric(Readout(model, run.resid[model.spec.n_layers], batch)) for run in (base, source))
        where = batch.mask(positions).to(m_base.device)
        first = int(where.any(0).nonzero()[0])
        ends = (m_source - m_base).double().cpu(), m_base.double().cpu()
    if not groups:
        yield PatchedPart([], torch.empty(0, len(batch), dtype=torch.float64), *ends)
    for numbers in _chunks(groups, where, at_once=tokens_at_once):
        with torch.no_grad():
            now = [groups[i] for i in numbers]
            run = model.resume(base, [_start(group) for group in now], first, _patch_edits(now, source, where))
            patched = metric(Readout(model, run.resid[model.spec.n_layers], batch)).view(len(numbers), len(batch))
            effect = (patched - m_base).double().cpu()
        yield PatchedPart(numbers, effect, *ends)


@dataclass(frozen=True)
class Receiver:
    """An input of one head, at named positions: its query, or the key or value of its group (``head`` counts groups then)."""

    layer: int
    head: int
    component: Literal["q", "k", "v"] = "q"
    positions: str | int = "END"

    def check(self, model: HookedLM) -> None:
        """Refuse a receiver that the model does not have."""
        if self.component not in ("q", "k", "v"):
            raise ValueError(f"receiver component {self.component!r} is unknown; use 'q', 'k' or 'v'")
        heads = model.spec.n_heads if self.component == "q" else model.spec.n_kv_heads
        if not (0 <= self.layer < model.spec.n_layers and 0 <= self.head < heads):
            raise ValueError(
                f"receiver {self.component} of {self.layer}.{self.head} does not exist: {model.spec.name} has layers 0 to "
                f"{model.spec.n_layers - 1} and {heads} {'query heads' if self.component == 'q' else 'key/value groups'}"
            )


def path_patch(
    model: HookedLM,
    pairs: Pairs,
    senders: Iterable[str | Node] | None = None,
    receivers: Literal["logits"] | Sequence[Receiver] = "logits",
    *,
    metric: Metric = logit_diff,
    positions: str | int = "END",
    freeze: Literal["heads", "heads+mlps"] = "heads",
    direction: Direction = "noise",
) -> Scores:
    """Effect of each sender head along its direct path into the receivers (three passes; Merullo et al., section 2).

    1. Base and source prompts run once and are cached.
    2. The base runs again: the sender's output comes from the source, every *other* head at ``positions`` is held at its base
       value, and what arrives at the receivers is recorded. MLPs are recomputed, so a "direct path" may lead through them,
       unless ``freeze="heads+mlps"``.
    3. The base runs a third time with only the recorded receiver inputs written in. (For ``"logits"`` pass 2 already ends
       there.)

    Args:
        model: the model.
        pairs: the prompts.
        senders: heads; all if left out.
        receivers: the final residual (``"logits"``) or inputs of heads.
        metric: what to measure.
        positions: where the sender is replaced and where the others are frozen.
        freeze: what is held in pass 2.
        direction: ``"noise"`` or ``"denoise"``.

    Raises:
        ValueError: for senders or receivers that do not exist, or pairs whose metric does not differ.
    """
    chosen = [_group(model, sender) for sender in (model.spec.heads if senders is None else senders)]
    if any(len(group) != 1 or group[0].head is None for group in chosen):
        raise ValueError("senders must be single heads such as '9.6'")
    if freeze not in ("heads", "heads+mlps"):
        raise ValueError(f"freeze={freeze!r} is unknown; use 'heads' or 'heads+mlps'")
    if (isinstance(receivers, str) and receivers != "logits") or not receivers:
        raise ValueError(f"receivers={receivers!r} is unknown; use 'logits' or a list of at least one Receiver")
    targets = [] if receivers == "logits" else list(receivers)
    for receiver in targets:
        receiver.check(model)
    n_layers = model.spec.n_layers
    stop = max((receiver.layer for receiver in targets), default=n_layers - 1) + 1
    gap, base_metric = torch.empty(2, len(pairs), dtype=torch.float64)
    # a sender at or above the highest receiver cannot reach it: exactly 0
    effect = torch.zeros(len(chosen), len(pairs), dtype=torch.float64)
    for batch in progress(list(pairs.batches()), f"paths, {pairs.name}"):
        with torch.no_grad():
            base, source = _both_runs(model, batch, direction, ("z", "mlp_out") if freeze == "heads+mlps" else ("z",))
            m_base, m_source = (metric(Readout(model, run.resid[n_layers], batch)) for run in (base, source))
            where = batch.mask(positions).to(m_base.device)
            first = int(where.any(0).nonzero()[0])
            reach = n_layers if not targets else stop - 1
            able = [i for i, group in enumerate(chosen) if group[0].layer < reach]
            for numbers in _chunks(chosen, where, able):
                groups_now = [chosen[i] for i in numbers]
                edits = _freeze_edits(base, source, where, groups_now, range(_start(groups_now[0]), n_layers), freeze)
                capture = {receiver.component for receiver in targets}
                run = model.resume(base, [_start(group) for group in groups_now], first, edits, capture, stop=stop)
                if targets:
                    run = _deliver(model, base, run, targets, batch, len(numbers))
                patched = metric(Readout(model, run.resid[n_layers], batch)).view(len(numbers), len(batch))
                effect[torch.tensor(numbers)[:, None], batch.index] = (patched - m_base).cpu().to(effect.dtype)
        gap[batch.index] = (m_source - m_base).cpu().to(gap.dtype)
        base_metric[batch.index] = m_base.cpu().to(gap.dtype)
    how = f"path patching into {receivers if receivers == 'logits' else list(receivers)}, freeze {freeze}"
    return _scores(model, pairs, chosen, effect, gap, base_metric, metric, positions, direction, how)


# ---------------------------------------------------------------------------------------------------- edits


def overwrite(value: Tensor, where: Tensor, only: Tensor | None = None) -> Callable[[Tensor, int], Tensor]:
    """A change for :class:`Edit`: write ``value`` [B, T, ...] at ``where`` [B, T] into every copy that is there.

    ``only`` narrows it to some copies, ``[copies]``, or to some heads of each copy, ``[copies, H]``.
    """

    def change(act: Tensor, first: int) -> Tensor:
        copies = len(act) // len(where)
        mask = where[:, first:].repeat(copies, 1).view(len(act), -1, *[1] * (act.ndim - 2))  # [R, T', 1, ...]
        if only is not None:
            rows = only[:copies].repeat_interleave(len(where), 0)  # [R] or [R, H]
            mask = mask & rows.view(len(act), 1, *rows.shape[1:], *[1] * (act.ndim - 1 - rows.ndim))
        return torch.where(mask, value[:, first:].repeat(copies, *[1] * (value.ndim - 1)), act)

    return change


def _patch_edits(groups: Sequence[Group], source: Run, where: Tensor) -> list[Edit]:
    """Edits that give copy ``c`` the source writes of ``groups[c]``."""
    edits = []
    for layer in sorted({node.layer for group in groups for node in group if node.head is not None}):
        z = source.acts["z", layer]
        edits.append(Edit("z", layer, overwrite(z, where, _heads_of(groups, layer, z))))
    for node in sorted({node for group in groups for node in group if node.head is None}):
        rows = torch.tensor([node in group for group in groups], device=where.device)
        if node == INPUT:
            edits.append(Edit("resid_pre", 0, overwrite(source.resid[0], where, rows)))
        else:
            edits.append(Edit("mlp_out", node.layer, overwrite(source.acts["mlp_out", node.layer], where, rows)))
    return edits


def _heads_of(groups: Sequence[Group], layer: int, z: Tensor) -> Tensor:
    """Which heads of a layer each group holds, ``[copies, H]`` bool."""
    chosen = [[Node(layer, head) in group for head in range(z.shape[2])] for group in groups]
    return torch.tensor(chosen, device=z.device)


def _freeze_edits(
    base: Run, source: Run, where: Tensor, senders: Sequence[Group], layers: range, freeze: str
) -> list[Edit]:
    """Pass 2: every head (and MLP) at ``where`` from the base, then each copy's sender from the source."""
    edits = []
    for layer in layers:
        z = source.acts["z", layer]
        edits.append(Edit("z", layer, overwrite(base.acts["z", layer], where)))
        edits.append(Edit("z", layer, overwrite(z, where, _heads_of(senders, layer, z))))
        if freeze == "heads+mlps":
            edits.append(Edit("mlp_out", layer, overwrite(base.acts["mlp_out", layer], where)))
    return edits


def _deliver(model: HookedLM, base: Run, sent: Run, targets: Sequence[Receiver], batch: Batch, copies: int) -> Run:
    """Pass 3: write what arrived at the receivers into an otherwise untouched run."""
    masks = {target: batch.mask(target.positions).to(sent.resid[max(sent.resid)].device) for target in targets}
    # a receiver below every sender of this chunk, or before the first position that pass 2 computed, got what it always gets
    live = [t for t in targets if (t.component, t.layer) in sent.acts]
    layer = min(t.layer for t in live)
    first = max(min(int(masks[t].any(0).nonzero()[0]) for t in live), sent.first)
    edits = []
    for target in live:

        def change(act: Tensor, start: int, target: Receiver = target) -> Tensor:
            arrived = sent.acts[target.component, target.layer][
                :, start - sent.first :, target.head
            ]  # [R', T', d_head]
            reached = slice(len(arrived))  # senders above this receiver are the last copies and cannot reach it
            mask = masks[target][:, start:].repeat(copies, 1)[reached, :, None]
            act = act.clone()
            act[reached, :, target.head] = torch.where(mask, arrived, act[reached, :, target.head])
            return act

        edits.append(Edit(target.component, target.layer, change))
    return model.resume(base, [layer] * copies, first, edits)


# ------------------------------------------------------------------------------------------------ bookkeeping


def _group(model: HookedLM, group: str | Node | Sequence[str | Node]) -> Group:
    nodes = [group] if isinstance(group, str | Node) else list(group)
    if not nodes:
        raise ValueError("groups holds an empty group; name at least one node")
    return tuple(model.spec.check(node) for node in nodes)


def _check_direction(direction: str) -> None:
    if direction not in ("noise", "denoise"):
        raise ValueError(
            f"direction={direction!r} is unknown; use 'noise' (corrupt into clean) or 'denoise' (clean into corrupt)"
        )


def _both_runs(model: HookedLM, batch: Batch, direction: Direction, kinds: Sequence[str]) -> tuple[Run, Run]:
    """The base and the source run, with activations of these kinds captured."""
    _check_direction(direction)
    runs = [model.run(tokens, capture=kinds) for tokens in (batch.clean, batch.corrupt)]
    return (runs[0], runs[1]) if direction == "noise" else (runs[1], runs[0])


def _start(group: Group) -> int:
    """The block at which a group begins to matter."""
    return max(min(node.layer for node in group), 0)


def _chunks(
    groups: Sequence[Group], where: Tensor, numbers: Sequence[int] | None = None, at_once: int | None = None
) -> Iterator[list[int]]:
    """Indices of groups in the order of their start, as many at a time as one sweep over prompts like ``where`` [B, T] may hold."""
    order = sorted(range(len(groups)) if numbers is None else numbers, key=lambda number: _start(groups[number]))
    if at_once is None:
        at_once = TOKENS_AT_ONCE
        if where.is_cuda:
            at_once = max(at_once, torch.cuda.get_device_properties(where.device).total_memory // GPU_BYTES)
    size = max(1, at_once // where.numel())
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def _scores(
    model: HookedLM,
    pairs: Pairs,
    groups: Sequence[Group],
    effect: Tensor,
    gap: Tensor,
    base: Tensor,
    metric: Metric,
    positions: str | int,
    direction: str,
    method: str,
) -> Scores:
    made = {
        "method": method,
        "model": model.spec.name,
        "data": pairs.name,
        "data_hash": pairs.digest,
        "metric": getattr(metric, "__name__", repr(metric)),
        "positions": positions,
        "direction": direction,
    }
    return Scores(model.spec, groups, effect.numpy(), gap.numpy(), base.numpy(), made)
