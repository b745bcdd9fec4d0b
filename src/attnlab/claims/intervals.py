"""Intervals that the rules of the ledger compare: bootstrapped over items, or the range of a few seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def bootstrap(
    n: int, statistic: Callable[[np.ndarray], np.ndarray], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of ``n`` items.

    Args:
        n: how many items (prompts, seeds) were measured.
        statistic: gets ``[draws, n]`` indices of resampled items and returns one value a draw, ``[draws]``.
        level: of confidence.
        draws: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: if there are fewer than two items: one item has no spread.
    """
    import numpy as np

    if n < 2:
        raise ValueError(f"n={n} items have no spread to resample; measure at least two prompts or seeds")
    values = statistic(np.random.default_rng(seed).integers(n, size=(draws, n)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean; see :func:`bootstrap`."""
    import numpy as np

    table = np.asarray(values, dtype=float)
    return bootstrap(len(table), lambda picks: table[picks].mean(1), level=level, draws=draws, seed=seed)


def mean_and_range(values: Iterable[float]) -> tuple[float, tuple[float, float]]:
    """Mean, lowest and highest of a few seeds: with three or five there is no better interval.

    Raises:
        ValueError: no value.
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("values: none given; measure at least one seed")
    return fmean(values), (min(values), max(values))
