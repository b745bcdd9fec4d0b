"""Figures of the lightning-attention-2 chapter, from counts and invented timings."""

from __future__ import annotations

import pandas as pd
import pytest

from attnlab.figures import lightning_attention_2 as plots


def test_every_entry_of_the_causal_matrix_is_drawn_once() -> None:
    frame = plots.tile_frame(20, chunks=(1, 6, 20))
    assert set(frame.how) == {plots.INSIDE, plots.THROUGH}
    for chunk, rows in frame.groupby("chunk"):
        for t, bars in rows.groupby("t"):
            keys = [key for first, last in zip(bars["first"], bars["last"], strict=True) for key in range(first, last)]
            assert sorted(keys) == list(range(t + 1)), (chunk, t)
        inside = rows[rows.how == plots.INSIDE]
        assert (inside["first"] // chunk == inside.t // chunk).all()


def test_costs_pull_in_opposite_directions() -> None:
    frame = plots.cost_frame(64)
    for _, rows in frame[frame.part == plots.SUM].groupby("width"):
        assert rows.kFLOP.is_monotonic_increasing
        assert rows.steps.is_monotonic_decreasing
    parts = frame.pivot_table(index=["width", "chunk"], columns="part", values="kFLOP")
    pd.testing.assert_series_equal(parts[plots.SUM], parts[plots.INSIDE] + parts[plots.THROUGH], check_names=False)
    level = parts.loc[(32, 32)]
    assert level[plots.INSIDE] == level[plots.THROUGH]


def timed() -> pd.DataFrame:
    speeds = {"tiled": (100.0, 100.0, 101.0), "softmax": (300.0, 90.0, 30.0), "masked product": (80.0, 20.0)}
    rows = [
        {"form": form, "length": n, "round": r, "seconds": 1 / speed, "tokens/s": speed * (1 + 0.01 * r)}
        for form, all_speeds in speeds.items()
        for n, speed in zip((512, 1024, 2048), all_speeds, strict=False)
        for r in (0, 1)
    ]
    return pd.DataFrame(rows)


def law() -> pd.DataFrame:
    rows = [
        {"impl": impl, "kind": kind, "pass": way, "T": T, "ms": ms * factor, "floor_ms": 0.25 * factor}
        for way, factor in (("forward", 1.0), ("forward+backward", 3.0))
        for impl, kind, ms in (("attnlab", "ours", 0.4), ("fla chunk", "linear", 0.8), ("SDPA", "softmax", 2.0))
        for T in (1024, 4096)
    ]
    return pd.DataFrame(rows)


def test_charts_are_valid_and_fit_a_page() -> None:
    chunks = pd.DataFrame({"chunk": [4, 8, 16], "round": 0, "ms": [30.0, 12.0, 40.0]})
    for chart in (
        plots.tile_map(chunk=8, width=16, row=3),
        plots.chunk_chart(chunks, width=8),
        plots.speed_chart(timed(), 812.0),
        plots.speed_chart(timed(), None),
        plots.record_chart(law()),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 200_000
        assert "'title'" in str(spec)


def test_a_crossing_is_marked_only_where_there_is_one() -> None:
    assert "overtakes at 812" in str(plots.speed_chart(timed(), 812.0).to_dict())
    assert "overtakes" not in str(plots.speed_chart(timed(), None).to_dict())


def test_ticks_are_round_and_lie_on_the_axis() -> None:
    y = plots._logs("ms", "milliseconds", pd.Series([0.38, 29.1])).to_dict()
    assert y["axis"]["values"] == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert y["scale"]["domain"] == pytest.approx([0.304, 36.375])


def test_a_launch_with_one_sequence_leaves_most_of_the_chip_without_work() -> None:
    table = plots.launch_table(65_536, 65_536, 16, 128, 64)["one forward sweep"]
    assert table["sequences in the batch"] == "1"
    assert table["programs, one a sequence, head and slice"] == "32"
    assert table["multiprocessors with work, of 132"] == "32"
    assert plots.launch_table(4096, 65_536, 16, 128, 64)["one forward sweep"]["sequences in the batch"] == "1"


def test_explorer_answers_every_setting() -> None:
    assert len(plots.launch_explorer().grid()) >= 40
