"""Figures of the chapter ``foundations/positional-attention``."""

from __future__ import annotations

import pandas as pd
import pytest

from attnlab.figures import positional_attention as plots
from attnlab.foundations import positional_attention as chapter
from attnlab.foundations import positional_attention_runs as runs
from attnlab.models.training import seeded


def networks():
    return [
        seeded(lambda name=name: chapter.build(name, 4, width=8, hidden=8), 0) for name in ("positional", "standard")
    ]


def rows():
    return [
        {"model": model, "seed": seed, "scale": scale, "mse": 0.1 * scale**2, "relative": 0.1}
        for model in plots.MODEL_COLOURS
        for seed in (0, 1)
        for scale in runs.SCALES
    ]


@pytest.mark.parametrize("length", [2, 4, 8])
def test_an_output_is_reached_from_the_places_it_depends_on(length):
    reach = plots.reach_frame(length)
    first = reach[(reach["round"] == 1) & (reach.algorithm != "sorting")]
    for (_, output), wires in first.groupby(["algorithm", "output"]):
        assert set(wires.source) == set(range(1, output + 1))
    sorting = reach[(reach["round"] == 1) & (reach.algorithm == "sorting")]
    assert (sorting.groupby("output").source.nunique() == length).all()


def test_held_numbers_start_with_the_list_and_end_sorted():
    held = plots.held_frame(8)
    for _, one in held[held.algorithm == "sorting"].groupby("list"):
        end = one[one["round"] == one["round"].max()].number.tolist()
        start = one[one["round"] == 0].number.tolist()
        assert end == sorted(start)
        assert len(set(start)) == 8


def test_positional_cells_know_neither_list_nor_scale():
    fixed, moving = plots.explorer_frames(*networks())
    assert len(fixed) == 3 * 2 * 25
    assert set(moving.columns) - set(fixed.columns) == {"list", "c"}
    assert len(moving) == 20 * len(fixed)
    assert fixed.groupby(["layer", "head", "query"]).weight.sum().between(0.99, 1.01).all()


def test_charts_are_valid_and_small():
    found = pd.DataFrame([{"seed": 0, "scale": c, "own": c, "small": 1, "other": 2} for c in runs.SCALES])
    for chart in (
        plots.wires_chart(),
        plots.explorer_chart(*networks(), rows()),
        plots.error_chart(rows()),
        plots.surgery_chart(found),
    ):
        assert len(str(chart.to_dict())) < 900_000
        assert chart.title


def test_the_twin_answers_at_every_setting():
    assert len(plots.wires_twin().grid()) == 9
