"""The table of scores: ratio of means, names, order, intervals, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import Node, NoEffectError, Scores, Spec

SPEC = Spec("made up", n_layers=2, n_heads=3, n_kv_heads=1, d_model=6, d_head=2)
GROUPS = [(Node(0, 0),), (Node(1, 2),), (Node(1),), (Node(0, 1), Node(1, 0))]
EFFECT = np.array([[1.0, 0.0, 2.0], [-4.0, -1.0, -1.0], [0.5, 0.5, 0.5], [2.0, 4.0, 6.0]])
GAP = np.array([1.0, 2.0, 3.0])


def table(effect=EFFECT, gap=GAP, groups=GROUPS, **made):
    return Scores(SPEC, groups, effect, gap, np.zeros(len(gap)), made)


def test_a_score_is_the_ratio_of_the_means():
    np.testing.assert_allclose(table().values, [0.5, -1.0, 0.25, 2.0], rtol=1e-15)


def test_groups_are_found_by_their_nodes_in_any_order_and_spelling():
    scores = table()
    assert scores.of("0.0") == pytest.approx(0.5)
    assert scores.of("L1H2") == scores.of(Node(1, 2)) == pytest.approx(-1.0)
    assert scores.of("m1") == pytest.approx(0.25)
    assert scores.of("1.0", "0.1") == scores.of("a0.h1", "1.0") == pytest.approx(2.0)


@pytest.mark.parametrize("nodes", [("0.2",), ("0.1",), ("0.0", "1.2"), ("input",), ()])
def test_a_group_that_was_not_measured_is_named(nodes):
    with pytest.raises(ValueError, match="was not measured; there are 4 groups") as error:
        table().of(*nodes)
    assert all(node in str(error.value) for node in nodes)


def test_a_node_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"node 31\.0 does not exist in made up"):
        table().of("31.0")


def test_top_ranks_single_nodes_by_absolute_score():
    assert table().top(2) == [Node(1, 2), Node(0, 0)]
    assert table().top(10) == [Node(1, 2), Node(0, 0), Node(1)]


def test_ties_go_to_the_lower_layer_even_between_an_mlp_and_a_head():
    groups = [(Node(1, 2),), (Node(1),), (Node(0, 1),), (Node(1, 0),), (Node(-1),)]
    tied = table(np.ones((5, 3)), groups=groups)
    assert [node.layer for node in tied.top(5)] == [-1, 0, 1, 1, 1]
    assert tied.top(3) == table(np.ones((5, 3)), groups=groups[::-1]).top(3)


def test_grid_holds_single_heads_only():
    expected = [[0.5, np.nan, np.nan], [np.nan, np.nan, -1.0]]
    np.testing.assert_allclose(table().grid(), expected, rtol=1e-15)


def test_frame_has_one_row_a_group():
    frame = table().frame()
    assert frame["node"].tolist() == ["0.0", "1.2", "m1", "0.1 + 1.0"]
    np.testing.assert_allclose(frame["score"], table().values)
    assert frame["layer"][:3].tolist() == [0, 1, 1]
    assert frame["head"][:2].tolist() == [0, 2]
    assert frame["head"][2:].isna().all()
    assert frame["layer"][3:].isna().all()


def test_interval_is_repeatable_ordered_and_holds_the_value():
    rng = np.random.default_rng(1)
    gap = rng.normal(3, 0.5, 200)
    scores = table(np.stack([0.4 * gap + rng.normal(0, 1, 200)]), gap, [(Node(0, 0),)])
    low, high = scores.interval("0.0")
    assert low < scores.of("0.0") < high
    assert (low, high) == scores.interval("0.0")
    narrow = scores.interval("0.0", level=0.5)
    assert low < narrow[0] < narrow[1] < high
    # standard error of the ratio of means by the delta method; the 95% interval is about 3.92 of them wide
    residual = scores.effect[0] - scores.of("0.0") * gap
    error = residual.std() / gap.mean() / 200**0.5
    assert high - low == pytest.approx(3.92 * error, rel=0.15)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """300 data sets of 40 pairs with a true score of 0.4: a 90% interval covers 84% to 95% (four standard errors below)."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        gap = rng.normal(3, 0.5, 40)
        scores = table(np.stack([0.4 * gap + rng.normal(0, 1, 40)]), gap, [(Node(0, 0),)])
        low, high = scores.interval("0.0", level=0.9, draws=300)
        hits += low <= 0.4 <= high
    assert 0.83 < hits / 300 < 0.96


def test_a_proportional_effect_has_no_interval():
    low, high = table(np.stack([0.25 * GAP]), groups=[(Node(0, 0),)]).interval("0.0")
    assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-12)


@pytest.mark.parametrize("gap", [np.zeros(3), np.array([1.0, -1.0, 0.0]), np.array([1.0, np.nan, 1.0])])
def test_no_gap_no_scores(gap):
    with pytest.raises(NoEffectError, match=r"toy data.*no effect to attribute"):
        table(gap=gap, data="toy data")


def test_no_effect_is_a_value_error():
    assert issubclass(NoEffectError, ValueError)
