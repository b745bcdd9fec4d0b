"""Figures of the preplan-anchor chapter, from invented readings and runs."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from attnlab.circuits import rhythm
from attnlab.circuits.chain_model import Forced
from attnlab.circuits.preplan_anchor import NAMES, SINKS, Reading
from attnlab.circuits.preplan_anchor_runs import credit_table
from attnlab.figures import preplan_anchor as plots

START = 6


def reading(seed: int, n: int = 60) -> Reading:
    logits = 3 * torch.randn(2, START + n, START + n, generator=torch.Generator().manual_seed(seed))
    local, far = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    words = [("\n" if i % 17 == 16 else f" word{i}" if i % 3 else str(i)) for i in range(n)]
    entropy = np.random.default_rng(seed).random(n)
    return Reading(words, START, local, far, {"input": entropy, "prediction": entropy})


@pytest.fixture
def both() -> dict[str, Reading]:
    return {sink: reading(seed) for seed, sink in enumerate(SINKS)}


def test_boxes_stand_side_by_side_inside_the_width_and_lines_break() -> None:
    words = ["one", " two", "\n", "three", " four" * 3, "x" * 30, " y"]
    frame = plots.token_boxes(words, width=150)
    assert frame.word.tolist()[:4] == ["one", "two", "⏎", "three"]
    assert (frame.x2 > frame.x).all()
    for _, line in frame.groupby("y"):
        assert (line.x.to_numpy()[1:] >= line.x2.to_numpy()[:-1]).all()
        assert line.x2.max() <= 150 or len(line) == 1
    assert frame.y.tolist()[3] == plots.ROW  # after the line break
    assert plots.token_boxes([" ", "a"]).word.tolist() == ["·", "a"]


def test_token_frame_holds_the_series_and_the_weights_of_every_setting(both: dict[str, Reading]) -> None:
    frame = plots.token_frame(both)
    assert len(frame) == 60
    for sink, one in both.items():
        np.testing.assert_allclose(frame[f"waad {sink} 10"], one.waad(10), atol=0.006)
        assert frame[f"fai {sink}"].isna().sum() == 10
        np.testing.assert_allclose(frame[f"fai {sink}"].dropna(), 100 * one.fai()[:50], atol=0.001)
        for rule in ("local", "global"):
            assert (frame[f"{rule} {sink} 10"] == 1.5).sum() == 24
    with pytest.raises(ValueError, match="readings is empty"):
        plots.token_frame({})


def test_links_are_the_strongest_readers_and_targets(both: dict[str, Reading]) -> None:
    frame = plots.link_frame(both, most=3)
    later = frame[(frame.kind == "reads it later") & (frame.sink == "kept") & (frame.i == 5)]
    column = both["kept"].far[START + 15 :, START + 5].numpy()
    assert later.j.tolist() == (15 + np.argsort(-column, kind="stable")[:3]).tolist()
    earlier = frame[(frame.kind == "it looks at") & (frame.sink == "kept") & (frame.i == 5)]
    assert (earlier.j < 5).all()
    assert not ((frame.kind == "reads it later") & (frame.i > 49)).any()
    assert frame.groupby(["i", "kind", "sink"]).size().max() == 3


def test_the_strip_is_a_valid_chart_of_moderate_size(both: dict[str, Reading]) -> None:
    chart = plots.rhythm_figure(plots.token_frame(both), plots.link_frame(both), picked=3)
    spec = json.dumps(chart.to_dict())
    assert len(spec) < 300_000
    names = {param["name"] for param in chart.to_dict()["params"]}
    assert {"sink", "cut", "at"} <= names


def test_other_charts_are_valid(both: dict[str, Reading]) -> None:
    spans = {sink: torch.rand(3, 4, generator=torch.Generator().manual_seed(i)) + 1 for i, sink in enumerate(SINKS)}
    groups = {sink: rhythm.group_heads(table) for sink, table in spans.items()}
    null = np.random.default_rng(0).random(50)
    tests = {name: rhythm.ShiftTest(np.array([0.5, 0.6]), null) for name in NAMES}
    flags = np.zeros((5, 4), dtype=bool)
    forced = Forced(torch.zeros(5, 6), np.array([True, False, True, False]), ~flags, flags, flags.astype(int))
    rows = [
        {"case": "credit", "impl": rule, "seed": seed, "score": 50.0 + seed, "after": 60.0, "curve": [40.0, 50.0]}
        for rule in ("uniform", "random", "coupled")
        for seed in (0, 1)
    ]
    for chart in (
        plots.span_chart(spans, groups),
        plots.null_chart(tests, tests),
        plots.anchor_chart(forced, np.random.default_rng(0).random((5, 6)), np.arange(6.0)),
        plots.curves_chart(rows),
        plots.gains_chart(rows, credit_table(rows)),
    ):
        spec = json.dumps(chart.to_dict(), allow_nan=False)
        assert len(spec) < 100_000
        assert '"title"' in spec


def test_gains_are_over_random_credit_and_leave_it_out() -> None:
    rows = [
        {"case": "credit", "impl": rule, "seed": seed, "score": base + seed, "after": 1.0, "curve": [1.0]}
        for rule, base in (("random", 10.0), ("coupled", 12.5))
        for seed in (0, 1)
    ]
    spec = plots.gains_chart(rows, credit_table(rows)).to_dict()
    gains = [row["gain"] for table in spec["datasets"].values() for row in table if "seed" in row]
    assert gains == [2.5, 2.5]


def test_the_twin_answers_every_setting(both: dict[str, Reading]) -> None:
    panel = plots.rhythm_explorer({sink: [one, one] for sink, one in both.items()}, ["How many are left?"] * 2)
    tried = panel.grid()
    assert len(tried) == 48
    assert {setting["sink"] for setting in tried} == set(SINKS)
    assert {setting["horizon"] for setting in tried} == {(10, None), (10, 50), (2, 10)}


def test_peaks_are_marked_where_they_are() -> None:
    one = reading(0)
    chart = plots.peaks_chart(one, 10, (10, None), 0.8, "title").to_dict()
    marked = [
        pd.DataFrame(rows).token.tolist() for rows in chart["datasets"].values() if all(row["peak"] for row in rows)
    ]
    assert np.flatnonzero(rhythm.peaks(one.waad(10))).tolist() in marked
    assert np.flatnonzero(rhythm.peaks(one.fai((10, None)))).tolist() in marked
    assert "of the WAAD peaks are followed" in chart["description"]
