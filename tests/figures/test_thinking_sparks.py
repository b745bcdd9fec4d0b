"""Figures of the thinking-sparks chapter, from invented runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from attnlab.circuits.thinking_sparks import TAUS, Timeline
from attnlab.figures import thinking_sparks as plots

UPDATES = [0, 10, 20]
WORDS = ["7", "+", "5", "="]


@pytest.fixture
def lines() -> dict[str, Timeline]:
    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.ones(10)).reshape(1, 2, 5)
    found = {}
    for method in ("SFT", "GRPO", "drift"):
        later = rng.dirichlet(np.ones(10), size=2).reshape(2, 2, 5)
        kl = np.array([0, 0.1, 0.2])
        found[method] = Timeline(method, UPDATES, np.concatenate([base, later]), kl, kl, kl, np.full(3, np.nan))
    return found


@pytest.fixture
def heads(lines: dict[str, Timeline]) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    keys = [(method, at) for method in lines for at in UPDATES]
    patched = {key: rng.normal(size=(2, 5)) for key in keys}
    return plots.head_frame(lines, patched, {key: rng.dirichlet(np.ones(4), size=(2, 5)) for key in keys})


def test_head_frame_has_a_row_a_run_checkpoint_and_head(lines, heads: pd.DataFrame) -> None:
    assert len(heads) == 3 * 3 * 10
    assert (heads[heads.updates == 0].E == 0).all()
    row = heads[(heads.run == "GRPO") & (heads.updates == 20) & (heads["head"] == "1.3")].iloc[0]
    now, before = lines["GRPO"].shares[2, 1, 3], lines["GRPO"].shares[0, 1, 3]
    assert pytest.approx((now - before) / (now + before), abs=2e-3) == row.E
    assert row.before == pytest.approx(before, abs=1e-4)
    assert row[["a0", "a1", "a2", "a3"]].sum() == pytest.approx(1, abs=3e-3)
    base = heads[(heads.run == "GRPO") & (heads.updates == 0) & (heads["head"] == "1.3")].iloc[0]
    assert row["base_drop"] == base["drop"]


def test_charts_are_valid_and_fit_a_page(lines, heads: pd.DataFrame) -> None:
    methods = ["SFT", "GRPO", "drift", plots.NOISE]
    counts = pd.DataFrame(
        [
            {"regime": regime, "seed": seed, "method": method, "tau": tau, "base": 8, "emergent": 1.5, "lost": 0.0}
            for regime in ("sharpen", "switch")
            for seed in (0, 1)
            for method in methods
            for tau in TAUS
        ]
    )
    moves = pd.DataFrame(
        [
            {"regime": "sharpen", "method": method, "seed": 0, "updates": at, "kl": 0.1 * at, "emergent": 1}
            for method in methods[:3]
            for at in (10, 20)
        ]
    )
    modes = pd.DataFrame({"head": ["0.0", "0.1", "0.2"], "think": [0.5, 0.0, 0.02], "number": [0.4, 0.03, 0.001]})
    for chart in (
        plots.spark_map(heads, lines, WORDS, "1.2", at=20),
        plots.threshold_chart(counts),
        plots.distance_chart(moves),
        plots.mode_chart(modes, 0.01),
        plots.grid_chart(heads, "SFT", 10),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 300_000
        assert "'title'" in str(spec)


def test_every_checkpoint_has_a_colour() -> None:
    assert len(plots.COHORTS) >= 9


def test_the_grid_says_what_came_and_went(heads: pd.DataFrame) -> None:
    now = heads[(heads.run == "SFT") & (heads.updates == 20)]
    new = int(((now.share >= 0.05) & (now.before < 0.05)).sum())
    assert f"{new} new" in plots.grid_chart(heads, "SFT", 20, 0.05).to_dict()["title"]["subtitle"]
    assert "0 new, 0 lost" in plots.grid_chart(heads, "SFT", 0, 0.05).to_dict()["title"]["subtitle"]


def test_panel_answers_every_setting(heads: pd.DataFrame) -> None:
    assert len(plots.panel(heads).grid()) == 48
