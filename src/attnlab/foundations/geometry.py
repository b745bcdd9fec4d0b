"""Planar problems whose answer is a list of input indices, with exact solutions, for the chapter ``foundations/pointer-networks``.

Points are arrays [B, n, 2]; B instances of one size are solved together. A solution names points by their index from 0. As a target
for a network (``hull_targets``, ``delaunay_targets``, ``tour_targets``) an index is shifted by one, since 0 is the stop
symbol, and rows are padded with ``data.IGNORE``.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import Delaunay

from attnlab.data import IGNORE

STOP = 0  # the symbol that ends an answer; point j is the symbol j + 1
NOBODY = -1  # pads a solution
LARGEST_TOUR = 16  # Held-Karp keeps 2^(n-1) tables


def uniform_points(rng: np.random.Generator, batch: int, n: int) -> np.ndarray:
    """Points drawn independently and uniformly from the unit square, [B, n, 2].

    Raises:
        ValueError: fewer than three points, or no instance.
    """
    if n < 3 or batch < 1:
        raise ValueError(f"batch={batch}, n={n}: at least 1 instance of at least 3 points is wanted")
    return rng.random((batch, n, 2))


# ------------------------------------------------------------------------------------------------------------ convex hull


def hulls(points: np.ndarray) -> np.ndarray:
    """The convex hull of every instance: vertices counter-clockwise from the one with the lowest index, [B, n].

    Gift wrapping for all instances at once. From the lowest point on the directions of the edges turn from 0 to 2 pi, so
    the next vertex is the point at the smallest angle not yet passed.

    Args:
        points: [B, n, 2], no three on a line.

    Returns:
        indices, padded with ``NOBODY``.

    Raises:
        ValueError: a wrong shape, fewer than three points, numbers that are not finite.
    """
    points = checked(points)
    batch, n, _ = points.shape
    rows = np.arange(batch)
    low = points[..., 1].min(1, keepdims=True)
    start = np.where(points[..., 1] == low, points[..., 0], np.inf).argmin(1)  # of equally low ones the leftmost
    current, heading = start, np.zeros(batch)
    order, open_ = np.full((batch, n), NOBODY), np.ones(batch, dtype=bool)
    for step in range(n):
        order[open_, step] = current[open_]
        edge = points - points[rows, current][:, None]  # [B, n, 2]
        angle = np.arctan2(edge[..., 1], edge[..., 0]) % (2 * np.pi)
        angle[(angle < heading[:, None]) | (edge == 0).all(-1)] = np.inf
        current = angle.argmin(1)
        heading = angle[rows, current]
        open_ &= current != start
        if not open_.any():
            break
    return from_lowest(order)


def from_lowest(order: np.ndarray) -> np.ndarray:
    """Closed sequences [B, M] turned so that each starts at its lowest index."""
    rows, size = np.arange(len(order))[:, None], (order != NOBODY).sum(1, keepdims=True)  # [B, 1]
    first = np.where(order == NOBODY, order.max(initial=0) + 1, order).argmin(1)[:, None]
    place = np.arange(order.shape[1])
    return np.where(place < size, order[rows, (first + place) % np.maximum(size, 1)], NOBODY)


def hull_targets(points: np.ndarray) -> np.ndarray:
    """The paper's format: the hull, its first point again, stop; [B, M + 2] for at most M vertices (section 2.3, figure 2)."""
    order = hulls(points)
    size, rows = (order != NOBODY).sum(1), np.arange(len(order))
    targets = np.full((len(order), size.max() + 2), IGNORE)
    targets[:, :-2] = as_symbols(order[:, : size.max()])
    targets[rows, size] = order[:, 0] + 1
    targets[rows, size + 1] = STOP
    return targets


# ------------------------------------------------------------------------------------------------- Delaunay triangulation


def triangles(points: np.ndarray) -> np.ndarray:
    """The Delaunay triangulation of one instance [n, 2]: [T, 3], in the paper's order.

    Each triangle lists its vertices by index; triangles go by the coordinates of their incenters, x first.
    """
    found = np.sort(Delaunay(checked(points[None])[0]).simplices, axis=1)
    center = incenters(points, found)
    return found[np.lexsort((center[:, 1], center[:, 0]))]


