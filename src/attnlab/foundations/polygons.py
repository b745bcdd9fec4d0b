"""How good an answer is, for the chapter ``foundations/pointer-networks``: the paper's measures, and what they are worth.

An answer is a row of symbols as a network gives it: 0 stops, j + 1 is point j. ``read`` turns it into a polygon.
"""

from __future__ import annotations

import numpy as np

from attnlab.foundations.geometry import NOBODY, STOP, checked, from_lowest, hulls, triangles


def read(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols [B, M] as polygons: indices [B, M] up to the stop, without the repeat that closes them, and who stopped [B]."""
    ended = outputs == STOP
    size = np.where(ended.any(1), ended.argmax(1), outputs.shape[1])
    closed = (size > 1) & (outputs[np.arange(len(outputs)), size - 1] == outputs[:, 0])
    order = np.where(np.arange(outputs.shape[1]) < (size - closed)[:, None], outputs - 1, NOBODY)
    return order, ended.any(1)


def area(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Signed area of polygons [B, M] by the shoelace formula, positive if counter-clockwise, [B]."""
    a, b = _edges(points, order)
    twice: np.ndarray = (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(1)
    return twice / 2


def simple(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether each polygon [B, M] is simple: at least three corners, none of them twice, no two edges that cross, [B]."""
    size = (order != NOBODY).sum(1)
    a, b = _edges(points, order)  # padding: edges from a corner to itself
    place = np.arange(order.shape[1])
    real = place < size[:, None]
    pairs = real[:, :, None] & real[:, None, :] & (place[:, None] < place)
    twice = (pairs & (order[:, :, None] == order[:, None, :])).any((1, 2))

    def side(c: np.ndarray) -> np.ndarray:  # of corner c[:, j] as seen from edge i: [B, i, j]
        return np.sign(_turn(a[:, :, None], b[:, :, None], c[:, None, :]))

    across = side(a) * side(b) < 0
    crossing = (pairs & across & across.swapaxes(1, 2)).any((1, 2))
    return (size >= 3) & ~twice & ~crossing


def same_polygon(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether two polygons [B, M] and [B, N] have the same corners in the same cyclic order, in either direction, [B]."""
    width = max(one.shape[1], other.shape[1])
    one, other = (_canonical(_padded(order, width)) for order in (one, other))
    return (one == other).all(1)


def hull_scores(points: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """The paper's measures of hulls (section 4.2), one number an instance.

    Args:
        points: [B, n, 2].
        outputs: symbols [B, M].

    Returns:
        ``exact``: the same polygon as the hull; ``simple``: a simple polygon that ended with a stop; ``area``: its share of the
        hull's area, NaN where it is not simple (the paper leaves those out and prints FAIL if they are more than 1 percent).
    """
    order, stopped = read(outputs)
    truth = hulls(points)
    fine = stopped & simple(points, order)
    covered = np.abs(area(points, order)) / area(points, truth)
    return {
        "exact": stopped & same_polygon(order, truth),
        "simple": fine,
        "area": np.where(fine, covered, np.nan),
    }


def delaunay_scores(points: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """``exact``: all triangles of the Delaunay triangulation and no others; ``coverage``: the share of them that was given (4.3)."""
    exact, coverage = [], []
    for p, row in zip(points, outputs, strict=True):
        ends = np.flatnonzero(row == STOP)
        named = row[: ends[0] if len(ends) else len(row)] - 1
        whole = len(named) // 3 * 3
        given = {frozenset(map(int, corner)) for corner in named[:whole].reshape(-1, 3)}
        truth = {frozenset(map(int, corner)) for corner in triangles(p)}
        exact.append(bool(len(ends)) and given == truth and whole == len(named))
        coverage.append(len(given & truth) / len(truth))
    return {"exact": np.array(exact), "coverage": np.array(coverage)}


# ------------------------------------------------------------------------------------------- what the area alone is worth


def half_area(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share of the hull's area that the hull of a random half of the points covers, at least three of them, [B]."""
    batch, n, _ = checked(points).shape
    some = rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1)[:, : max(3, n // 2)]
    kept = np.take_along_axis(points, some[..., None], axis=1)
    share: np.ndarray = area(kept, hulls(kept)) / area(points, hulls(points))
    return share


def extremes_area(points: np.ndarray) -> np.ndarray:
    """Share covered by the polygon of the lowest, rightmost, highest and leftmost point, [B]."""
    x, y = checked(points)[..., 0], points[..., 1]
    corners = np.stack([y.argmin(1), x.argmax(1), y.argmax(1), x.argmin(1)], axis=1)
    share: np.ndarray = area(points, corners) / area(points, hulls(points))  # a corner that comes twice adds no area
    return share


def margins(points: np.ndarray) -> np.ndarray:
    """How far some point must move, at least, before the hull has other vertices, [B]: small if three points almost are in line.

    The smaller of two distances: of a vertex from the line through its neighbours, and of an inner point from the edges.
    """
    points, order = checked(points), hulls(points)
    size = (order != NOBODY).sum(1)
    place, rows = np.arange(order.shape[1]), np.arange(len(order))[:, None]
    real = place < size[:, None]
    a, b = _edges(points, order)
    before = points[rows, order[rows, (place - 1) % size[:, None]]]
    height = np.where(real, np.abs(_turn(before, a, b)) / _safe(np.linalg.norm(b - before, axis=-1)), np.inf)  # [B, M]
    depth = _turn(a[:, :, None], b[:, :, None], points[:, None]) / _safe(np.linalg.norm(b - a, axis=-1))[..., None]
    inner = np.ones(points.shape[:2], dtype=bool)
    np.put_along_axis(inner, np.where(real, order, order[:, :1]), False, axis=1)
    depth = np.where(real[:, :, None] & inner[:, None], depth, np.inf)  # [B, M, n]
    return np.minimum(height.min(1), depth.min((1, 2)))


def lateness(points: np.ndarray) -> np.ndarray:
    """Mean place in the input of the hull's vertices, from 0 (all come first) to 1, [B]."""
    order = hulls(points)
    real = order != NOBODY
    mean: np.ndarray = np.where(real, order, 0).sum(1) / real.sum(1) / (points.shape[1] - 1)
    return mean


# ---------------------------------------------------------------------------------------------------------------- details


def _edges(points: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From and to of every edge, [B, M, 2] each; padding gives edges from the first corner to itself."""
    size = np.maximum((order != NOBODY).sum(1), 1)[:, None]
    place, rows = np.arange(order.shape[1]), np.arange(len(order))[:, None]
    real = place < size
    start = np.where(real, order, order[:, :1])
    end = np.where(real, order[rows, (place + 1) % size], order[:, :1])
    return points[rows, start], points[rows, end]


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Twice the signed area of the triangle a, b, c: positive if c lies to the left of the way from a to b."""
    turned: np.ndarray = (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )
    return turned


def _canonical(order: np.ndarray) -> np.ndarray:
    """From the lowest index on, in the direction whose second index is the smaller one."""
    order = from_lowest(order)
    size, rows = (order != NOBODY).sum(1, keepdims=True), np.arange(len(order))[:, None]
    place = np.arange(order.shape[1])
    back = np.where(place < size, order[rows, -place % np.maximum(size, 1)], NOBODY)
    last = np.take_along_axis(order, np.maximum(size - 1, 0), axis=1)
    return np.where((size >= 3) & (order[:, 1:2] > last), back, order)


def _padded(order: np.ndarray, width: int) -> np.ndarray:
    return np.pad(order, ((0, 0), (0, width - order.shape[1])), constant_values=NOBODY)


def _safe(length: np.ndarray) -> np.ndarray:
    return np.where(length > 0, length, 1.0)
