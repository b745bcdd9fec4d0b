"""Exact solutions against scipy and brute force, target formats, and the paper's golden tour lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from attnlab.data import IGNORE
from attnlab.foundations import geometry as g

SQUARE = np.array([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def draw(batch, n, seed=0):
    return g.uniform_points(np.random.default_rng(seed), batch, n)


@pytest.mark.parametrize("n", [3, 4, 7, 50])
def test_gift_wrapping_finds_scipys_hull(n):
    points = draw(40, n)
    for p, order in zip(points, g.hulls(points), strict=True):
        truth = ConvexHull(p).vertices  # counter-clockwise
        truth = np.roll(truth, -truth.argmin())
        assert order[order != g.NOBODY].tolist() == truth.tolist()


def test_the_corners_of_a_square_from_the_lowest_index_counter_clockwise():
    assert g.hulls(SQUARE[None])[0].tolist() == [0, 4, 2, 3, g.NOBODY]


def test_a_hull_is_closed_and_stopped():
    target = g.hull_targets(SQUARE[None])[0]
    assert target.tolist() == [1, 5, 3, 4, 1, g.STOP]
    points = draw(30, 9)
    size = (g.hulls(points) != g.NOBODY).sum(1)
    targets = g.hull_targets(points)
    assert ((targets != IGNORE).sum(1) == size + 2).all()
    assert targets.shape[1] == size.max() + 2


def test_delaunay_of_four_points_in_convex_position_has_the_two_triangles_of_the_empty_circles():
    points = np.array([[0.0, 0.0], [2.0, 0.1], [2.1, 1.0], [0.1, 1.1]])
    found = g.triangles(points)
    assert len(found) == 2
    for corners in found:
        rest = next(iter(set(range(4)) - set(corners.tolist())))
        assert not inside_circle(points[corners], points[rest])


def inside_circle(corners, point):
    """The in-circle determinant, for corners in either direction."""
    rows = np.array([[*(c - point), ((c - point) ** 2).sum()] for c in corners])
    turn = np.linalg.det(np.concatenate([corners, np.ones((3, 1))], axis=1))
    return np.linalg.det(rows) * turn > 0


@pytest.mark.parametrize("n", [3, 5, 9])
def test_no_point_lies_in_the_circle_of_a_delaunay_triangle(n):
    points = draw(1, n)[0]
    for corners in g.triangles(points):
        assert (np.diff(corners) > 0).all()
        others = set(range(n)) - set(corners.tolist())
        assert not any(inside_circle(points[corners], points[other]) for other in others)


def test_delaunay_targets_go_by_incenter_and_stop():
    points = draw(6, 7)
    for p, row in zip(points, g.delaunay_targets(points), strict=True):
        kept = row[row != IGNORE]
        assert kept[-1] == g.STOP
        corners = kept[:-1].reshape(-1, 3) - 1
        centers = [tuple(c) for c in g.incenters(p, corners)]
        assert centers == sorted(centers)
    legs = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # its inscribed circle has radius 1
    assert g.incenters(legs, np.array([[0, 1, 2]]))[0] == pytest.approx([1, 1])


@pytest.mark.parametrize("n", [3, 4, 7])
def test_held_and_karp_find_what_brute_force_finds(n):
    points = draw(5, n)
    orders = np.array([(0, *rest) for rest in itertools.permutations(range(1, n))])
    for p, order in zip(points, g.tours(points), strict=True):
        lengths = g.tour_length(np.broadcast_to(p, (len(orders), n, 2)), orders)
        assert g.tour_length(p[None], order[None])[0] == pytest.approx(lengths.min(), abs=1e-12)
        assert order[0] == 0
        assert order[1] < order[-1]
        assert sorted(order) == list(range(n))


@pytest.mark.parametrize(("n", "batch", "golden"), [(5, 8000, 2.12), (10, 400, 2.87)])
def test_mean_tours_have_the_length_that_the_paper_reports(n, batch, golden):
    points = draw(batch, n, seed=1)
    assert g.tour_length(points, g.tours(points)).mean() == pytest.approx(golden, abs=0.03)


def test_the_nearest_neighbour_is_a_tour_and_no_shorter():
    points = draw(50, 8)
    order = g.nearest_neighbour(points)
    assert (np.sort(order, axis=1) == np.arange(8)).all()
    shortest = g.tour_length(points, g.tours(points))
    assert (g.tour_length(points, order) >= shortest - 1e-12).all()
    assert g.nearest_neighbour(np.array([[[0, 0], [3, 0], [1, 0], [0, 1.5]]])).tolist() == [[0, 2, 3, 1]]
    assert g.tour_targets(points).shape == (50, 9)
    assert (g.tour_targets(points)[:, -1] == g.STOP).all()


def test_a_square_tour_is_four_long():
    assert g.tour_length(SQUARE[None, [2, 3, 0, 4]], np.array([[0, 1, 2, 3]]))[0] == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.hulls(np.zeros((2, 2, 2))), r"points: \[B, n, 2\] with n >= 3 is wanted, not \[2, 2, 2\]"),
        (lambda: g.hulls(np.zeros((5, 2))), r"points: .* not \[5, 2\]"),
        (lambda: g.tours(np.full((1, 4, 2), np.nan)), "points: a coordinate is not finite"),
        (lambda: g.tours(np.zeros((1, 17, 2))), r"points: n=17 needs 2\^16 tables; at most 16"),
        (lambda: g.uniform_points(np.random.default_rng(0), 1, 2), "batch=1, n=2: at least 1 instance"),
    ],
)
def test_what_cannot_be_solved_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
