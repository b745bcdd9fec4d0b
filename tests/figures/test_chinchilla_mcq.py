"""Figures of the chinchilla-mcq chapter, from an untrained model and invented numbers."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import HookedLM, Node, Scores
from attnlab.circuits.chinchilla_mcq import DirectEffects
from attnlab.circuits.chinchilla_mcq_study import PARTS, Small, rank_rows
from attnlab.data.choices import WORDS
from attnlab.figures import chinchilla_mcq as plots
from attnlab.models.word_model import WordModel


class Untrained(Small):
    """A model that has learnt nothing, with heads that are called correct-letter heads all the same."""

    heads = ["1.0", "1.1"]  # noqa: RUF012 - takes the place of a cached property


@pytest.fixture(scope="module")
def small() -> Small:
    model = WordModel(WORDS, n_layers=2, n_heads=2, d_model=16, d_mlp=16, context=11, init_std=0.3, seed=0)
    return Untrained("list", 0, HookedLM(model.bridge()))


def test_cells_are_means_of_attention(small):
    frame = plots.cell_frame([(small, ["1.0"])])
    assert len(frame) == 3 * 16
    assert set(frame["head"]) == {"list 1.0"}
    assert frame.attention.between(0, 1).all()
    assert (frame.groupby(["labels", "right"]).attention.sum() <= 1.01).all()


def test_points_say_what_colours_them(small):
    frame = plots.point_frame([(small, ["1.0", "1.1"])], prompts=5)
    assert len(frame) == 2 * 3 * 5 * (1 + 4)
    ordered = frame[(frame.labels == "A B C D") & (frame.kind == "key")]
    assert (ordered.place == ordered["by letter"]).all()
    shuffled = frame[(frame.labels == "shuffled") & (frame.kind == "key")]
    assert (shuffled.place != shuffled["by letter"]).any()
    assert (frame[frame.kind == "key"].groupby(["head", "labels", "prompt"])["right or wrong"].sum() == 3).all()
    assert (frame[frame.kind == "query"]["right or wrong"] == 3).all()


def test_charts_are_valid_and_fit_a_page(small):
    chosen = [(small, ["1.0"])]
    ranks = plots.rank_frame(rank_rows(small, ["ABCD"], (0, 3)))
    assert len(ranks) == 2 * len(PARTS)
    direct = DirectEffects(["input", "1.0", "m1", "bias"], np.random.default_rng(0).normal(size=(4, 6)), np.ones(6))
    total = Scores(small.model.spec, [(Node(1, 0),), (Node(1),)], -np.ones((2, 6)), np.ones(6), np.zeros(6))
    effects = plots.effects_frame(direct, total)
    assert effects.total.tolist() == [1.0, 1.0]
    for chart in (
        plots.letter_map(plots.cell_frame(chosen), plots.point_frame(chosen, prompts=3), ranks),
        plots.histogram({"by letter": [2, 2, 2, 2], "by text": [0, 1, 2, 3]}),
        plots.effects_chart(effects, ["1.0"]),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 300_000
        assert "'title'" in str(spec)


def test_the_explorer_answers_every_setting(small):
    panel = plots.compression_explorer(small)
    assert len(panel.grid(limit=12)) == 12


def test_where_the_taught_model_looks_is_a_mean_over_models():
    rows = [{"looks": [[0.5, 0.0], [0.1, 0.9]]}, {"looks": [[0.7, 0.0], [0.3, 0.5]]}]
    chart = plots.looks_chart(rows).to_dict()
    (cells,) = chart["datasets"].values()
    assert [cell["attention"] for cell in cells] == [0.6, 0.0, 0.2, 0.7]
    assert (cells[2]["right"], cells[2]["line"]) == (2, 1)
    assert chart["width"] <= 260
