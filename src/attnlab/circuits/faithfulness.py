r"""Is a circuit enough, is all of it needed, and how small can it be? Quantities made of runs of circuits.

Faithfulness of a circuit :math:`C` of the model :math:`G` is :math:`F(C) = (m(C) - m(\emptyset)) / (m(G) - m(\emptyset))`, where
the empty circuit has every edge ablated: 1 for the model, 0 for nothing but ablation, above 1 for a circuit that does the
task better than the model. All quantities take the arguments of :func:`attnlab.circuits.evaluate.evaluate` and raise its
errors, and :class:`~attnlab.circuits.scores.NoEffectError` if ablating everything changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.evaluate import Ablation, evaluate_many
from attnlab.circuits.graph import Graph
from attnlab.circuits.metrics import Metric, logit_diff
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.scores import NoEffectError
from attnlab.claims import bootstrap

#: shares of all edges at which circuits are compared; those of MIB (Mueller et al. 2025, arXiv:2504.13151)
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Faithfulness(NamedTuple):
    """How much of the model's effect a circuit keeps, pair by pair; 1 for the model, 0 for nothing but ablation.

    The two averages differ, and rankings of methods can flip between them (Miller et al. 2024, arXiv:2407.08734), so both
    have their names. Attributes are arrays ``[N]`` of the metric.
    """

    circuit: np.ndarray
    model: np.ndarray
    ablated: np.ndarray

    @property
    def ratio_of_means(self) -> float:
        """Mean gain of the circuit over mean gain of the model."""
        return float((self.circuit - self.ablated).mean() / self._gap.mean())

    @property
    def mean_of_ratios(self) -> float:
        """Mean over pairs of gain over gain; NaN where a pair's model and ablated run have the same metric."""
        if (np.abs(self._gap) < 1e-9).any():
            return float("nan")
        return float(((self.circuit - self.ablated) / self._gap).mean())

    def interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the ratio of means over pairs (percentile method)."""
        gain, gap = self.circuit - self.ablated, self._gap
        return bootstrap(
            len(gap), lambda picks: gain[picks].mean(1) / gap[picks].mean(1), level=level, draws=draws, seed=seed
        )

    @property
    def _gap(self) -> np.ndarray:
        gap = self.model - self.ablated
        if not abs(gap.mean()) > 1e-9:  # also true for NaN
            raise NoEffectError(
                f"the mean metric is {self.model.mean():.4g} in the model and under ablation alike, so there is nothing to be "
                "faithful to; choose a counterfactual or an ablation that changes the answer"
            )
        return gap


def faithfulness(
    model: HookedLM,
    graph: Graph,
    pairs: Pairs,
    metric: Metric = logit_diff,
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> Faithfulness:
    """What a circuit keeps of the model's effect; errors as :func:`~attnlab.circuits.evaluate.evaluate`."""
    return _faithfulness(model, [graph], pairs, metric, ablation, batch_size)[0]


