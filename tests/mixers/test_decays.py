"""Decay schedules: the papers' numbers, their order, their edges."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.mixers import lightning_log_decay, retnet_log_decay


def test_retention_keeps_31_of_32_in_the_first_head():
    decay = retnet_log_decay(8, dtype=torch.float64).exp()
    torch.testing.assert_close(decay, 1 - 2.0 ** -torch.arange(5, 13, dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["paper", "fla", "alibi"])
@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_decays_are_at_most_one_and_later_layers_remember_longer(schedule, heads):
    table = torch.stack([lightning_log_decay(heads, layer, 5, schedule=schedule) for layer in range(5)])
    assert table.shape == (5, heads)
    assert table.dtype == torch.float32
    assert (table <= 0).all()
    assert (table.diff(dim=0) >= 0).all()


def test_the_three_schedules_are_three():
    def logs(schedule, layer=1):
        return lightning_log_decay(4, layer, 3, schedule=schedule, dtype=torch.float64).tolist()

    assert logs("paper") == pytest.approx([-2 * h * 2 / 3 for h in (1, 2, 3, 4)])
    assert logs("fla") == pytest.approx([-2 * h * 2 / 3 for h in (0, 1, 2, 3)])
    assert logs("alibi") == pytest.approx([-(2.0**-p) * (0.5 + 1e-5) for p in (2, 4, 6, 8)])
    assert logs("alibi", 2) == pytest.approx([-(2.0**-p) * 1e-5 for p in (2, 4, 6, 8)])


def test_slopes_between_powers_of_two_come_from_the_next_power():
    slopes = -lightning_log_decay(6, 0, 2, schedule="alibi", dtype=torch.float64) / (1 + 1e-5)
    assert [math.log2(x) for x in slopes.tolist()] == pytest.approx([-2, -4, -6, -8, -1, -3])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="heads=0 must be a whole number, at least 1"):
        retnet_log_decay(0)
    with pytest.raises(ValueError, match="layer=3 must lie between 0 and layers - 1 = 2"):
        lightning_log_decay(4, 3, 3)
    with pytest.raises(ValueError, match="layers=1 divides by zero"):
        lightning_log_decay(4, 0, 1, schedule="alibi")
    with pytest.raises(ValueError, match="schedule='linear' is not known"):
        lightning_log_decay(4, 0, 1, schedule="linear")
