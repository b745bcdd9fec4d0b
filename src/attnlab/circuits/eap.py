r"""Edge attribution: a first-order score for every edge of a model from a few forwards and backwards.

Patching an edge ``u -> v`` lets the input ``v`` alone read what ``u`` writes on the *source* prompts, while everything else reads
the *base* prompts. To first order this moves the metric by

.. math:: \sum_t \big(w^{source}_{u,t} - w^{base}_{u,t}\big) \cdot \frac{\partial m}{\partial r^{v}_t}

where :math:`w_u` is what ``u`` writes and :math:`r^v` is the copy of the residual stream that enters ``v``, before its norm. With
the gradient at the base run this is EAP (Syed et al. 2023, arXiv:2310.10348); averaged along the line between the two prompts'
embeddings it is EAP-IG (Hanna et al. 2024, arXiv:2403.17806), which still sees edges whose gradient vanishes at one end.

Direction and sign are those of :func:`~attnlab.circuits.attribution.attribution_patch`: ``"noise"`` takes the clean prompt as base
and the corrupt one as source. Scores are divided by metric(source) - metric(base), so an edge that carries the answer is positive
in both directions, and the edges out of a head add up to that head's attribution score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attnlab.circuits.edges import PORTS, EdgeScores, Wiring
from attnlab.circuits.metrics import Metric, Readout, logit_diff
from attnlab.circuits.model import Edit, HookedLM, Run
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import Direction, _check_direction
from attnlab.circuits.scores import NoEffectError
from attnlab.lab import progress

Endpoint = Literal["left", "midpoint", "right"]
Total = Literal["signed", "absolute"]
#: where in its interval each rule takes the gradient
OFFSETS = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
#: pairs in one sweep; the writes of all sources [n_src, B, T, d_model] are held at once (SmolLM2, 16 tokens: 89 MB)
PAIRS_AT_ONCE = 8


def eap(
    model: HookedLM,
    pairs: Pairs,
    *,
    metric: Metric = logit_diff,
    steps: int = 1,
    endpoint: Endpoint = "left",
    path: Literal["inputs"] = "inputs",
    direction: Direction = "noise",
    total: Total = "signed",
    batch_size: int = PAIRS_AT_ONCE,
) -> EdgeScores:
    """Edge attribution (``steps=1``) or edge attribution with integrated gradients (``steps`` of 5 or more).

    The gradient is averaged over ``steps`` points on the line from the base prompt's embeddings (0) to the source prompt's (1):
    ``k / steps`` for ``"left"``, ``(k + 1/2) / steps`` for ``"midpoint"``, ``(k + 1) / steps`` for ``"right"``, with ``k`` from 0 to
    ``steps - 1``. ``"left"`` with one step is plain EAP, and in direction ``"noise"`` its points are those of Hanna et al.
    As the steps grow, the scores of the edges out of ``input`` add up to 1 (``"midpoint"`` gets there fastest). Two forwards,
    then one forward and one backward a step, whatever the number of edges. All positions count.

    Args:
        model: a model with one key and one value a query head, see :func:`~attnlab.circuits.ungroup.ungrouped`.
        pairs: the prompts.
        metric: what to explain; it must have a gradient.
        steps: points of the gradient.
        endpoint: where in its interval each point lies.
        path: what moves along the line; the embeddings.
        direction: ``"noise"`` (corrupt into clean) or ``"denoise"`` (clean into corrupt).
        total: how pairs add up. ``"signed"`` scores may cancel between pairs; ``"absolute"`` adds the sizes of the scores of
            each pair, as a sum of ``|score|`` over prompts asks for.
        batch_size: pairs at once.

    Raises:
        NoEffectError: if the metric is the same on both prompts.
        ValueError: for an unknown argument, fewer than one step or pair at once, a metric without a gradient, grouped keys and values, or a
            model whose heads, MLPs and embedding do not add up to its residual stream.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} takes no pair; use at least 1 (it changes memory and time alone)")
    sums = EdgeSums(model, metric=metric, steps=steps, endpoint=endpoint, path=path, direction=direction, total=total)
    for batch in progress(list(pairs.batches(size=batch_size)), f"{sums.method}, {pairs.name}"):
        for _ in sums.points(batch):
            pass
    return sums.scores(pairs)


