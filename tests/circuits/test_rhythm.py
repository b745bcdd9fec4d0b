"""WAAD, FAI, spans and groups against cases with known answers; peaks and circular shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import rhythm

N = 23


def maps(n: int = N, *lead: int, seed: int = 0) -> torch.Tensor:
    """Random causal attention in float64."""
    logits = torch.randn(*lead, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def looking(back: int) -> torch.Tensor:
    """Every token looks exactly ``back`` tokens back, or at token 0 where there are fewer."""
    rows = torch.arange(N)
    found = torch.zeros(N, N, dtype=torch.float64)
    found[rows, (rows - back).clamp(min=0)] = 1
    return found


# ------------------------------------------------------------------------------------------------------------- WAAD


@pytest.mark.parametrize("form", [rhythm.waad, rhythm.waad_banded])
def test_waad_of_attention_at_a_known_distance(form) -> None:
    steps = torch.arange(N, dtype=torch.float64)
    torch.testing.assert_close(form(looking(0), 5), torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(form(looking(1), 5), steps.clamp(max=1))
    torch.testing.assert_close(form(looking(N), 5), steps.clamp(max=5))  # all look at token 0: min(t, W)


def test_waad_of_uniform_attention_is_half_the_position_until_the_window_cuts() -> None:
    found = rhythm.waad(rhythm.uniform_maps(N), window=N)
    torch.testing.assert_close(found, torch.arange(N, dtype=torch.float64) / 2)
    clipped = [np.minimum(np.arange(t + 1), 4).mean() for t in range(N)]
    np.testing.assert_allclose(rhythm.waad(rhythm.uniform_maps(N), window=4).numpy(), clipped, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 7, N, 100])
def test_the_banded_form_is_the_dense_one(window: int) -> None:
    for shape in ((), (3,), (2, 3)):
        some = maps(N, *shape)
        dense = rhythm.waad(some, window)
        assert dense.shape == (*shape, N)
        torch.testing.assert_close(rhythm.waad_banded(some, window), dense, rtol=0, atol=1e-10)
        assert 0 <= float(dense.min()) <= float(dense.max()) <= window


def test_waad_grows_with_the_window_and_ends_at_the_span() -> None:
    found = torch.stack([rhythm.waad(maps(), window) for window in range(1, N + 3)])
    assert bool((found.diff(dim=0) >= -1e-12).all())
    torch.testing.assert_close(found[-1][5:].mean(), rhythm.head_spans(maps(), 5))


# -------------------------------------------------------------------------------------------------------------- FAI


@pytest.mark.parametrize("horizon", [(0, None), (1, 4), (3, 3), (10, 50), (10, None), (4, 9)])
@pytest.mark.parametrize("start", [0, 6, 11])
def test_the_banded_fai_is_the_dense_one_with_the_same_gaps(horizon, start: int) -> None:
    some = maps(N, 2)
    dense, banded = rhythm.fai(some, start, horizon), rhythm.fai_banded(some, start, horizon)
    torch.testing.assert_close(banded, dense, rtol=0, atol=1e-10, equal_nan=True)
    assert bool(dense[..., N - horizon[0] :].isnan().all()) or horizon[0] == 0
    assert bool(dense[..., start : N - horizon[0]].isfinite().all())


def test_fai_of_uniform_attention_is_a_mean_of_reciprocals() -> None:
    found = rhythm.fai(rhythm.uniform_maps(N), 0, (2, 6))
    for s in range(N - 2):
        rows = range(s + 2, min(N - 1, s + 6) + 1)
        assert float(found[s]) == pytest.approx(np.mean([1 / (t + 1) for t in rows]))


def test_fai_of_a_column_of_one_weight_is_that_weight() -> None:
    some = torch.eye(N, dtype=torch.float64) * 0.7
    some[:, 0] += 0.3
    assert float(rhythm.fai(some, 5, (10, 50))[0]) == pytest.approx(0.3)


def test_unnormalised_fai_over_the_full_horizon_counts_the_rows() -> None:
    start = 7
    found = rhythm.fai(maps(), start, (0, None))
    rows = torch.tensor([N - max(start, s) for s in range(N)])
    assert float((found * rows).sum()) == pytest.approx(N - start)


def test_rows_of_the_prompt_have_no_say() -> None:
    one, other = maps(seed=0), maps(seed=0)
    other[:9] = maps(seed=1)[:9]
    torch.testing.assert_close(rhythm.fai(one, 9, (2, 5)), rhythm.fai(other, 9, (2, 5)), equal_nan=True)
    torch.testing.assert_close(rhythm.waad(one)[9:], rhythm.waad(other)[9:])
    torch.testing.assert_close(rhythm.head_spans(one, 9), rhythm.head_spans(other, 9))


# ---------------------------------------------------------------------------------------------------- spans and groups


def test_spans_are_convex_combinations_and_groups_follow_permuted_heads() -> None:
    spans = rhythm.head_spans(maps(N, 4, 6), 3)
    assert spans.shape == (4, 6)
    assert 0 <= float(spans.min()) <= float(spans.max()) <= N - 1
    local, far = rhythm.group_heads(spans, 0.3)
    assert len(local) == len(far) == 7  # floor(0.3 * 24)
    assert not set(local) & set(far)
    assert max(float(spans[x]) for x in local) <= min(float(spans[x]) for x in far)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = rhythm.group_heads(spans[:, order], 0.3)
    assert sorted((layer, int(order[h])) for layer, h in moved[0]) == sorted(local)
    assert sorted((layer, int(order[h])) for layer, h in moved[1]) == sorted(far)


def test_exactly_a_share_of_the_heads_despite_rounding() -> None:
    local, _ = rhythm.group_heads(torch.arange(270.0).view(30, 9), 0.3)
    assert len(local) == 81  # 0.3 * 270 is a little less than 81 in floating point


def test_removed_columns_give_their_attention_to_the_rest() -> None:
    some = maps()
    found = rhythm.without_columns(some, 3)
    assert float(found[3:, :3].abs().max()) == 0
    torch.testing.assert_close(found.sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(found[10, 3:11], some[10, 3:11] / some[10, 3:11].sum())
    torch.testing.assert_close(found[:3], torch.eye(N, dtype=torch.float64)[:3])  # rows that lost everything
    torch.testing.assert_close(rhythm.without_columns(some, []), some)
    torch.testing.assert_close(rhythm.without_columns(some, [0, 1, 2]), found)


# ----------------------------------------------------------------------------------------------------------- entropy


def test_entropy_is_aligned_with_the_token_or_with_the_next() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = rhythm.token_entropy(logits, "prediction")
    torch.testing.assert_close(after, torch.distributions.Categorical(logits=logits).entropy())
    own = rhythm.token_entropy(logits)
    assert bool(own[:, 0].isnan().all())
    torch.testing.assert_close(own[:, 1:], after[:, :-1])
    sure = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    torch.testing.assert_close(rhythm.token_entropy(sure, "prediction"), torch.tensor([0.0, float(np.log(2.0))]))


# -------------------------------------------------------------------------------------------------- peaks and chance


def where(marked: np.ndarray) -> list[int]:
    return np.flatnonzero(marked).tolist()


def test_peaks_are_maxima_above_the_quantile_and_a_plateau_is_one() -> None:
    assert where(rhythm.peaks(np.array([0, 3, 0, 1, 0, 5, 0.0]), 0.5)) == [1, 3, 5]
    assert where(rhythm.peaks(np.array([0, 3, 0, 1, 0, 5, 0.0]), 0.8)) == [1, 5]
    assert where(rhythm.peaks(np.array([0, 2, 2, 0, 0, 0.0]), 0.5)) == [1]
    assert where(rhythm.peaks(np.array([0, 2, 2, 3, 0, 0.0]), 0.1)) == [3]  # a step on the way up is no peak
    assert where(rhythm.peaks(np.array([4, 0, 0, np.nan, 0, 6.0]), 0.5)) == [0, 5]
    assert where(rhythm.peaks(np.ones(9), 0.0)) == []


def test_lift_and_follows() -> None:
    marked = np.array([True, False, False, True, False, False])
    assert rhythm.lift(marked, np.array([4.0, 0, 0, 2, 0, 0])) == 2.0
    assert rhythm.lift(marked, np.array([np.nan, 0, 0, 3, 0, 0])) == pytest.approx(3 - 0.6)
    assert np.isnan(rhythm.lift(np.zeros(6, bool), np.arange(6.0)))
    second = np.array([False, False, True, False, False, False])
    assert rhythm.follows(marked, second) == 0.5
    assert rhythm.follows(marked, second, within=1) == 0.0
    assert rhythm.follows(second, marked, within=1) == 1.0
    assert rhythm.follows(second, marked, within=0) == 0.0
    assert np.isnan(rhythm.follows(np.zeros(6, bool), second))


def test_a_shift_test_knows_a_planted_rhythm_from_none() -> None:
    rng = np.random.default_rng(0)
    planted, none = [], []
    for _ in range(12):
        first = rng.random(90) < 0.1
        first[[0, -1]] = True, False  # a shift by one carries the last over to the front
        planted.append((first, np.roll(first, 1)))
        none.append((first, rng.random(90) < 0.1))
    strong, weak = (rhythm.shift_test(pairs, rhythm.follows, draws=400) for pairs in (planted, none))
    assert strong.value == 1.0
    assert strong.p == pytest.approx(1 / 401)
    assert weak.p > 0.01
    mean, (low, high) = strong.band()
    assert low < mean < high < strong.value


def test_free_shuffling_finds_a_rhythm_in_two_smooth_series_that_know_nothing_of_each_other() -> None:
    """The pitfall that circular shifts are for: neighbours in a smooth series are alike."""
    slow = np.sin(np.arange(120) / 6)
    pairs = [(slow > 0.7, np.roll(slow, 31 * i)) for i in range(1, 5)]
    shifted, shuffled = (test(pairs, rhythm.lift, draws=300) for test in (rhythm.shift_test, rhythm.shuffle_test))
    assert shifted.value == shuffled.value
    assert np.ptp(shuffled.band()[1]) < 0.6 * np.ptp(shifted.band()[1])


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rhythm.waad(None), "maps is None: fused attention forms no map; .*eager"),  # type: ignore[arg-type]
        (lambda: rhythm.waad(torch.ones(3, 4)), r"maps must be \[..., N, N\], got shape \(3, 4\)"),
        (lambda: rhythm.waad(torch.full((4, 4), 0.25)), "a token attends to a later one"),
        (lambda: rhythm.waad(0.5 * torch.eye(4)), "rows must sum to 1"),
        (lambda: rhythm.waad(torch.eye(4), 0), "window=0 must be at least 1 token"),
        (lambda: rhythm.waad_banded(torch.eye(4), -1), "window=-1 must be at least 1 token"),
        (lambda: rhythm.fai(maps(), N), f"start={N} leaves no response in {N} tokens"),
        (lambda: rhythm.fai(maps(), 0, (5, 4)), r"horizon=\(5, 4\) must be \(low, high\)"),
        (lambda: rhythm.fai(maps(), 0, (-1, 4)), r"horizon=\(-1, 4\) must be \(low, high\)"),
        (lambda: rhythm.fai(maps(), 15), "a response of 8 tokens is too short, at least 12 are needed"),
        (lambda: rhythm.fai_banded(maps(), 15), "a response of 8 tokens is too short"),
        (lambda: rhythm.head_spans(maps(), -1), "start=-1 leaves no response"),
        (lambda: rhythm.group_heads(torch.ones(4)), "spans must be a finite table"),
        (lambda: rhythm.group_heads(torch.full((2, 2), torch.nan)), "spans must be a finite table"),
        (lambda: rhythm.group_heads(torch.ones(2, 2), 0.1), "share=0.1 of 4 heads is 0 a group; 1 to 2 would do"),
        (lambda: rhythm.group_heads(torch.ones(2, 2), 0.8), "share=0.8 of 4 heads is 3 a group"),
        (lambda: rhythm.without_columns(maps(), N), "the last token must keep something"),
        (lambda: rhythm.without_columns(maps(), [-1]), r"columns=\[-1\] must lie from 0 to 21"),
        (lambda: rhythm.token_entropy(torch.ones(3, 4), "output"), "align='output' is unknown; use 'input'"),  # type: ignore[arg-type]
        (lambda: rhythm.peaks(np.arange(9.0), 1.0), r"quantile=1.0 must lie in \[0, 1\)"),
        (lambda: rhythm.peaks(np.array([1.0, np.nan, 2.0])), "too few finite values for peaks"),
        (lambda: rhythm.follows(np.ones(3, bool), np.ones(3, bool), -1), "within=-1 must be 0 tokens or more"),
        (lambda: rhythm.shift_test([], rhythm.lift), "pairs is empty; give one pair of series a response"),
        (
            lambda: rhythm.shift_test([(np.ones(3), np.ones(4))], rhythm.lift),
            r"pairs\[0\]: series of 3 and 4 tokens; equal lengths",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
