"""The benchmark compares equal things: both ways agree on a tiny model. No time is asserted."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import activation_patch, bench


def test_both_ways_agree_on_every_head_and_pair(any_lm, make_pairs, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    pairs = make_pairs([7, 5, 7, 9])
    timing = bench.compare(any_lm, pairs, any_lm.spec.heads)
    assert timing.ours.shape == (len(any_lm.spec.heads), 4)
    assert timing.difference < 1e-5  # the library stores float32
    assert np.abs(timing.library).max() > 1e-3
    exact = activation_patch(any_lm, pairs, direction="denoise").effect
    np.testing.assert_allclose(timing.ours, exact, rtol=0, atol=1e-10)
    assert min(timing.seconds) > 0
    assert timing.library_seconds > 0
    assert f"{len(any_lm.spec.heads)} heads, 4 pairs" in str(timing)


def test_disagreement_is_an_error(lm, pairs, monkeypatch):
    right = bench.library_effect
    monkeypatch.setattr(bench, "library_effect", lambda *arguments: right(*arguments) + 1e-3)
    with pytest.raises(RuntimeError, match="the two ways disagree"):
        bench.compare(lm, pairs, lm.spec.heads[:2])


def test_heads_are_spread_over_the_model(lm):
    assert bench.spread(lm, "all") == lm.spec.heads
    assert [str(node) for node in bench.spread(lm, "3")] == ["0.0", "1.2", "2.5"]
    assert len(set(bench.spread(lm, "18"))) == 18


@pytest.mark.parametrize("heads", ["0", "19", "-1", "some", ""])
def test_what_is_no_number_of_heads_is_refused(lm, heads):
    with pytest.raises(ValueError, match=f"heads='{heads}' is understood neither"):
        bench.spread(lm, heads)