class EdgeSums:
    """What :func:`eap` adds up batch after batch, for work that wants to stop in between.

    Arguments and errors are those of :func:`eap`. ``effect`` [n_src, n_dst], ``base`` and ``gap`` are the sums over the batches
    so far: whoever keeps the three and puts them back goes on to the same bits.
    """

    def __init__(
        self,
        model: HookedLM,
        *,
        metric: Metric = logit_diff,
        steps: int = 1,
        endpoint: Endpoint = "left",
        path: Literal["inputs"] = "inputs",
        direction: Direction = "noise",
        total: Total = "signed",
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} gives no gradient; use a whole number of at least 1 (5 is common)")
        if endpoint not in OFFSETS:
            raise ValueError(f"endpoint={endpoint!r} is unknown; use 'left', 'midpoint' or 'right'")
        if path != "inputs":
            raise ValueError(f"path={path!r} is unknown; use 'inputs', the line between the embeddings")
        if total not in ("signed", "absolute"):
            raise ValueError(f"total={total!r} is unknown; use 'signed' or 'absolute'")
        _check_direction(direction)
        self.model, self.metric, self.direction = model, metric, direction
        self.wiring, self.weights = _wiring(model), _projections(model)
        self.method = "EAP" if steps == 1 else "EAP-IG"
        self.how: dict[str, Any] = {
            "method": self.method,
            "steps": steps,
            "endpoint": endpoint,
            "path": path,
            "total": total,
        }
        self.tally = _Tally(self.wiring)

    def points(self, batch: Batch) -> Iterator[int]:
        """Take one gradient point of a batch after another; with the last one the batch counts."""
        steps, parts = self.how["steps"], len(batch) if self.how["total"] == "absolute" else 1
        offset = OFFSETS[self.how["endpoint"]]
        ends = _both_ends(self.model, self.wiring, batch, self.metric, self.direction)
        effect = torch.zeros(parts, self.wiring.n_src, self.wiring.n_dst, dtype=torch.float64)
        for k in range(steps):
            run = _between(self.model, ends, (k + offset) / steps)
            value = self.metric(Readout(self.model, run.resid[self.model.spec.n_layers], batch))
            for columns, grads in _port_gradients(self.model, self.wiring, run, value, self.weights):
                reads = int(self.wiring.reads[columns][0])
                effect[:, :reads, columns] += _products(ends.change[:reads], grads, parts).double().cpu() / steps
            if k < steps - 1:
                yield k
        self.tally.effect += effect.abs().sum(0) if self.how["total"] == "absolute" else effect[0]
        self.tally.count(ends)
        yield steps - 1

    def scores(self, pairs: Pairs) -> EdgeScores:
        """The scores of the pairs, all of whose batches were taken.

        Raises:
            NoEffectError: if the metric is the same on both prompts.
        """
        tally = self.tally
        if self.how["total"] == "absolute":  # scores are divided by the gap, which may be negative; sizes are not
            tally = _Tally(self.wiring)
            tally.effect = self.tally.effect * math.copysign(1.0, self.tally.gap)
            tally.base, tally.gap = self.tally.base, self.tally.gap
        return tally.scores(self.model, pairs, self.metric, self.direction, **self.how)


def exact_edge_scores(
    model: HookedLM, pairs: Pairs, *, metric: Metric = logit_diff, direction: Direction = "noise"
) -> EdgeScores:
    """What :func:`eap` estimates: each edge patched alone. One forward an edge, so for small models.

    The destination reads the residual stream with the write of one source replaced by its write on the source prompt; every
    other reader sees the base run.

    Raises:
        NoEffectError: if the metric is the same on both prompts.
        ValueError: as for :func:`eap`.
    """
    wiring = _wiring(model)
    weights = _projections(model)
    tally = _Tally(wiring)
    for batch in progress(list(pairs.batches(size=PAIRS_AT_ONCE)), f"edges one by one, {pairs.name}"):
        with torch.no_grad():
            ends = _both_ends(model, wiring, batch, metric, direction)
            for column in range(wiring.n_dst):
                reads = int(wiring.reads[column])
                end = _patched_inputs(model, wiring, ends, column, weights)
                effect = metric(Readout(model, end, batch)).view(reads, len(batch)) - ends.m_base
                tally.effect[:reads, column] += effect.sum(1).double().cpu()
        tally.count(ends)
    return tally.scores(model, pairs, metric, direction, method="exact")


