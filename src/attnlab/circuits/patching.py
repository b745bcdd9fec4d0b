"""Activation patching and path patching, exact and restarted where they can be.

The direction is an argument and is recorded: ``"noise"`` runs the clean prompt and writes corrupt activations into it (what
breaks?), ``"denoise"`` runs the corrupt prompt and writes clean ones (what repairs?).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnlab.circuits.metrics import Metric, Readout, logit_diff
from attnlab.circuits.model import INPUT, Edit, HookedLM, Node, Run
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.scores import Group, Scores

Direction = Literal["noise", "denoise"]
#: rows x tokens of one patched forward; larger is no faster on two cores and takes more memory
TOKENS_AT_ONCE = 4096


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

    Each patched run restarts at the lowest layer of its group and at the first patched position, and many of them run as
    rows of one batch. Patching END only, a run costs one token instead of the whole prompt.

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
    for batch in pairs.batches():
        with torch.no_grad():
            base, source = _both_runs(model, batch, direction)
            m_base, m_source = (metric(Readout(model, run.resid[model.spec.n_layers], batch)) for run in (base, source))
            where = batch.mask(positions).to(m_base.device)
            first = int(where.any(0).nonzero()[0])
            for numbers in _chunks(chosen, len(batch) * (where.shape[1] - first)):
                layer = max(min(node.layer for node in chosen[numbers[0]]), 0)
                edits = _patch_edits([chosen[i] for i in numbers], source, where)
                run = model.resume(base, layer, first, copies=len(numbers), edits=edits)
                patched = metric(Readout(model, run.resid[model.spec.n_layers], batch)).view(len(numbers), len(batch))
                effect[torch.tensor(numbers)[:, None], batch.index] = (patched - m_base).cpu().to(effect.dtype)
        gap[batch.index] = (m_source - m_base).cpu().to(gap.dtype)
        base_metric[batch.index] = m_base.cpu().to(gap.dtype)
    return _scores(model, pairs, chosen, effect, gap, base_metric, metric, positions, direction, "activation patching")


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
    for batch in pairs.batches():
        with torch.no_grad():
            base, source = _both_runs(model, batch, direction)
            m_base, m_source = (metric(Readout(model, run.resid[n_layers], batch)) for run in (base, source))
            where = batch.mask(positions).to(m_base.device)
            first = int(where.any(0).nonzero()[0])
            reach = n_layers if not targets else stop - 1
            able = [i for i, group in enumerate(chosen) if group[0].layer < reach]
            for numbers in _chunks(chosen, len(batch) * (where.shape[1] - first), able):
                layer, heads = chosen[numbers[0]][0].layer, [chosen[i][0].head for i in numbers]
                edits = _freeze_edits(model, base, source, where, layer, heads, freeze)
                capture = {receiver.component for receiver in targets}
                run = model.resume(base, layer, first, len(numbers), edits, capture, stop=stop)
                if targets:
                    run = _deliver(model, base, run, targets, batch, len(numbers))
                patched = metric(Readout(model, run.resid[n_layers], batch)).view(len(numbers), len(batch))
                effect[torch.tensor(numbers)[:, None], batch.index] = (patched - m_base).cpu().to(effect.dtype)
        gap[batch.index] = (m_source - m_base).cpu().to(gap.dtype)
        base_metric[batch.index] = m_base.cpu().to(gap.dtype)
    how = f"path patching into {receivers if receivers == 'logits' else list(receivers)}, freeze {freeze}"
    return _scores(model, pairs, chosen, effect, gap, base_metric, metric, positions, direction, how)


# ---------------------------------------------------------------------------------------------------- edits


def overwrite(value: Tensor, where: Tensor, copies: int, only: Tensor | None = None) -> Callable[[Tensor, int], Tensor]:
    """A change for :class:`Edit`: write ``value`` [B, T, ...] at ``where`` [B, T], in every copy.

    ``only`` [copies, H] narrows it to chosen heads of each copy (then ``value`` is [B, T, H, d]).
    """

    def change(act: Tensor, first: int) -> Tensor:
        mask = where[:, first:].repeat(copies, 1).view(-1, act.shape[1], *[1] * (act.ndim - 2))  # [R, T', 1, ...]
        if only is not None:
            mask = mask & only.repeat_interleave(len(where), 0)[:, None, :, None]  # [R, T', H, 1]
        return torch.where(mask, value[:, first:].repeat(copies, *[1] * (value.ndim - 1)), act)

    return change


def _patch_edits(groups: Sequence[Group], source: Run, where: Tensor) -> list[Edit]:
    """Edits that give copy ``c`` the source writes of ``groups[c]``."""
    copies, edits = len(groups), []
    for layer in sorted({node.layer for group in groups for node in group if node.head is not None}):
        z = source.acts["z", layer]
        only = torch.zeros(copies, z.shape[2], dtype=torch.bool, device=z.device)
        for copy, group in enumerate(groups):
            for node in group:
                if node.layer == layer and node.head is not None:
                    only[copy, node.head] = True
        edits.append(Edit("z", layer, overwrite(z, where, copies, only)))
    for node in sorted({node for group in groups for node in group if node.head is None}):
        kind, layer = ("resid_pre", 0) if node == INPUT else ("mlp_out", node.layer)
        rows = torch.tensor([node in group for group in groups], device=where.device)
        edits.append(Edit(kind, layer, _overwrite_rows(source.acts[kind, layer], where, rows)))
    return edits


def _overwrite_rows(value: Tensor, where: Tensor, rows: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Write ``value`` [B, T, d] at ``where`` in the chosen copies ``rows`` [copies]."""
    copies = len(rows)

    def change(act: Tensor, first: int) -> Tensor:
        mask = where[:, first:].repeat(copies, 1) & rows.repeat_interleave(len(where))[:, None]
        return torch.where(mask[..., None], value[:, first:].repeat(copies, 1, 1), act)

    return change


