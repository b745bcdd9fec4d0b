"""Comparisons: a row a run, the best rate by its median, and hidden sizes that equalise parameters."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from attnlab.models.language import MLP, SGLU, Decoder, SoftmaxAttention
from attnlab.models.sweep import best, count_parameters, match_parameters, sweep
from attnlab.models.training import TrainConfig, fit, held_out, seeded


def make_model():
    return nn.Linear(3, 1).double()


def batches(rng):
    x = rng.normal(size=(16, 3))
    return x, x.sum(1, keepdims=True)


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


CONFIG = TrainConfig(steps=20)
VALIDATION = held_out([batches(np.random.default_rng(1))], loss=loss)


def swept(loss=loss, lrs=(0.01, 0.1), seeds=(0, 3)):
    return sweep(make_model, batches, loss, CONFIG, lrs=lrs, seeds=seeds, evaluate=VALIDATION, device="cpu")


def test_a_row_is_what_the_single_run_gives():
    frame = swept()
    assert list(frame.columns) == ["lr", "seed", "parameters", "diverged", "train_loss", "seconds", "loss"]
    assert list(zip(frame["lr"], frame["seed"], strict=True)) == [(0.01, 0), (0.01, 3), (0.1, 0), (0.1, 3)]
    history = fit(seeded(make_model, 3), batches, loss, TrainConfig(steps=20, lr=0.1, seed=3), evaluate=VALIDATION)
    row = frame.iloc[3]
    assert (row["train_loss"], row["loss"]) == (history.final_loss(), history.final["loss"])
    assert row["parameters"] == 4
    assert not frame["diverged"].any()


def test_a_run_that_diverges_is_a_row_and_not_the_end():
    def fragile(model, batch):
        value = loss(model, batch)
        return value * math.nan if model.bias.abs().max() > 5 else value

    frame = swept(lrs=[100.0, 0.05], loss=fragile)
    assert frame["diverged"].tolist() == [True, True, False, False]
    assert frame["loss"].isna().tolist() == [True, True, False, False]
    assert best(frame, "loss")["lr"].tolist() == [0.05, 0.05]


def test_a_sweep_in_which_everything_diverges_is_a_table_still():
    frame = swept(loss=lambda model, batch: loss(model, batch) * math.nan)
    assert frame["diverged"].all()
    assert frame["train_loss"].isna().all()
    with pytest.raises(ValueError, match="at no learning rate do half of the runs have a train_loss"):
        best(frame, "train_loss")


@pytest.mark.parametrize("empty", ["lrs", "seeds"])
def test_an_empty_grid_is_refused(empty):
    with pytest.raises(ValueError, match=f"{empty}: it is empty"):
        swept(**{empty: []})


def table(**values):
    rows = [(float(lr[1:]), seed, value) for lr, row in values.items() for seed, value in enumerate(row)]
    return pd.DataFrame(rows, columns=["lr", "seed", "score"])


def test_the_best_rate_has_the_best_median():
    frame = table(l1=[0.1, 0.9, 0.9], l2=[0.5, 0.5, 0.6], l3=[0.4, 0.7, 0.8])
    assert best(frame, "score")["lr"].tolist() == [2.0] * 3
    assert best(frame, "score", "max")["lr"].tolist() == [1.0] * 3


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_missing_value_counts_as_the_worst(mode):
    frame = table(l1=[math.nan, math.nan, 0.5], l2=[0.5, 0.5, 0.5], l3=[0.5, math.nan, 0.5])
    assert best(frame, "score", mode)["lr"].unique().tolist() == [2.0]


def test_an_unknown_metric_or_mode_is_refused():
    frame = table(l1=[1.0])
    with pytest.raises(ValueError, match="metric: the sweep has no column 'loss', only"):
        best(frame, "loss")
    with pytest.raises(ValueError, match="mode: 'min' or 'max' is wanted, not 'best'"):
        best(frame, "score", "best")


class TestParameters:
    def test_frozen_ones_and_copies_do_not_count(self):
        model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(7, 7)])
        model[1].weight = model[0].weight
        model[2].requires_grad_(False)
        assert count_parameters(model) == 20 + 5 + 5

    def make(self, mlp, hidden):
        return Decoder(
            50, 16, 2, lambda layer: SoftmaxAttention(16, 2), make_mlp=lambda layer: mlp(16, hidden), max_length=9
        )

    @pytest.mark.parametrize("mlp", [MLP, SGLU])
    @pytest.mark.parametrize("multiple", [1, 8])
    def test_the_closest_hidden_size_is_found(self, mlp, multiple):
        target = count_parameters(self.make(MLP, 61))
        hidden = match_parameters(lambda hidden: self.make(mlp, hidden), target, multiple=multiple, tolerance=0.1)
        assert hidden % multiple == 0
        gaps = {
            other: abs(count_parameters(self.make(mlp, other)) - target) for other in range(multiple, 100, multiple)
        }
        assert gaps[hidden] == min(gaps.values())

    def test_an_exact_size_is_found_exactly_and_the_stream_is_left_alone(self):
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        target = count_parameters(seeded(lambda: self.make(SGLU, 37), 0))
        assert match_parameters(lambda hidden: self.make(SGLU, hidden), target, tolerance=0) == 37
        assert torch.equal(torch.rand(2), expected)

    def test_a_target_out_of_reach_is_refused(self):
        with pytest.raises(
            ValueError, match=r"target: 10 parameters are out of reach within 2.0%: hidden size 1 gives"
        ):
            match_parameters(lambda hidden: self.make(MLP, hidden), 10)

    def test_a_builder_that_ignores_its_argument_is_refused(self):
        with pytest.raises(ValueError, match="make_model: hidden sizes 1 and 2 give 4 and 4 parameters"):
            match_parameters(lambda hidden: make_model(), 100)

    @pytest.mark.parametrize("change", [{"target": 0}, {"multiple": 0}])
    def test_sizes_that_are_not_positive_are_refused(self, change):
        with pytest.raises(ValueError, match="a positive number is wanted, not 0"):
            match_parameters(nn.Identity, **({"target": 5} | change))
