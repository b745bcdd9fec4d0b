"""Overlap of rankings: identities, chance against exact counting and Monte Carlo, the bootstrap interval."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom

from attnlab.circuits import Scores, Spec, chance, overlap, overlap_curve, overlap_interval, top_share
from attnlab.circuits.overlap import count

SPEC = Spec("made up", n_layers=5, n_heads=8, n_kv_heads=2, d_model=16, d_head=2)


def scores_of(values, noise=0.0, n=12, seed=0):
    """Scores with the given values of the 40 heads, and pairs that scatter around them."""
    scatter = noise * np.random.default_rng(seed).normal(size=(len(values), n))
    effect = np.asarray(values, dtype=float)[:, None] + scatter
    return Scores(SPEC, [(head,) for head in SPEC.heads], effect, np.ones(n), np.zeros(n))


def random_scores(seed):
    return scores_of(np.random.default_rng(seed).normal(size=40))


def tail(n, k, least):
    """P(overlap >= least) of two random k-subsets of n, by counting."""
    hits = sum(comb(k, i) * comb(n - k, k - i) for i in range(least, k + 1))
    return float(Fraction(hits, comb(n, k)))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_overlap_is_symmetric_and_full_with_itself(share):
    a, b = random_scores(1), random_scores(2)
    assert overlap(a, b, share) == overlap(b, a, share)
    assert overlap(a, a, share) == count(40, share)


def test_overlap_of_everything_is_everything():
    assert overlap(random_scores(1), random_scores(2), 1.0) == 40


def test_overlap_counts_shared_heads_by_absolute_value():
    values = np.arange(40.0)
    a = scores_of(values)
    b = scores_of(np.where(values % 2 == 0, -values, 0.1 * values))  # even heads keep their size, with the other sign
    assert top_share(a, 0.1) == {"4.4", "4.5", "4.6", "4.7"}
    assert top_share(b, 0.1) == {"4.0", "4.2", "4.4", "4.6"}
    assert overlap(a, b, 0.1) == 2


@pytest.mark.parametrize(
    ("n", "share", "k"), [(270, 0.02, 5), (270, 0.05, 14), (270, 0.1, 27), (384, 0.02, 8), (40, 0.001, 1)]
)
def test_a_share_becomes_a_count(n, share, k):
    assert count(n, share) == k


def test_random_sets_overlap_as_chance_says():
    """Mean k^2 / n within four standard errors of 4,000 draws, and the quantile is exceeded at most as often as it says."""
    n, k, draws = 40, 8, 4000
    rng = np.random.default_rng(0)
    sizes = np.array([len(set(rng.choice(n, k, False)) & set(rng.choice(n, k, False))) for _ in range(draws)])
    mean, high = chance(n, k, 0.99)
    assert mean == k * k / n
    assert abs(sizes.mean() - mean) < 4 * sizes.std() / draws**0.5
    assert (sizes > high).mean() < 0.01 + 4 * (0.01 * 0.99 / draws) ** 0.5


def test_overlap_of_random_rankings_is_chance_on_average():
    sizes = np.array([overlap(random_scores(2 * i), random_scores(2 * i + 1), 0.2) for i in range(300)])
    assert abs(sizes.mean() - chance(40, 8)[0]) < 4 * sizes.std() / 300**0.5


@pytest.mark.parametrize(("n", "k"), [(270, 5), (270, 14), (270, 27), (384, 8), (40, 40), (7, 3), (1, 1)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_quantile_is_the_exact_one(n, k, level):
    """The smallest q with P(overlap <= q) >= level, by counting and by scipy."""
    high = chance(n, k, level)[1]
    assert 1 - tail(n, k, high + 1) >= level - 1e-12
    assert high == 0 or 1 - tail(n, k, high) < level + 1e-12
    assert high == hypergeom.ppf(level, n, k, k)


@pytest.mark.parametrize(("k", "shared", "p"), [(14, 10, 2e-12), (27, 16, 4e-12), (5, 2, 0.003)])
def test_published_p_values(k, shared, p):
    """P(overlap >= shared) of 270 heads, to the one digit given; the quantile crosses ``shared`` just there."""
    exact = tail(270, k, shared)
    assert float(f"{exact:.0e}") == p
    assert chance(270, k, 1 - 2 * exact)[1] < shared <= chance(270, k, 1 - exact / 2)[1]


def test_the_curve_repeats_the_single_numbers():
    a, b = random_scores(1), random_scores(2)
    curve = overlap_curve(a, b, shares=(0.02, 0.1, 1.0), level=0.95)
    assert list(curve.columns) == ["share", "k", "overlap", "fraction", "chance", "chance_high"]
    for row in curve.itertuples():
        assert row.k == count(40, row.share)
        assert row.overlap == overlap(a, b, row.share)
        assert row.fraction == row.overlap / row.k
        assert (row.chance, row.chance_high) == chance(40, row.k, 0.95)
    assert curve.iloc[-1][["overlap", "fraction", "chance"]].tolist() == [40, 1, 40]


def test_the_interval_holds_the_overlap_and_repeats():
    values = np.random.default_rng(3).normal(size=40)
    a, b = scores_of(values, 0.5, seed=1), scores_of(values, 0.5, seed=2)
    low, high = overlap_interval(a, b, 0.2, draws=200)
    assert 0 <= low <= overlap(a, b, 0.2) <= high <= 8
    assert low < high
    assert (low, high) == overlap_interval(a, b, 0.2, draws=200)


def test_without_scatter_the_interval_is_a_point():
    a, b = random_scores(1), random_scores(2)
    assert overlap_interval(a, b, 0.2, draws=50) == (overlap(a, b, 0.2),) * 2


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"share={share} must lie in \(0, 1\]"):
        top_share(random_scores(0), share)


@pytest.mark.parametrize("k", [0, -1, 41])
def test_a_count_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and n_heads=40"):
        chance(40, k)


def test_rankings_of_different_heads_are_refused():
    a, b = random_scores(0), random_scores(1)
    short = Scores(SPEC, b.groups[:10], b.effect[:10], b.gap, b.base)
    for compare in (overlap, lambda x, y, s: overlap_curve(x, y, [s]), overlap_interval):
        with pytest.raises(ValueError, match="a holds 40 groups and b 10"):
            compare(a, short, 0.2)
