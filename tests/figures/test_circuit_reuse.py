"""Figures of the circuit-reuse chapter, from invented scores."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import Node, Scores, Spec, overlap_curve
from attnlab.circuits.circuit_reuse import Repair
from attnlab.figures import circuit_reuse as plots

SPEC = Spec("toy", n_layers=4, n_heads=5, n_kv_heads=5, d_model=20, d_head=4)
TASKS = ("IOI", "Colored Objects", "Greater-than")


@pytest.fixture
def maps() -> dict[str, Scores]:
    rng = np.random.default_rng(0)
    groups = [(head,) for head in SPEC.heads]
    return {task: Scores(SPEC, groups, rng.normal(size=(20, 6)), np.ones(6), np.zeros(6)) for task in TASKS}


class Words:
    """As much of ``Pairs`` as the explorer needs."""

    pairs = (type("Pair", (), {"clean": "a b c"})(), type("Pair", (), {"clean": "d e"})())

    def __len__(self) -> int:
        return 2

    def words(self, number: int) -> list[str]:
        return self.pairs[number].clean.split()


def test_head_frame_ranks_by_absolute_score(maps: dict[str, Scores]) -> None:
    frame = plots.head_frame(maps)
    assert len(frame) == 20
    for task, scores in maps.items():
        ordered = frame.sort_values(f"rank {task}")["head"].tolist()
        assert ordered == [str(node) for node in scores.top(20)]


def test_head_frame_wants_a_task() -> None:
    with pytest.raises(ValueError, match="maps is empty"):
        plots.head_frame({})


def test_attention_frame_has_a_row_a_head_task_and_position() -> None:
    attention = {"IOI": {Node(1, 2): {"IO": np.array([0.2, 0.4]), "S2": np.array([0.5, 0.1])}}}
    frame = plots.attention_frame(attention)
    assert frame.to_dict("records") == [
        {"head": "1.2", "task": "IOI", "to": "IO", "attention": 0.3},
        {"head": "1.2", "task": "IOI", "to": "S2", "attention": 0.3},
    ]


def test_charts_are_valid_and_fit_a_page(maps: dict[str, Scores]) -> None:
    attention = plots.attention_frame({"IOI": {head: {"IO": np.array([0.5])} for head in SPEC.heads}})
    curve = overlap_curve(maps["IOI"], maps["Colored Objects"])
    outcome = Repair(["untouched", "triple", "r"], *np.random.default_rng(0).integers(0, 2, (2, 3, 12)).astype(float))
    for chart in (
        plots.reuse_map(plots.head_frame(maps), attention, k=4, picked="1.2"),
        plots.overlap_chart({"a": curve, "b": curve}),
        plots.repair_chart(outcome, {"untouched": "untouched", "triple": "three heads"}, [2]),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 200_000
        assert "'title'" in str(spec)


def test_explorer_answers_every_setting(maps: dict[str, Scores]) -> None:
    rows = {Node(1, 2): [np.full(3, 1 / 3), np.full(2, 0.5)], Node(0, 4): [np.full(3, 1 / 3), np.full(2, 0.5)]}
    panel = plots.prompt_explorer(Words(), rows, maps["IOI"], k=4)  # type: ignore[arg-type]
    assert len(panel.grid()) >= 4