def incenters(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Centre of the inscribed circle of each triangle [T, 3]: its corners weighted by the length of the opposite side."""
    p = points[corners]  # [T, 3, 2]
    side = np.linalg.norm(np.roll(p, -1, axis=1) - np.roll(p, 1, axis=1), axis=-1)  # side[i] lies opposite to corner i
    center: np.ndarray = (side[..., None] * p).sum(1) / side.sum(1, keepdims=True)
    return center


def delaunay_targets(points: np.ndarray) -> np.ndarray:
    """All triangles one after the other, then stop, [B, 3 T + 1] for at most T triangles."""
    lists = [triangles(p).ravel() + 1 for p in checked(points)]
    targets = np.full((len(lists), max(map(len, lists)) + 1), IGNORE)
    for row, symbols in zip(targets, lists, strict=True):
        row[: len(symbols)], row[len(symbols)] = symbols, STOP
    return targets


# ----------------------------------------------------------------------------------------------------- travelling salesman


def tours(points: np.ndarray) -> np.ndarray:
    """The shortest closed tour of every instance by Held and Karp's dynamic programme, [B, n].

    It starts at point 0. Of its two directions we take the one whose second index is smaller (the paper leaves this open).

    Raises:
        ValueError: more than ``LARGEST_TOUR`` points, besides what ``checked`` refuses.
    """
    points = checked(points)
    batch, n, _ = points.shape
    if n > LARGEST_TOUR:
        raise ValueError(f"points: n={n} needs 2^{n - 1} tables; at most {LARGEST_TOUR} points are solved exactly")
    between = distances(points)
    others = range(n - 1)  # point k + 1 is bit k of a set
    # best[visited, :, k]: the shortest way from 0 through the points of the set ``visited`` that ends at point k + 1
    best = np.full((2 ** (n - 1), batch, n - 1), np.inf)
    for k in others:
        best[1 << k, :, k] = between[:, 0, k + 1]
    for visited in range(1, 2 ** (n - 1)):
        if visited & (visited - 1):  # at least two points
            for k in others:
                if visited >> k & 1:
                    best[visited, :, k] = (best[visited ^ (1 << k)] + between[:, 1:, k + 1]).min(1)
    return _one_direction(_walk_back(best, between))


def _walk_back(best: np.ndarray, between: np.ndarray) -> np.ndarray:
    """From the table of shortest ways to the tours [B, n], last point first."""
    batch, n = len(between), between.shape[1]
    rows, visited = np.arange(batch), np.full(batch, 2 ** (n - 1) - 1)
    order, to = np.zeros((batch, n), dtype=np.int64), np.zeros(batch, dtype=np.int64)
    for place in range(n - 1, 0, -1):
        k = (best[visited, rows] + between[rows, to, 1:]).argmin(1)
        to = order[:, place] = k + 1
        visited ^= 1 << k
    return order


def _one_direction(order: np.ndarray) -> np.ndarray:
    flipped = np.concatenate([order[:, :1], order[:, :0:-1]], axis=1)
    return np.where((order[:, 1] < order[:, -1])[:, None], order, flipped)


def tour_targets(points: np.ndarray) -> np.ndarray:
    """The tour from point 0, then stop, [B, n + 1]."""
    order = tours(points)
    return np.concatenate([order + 1, np.full((len(order), 1), STOP)], axis=1)


def tour_length(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Length of closed tours [B, n], the way home included, [B]."""
    stops = np.take_along_axis(points, order[..., None], axis=1)
    length: np.ndarray = np.linalg.norm(stops - np.roll(stops, -1, axis=1), axis=-1).sum(1)
    return length


def nearest_neighbour(points: np.ndarray) -> np.ndarray:
    """Tours that always go on to the nearest point not yet visited, from point 0, [B, n]."""
    between, rows = distances(checked(points)), np.arange(len(points))
    order = np.zeros(points.shape[:2], dtype=np.int64)
    for place in range(1, points.shape[1]):
        between[rows, :, order[:, place - 1]] = np.inf  # nobody returns there
        order[:, place] = between[rows, order[:, place - 1]].argmin(1)
    return order


def distances(points: np.ndarray) -> np.ndarray:
    """Euclidean distances between the points of each instance, [B, n, n]."""
    apart: np.ndarray = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    return apart


# ---------------------------------------------------------------------------------------------------------------- details


def as_symbols(order: np.ndarray) -> np.ndarray:
    """Indices as symbols of a target: one more, and ``data.IGNORE`` where nobody is."""
    return np.where(order == NOBODY, IGNORE, order + 1)


def checked(points: np.ndarray) -> np.ndarray:
    """The points as float64.

    Raises:
        ValueError: no array [B, n, 2] with n >= 3, or numbers that are not finite.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] < 3 or not len(points):
        raise ValueError(f"points: [B, n, 2] with n >= 3 is wanted, not {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError("points: a coordinate is not finite; leave such instances out")
    return points
