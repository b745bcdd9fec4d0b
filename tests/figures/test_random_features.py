"""Figures of the chapter ``foundations/random-features``."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from attnlab.figures import random_features as plots
from attnlab.foundations import random_features_runs as runs
from attnlab.foundations.random_features_heads import OFFSETS

TINY = runs.SIZES["tiny"][0]


@pytest.fixture(scope="module")
def table():
    return pd.DataFrame([row for seed in (0, 1) for row in TINY.run(seed)])


def size(chart):
    return len(json.dumps(chart.to_dict()))


def test_the_explorer_offers_every_target_and_the_biases_that_ran(table):
    spec = plots.explorer_chart(table, name="rec").to_dict()
    params = {param["name"]: param for param in spec["params"] if "bind" in param}
    assert params["rec_target"]["bind"]["options"] == [target.name for target in runs.TARGETS + runs.PURE]
    assert params["rec_mu"]["bind"]["options"] == [0.0, 1.0, 4.0]
    assert "rf_" not in json.dumps(spec)
    rows = next(data for data in spec["datasets"].values() if "model" in data[0])
    assert len(rows) == 7 * 2 * 15
    assert min(row["low"] for row in rows) >= plots.LEAST  # a logarithmic axis has no zero
    assert {row["model"] for row in rows} == set(plots.MODELS)


def test_gains_say_who_gains(table):
    chart = plots.gains_chart(runs.gains(table), 40)
    rows = next(data for data in chart.to_dict()["datasets"].values() if "change" in data[0])
    assert {row["labels"] for row in rows} == {40}
    for row in rows:
        expected = "gains" if row["high"] < 1 else "loses" if row["low"] > 1 else "undecided"
        assert row["change"] == expected


def test_charts_of_the_kernel_are_valid_and_keep_the_limit():
    errors = pd.DataFrame(
        [
            {"seed": s, "heads": M, "kernel": k, "error": 0.1}
            for s in (0, 1)
            for M in (10, 100)
            for k in ("all pairs", "one to one")
        ]
    )
    curve = pd.DataFrame([{"seed": 0, "heads": M, "target": "keys 2", "error": 0.2} for M in (8, 16, None)])
    chart = plots.kernel_chart(errors, curve)
    assert size(chart) < 20_000
    assert "test error" in json.dumps(chart.to_dict())


def test_the_map_of_heads_starts_at_the_largest_ratio():
    rows = [
        {"layer": layer, "head": head, "name": f"{layer}.{head}", "ratio": ratio, "limit": 0.1, "low limit": -0.1}
        | {f"at {t}": ratio for t in OFFSETS}
        for layer, head, ratio in ((0, 0, -4.0), (0, 1, 0.05), (1, 0, 2.5), (1, 1, 0.3))
    ]
    spec = plots.heads_chart(pd.DataFrame(rows)).to_dict()
    picked = next(param for param in spec["params"] if param["name"] == "rf_head")
    assert picked["value"] == [{"name": "1.0"}]


def test_the_twin_answers_at_every_setting():
    tried = plots.weight_twin().grid()
    assert {setting["d"] for setting in tried} >= {3, 64}
    assert {setting["mu"] for setting in tried} >= {0.0, 8.0}