# ---------------------------------------------------------------------------------------------------- the runs


class _Ends(NamedTuple):
    """The base run and what the source run changes, from the first position on at which the prompts of the batch differ."""

    tokens: Tensor  # [B, T] of the base
    base: Run  # whole prompts
    first: int
    change: Tensor  # [n_src, B, T - first, d_model] write on the source prompt - write on the base prompt
    m_base: Tensor  # [B]
    m_source: Tensor  # [B]


def _both_ends(model: HookedLM, wiring: Wiring, batch: Batch, metric: Metric, direction: Direction) -> _Ends:
    _check_direction(direction)
    tokens = [batch.clean, batch.corrupt] if direction == "noise" else [batch.corrupt, batch.clean]
    first = int((batch.clean != batch.corrupt).any(0).nonzero()[0])
    last, kinds = model.spec.n_layers, ("z", "mlp_out")
    with torch.no_grad():
        base = model.run(tokens[0], capture=kinds)
        source = model.run(tokens[1], capture=kinds, base=base, first=first)
        m_base, m_source = (metric(Readout(model, run.resid[last], batch)) for run in (base, source))

        def moved(after: Tensor, before: Tensor) -> Tensor:
            return after - before[:, first:]

        embedding = moved(source.resid[0], base.resid[0])  # [B, T - first, d_model]
        change = embedding.new_empty(wiring.n_src, *embedding.shape)
        change[0] = embedding
        for layer in range(last):
            z = moved(source.acts["z", layer], base.acts["z", layer])  # [B, T - first, H, d_head]
            change[wiring.heads_of(layer)] = torch.einsum("bthe,hed->hbtd", z, model.W_O[layer])
            change[wiring.mlp_of(layer)] = moved(source.acts["mlp_out", layer], base.acts["mlp_out", layer])
        total = moved(source.resid[last], base.resid[last])
        if (change.sum(0) - total).abs().max() > 1e-2 * total.abs().max():
            raise ValueError(
                f"model {model.spec.name}: what its embedding, heads and MLPs write does not add up to its residual stream "
                "(norms behind a block, or scaled writes); edges need a plain pre-norm decoder"
            )
    return _Ends(tokens[0], base, first, change, m_base, m_source)


def _between(model: HookedLM, ends: _Ends, fraction: float) -> Run:
    """The base run with gradients, its embeddings moved a fraction of the way to the source's.

    The MLP reads a copy of the residual stream, so that the gradient of ``mlp_in`` is that of the port and not of the stream.
    """
    edits = [Edit("resid_pre", 0, lambda act, first: act + fraction * ends.change[0])]
    edits += [Edit("mlp_in", layer, lambda act, first: act.clone()) for layer in range(model.spec.n_layers)]
    capture = ("resid_pre", *PORTS, "mlp_in")
    return model.run(ends.tokens, edits, capture, grad=True, base=ends.base, first=ends.first)


