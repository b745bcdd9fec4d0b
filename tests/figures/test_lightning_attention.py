"""Figures of the lightning-attention chapter, from decays and invented measurements."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from attnlab.figures import lightning_attention as plots
from attnlab.kernels import lightning_attention_runs as runs


def test_half_lives_are_written_in_four_characters() -> None:
    assert plots.half_life(math.log(0.5)) == 1
    assert plots.half_life(0) == math.inf
    numbers = {0.0866: "0.09", 0.999: "1.0", 5.54: "5.5", 177.4: "177", 999.9: "1k", 28_391: "28k", 17.7e6: "18M"}
    assert {number: plots.short(number) for number in numbers} == numbers
    assert plots.short(math.inf) == "∞"


def test_every_head_of_every_schedule_has_a_row() -> None:
    frame = plots.decay_frame(6, 8)
    assert len(frame) == 3 * 6 * 8
    assert set(frame.schedule) == set(plots.NAMES.values())
    forever = frame[frame.label == "∞"]
    assert set(forever.schedule) == {plots.NAMES["fla"]}
    assert set(forever["head"]) == {1}
    first = frame[(frame.schedule == plots.NAMES["paper"]) & (frame.layer == 0) & (frame["head"] == 1)].iloc[0]
    assert first.log_decay == -1
    assert first.half_life == pytest.approx(math.log(2))


def test_schedules_differ_by_what_they_let_heads_remember() -> None:
    table = plots.schedule_table(12, 8)
    assert table.loc[plots.NAMES["paper"], "heads over 100 tokens"] == "0 of 96"
    assert table.loc[plots.NAMES["fla"], "heads over 100 tokens"] == "12 of 96"
    assert table.loc[plots.NAMES["paper"], "first layer, longest"] == "0.69"


def losses() -> pd.DataFrame:
    names = (*runs.JUDGED, *runs.SCHEDULES, runs.ROTARY)
    return pd.DataFrame(
        {"model": name, "seed": seed, "loss": 2.5 - 0.05 * i + 0.01 * seed}
        for i, name in enumerate(names)
        for seed in range(3)
    )


def timed() -> pd.DataFrame:
    return pd.DataFrame(
        {"model": name, "length": n, "round": r, "tokens/s": 1e5 * (1 + 0.01 * r) * (512 / n) ** slope}
        for name, slope in ((runs.OURS, 0), (runs.ROTARY, 0.5))
        for n in (512, 1024, 2048)
        for r in range(3)
    )


def test_charts_are_valid_strict_json_and_fit_a_page() -> None:
    for chart in (
        plots.decay_map(),
        plots.decay_map(2, 1, plots.NAMES["alibi"], layer=9, head=9),
        plots.loss_chart(losses(), "Which?"),
        plots.speed_chart(timed(), "Who?"),
        plots.saturation_chart(runs.saturation(8, [4, 16], seeds=(0, 1)), 8),
    ):
        body = json.dumps(chart.to_dict(), allow_nan=False)
        assert len(body) < 200_000
        assert '"title"' in body


def test_models_come_best_first_over_the_range_of_ours() -> None:
    spec = json.dumps(plots.loss_chart(losses(), "Which?").to_dict())
    assert f'"sort": ["{runs.ROTARY}", "{runs.SCHEDULES[1]}"' in spec
    assert '{"low": 2.5, "high": 2.52}' in spec


def test_a_click_starts_inside_the_model() -> None:
    spec = json.dumps(plots.decay_map(2, 4, layer=7, head=9).to_dict())
    assert '"value": [{"layer": 1, "head": 4}]' in spec


def test_explorer_answers_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNLAB_BOOK", "1")  # markup instead of drawings, which would take most of the time
    assert len(plots.decay_explorer().grid(limit=12)) == 12