def _freeze_edits(
    model: HookedLM, base: Run, source: Run, where: Tensor, layer: int, heads: Sequence[int | None], freeze: str
) -> list[Edit]:
    """Pass 2: senders of ``layer`` from the source, all other heads (and MLPs) at ``where`` from the base."""
    copies = len(heads)
    only = torch.zeros(copies, model.spec.n_heads, dtype=torch.bool, device=where.device)
    only[torch.arange(copies), torch.tensor(heads)] = True
    edits = [Edit("z", layer, overwrite(source.acts["z", layer], where, copies, only))]
    edits += [
        Edit("z", above, overwrite(base.acts["z", above], where, copies))
        for above in range(layer + 1, model.spec.n_layers)
    ]
    if freeze == "heads+mlps":
        for above in range(layer, model.spec.n_layers):
            edits.append(Edit("mlp_out", above, overwrite(base.acts["mlp_out", above], where, copies)))
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
            arrived = sent.acts[target.component, target.layer][:, start - sent.first :, target.head]  # [R, T', d_head]
            mask = masks[target][:, start:].repeat(copies, 1)[..., None]
            act = act.clone()
            act[:, :, target.head] = torch.where(mask, arrived, act[:, :, target.head])
            return act

        edits.append(Edit(target.component, target.layer, change))
    return model.resume(base, layer, first, copies, edits)


# ------------------------------------------------------------------------------------------------ bookkeeping


def _group(model: HookedLM, group: str | Node | Sequence[str | Node]) -> Group:
    nodes = [group] if isinstance(group, str | Node) else list(group)
    if not nodes:
        raise ValueError("groups holds an empty group; name at least one node")
    return tuple(model.spec.check(node) for node in nodes)


def _both_runs(model: HookedLM, batch: Batch, direction: Direction) -> tuple[Run, Run]:
    if direction not in ("noise", "denoise"):
        raise ValueError(
            f"direction={direction!r} is unknown; use 'noise' (corrupt into clean) or 'denoise' (clean into corrupt)"
        )
    runs = [model.run(tokens, capture=("resid_pre", "z", "mlp_out")) for tokens in (batch.clean, batch.corrupt)]
    return (runs[0], runs[1]) if direction == "noise" else (runs[1], runs[0])


def _chunks(groups: Sequence[Group], tokens_each: int, numbers: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Indices of groups that start at the same layer, as many as fit into one forward."""
    by_layer: dict[int, list[int]] = {}
    for number in range(len(groups)) if numbers is None else numbers:
        by_layer.setdefault(min(node.layer for node in groups[number]), []).append(number)
    size = max(1, TOKENS_AT_ONCE // tokens_each)
    for same in by_layer.values():
        for start in range(0, len(same), size):
            yield same[start : start + size]


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
