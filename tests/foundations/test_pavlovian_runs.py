"""The worlds that models are trained on, the tokens that they read, and the command that makes the record."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from attnlab.foundations import pavlovian_runs as runs
from attnlab.foundations.pavlovian import Phase


class Oracle(nn.Module):
    """Answers a fixed share of the present cue's first channel, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: torch.Tensor | None = None

    def forward(self, x):
        self.seen = x
        return self.weight * x[..., :1]


def test_a_token_carries_this_trials_cues_and_the_last_trial():
    keys, values = np.arange(12.0).reshape(1, 3, 4), np.array([[[1.0], [2.0], [3.0]]])
    inputs, targets = runs.sequence(keys, values)
    assert inputs.shape == (1, 3, 9)
    np.testing.assert_array_equal(inputs[0, :, :4], keys[0])
    np.testing.assert_array_equal(inputs[0, 1:, 4:8], keys[0, :2])
    np.testing.assert_array_equal(inputs[0, :, 8], [0, 1, 2])
    np.testing.assert_array_equal(targets, values)


def test_reinforcers_are_sums_over_cues():
    setting = runs.Setting(features=8, trials=50, stay=0.0, change=0.0)
    inputs, targets = setting.draw(np.random.default_rng(0), 3)
    for x, y in zip(inputs[:, :, :8], targets, strict=True):
        worth, _, rank, _ = np.linalg.lstsq(x, y, rcond=1e-4)
        assert rank == 3
        np.testing.assert_allclose(x @ worth, y, atol=1e-4)


def test_worlds_stay_and_change():
    keys = runs.Setting(features=8, trials=20, stay=1.0, change=0.0).draw(np.random.default_rng(0), 2).inputs[:, :, :8]
    assert (keys == keys[:, :1]).all()
    again = runs.Setting(features=8).draw(np.random.default_rng(5), 2)
    assert all(
        (x == y).all() for x, y in zip(again, runs.Setting(features=8).draw(np.random.default_rng(5), 2), strict=True)
    )


@pytest.mark.parametrize("rule", runs.TRAINED)
def test_every_rule_is_causal(rule):
    model = runs.Setting(features=4, width=16).model(rule, 2).double()
    x = torch.randn(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(model(x)[:, :6], model(changed)[:, :6], rtol=0, atol=1e-10)


def test_an_experiment_ends_with_the_cue_alone():
    model = Oracle()
    found = runs.respond(model, [Phase("A", 1.0, 2), Phase("", 0.0, 1)], "B", 6, seed=0)
    assert model.seen.shape == (runs.ANIMALS, 4, 13)
    cues = runs.directions(np.random.default_rng([0, 1]), runs.ANIMALS, 6)
    assert found == pytest.approx(cues[:, 1, 0].mean(), abs=1e-5)
    assert model.seen[:, 2, :6].abs().max() == 0  # the pause
    assert model.seen[:, 3, 6:].abs().max() == 0  # and nothing of it in the test


def test_the_command_writes_a_record(tmp_path):
    path = tmp_path / "pavlovian.json"
    runs.main(["--record", str(path), "--tiny", "--seeds", "1", "--steps", "1"])
    record = json.loads(path.read_text())
    assert record["command"].endswith("--seeds 1 --tiny --steps 1")
    rows = record["rows"]
    assert rows[0]["zero error"] > 0
    assert [(row["rule"], row["layers"]) for row in rows[1:]] == [(r, n) for n in (1, 2) for r in runs.TRAINED]
    assert runs.spread(rows[1:], "DeltaNet", 1, "blocking")[0] == rows[3]["blocking"]


def test_a_record_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "pavlovian.json"
    tiny = ["--record", str(path), "--tiny", "--seeds", "1", "--steps", "1"]
    runs.main([*tiny, "--budget", "0"])  # one model is begun before any time has passed
    first = json.loads(path.read_text())["rows"]
    assert len(first) == 2
    runs.main([*tiny, "--resume"])
    rows = json.loads(path.read_text())["rows"]
    assert rows[:2] == first
    assert len(rows) == 1 + 2 * len(runs.TRAINED)
    with pytest.raises(SystemExit):
        runs.main([*tiny[:-1], "2", "--resume"])


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="rule='LSTM' is unknown; use one of linear attention"):
        runs.Head("LSTM", 8, 2)
    with pytest.raises(ValueError, match="rows: no DeltaNet with 3 layers"):
        runs.spread([], "DeltaNet", 3, "blocking")
