"""Figures of the sae-circuits chapter, from invented codes and rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from attnlab.circuits import Node, roc
from attnlab.circuits.sae_circuits import unique_codes
from attnlab.figures import sae_circuits as plots

HEADS = [Node(layer, head) for layer in range(2) for head in range(3)]
POSITIVE = np.arange(14) < 7
TRUTH = np.arange(6) < 2
CODES = {(m, n): np.random.default_rng(m + n).integers(0, m, size=(14, 6)) for m in (3, 9) for n in (2, 4)}


@pytest.fixture
def frame() -> pd.DataFrame:
    return plots.barcode_frame(CODES, POSITIVE, HEADS, TRUTH, shown=5)


def test_the_frame_has_a_row_a_setting_and_head(frame: pd.DataFrame) -> None:
    assert len(frame) == 4 * 6
    for (m, n), codes in CODES.items():
        mine = frame[(frame.m == m) & (frame.n == n)]
        assert mine.score.tolist() == unique_codes(codes, POSITIVE).astype(int).tolist()
        assert mine.auc.iloc[0] == pytest.approx(roc(unique_codes(codes, POSITIVE), TRUTH).auc, abs=1e-3)
        assert mine.code.iloc[1] == [*codes[:5, 1].tolist(), *codes[7:12, 1].tolist()]


def test_new_marks_codes_that_no_negative_prompt_has(frame: pd.DataFrame) -> None:
    row = frame.iloc[0]
    known = set(CODES[3, 2][7:, 0].tolist())
    assert row.new == [int(code not in known) for code in row.code[:5]] + [0] * 5


def test_charts_are_valid_and_small(frame: pd.DataFrame) -> None:
    rows = [
        {"impl": impl, "statistic": statistic, "model": model, "fit": fit, "auc": 0.4 + model / 10, "pairs": pairs}
        for impl in ("SAE (paper)", "k-means")
        for statistic in ("new codes", "information")
        for model in (0, 1)
        for fit in (0, 1)
        for pairs in (5, 50)
    ]
    curves = pd.DataFrame({"ranking": ["a", "a", "b"], "kept": [0, 10, 10], "faithfulness": [0.0, 0.5, -0.2]})
    for chart in (
        plots.barcode(frame, 3, 2),
        plots.barcode(frame[(frame.m == 3) & (frame.n == 2)], 3, 2, theta=1),
        plots.auc_chart(rows, "which?"),
        plots.count_chart(rows, "pairs", "pairs scored", "more?"),
        plots.curve_chart(curves, "enough?"),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 200_000
        assert "'title'" in str(spec)


def test_explorer_answers_every_setting(frame: pd.DataFrame) -> None:
    assert len(plots.barcode_explorer(frame).grid(limit=8)) == 8