def _port_gradients(
    model: HookedLM, wiring: Wiring, run: Run, value: Tensor, weights: list[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Gradient of the metric by what enters each destination, before its norm: ``(columns, [n, B, T, d_model])``, n columns.

    All columns of a slice read the same sources.
    """
    if not value.requires_grad:
        raise ValueError(
            "metric has no gradient (a count or a choice); use logit_diff, log_odds, prob_diff or log_prob"
        )
    last = model.spec.n_layers
    inputs = [run.acts[port, layer] for layer in range(last) for port in (*PORTS, "mlp_in")]
    # rows do not interact: the sum gives each its own gradient
    *grads, final = torch.autograd.grad(value.sum(), [*inputs, run.resid[last]])
    for layer in range(last):
        *heads, mlp = grads[4 * layer : 4 * layer + 4]
        normed = [torch.einsum("bthe,hde->hbtd", g, w[layer]) for g, w in zip(heads, weights, strict=True)]
        columns = slice(wiring.port(layer, "q").start, wiring.port(layer, "v").stop)
        yield columns, _before(_norm(model, layer), run.acts["resid_pre", layer], torch.cat(normed))
        yield wiring.port(layer, "mlp"), mlp[None]
    yield slice(wiring.n_dst - 1, wiring.n_dst), final[None]


def _products(change: Tensor, grads: Tensor, parts: int) -> Tensor:
    """Inner products of changes [reads, B, T, d] with gradients [n, B, T, d]: ``[1, reads, n]``, or one matrix a pair."""
    if parts == 1:
        return (change.flatten(1) @ grads.flatten(1).T)[None]
    return change.transpose(0, 1).flatten(2) @ grads.transpose(0, 1).flatten(2).mT


def _before(norm: Any, resid: Tensor, grads: Tensor) -> Tensor:
    """Carry gradients ``[n, B, T, d_model]`` of a norm's output back to its input ``resid`` [B, T, d_model]."""
    with torch.enable_grad():
        copies = resid.detach().expand_as(grads).requires_grad_(True)
        return torch.autograd.grad(norm(copies), copies, grads)[0]


def _patched_inputs(model: HookedLM, wiring: Wiring, ends: _Ends, column: int, weights: list[Tensor]) -> Tensor:
    """Final residual with one destination reading one changed source, ``[reads * B, T - first, d_model]``, source after source."""
    reads, last = int(wiring.reads[column]), model.spec.n_layers
    change = ends.change[:reads]
    if column == wiring.n_dst - 1:
        return (ends.base.resid[last][:, ends.first :] + change).flatten(0, 1)
    layer, place = divmod(column, 3 * wiring.n_heads + 1)
    port, head = divmod(place, wiring.n_heads)
    if port == len(PORTS):
        edit = Edit("mlp_in", layer, lambda act, first: act + change.flatten(0, 1))
    else:
        resid, norm = ends.base.resid[layer][:, ends.first :], _norm(model, layer)
        moved = ((norm(resid + change) - norm(resid)) @ weights[port][layer, head]).flatten(
            0, 1
        )  # [R, T - first, d_head]

        def shift(act: Tensor, first: int) -> Tensor:
            act = act.clone()
            act[:, :, head] += moved
            return act

        edit = Edit(PORTS[port], layer, shift)
    return model.resume(ends.base, [layer] * reads, ends.first, [edit]).resid[last]


# ------------------------------------------------------------------------------------------------- the model's parts


def _wiring(model: HookedLM) -> Wiring:
    spec = model.spec
    if spec.n_kv_heads != spec.n_heads:
        raise ValueError(
            f"model {spec.name} has {spec.n_heads} query heads but {spec.n_kv_heads} keys and values, so a head has no key of "
            "its own to score; pass ungrouped(model)"
        )
    if not all(hasattr(block, "ln1") and hasattr(block, "ln2") for block in model.bridge.blocks):
        raise ValueError(
            f"model {spec.name} has blocks without a norm before heads and MLP; edges need a pre-norm decoder"
        )
    return Wiring.of(spec, parallel_blocks=bool(getattr(model.bridge.cfg, "parallel_attn_mlp", False)))


def _projections(model: HookedLM) -> list[Tensor]:
    """The weights in front of queries, keys and values, ``[n_layers, n_heads, d_model, d_head]`` each."""
    return [weight.detach() for weight in (model.bridge.W_Q, model.bridge.W_K, model.bridge.W_V)]


def _norm(model: HookedLM, layer: int) -> Any:
    """The norm before the heads, without the bridge's hooks."""
    return model.bridge.blocks[layer].ln1.original_component


class _Tally:
    """Sums over pairs while the batches go by."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.effect = torch.zeros(wiring.n_src, wiring.n_dst, dtype=torch.float64)
        self.base = self.gap = 0.0

    def count(self, ends: _Ends) -> None:
        self.base += float(ends.m_base.double().sum())
        self.gap += float((ends.m_source - ends.m_base).double().sum())

    def scores(self, model: HookedLM, pairs: Pairs, metric: Metric, direction: str, **how: Any) -> EdgeScores:
        base, gap = self.base / len(pairs), self.gap / len(pairs)
        if not abs(gap) > 1e-9:  # also true for NaN
            raise NoEffectError(
                f"{pairs.name}: the mean metric is {base:.4g} on the base and on the source prompts alike, so there is no "
                "effect to attribute; choose a counterfactual that changes the answer"
            )
        info = {
            "model": model.spec.name,
            "task": pairs.name,
            "data_hash": pairs.digest,
            "pairs": len(pairs),
            "metric": getattr(metric, "__name__", repr(metric)),
            "positions": "all",
            "direction": direction,
            "base": base,
            "gap": gap,
        }
        return EdgeScores(self.wiring, self.effect / self.gap, how | info)
