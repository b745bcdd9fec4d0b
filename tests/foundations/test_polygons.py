"""The measures: rotated and reversed answers are the same polygon, crossed ones have no area, margins say what they say."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.foundations import geometry as g
from attnlab.foundations import polygons

SQUARE = np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.4]]])


def said(*symbols):
    return np.array([symbols])


@pytest.mark.parametrize(
    ("symbols", "exact", "simple", "area"),
    [
        ((1, 2, 3, 4, 1, 0), True, True, 1),
        ((3, 4, 1, 2, 3, 0), True, True, 1),  # rotated
        ((1, 4, 3, 2, 1, 0), True, True, 1),  # reversed: the same polygon
        ((1, 2, 3, 4, 0, 0), True, True, 1),  # not closed: the same polygon
        ((1, 2, 3, 1, 0, 0), False, True, 0.5),
        ((1, 2, 3, 4, 5, 1, 0), False, True, 0.75),
        ((1, 3, 2, 4, 1, 0), False, False, None),  # crosses itself
        ((1, 2, 3, 2, 1, 0), False, False, None),  # a corner twice
        ((1, 2, 1, 0, 0, 0), False, False, None),  # two corners
        ((1, 2, 3, 4, 1, 2), False, False, None),  # never stops
        ((0, 0, 0, 0, 0, 0), False, False, None),  # says nothing
    ],
)
def test_an_answer_is_judged_as_a_polygon(symbols, exact, simple, area):
    scores = polygons.hull_scores(SQUARE, said(*symbols))
    assert scores["exact"][0] == exact
    assert scores["simple"][0] == simple
    assert np.isnan(scores["area"][0]) if area is None else scores["area"][0] == pytest.approx(area)


@pytest.mark.parametrize("n", [3, 6, 31])
def test_the_target_is_a_perfect_answer(n):
    points = g.uniform_points(np.random.default_rng(n), 25, n)
    targets = g.hull_targets(points)
    scores = polygons.hull_scores(points, np.where(targets < 0, 0, targets))
    assert scores["exact"].all()
    assert scores["simple"].all()
    assert scores["area"] == pytest.approx(1)
    assert (polygons.area(points, g.hulls(points)) > 0).all()


def test_triangles_count_in_any_order_and_only_whole():
    points = SQUARE[:, [0, 1, 2, 4]] + np.array([0.0, 0.01])
    targets = g.delaunay_targets(points)
    triples = targets[0, :-1].reshape(-1, 3)
    turned = np.concatenate([triples[::-1, ::-1].ravel(), [0]])[None]
    assert polygons.delaunay_scores(points, turned)["exact"].all()
    short = np.concatenate([triples[0], [0], triples[0]])[None]
    scores = polygons.delaunay_scores(points, short)
    assert not scores["exact"].any()
    assert scores["coverage"][0] == pytest.approx(1 / len(triples))
    assert not polygons.delaunay_scores(points, targets[:, :-1])["exact"].any()  # no stop
    assert not polygons.delaunay_scores(points, np.append(targets[0, :-1], [1, 0])[None])["exact"].any()


def test_trivial_answers_cover_part_of_the_hull():
    points = g.uniform_points(np.random.default_rng(3), 50, 12)
    for share in (polygons.half_area(points, np.random.default_rng(0)), polygons.extremes_area(points)):
        assert (share >= 0).all()
        assert (share <= 1 + 1e-12).all()
    assert polygons.half_area(points[:, :3], np.random.default_rng(0)) == pytest.approx(1)
    assert polygons.extremes_area(SQUARE[:, [4, 1, 2, 0]] * 1)[0] == pytest.approx(1)


def test_a_margin_is_the_smallest_move_that_changes_the_hull():
    assert polygons.margins(SQUARE)[0] == pytest.approx(0.4)  # the inner point above the lower edge
    flat = np.array([[[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, -0.1]]])
    assert polygons.margins(flat)[0] == pytest.approx(0.1)  # a vertex near the line of its neighbours
    points = g.uniform_points(np.random.default_rng(5), 40, 8)
    rng = np.random.default_rng(6)
    moved = points + rng.uniform(-1, 1, points.shape) * polygons.margins(points)[:, None, None] * 0.45 / np.sqrt(2)
    assert (g.hulls(moved) == g.hulls(points)).all()


def test_lateness_is_where_the_vertices_stand():
    assert polygons.lateness(SQUARE)[0] == pytest.approx(1.5 / 4)
    assert polygons.lateness(SQUARE[:, ::-1])[0] == pytest.approx(2.5 / 4)
