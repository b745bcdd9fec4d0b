"""Figures of the chapter ``foundations/unified-long-sequence``."""

from __future__ import annotations

import pandas as pd
import pytest

from attnlab.figures import unified_long_sequence as plots
from attnlab.foundations.unified_long_sequence import MIXERS, WORKSPACE
from attnlab.foundations.unified_long_sequence_runs import QUESTIONS, TRAINED
from attnlab.scale import LAYOUTS


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_pair_of_ranks_meets_once_and_nobody_meets_two_at_a_time(ranks):
    work = plots.work_frame(ranks, length=16 * ranks)
    for _, rows in work.groupby("layout"):
        assert len(rows) == ranks**2
        assert (rows.groupby("step")["key"].nunique() == ranks).all()
    busy = plots.busy_frame(work).set_index("layout").busy
    assert busy["zigzag"] == pytest.approx(1, abs=0.01)
    assert busy["contiguous"] < busy["striped"] <= 1


def test_charts_are_valid_and_small():
    frame = plots.matrix_frame(length=8, width=4)
    assert len(frame) == len(MIXERS) * 64
    assert frame.weight.abs().max() == 1
    small = plots.workspace_frame(length=8, width=4)
    assert len(small) == len(WORKSPACE) * 64
    assert small.groupby("mixer").weight.agg(lambda weight: weight.abs().max()).eq(1).all()
    rows = [(m, q, s, 0.5) for m in TRAINED for q in QUESTIONS for s in range(3)]
    runs = pd.DataFrame(rows, columns=["mixer", "question", "seed", "accuracy"])
    for chart in (
        plots.ring_chart(4),
        plots.matrix_chart(frame),
        plots.workspace_chart(small),
        plots.accuracy_chart(runs, 0.3),
        plots.hiding_chart(),
    ):
        assert len(str(chart.to_dict())) < 500_000
        assert chart.title


def test_the_twin_answers_at_every_setting():
    assert [setting["ranks"] for setting in plots.ring_twin().grid()] == [2, 4, 6, 8]


def test_layouts_of_the_figure_are_those_of_the_package():
    assert set(plots.work_frame(2).layout) == set(LAYOUTS)
