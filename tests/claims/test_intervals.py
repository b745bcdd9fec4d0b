"""Intervals: known cases, coverage, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.claims import bootstrap, bootstrap_mean, mean_and_range


def test_equal_values_have_no_spread() -> None:
    assert bootstrap_mean([2.5, 2.5, 2.5]) == (2.5, 2.5)


def test_interval_is_reproducible_and_follows_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=13)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_mean(values, draws=4000)
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert high - low == pytest.approx(expected, rel=0.08)  # 4000 draws put about 3% of noise on a 2.5% quantile


def test_higher_level_is_wider() -> None:
    values = np.random.default_rng(0).normal(size=30)
    narrow, wide = bootstrap_mean(values, level=0.8), bootstrap_mean(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_any_statistic_of_the_picked_items() -> None:
    table = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
    low, high = bootstrap(3, lambda picks: table[picks][..., 1].mean(1) / table[picks][..., 0].mean(1))
    assert low == high == 2.0


@pytest.mark.parametrize("n", [0, 1])
def test_one_item_has_no_spread(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}"):
        bootstrap(n, lambda picks: picks.mean(1))


def test_a_few_seeds_have_a_mean_and_a_range() -> None:
    assert mean_and_range(iter([4.0, 1, 2.5])) == (2.5, (1.0, 4.0))
    assert mean_and_range(np.array([3])) == (3.0, (3.0, 3.0))
    with pytest.raises(ValueError, match="values: none given"):
        mean_and_range([])
