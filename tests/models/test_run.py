"""Configurations, learning rates and histories."""

from __future__ import annotations

import math

import pytest

from attnlab.models.run import History, TrainConfig, learning_rate


class TestSchedule:
    def test_warmup_rises_linearly_to_the_rate(self):
        config = TrainConfig(steps=20, lr=0.4, warmup=4, schedule="constant")
        assert [learning_rate(config, step) for step in range(1, 7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])

    @pytest.mark.parametrize("warmup", [0, 3])
    def test_linear_falls_by_equal_steps_and_would_reach_the_floor_next(self, warmup):
        config = TrainConfig(steps=warmup + 8, lr=1.0, warmup=warmup, schedule="linear", floor=0.2)
        rates = [learning_rate(config, warmup + 1 + i) for i in range(8)]
        assert rates == pytest.approx([1 - 0.1 * i for i in range(8)])

    def test_cosine_starts_at_the_rate_halves_midway_and_is_symmetric(self):
        config = TrainConfig(steps=10, lr=2.0)
        rates = [learning_rate(config, step) for step in range(1, 11)]
        assert rates[0] == 2.0
        assert rates[5] == pytest.approx(1.0)
        assert [a + b for a, b in zip(rates[1:], rates[:0:-1], strict=True)] == pytest.approx([2.0] * 9)
        assert rates[-1] == pytest.approx(1 + math.cos(0.9 * math.pi))


def test_the_final_loss_is_a_mean_over_the_end():
    history = History(step=list(range(1, 41)), loss=[9.0] * 38 + [1.0, 2.0])
    assert history.final_loss() == 1.5
    assert history.final_loss(0.001) == 2.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, "steps: a number of updates, at least 1, is wanted, not 0"),
        ({"warmup": 10}, "warmup: from 0 to 9 updates are wanted, not 10"),
        ({"lr": 0.0}, "lr: a positive rate is wanted, not 0.0"),
        ({"lr": math.nan}, "lr: a positive rate is wanted, not nan"),
        ({"floor": 1.5}, "floor: a share of lr"),
        ({"weight_decay": -0.1}, "weight_decay: 0 or more is wanted, not -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas: two numbers .* not \(0.9, 1.0\)"),
        ({"clip": 0.0}, "clip: a positive norm, or None, is wanted, not 0.0"),
        ({"seed": -1}, "seed: an integer from 0"),
        ({"schedule": "step"}, "schedule: one of .*'cosine'.* is wanted, not 'step'"),
        ({"precision": "float16"}, "precision: one of .* is wanted, not 'float16'"),
        ({"evaluate_every": 0}, "evaluate_every: a number of updates"),
        ({"checkpoint_every": -3}, "checkpoint_every: a number of updates"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        TrainConfig(**({"steps": 10} | change))