def completeness(
    model: HookedLM,
    graph: Graph,
    pairs: Pairs,
    metric: Metric = logit_diff,
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> float:
    """One minus the faithfulness (ratio of means) of the complement: 1 if nothing outside the circuit does the task."""
    return 1 - faithfulness(model, ~graph, pairs, metric, ablation=ablation, batch_size=batch_size).ratio_of_means


def incompleteness(
    model: HookedLM,
    graph: Graph,
    pairs: Pairs,
    knockouts: Mapping[str, Sequence[str | Node]],
    metric: Metric = logit_diff,
    *,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> pd.DataFrame:
    """Does the circuit break as the model does? For each set K of nodes ``|F(C - K) - F(G - K)|``, small if C is complete.

    Columns ``knockout, circuit, model, incompleteness`` (faithfulness as ratio of means). Source: Wang et al. 2022
    (arXiv:2211.00593), section 4.
    """
    whole = Graph.full(graph.wiring)
    graphs = [g.without(*nodes) for nodes in knockouts.values() for g in (graph, whole)]
    values = [f.ratio_of_means for f in _faithfulness(model, graphs, pairs, metric, ablation, batch_size)]
    frame = pd.DataFrame({"knockout": list(knockouts), "circuit": values[::2], "model": values[1::2]})
    return frame.assign(incompleteness=(frame.circuit - frame.model).abs())


def minimality(
    model: HookedLM,
    graph: Graph,
    pairs: Pairs,
    metric: Metric = logit_diff,
    *,
    given: Sequence[str | Node] = (),
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> pd.DataFrame:
    """What each head and MLP of a circuit is needed for: the change of faithfulness when it alone is taken out.

    A node may matter only once its understudies are gone (backup heads); name those in ``given`` to take them out first.
    Columns ``node, without, change`` (ratio of means), largest change first. Source: Wang et al. 2022 (arXiv:2211.00593),
    section 4.
    """
    base = graph.without(*given)
    nodes = [node for node in base.nodes() if node not in ("input", "logits")]
    graphs = [base, *(base.without(node) for node in nodes)]
    whole, *rest = (f.ratio_of_means for f in _faithfulness(model, graphs, pairs, metric, ablation, batch_size))
    frame = pd.DataFrame({"node": nodes, "without": rest, "change": [value - whole for value in rest]})
    return frame.sort_values("change", key=abs, ascending=False, kind="stable", ignore_index=True)


class SparsityCurve(NamedTuple):
    """Faithfulness against the number of edges.

    ``frame`` has the columns ``n_edges`` (asked for), ``kept`` (after pruning), ``share, ratio_of_means, mean_of_ratios``. The
    areas use the ratio of means over the share of edges from 0 to 1, by trapezoids, with the ends F = 0 and F = 1 that hold
    by definition: ``cpr`` lies under the line (higher is better), ``cmd`` between the line and 1 (lower is better). Source:
    Mueller et al. 2025 (arXiv:2504.13151); their code starts at a share of 0.001 and leaves the beginning out.
    """

    frame: pd.DataFrame
    cpr: float
    cmd: float


def sparsity_curve(
    model: HookedLM,
    scores: EdgeScores,
    pairs: Pairs,
    edge_counts: Sequence[int] | None = None,
    metric: Metric = logit_diff,
    *,
    select: Literal["top", "greedy"] = "top",
    absolute: bool = True,
    ablation: Ablation = "resample",
    batch_size: int = 16,
) -> SparsityCurve:
    """Faithfulness of the pruned circuits of the strongest edges.

    Args:
        model: an ungrouped model.
        scores: what edges are chosen by.
        pairs: the prompts; others than the scores were made on, to be fair.
        edge_counts: how many edges to keep; the shares of :data:`SHARES` if left out.
        metric: what to measure.
        select: :meth:`~attnlab.circuits.graph.Graph.top_n` or :meth:`~attnlab.circuits.graph.Graph.greedy`.
        absolute: choose by absolute score (finds the model's behaviour, CMD) or by score (finds what helps, CPR).
        ablation: see :func:`~attnlab.circuits.evaluate.evaluate`.
        batch_size: see :func:`~attnlab.circuits.evaluate.evaluate`.

    Raises:
        ValueError: as :func:`~attnlab.circuits.evaluate.evaluate`, for counts that cannot be had, or an unknown ``select``.
    """
    counts, graphs = curve_graphs(scores, edge_counts, select=select, absolute=absolute)
    values = _faithfulness(model, graphs, pairs, metric, ablation, batch_size)
    return curve_of(counts, graphs, values)


def curve_graphs(
    scores: EdgeScores,
    edge_counts: Sequence[int] | None = None,
    *,
    select: Literal["top", "greedy"] = "top",
    absolute: bool = True,
) -> tuple[list[int], list[Graph]]:
    """The edge counts of a :func:`sparsity_curve` and its pruned circuits."""
    choosers: dict[str, Callable[..., Graph]] = {"top": Graph.top_n, "greedy": Graph.greedy}
    if select not in choosers:
        raise ValueError(f"select={select!r} is unknown; use 'top' or 'greedy'")
    total = scores.wiring.n_edges
    counts = sorted({max(1, round(share * total)) for share in SHARES} if edge_counts is None else set(edge_counts))
    return counts, [choosers[select](scores, n, absolute=absolute).prune() for n in counts]


def curve_of(counts: Sequence[int], graphs: Sequence[Graph], values: Sequence[Faithfulness]) -> SparsityCurve:
    """The curve through circuits that were measured already."""
    total = graphs[0].wiring.n_edges
    frame = pd.DataFrame(
        {
            "n_edges": counts,
            "kept": [len(graph) for graph in graphs],
            "share": [n / total for n in counts],
            "ratio_of_means": [f.ratio_of_means for f in values],
            "mean_of_ratios": [f.mean_of_ratios for f in values],
        }
    )
    inner = frame[frame.share.between(0, 1, inclusive="neither")]
    share = np.array([0.0, *inner.share, 1.0])
    line = np.array([0.0, *inner.ratio_of_means, 1.0])
    return SparsityCurve(frame, float(np.trapezoid(line, share)), float(np.trapezoid(np.abs(1 - line), share)))


def _faithfulness(
    model: HookedLM, graphs: Sequence[Graph], pairs: Pairs, metric: Metric, ablation: Ablation, batch_size: int
) -> list[Faithfulness]:
    wiring = Wiring.of(model.spec)
    every = [*graphs, Graph.full(wiring), Graph.empty(wiring)]
    *circuits, whole, ablated = evaluate_many(model, every, pairs, [metric], ablation=ablation, batch_size=batch_size)[
        :, 0
    ]
    return [Faithfulness(circuit, whole, ablated) for circuit in circuits]
