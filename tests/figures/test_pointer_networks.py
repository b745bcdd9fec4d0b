"""Figures of the chapter ``foundations/pointer-networks``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from attnlab.figures import pointer_networks as plots
from attnlab.foundations import pointer_tasks as tasks
from attnlab.models.training import seeded


def solver(kind, seed=0):
    return seeded(lambda: tasks.Setting(width=8, largest=6).build(kind), seed).eval()


@pytest.mark.parametrize("n", [5, 9])
def test_every_step_shows_a_distribution_and_the_symbol_that_was_said(n):
    points = tasks.instances(n, 1)[0]
    frame = plots.watch_frame({kind: solver(kind) for kind in (tasks.POINTER, tasks.ATTENTION)}, points)
    for (network, _), rows in frame.groupby(["network", "step"]):
        assert rows.chance.sum() == pytest.approx(1, abs=1e-3)
        assert (rows.state == "said now").sum() == 1
        assert rows.loc[rows.state == "said now", "chance"].item() == rows.chance.max()
        if network == tasks.ATTENTION:
            assert (rows[rows.symbol > 6].chance == 0).all()
    paths = plots.path_frame(frame)
    assert set(paths.columns) == {"network", "place", "x", "y"}


def test_charts_are_valid_and_small():
    solvers = {kind: solver(kind) for kind in (tasks.POINTER, tasks.ATTENTION)}
    inputs = {f"{n} points": tasks.instances(n, 1)[0] for n in (6, 12)}
    rows = pd.DataFrame(
        [
            {"updates": "400 updates", "kind": kind, "seed": seed, "n": n, "exact": 0.5, "simple": 0.9, "area": 0.99}
            for kind in tasks.KINDS
            for seed in (0, 1)
            for n in (5, 10, 20)
        ]
    )
    curves = plots.curve_frame([{"impl": tasks.POINTER, "seed": 0, "curve": [[100, 1.5], [200, 1.0]]}])
    for chart in (
        plots.watch_chart(solvers, inputs, 6),
        plots.sizes_chart(rows, 10),
        plots.learning_chart(curves),
    ):
        assert len(str(chart.to_dict())) < 500_000
        assert chart.title


def test_an_answer_is_described():
    square = np.array([[[0.1, 0.1], [0.9, 0.12], [0.88, 0.9], [0.14, 0.86], [0.5, 0.4]]])
    assert plots.measured(square, np.array([[1, 2, 3, 4, 1, 0]]), "hull") == "exact"
    assert plots.measured(square, np.array([[1, 2, 3, 1, 0, 0]]), "hull").endswith("% of the area")
    assert plots.measured(square, np.array([[1, 3, 2, 4, 1, 0]]), "hull") == "no simple polygon"
    assert plots.measured(square, np.array([[1, 5, 2, 3, 4, 0]]), "tour").endswith("% above the optimum")


def test_the_twin_answers_at_every_setting():
    panel = plots.answer_twin(
        {(kind, task): solver(kind) for kind in (tasks.POINTER, tasks.SET) for task in ("hull", "tour")}
    )
    assert {setting["task"] for setting in panel.grid(24)} == {"hull", "tour"}
