"""Tasks on short lists of numbers: running sum, minimum, median and best subarray, sorting, and following pointers.

The ranges are drawn as in the code of Back De Luca et al. (2025, arXiv:2410.01686): first a range, then the numbers in it, so that
a list may be all small, all negative, or wide. A test that asks for larger values leaves out lists that training could have seen.
All targets but those of :func:`lookup` come from :data:`TASKS`; all of them scale with their input, ``f(c x) = c f(x)`` for c > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CLOSEST = 1.01  # a limit this close above the excluded one leaves too few ranges to be found by drawing


class Lists(NamedTuple):
    """A batch: ``inputs`` [B, n, F] and ``targets`` [B, n, 1]; feature 0 is the number."""

    inputs: Floats
    targets: Floats


def cumulative_sum(x: Floats) -> Floats:
    """Sum of all numbers so far, [B, n] -> [B, n]."""
    return np.cumsum(x, axis=1)


def cumulative_min(x: Floats) -> Floats:
    """Smallest number so far, [B, n] -> [B, n]."""
    return np.minimum.accumulate(x, axis=1)


def cumulative_median(x: Floats) -> Floats:
    """Median of all numbers so far, [B, n] -> [B, n]; of an even count the middle between the two in the middle."""
    return np.stack([np.median(x[:, : i + 1], axis=1) for i in range(x.shape[1])], axis=1)


def sort(x: Floats) -> Floats:
    """The numbers in ascending order, [B, n] -> [B, n]."""
    return np.sort(x, axis=1)


def max_subarray(x: Floats) -> Floats:
    """Largest sum of a run of neighbours (not empty) among the numbers so far, [B, n] -> [B, n]; Kadane's algorithm."""
    ending, best = x[:, 0], [x[:, 0]]
    for now in x.T[1:]:
        ending = np.maximum(now, ending + now)
        best.append(np.maximum(best[-1], ending))
    return np.stack(best, axis=1)


TASKS: dict[str, Callable[[Floats], Floats]] = {
    "cumulative sum": cumulative_sum,
    "cumulative min": cumulative_min,
    "cumulative median": cumulative_median,
    "sort": sort,
    "max subarray": max_subarray,
}


def ranged(rng: np.random.Generator, batch: int, length: int, limit: float, beyond: float | None = None) -> Floats:
    """Lists [B, n], each drawn uniformly in a range of its own inside ``[-limit, limit]``.

    Args:
        rng: draws ranges and numbers.
        batch: B.
        length: n.
        limit: the largest absolute value.
        beyond: leave out ranges that lie within ``[-beyond, beyond]``: lists that a training with that limit could see.

    Raises:
        ValueError: a size or limit that is not positive, or a ``limit`` less than one percent above ``beyond``.
    """
    for name, size in {"batch": batch, "length": length, "limit": limit}.items():
        if not 0 < size < np.inf:
            raise ValueError(f"{name}: a positive number is wanted, not {size}")
    if beyond is not None and limit < CLOSEST * beyond:
        raise ValueError(f"limit: {limit} leaves no ranges beyond {beyond}; at least {CLOSEST * beyond:g} is wanted")
    ends = np.sort(rng.uniform(-limit, limit, size=(batch, 2)), axis=1)
    if beyond is not None:
        while (inside := np.abs(ends).max(axis=1) <= beyond).any():
            ends[inside] = np.sort(rng.uniform(-limit, limit, size=(int(inside.sum()), 2)), axis=1)
    return rng.uniform(ends[:, :1], ends[:, 1:], size=(batch, length))


def draw(
    rng: np.random.Generator, task: str, batch: int, length: int, limit: float, beyond: float | None = None
) -> Lists:
    """A batch of a task of :data:`TASKS`: inputs [B, n, 1], targets [B, n, 1]. Arguments as in :func:`ranged`.

    Raises:
        ValueError: an unknown task, or what :func:`ranged` refuses.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is unknown; choose one of {', '.join(TASKS)}")
    x = ranged(rng, batch, length, limit, beyond)
    return Lists(x[..., None], TASKS[task](x)[..., None])


def lookup(rng: np.random.Generator, batch: int, length: int, limit: float, beyond: float | None = None) -> Lists:
    """Every place holds a number and a pointer, and wants the number at which it points. Who talks to whom is data.

    Inputs [B, n, 1 + n]: the number, then the pointer as a one-hot vector. Arguments as in :func:`ranged`, which also says what
    is refused.
    """
    x = ranged(rng, batch, length, limit, beyond)
    pointers = rng.integers(length, size=(batch, length))
    inputs = np.concatenate([x[..., None], np.eye(length)[pointers]], axis=2)
    return Lists(inputs, np.take_along_axis(x, pointers, axis=1)[..., None])
