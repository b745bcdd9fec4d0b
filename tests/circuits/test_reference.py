"""Published circuits: counts and disputed heads. ROC: against counting pairs, its invariances, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import Node
from attnlab.circuits.edges import Wiring
from attnlab.circuits.graph import Graph
from attnlab.circuits.reference import REFERENCE_CIRCUITS, roc

IOI = REFERENCE_CIRCUITS["ioi/gpt2-small"]


def pair_counting(scores, truth):
    """Probability that a member outranks another, ties counting half."""
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth)
    difference = scores[truth][:, None] - scores[~truth]
    return ((difference > 0) + (difference == 0) / 2).mean()


@pytest.mark.parametrize(
    ("name", "heads", "mlps"),
    [("ioi/gpt2-small", 26, None), ("greater-than/gpt2-small", 9, 8), ("docstring/attn-only-4l", 6, 0)],
)
def test_published_counts(name, heads, mlps):
    circuit = REFERENCE_CIRCUITS[name]
    assert len(circuit.heads()) == heads == sum(map(len, circuit.roles.values()))
    assert (None if circuit.mlps is None else len(circuit.mlps)) == mlps
    for variant, change in circuit.variants.items():
        assert set(map(Node.parse, change.removed)) <= circuit.heads()
        assert not set(map(Node.parse, change.added)) & circuit.heads()
        assert len(circuit.heads(variant)) == heads + len(change.added) - len(change.removed)
    assert all(
        h.layer < circuit.n_layers and h.head < circuit.n_heads
        for v in (None, *circuit.variants)
        for h in circuit.heads(v)
    )


def test_the_disputed_heads_stand_in_both_lists():
    assert IOI.role("9.0") == "backup name mover"
    assert IOI.role("11.3") is None
    assert IOI.labels(["9.0", "11.3", "9.9"]).tolist() == [True, False, True]
    assert IOI.labels(["9.0", "11.3", "9.9"], "sae-circuits").tolist() == [False, True, True]


def test_the_graph_of_a_circuit_has_its_nodes():
    wiring = Wiring(12, 12)
    mlps = {f"m{layer}" for layer in range(12)}
    heads = {f"a{head.layer}.h{head.head}" for head in IOI.heads()}
    graph = IOI.graph(wiring)
    assert set(graph.nodes()) == heads | mlps | {"input", "logits"}
    assert graph == graph.prune()
    years = REFERENCE_CIRCUITS["greater-than/gpt2-small"]
    assert set(years.graph(wiring, "authors' code").nodes()) >= {"a5.h1", "a8.h8", "m9"}
    assert set(years.graph(wiring).nodes()) & mlps == set(years.mlps)
    assert isinstance(REFERENCE_CIRCUITS["docstring/attn-only-4l"].graph(Wiring(4, 8)), Graph)


def test_roc_of_perfect_reversed_and_tied_rankings():
    truth = np.arange(20) >= 15
    assert roc(np.arange(20), truth).auc == 1
    assert roc(-np.arange(20), truth).auc == 0
    assert roc(np.zeros(20), truth).auc == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_roc_counts_pairs_and_only_order_matters(seed):
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, size=63) / 5, rng.random(63) < 0.3  # many ties
    found = roc(scores, truth)
    assert found.auc == pytest.approx(pair_counting(scores, truth), abs=1e-12)
    assert roc(np.exp(3 * scores), truth).auc == pytest.approx(found.auc, abs=1e-12)
    assert roc(-scores, truth).auc == pytest.approx(1 - found.auc, abs=1e-12)
    points = found.points
    assert list(points.columns) == ["threshold", "false_positive_rate", "true_positive_rate"]
    assert points.iloc[0, 1:].tolist() == [0, 0]
    assert points.iloc[-1, 1:].tolist() == [1, 1]
    for row in points.iloc[1:].itertuples():
        assert row.true_positive_rate == pytest.approx((scores[truth] >= row.threshold).mean())
        assert row.false_positive_rate == pytest.approx((scores[~truth] >= row.threshold).mean())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"variant='acdc' is unknown; use None or one of \['sae-circuits'\]"):
        IOI.heads("acdc")
    with pytest.raises(ValueError, match="wiring has 3 x 2 heads; the circuit is one of gpt2 with 12 x 12"):
        IOI.graph(Wiring(3, 2))
    with pytest.raises(ValueError, match=r"scores has shape \(3,\) and truth \(2,\)"):
        roc([1, 2, 3], [True, False])
    with pytest.raises(ValueError, match="truth is of type int64; give booleans"):
        roc([1, 2], [1, 0])
    with pytest.raises(ValueError, match=r"scores\[1\] is not finite"):
        roc([1, np.nan], [True, False])
    for truth in ([True, True], [False, False]):
        with pytest.raises(ValueError, match="a curve needs members and others"):
            roc([1, 2], truth)
