"""How much two rankings of heads agree, and how much they would agree by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from attnlab.circuits.scores import Scores


def top_share(scores: Scores, share: float) -> set[str]:
    """The heads whose absolute score is among the top ``share`` (0 < share <= 1) of all measured heads.

    Raises:
        ValueError: if ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]; 0.02 means the top 2%")
    return {str(node) for node in scores.top(count(len(scores.groups), share))}


def count(n_heads: int, share: float) -> int:
    """Heads in the top ``share`` of ``n_heads``, rounded to the nearest, at least one."""
    return max(1, round(n_heads * share))


def overlap(a: Scores, b: Scores, share: float) -> int:
    """Heads in both top lists.

    Raises:
        ValueError: if ``share`` is out of range or the two did not measure the same heads.
    """
    if set(a.groups) != set(b.groups):
        raise ValueError(
            f"a holds {len(a.groups)} groups and b {len(b.groups)}, not the same ones; compare rankings of the same heads"
        )
    return len(top_share(a, share) & top_share(b, share))


def chance(n_heads: int, k: int, level: float = 0.99) -> tuple[float, int]:
    """Mean and upper ``level`` quantile of the overlap of two random ``k``-subsets of ``n_heads`` heads.

    The overlap is hypergeometric with mean k^2 / n. "Random" means that every head is as likely as any other: heads that
    matter for everything break this, which is why a control task is needed besides.

    Raises:
        ValueError: unless ``0 < k <= n_heads``.
    """
    if not 0 < k <= n_heads:
        raise ValueError(f"k={k} must lie between 1 and n_heads={n_heads}")
    return k * k / n_heads, int(hypergeom(n_heads, k, k).ppf(level))


def overlap_curve(
    a: Scores,
    b: Scores,
    shares: Sequence[float] = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    level: float = 0.99,
) -> pd.DataFrame:
    """Overlap against threshold: columns ``share, k, overlap, fraction, chance, chance_high``."""
    n = len(a.groups)
    rows = []
    for share in shares:
        k = count(n, share)
        mean, high = chance(n, k, level)
        shared = overlap(a, b, share)
        rows.append(
            {"share": share, "k": k, "overlap": shared, "fraction": shared / k, "chance": mean, "chance_high": high}
        )
    return pd.DataFrame(rows)


def overlap_interval(
    a: Scores, b: Scores, share: float, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the overlap when both data sets are resampled (percentile bootstrap over pairs).

    Resampling adds noise to both rankings, so the bootstrap distribution lies below the overlap of the full data; the
    interval is widened to hold the point value.
    """
    rng = np.random.default_rng(seed)
    k = count(len(a.groups), share)

    def resampled_top(scores: Scores) -> list[set[int]]:
        picks = rng.integers(scores.effect.shape[1], size=(draws, scores.effect.shape[1]))
        means = np.abs(scores.effect[:, picks].mean(-1))  # [G, draws]
        return [set(column) for column in np.argsort(-means, axis=0, kind="stable")[:k].T.tolist()]

    sizes = [len(x & y) for x, y in zip(resampled_top(a), resampled_top(b), strict=True)]
    point = overlap(a, b, share)
    low, high = np.quantile(sizes, [(1 - level) / 2, (1 + level) / 2])
    return float(min(low, point)), float(max(high, point))
