"""Figures of the chapter ``kernels/aaren``, from its scan and from invented measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnlab.figures import aaren as plots
from attnlab.kernels.aaren import Cost


@pytest.mark.parametrize("length", [2, 11, 16])
def test_a_tree_reaches_exactly_the_tokens_of_its_node(length: int) -> None:
    nodes, edges = plots.node_frame(length, 1.5), plots.edge_frame(length)
    assert len(nodes) == length * (plots.rounds(length) + 1)
    for row in nodes.itertuples():
        links = edges[edges.target == row.node]
        leaves = sorted(links[links["round"] == 0].t)
        covered = list(range(row.first, row.t + 1))
        assert leaves == (covered if row.round > 0 else [])
        ends = links.groupby(["t2", "round2"]).size()
        assert (ends == 2).sum() == (len(covered) - 1)  # merges; the other links pass a summary on
        assert (row.kind == plots.PREFIX) == (row.first == 1)


def test_node_values_are_the_softmax_average_of_the_piece() -> None:
    nodes = plots.node_frame(11, 1.5)
    s, v = plots.draw(11, 1.5)
    for row in nodes.itertuples():
        piece = slice(row.first - 1, row.t)
        assert row.o == pytest.approx(float(s[piece].softmax(0) @ v[piece, 0]), abs=1e-3)
        assert row.m == pytest.approx(float(s[piece].max()), abs=1e-3)


def test_counts_of_the_scan() -> None:
    assert [plots.rounds(n) for n in (2, 11, 16, 17)] == [1, 4, 4, 5]
    assert plots.merges(16) == 15 + 14 + 12 + 8
    ends = plots.edge_frame(16).query("target > 64").drop_duplicates(["t", "round", "t2", "round2"])
    assert (ends.groupby(["t2", "round2"]).size() == 2).sum() == plots.merges(16)


def rows(score: float) -> list[dict[str, Any]]:
    return [
        {"impl": impl, "seed": seed, "score": score, "curve": [(10, 2 * score), (20, score)]}
        for impl in plots.MIXER_COLOURS
        for seed in (0, 1)
    ]


def test_charts_are_valid_and_fit_a_page() -> None:
    costs = [
        Cost(name, context, 100 * context, np.array([0.1, 0.2]))
        for name in plots.LAYER_COLOURS
        for context in (10, 100)
    ]
    for chart in (
        plots.scan_figure(),
        plots.scan_figure(length=2, output=9, spread=0.0),
        plots.cost_chart(costs),
        plots.curves_chart(rows(0.05), rows(0.4), floor=0.01, blind=0.41),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 200_000
        assert "'title'" in str(spec)


def test_an_output_beyond_the_last_is_the_last() -> None:
    spec = str(plots.scan_figure(length=5, output=9).to_dict())
    assert "'value': [{'node': 20}]" in spec


def test_curves_have_a_line_a_seed() -> None:
    frame = plots.curve_frame(rows(0.05))
    assert frame.run.nunique() == 8
    assert len(frame) == 16


def test_explorer_answers_every_setting() -> None:
    assert len(plots.scan_explorer().grid(6)) == 6
