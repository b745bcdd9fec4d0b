"""Analyses that can be watched, stopped between two steps, kept in a file and gone on with.

Each is an object with ``total`` and ``done`` steps; :meth:`Work.steps` does the next ones and yields after each, so that a progress
bar, a Cancel button or Ctrl-C gets its turn. ``state()`` is a snapshot as arrays; a new object of the same arguments that
``restore``\\ s it goes on to the same bits. The command ``python -m attnlab.circuits`` and the panel of the explorer both stand on
these, over the functions that the chapters use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from attnlab.circuits.attribution import attributed
from attnlab.circuits.eap import PAIRS_AT_ONCE, EdgeSums
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.evaluate import Ablation, filled
from attnlab.circuits.faithfulness import Faithfulness, SparsityCurve, curve_graphs, curve_of
from attnlab.circuits.graph import Graph
from attnlab.circuits.metrics import Metric, logit_diff
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Batch, Pairs
from attnlab.circuits.patching import Direction, _group, _scores, patched_parts
from attnlab.circuits.scores import Scores

State = dict[str, np.ndarray]
#: rows x tokens of one sweep of exact patching here: a step then lasts about a second on two cores
TOKENS_A_STEP = 4096
#: metrics with a gradient; the others can only be patched exactly
SMOOTH = ("logit_diff", "log_odds", "prob_diff", "log_prob")
#: how many heads a curve over head lists keeps
HEAD_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


class Work:
    """An analysis in steps."""

    name: str
    total: int
    done: int = 0

    def steps(self) -> Iterator[int]:
        """Do what is left, yielding ``done`` after each step."""
        raise NotImplementedError

    def state(self) -> State:
        """What is needed to go on from the last safe point, as a copy."""
        raise NotImplementedError

    def restore(self, state: State) -> None:
        """Go on from a state of the same analysis."""
        raise NotImplementedError

    def finish(self) -> Any:
        """Do all that is left and return the result."""
        for _ in self.steps():
            pass
        return self.result()

    def result(self) -> Any:
        """The result, once every step is done."""
        raise NotImplementedError

    def _require_all(self) -> None:
        if self.done < self.total:
            raise ValueError(f"{self.name} has done {self.done} of {self.total} steps; there is no result yet")


class EdgeWork(Work):
    """:func:`~attnlab.circuits.eap.eap` in steps of one gradient point of one batch; safe points lie between batches.

    Arguments and errors are those of ``eap``; ``result()`` is its :class:`~attnlab.circuits.edges.EdgeScores`, to the bit.
    """

    def __init__(
        self,
        model: HookedLM,
        pairs: Pairs,
        *,
        metric: Metric = logit_diff,
        steps: int = 1,
        direction: Direction = "noise",
        batch_size: int = PAIRS_AT_ONCE,
    ) -> None:
        self.sums = EdgeSums(model, metric=metric, steps=steps, direction=direction)
        self.name, self.pairs, self.points = self.sums.method, pairs, steps
        self.batches = _batches(pairs, batch_size)
        self.total = steps * len(self.batches)
        self._state = self._snapshot(0)

    def steps(self) -> Iterator[int]:
        for number, batch in enumerate(self.batches):
            if self.done >= (number + 1) * self.points:
                continue
            for point in self.sums.points(batch):
                self.done = number * self.points + point + 1
                if point == self.points - 1:
                    self._state = self._snapshot(number + 1)
                yield self.done

    def _snapshot(self, batches: int) -> State:
        tally = self.sums.tally
        sums = {"effect": tally.effect.numpy().copy(), "base": np.array(tally.base), "gap": np.array(tally.gap)}
        return sums | {"batches": np.array(batches)}

    def state(self) -> State:
        return self._state

    def restore(self, state: State) -> None:
        tally = self.sums.tally
        tally.effect = torch.from_numpy(state["effect"].copy())
        tally.base, tally.gap = float(state["base"]), float(state["gap"])
        self.done = int(state["batches"]) * self.points
        self._state = state

    def result(self) -> EdgeScores:
        self._require_all()
        return self.sums.scores(self.pairs)


class HeadWork(Work):
    """Scores of heads in steps of one batch (attribution) or one sweep of patched heads (exact); safe points lie between batches.

    ``method="attribution"`` is :func:`~attnlab.circuits.attribution.attribution_patch`, ``"patch"`` is
    :func:`~attnlab.circuits.patching.activation_patch`; arguments and errors are theirs. ``result()`` is their
    :class:`~attnlab.circuits.scores.Scores`. Attribution always scores all heads.
    """

    def __init__(
        self,
        model: HookedLM,
        pairs: Pairs,
        method: Literal["attribution", "patch"] = "attribution",
        *,
        heads: Sequence[str | Node] | None = None,
        metric: Metric = logit_diff,
        positions: str | int | None = None,
        direction: Direction = "noise",
        batch_size: int = 16,
    ) -> None:
        if method not in ("attribution", "patch"):
            raise ValueError(f"method={method!r} is unknown; use 'attribution' or 'patch'")
        if method == "attribution" and heads is not None:
            raise ValueError("heads cannot be chosen for attribution, which scores all of them; leave it out")
        if heads is not None and not heads:
            raise ValueError("heads is empty; name at least one, such as '9.6'")
        self.name = "attribution" if method == "attribution" else "exact patching"
        self.model, self.pairs, self.method, self.metric, self.direction = model, pairs, method, metric, direction
        self.positions = positions if positions is not None else "all" if method == "attribution" else "END"
        self.groups = [_group(model, head) for head in (model.spec.heads if heads is None else heads)]
        self.batches = _batches(pairs, batch_size)
        self.parts = [self._parts(batch) for batch in self.batches]
        self.total = sum(self.parts)
        shape = (len(self.groups), len(pairs))
        self.effect, self.gap, self.base = np.zeros(shape), np.zeros(shape[1]), np.zeros(shape[1])
        self._state = self._snapshot(0)

    def _parts(self, batch: Batch) -> int:
        """Steps of one batch."""
        if self.method == "attribution":
            return 1
        return -(-len(self.groups) // max(1, TOKENS_A_STEP // batch.clean.numel()))

    def steps(self) -> Iterator[int]:
        after = 0
        for number, (batch, parts) in enumerate(zip(self.batches, self.parts, strict=True)):
            before, after = after, after + parts
            if self.done >= after:
                continue
            columns = batch.index.numpy()
            for part, (rows, effect, gap, base) in enumerate(self._measure(batch), start=1):
                self.effect[np.array(rows)[:, None], columns] = effect.numpy()
                self.gap[columns], self.base[columns] = gap.numpy(), base.numpy()
                self.done = before + part
                if part == parts:
                    self._state = self._snapshot(number + 1)
                yield self.done

    def _measure(self, batch: Batch) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        how: dict[str, Any] = {"metric": self.metric, "positions": self.positions, "direction": self.direction}
        if self.method == "attribution":
            yield list(range(len(self.groups))), *attributed(self.model, batch, **how)
        else:
            yield from patched_parts(self.model, batch, self.groups, tokens_at_once=TOKENS_A_STEP, **how)

    def _snapshot(self, batches: int) -> State:
        arrays = {"effect": self.effect.copy(), "gap": self.gap.copy(), "base": self.base.copy()}
        return arrays | {"batches": np.array(batches)}

    def state(self) -> State:
        return self._state

    def restore(self, state: State) -> None:
        self.effect, self.gap, self.base = (state[key].copy() for key in ("effect", "gap", "base"))
        self.done = sum(self.parts[: int(state["batches"])])
        self._state = state

    def result(self) -> Scores:
        self._require_all()
        method = "activation patching" if self.method == "patch" else "attribution patching, gradient at the base run"
        effect, gap, base = map(torch.from_numpy, (self.effect, self.gap, self.base))
        return _scores(
            self.model,
            self.pairs,
            self.groups,
            effect,
            gap,
            base,
            self.metric,
            self.positions,
            self.direction,
            method,
        )


class Evaluation(NamedTuple):
    """What a circuit is worth on some pairs, and what smaller and larger ones of the same scores are worth.

    ``curve.frame`` has the columns of :func:`~attnlab.circuits.faithfulness.sparsity_curve`, and ``n_heads`` for lists of heads.
    ``metric`` and ``ablation`` say how it was measured.
    """

    faithfulness: Faithfulness
    completeness: float
    curve: SparsityCurve
    metric: str
    ablation: Ablation

    @property
    def measured(self) -> str:
        """How it was measured, for people."""
        return f"{self.metric}, {self.ablation} ablation"


class EvaluationWork(Work):
    """Faithfulness, completeness and the curve over circuit sizes, in steps of one circuit on one batch; every step is safe.

    Args:
        model: the model that the circuit is of, :func:`~attnlab.circuits.ungroup.ungrouped`.
        circuit: what to evaluate.
        scores: of edges or heads; the curve goes through the strongest of them.
        pairs: the prompts; others than the scores were made on, to be fair.
        metric: what to measure.
        ablation: see :func:`~attnlab.circuits.evaluate.evaluate`.
        batch_size: pairs at once.
    """

    name = "evaluation"

    def __init__(
        self,
        model: HookedLM,
        circuit: Graph,
        scores: EdgeScores | Scores,
        pairs: Pairs,
        *,
        metric: Metric = logit_diff,
        ablation: Ablation = "resample",
        batch_size: int = 8,
    ) -> None:
        self.model, self.pairs, self.metric, self.ablation = model, pairs, metric, ablation
        self.batch_size, self.batches = batch_size, _batches(pairs, batch_size)
        self.heads: list[int] = []
        if isinstance(scores, Scores):
            self.heads = sorted({max(1, round(share * len(scores.groups))) for share in HEAD_SHARES})
            self.curve = [head_circuit(model, scores, n) for n in self.heads]
            self.counts = [len(graph) for graph in self.curve]
        else:
            self.counts, self.curve = curve_graphs(scores)
        wiring = circuit.wiring
        self.graphs = [circuit, ~circuit, *self.curve, Graph.full(wiring), Graph.empty(wiring)]
        self.total = len(self.graphs) * len(self.batches)
        self.values = np.full((len(self.graphs), 1, len(pairs)), np.nan)

    def steps(self) -> Iterator[int]:
        how: dict[str, Any] = {"ablation": self.ablation, "batch_size": self.batch_size}
        for done in filled(self.model, self.graphs, self.pairs, [self.metric], self.values, self.batches, **how):
            self.done = done
            yield done

    def state(self) -> State:
        return {"values": self.values.copy()}

    def restore(self, state: State) -> None:
        self.values = state["values"].copy()

    def result(self) -> Evaluation:
        self._require_all()
        *circuits, whole, ablated = self.values[:, 0]
        first, rest, *others = [Faithfulness(circuit, whole, ablated) for circuit in circuits]
        curve = curve_of(self.counts, self.curve, others)
        if self.heads:
            curve.frame.insert(0, "n_heads", self.heads)
        metric = getattr(self.metric, "__name__", repr(self.metric))
        return Evaluation(first, 1 - rest.ratio_of_means, curve, metric, self.ablation)


def head_circuit(model: HookedLM, scores: Scores, n: int) -> Graph:
    """Every edge between the ``n`` strongest heads, all MLPs (which have no score), the input and the logits."""
    mlps = [Node(layer) for layer in range(model.spec.n_layers)]
    return Graph.of_nodes(Wiring.of(model.spec), [*scores.top(n), *mlps])


def _batches(pairs: Pairs, batch_size: int) -> list[Batch]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} takes no pair; use at least 1 (it changes memory and time alone)")
    return list(pairs.batches(size=batch_size))
