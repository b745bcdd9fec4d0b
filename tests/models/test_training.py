"""The training loop: schedules and groups, equal bits after a resumption, and what stops a run."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.models.training import (
    Diverged,
    TrainConfig,
    decay_groups,
    evaluating,
    fit,
    held_out,
    learning_rate,
    seeded,
    step_generator,
    tensors,
)


def make_model():
    """A net with everything that draws numbers or keeps them: dropout, a norm, an embedding, a buffer."""
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 5)
    )


def batches(rng):
    x = rng.integers(11, size=24)
    return x, x % 5


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def line(seed=0, width=3):
    """A linear model in float64, and batches of a noisy line through the origin."""
    return seeded(lambda: nn.Linear(width, 1).double(), seed)


def line_batches(rng):
    x = rng.normal(size=(16, 3))
    return x, x.sum(1, keepdims=True)


def line_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestGroups:
    def test_matrices_decay_and_nothing_else(self):
        model = make_model()
        model.append(nn.Conv1d(4, 4, 3, groups=4))
        model[1].weight.no_weight_decay = True
        decayed, kept = decay_groups(model, 0.3)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
        assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(5, 16), (4, 1, 3)]
        assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))

    def test_a_tied_matrix_is_an_embedding_and_comes_once(self):
        model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "embedding": nn.Embedding(9, 4)})
        model["head"].weight = model["embedding"].weight
        decayed, kept = decay_groups(model, 0.1)
        assert decayed["params"] == []
        assert len(kept["params"]) == 1

    def test_frozen_parameters_are_in_no_group(self):
        model = make_model()
        model[0].requires_grad_(False)
        assert sum(len(group["params"]) for group in decay_groups(model, 0.1)) == len(list(model.parameters())) - 1

    def test_nothing_to_train_is_refused(self):
        with pytest.raises(ValueError, match="model: it has no parameter that requires a gradient"):
            fit(line().requires_grad_(False), line_batches, line_loss, TrainConfig(steps=1))

    def test_decay_without_a_gradient_shrinks_matrices_only(self):
        model = line()
        weight, bias = model.weight.clone(), model.bias.clone()
        config = TrainConfig(steps=1, lr=0.1, weight_decay=0.5)
        fit(model, line_batches, lambda model, batch: 0.0 * model(batch[0]).sum(), config)
        torch.testing.assert_close(model.weight, weight * (1 - 0.1 * 0.5))
        assert torch.equal(model.bias, bias)


class TestFit:
    def test_it_learns_and_records(self):
        model = line()
        history = fit(model, line_batches, line_loss, TrainConfig(steps=300, lr=0.05, warmup=10, evaluate_every=100))
        assert history.step == list(range(1, 301))
        assert history.final_loss() < 1e-3 < history.loss[0]
        assert len(history) == len(history.loss) == len(history.lr) == len(history.grad_norm) == 300
        assert history.seconds > 0
        assert history.final == {}  # nobody asked for an evaluation
        assert not model.training
        frame = history.frame()
        assert list(frame.columns) == ["step", "loss", "lr", "grad_norm"]
        assert frame["loss"].tolist() == history.loss

    def test_the_optimizer_steps_at_these_rates(self):
        config = TrainConfig(steps=7, warmup=2, lr=0.05)
        history = fit(line(), line_batches, line_loss, config)
        assert history.lr == [learning_rate(config, step) for step in history.step]

    def test_the_seed_decides(self):
        def trained(seed, **changes):
            model = seeded(make_model, 0)
            fit(model, batches, loss, TrainConfig(steps=5, seed=seed, **changes))
            return model

        assert same_bits(trained(3), trained(3))
        assert not same_bits(trained(3), trained(4))

    def test_the_stream_of_batches_knows_nothing_of_evaluation(self):
        def trained(evaluate, evaluate_every):
            seen = []

            def noted(rng):
                seen.append(batches(rng))
                return seen[-1]

            model = seeded(make_model, 0)
            config = TrainConfig(steps=9, evaluate_every=evaluate_every)
            fit(model, noted, loss, config, evaluate=evaluate)
            return model, np.stack([x for x, _ in seen])

        def noisy(model):
            torch.rand(7)
            np.random.rand(7)  # noqa: NPY002 - a careless evaluation
            return {"noise": model(torch.arange(11)).sum().item()}

        (quiet, first), (disturbed, second) = trained(None, None), trained(noisy, 2)
        assert np.array_equal(first, second)
        assert same_bits(quiet, disturbed)
        assert np.array_equal(first[4], batches(step_generator(0, 5))[0])

    @pytest.mark.parametrize("seed", [0, 5])
    def test_no_training_batch_is_what_the_plain_generators_draw(self, seed):
        """default_rng(0) and default_rng([0, 0]) are one stream: held-out data must not meet a training batch there."""
        drawn = {tuple(batches(step_generator(seed, step))[0]) for step in range(1, 50)}
        assert len(drawn) == 49
        plain = [np.random.default_rng(n) for n in range(50)]
        pairs = [np.random.default_rng([seed, n]) for n in range(50)]
        assert not drawn & {tuple(batches(rng)[0]) for rng in plain + pairs}

    def test_the_streams_of_the_caller_go_on_as_if_nothing_had_been(self):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        fit(seeded(make_model, 5), batches, loss, TrainConfig(steps=2))
        assert torch.equal(torch.rand(3), expected)

    def test_dropout_differs_from_step_to_step(self):
        seen = []

        def loss(model, batch):
            mask = F.dropout(torch.ones(64), training=model.training)
            seen.append(tuple(mask.tolist()))
            return line_loss(model, batch)

        fit(line(), line_batches, loss, TrainConfig(steps=6))
        assert len(set(seen)) == 6

    def test_the_gradient_is_clipped_and_its_norm_recorded_before(self, monkeypatch):
        applied = []
        original = torch.optim.AdamW.step

        def step(optimizer, *arguments):  # the moves of AdamW hide the norm of what it is given
            applied.append(
                nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]]).item()
            )
            return original(optimizer, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        free, tight, loose = (
            fit(line(), line_batches, line_loss, TrainConfig(steps=1, clip=clip)).grad_norm[0]
            for clip in (None, 0.25, 100.0)
        )
        assert 0.25 < free < 100
        assert tight == loose == free
        assert applied == pytest.approx([free, 0.25, free], rel=1e-5)  # torch adds 1e-6 to the norm it divides by

    def test_evaluation_runs_on_time_without_gradients_and_in_its_mode(self):
        def evaluate(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            return {"bias": model.bias.mean(), "weight": np.float32(2.0)}

        model = line()
        config = TrainConfig(steps=7, evaluate_every=3)
        history = fit(model, line_batches, line_loss, config, evaluate=evaluate)
        assert history.evaluation_frame()["step"].tolist() == [3, 6, 7]
        assert history.final == {"bias": model.bias.item(), "weight": 2.0}
        assert all(type(row["bias"]) is float for row in history.evaluations)

    def test_a_loss_that_is_no_scalar_is_refused(self):
        with pytest.raises(ValueError, match=r"loss: a scalar is wanted, not a tensor of shape \[16, 1\]"):
            fit(line(), line_batches, lambda model, batch: model(batch[0]), TrainConfig(steps=1))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (
                {"precision": "bfloat16"},
                "precision: 'bfloat16' needs a GPU, and the model lies on cpu; .* or use 'float32'",
            ),
            ({"compile": True}, "compile: True needs a GPU, .* or use False"),
        ],
    )
    def test_what_only_a_gpu_does_is_refused_on_a_cpu(self, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            fit(line(), line_batches, line_loss, TrainConfig(steps=1, **change))

    def test_the_pages_of_the_book_show_no_bar(self, monkeypatch, capsys):
        monkeypatch.setenv("ATTNLAB_BOOK", "1")
        fit(line(), line_batches, line_loss, TrainConfig(steps=3))
        assert capsys.readouterr() == ("", "")


class TestDivergence:
    def test_it_stops_at_the_step_and_says_what_to_do(self):
        calls = []

        def loss(model, batch):
            calls.append(None)
            return line_loss(model, batch) * (math.inf if len(calls) == 4 else 1.0)

        with pytest.raises(Diverged, match=r"step 4: the loss is inf .* rate of 0.001. Lower lr, lengthen warmup"):
            fit(line(), line_batches, loss, TrainConfig(steps=9, lr=1e-3, schedule="constant"))

    def test_a_gradient_that_is_no_number_stops_it_too(self):
        with pytest.raises(Diverged, match=r"step 1: the loss is 0.0 and the norm of the gradient nan"):
            fit(line(), line_batches, lambda model, batch: (0 * model.weight).sum().sqrt(), TrainConfig(steps=2))

    def test_the_last_checkpoint_is_kept(self, tmp_path):
        path = tmp_path / "run.pt"
        config = TrainConfig(steps=9, checkpoint_every=2)
        broken = False

        def loss(model, batch):
            return line_loss(model, batch) * (math.nan if broken else 1.0)

        def evaluate(model):
            nonlocal broken
            broken = True
            return {}

        with pytest.raises(Diverged, match=r"step 5: the loss is nan.*run.pt keeps the last checkpoint"):
            fit(
                line(),
                line_batches,
                loss,
                TrainConfig(steps=9, checkpoint_every=2, evaluate_every=4),
                evaluate=evaluate,
                checkpoint=path,
            )
        saved = torch.load(path, weights_only=True)
        assert saved["history"]["step"] == [1, 2, 3, 4]
        assert all(value.isfinite().all() for value in saved["model"].values())
        model, whole = line(), line()
        fit(model, line_batches, line_loss, config, checkpoint=path)
        fit(whole, line_batches, line_loss, config)
        assert same_bits(model, whole)


class Stop(Exception):
    """Stands for whatever interrupts a run."""


class TestResume:
    CONFIG = TrainConfig(steps=23, lr=0.01, warmup=4, weight_decay=0.1, evaluate_every=5)

    def evaluate_until(self, last):
        calls = []

        def evaluate(model):
            calls.append(None)
            if len(calls) == last:
                raise Stop
            return {"sum": model(torch.arange(11)).sum()}

        return evaluate

    @pytest.mark.parametrize("interruption", [2, 3, 5])
    def test_it_ends_in_the_same_bits(self, tmp_path, interruption):
        whole, parts = seeded(make_model, 0), seeded(make_model, 0)
        expected = fit(whole, batches, loss, self.CONFIG, evaluate=self.evaluate_until(None))
        with pytest.raises(Stop):
            fit(
                parts,
                batches,
                loss,
                self.CONFIG,
                evaluate=self.evaluate_until(interruption),
                checkpoint=tmp_path / "folder" / "run.pt",
            )
        # Another process would begin with other weights and another state of the random streams.
        torch.manual_seed(99)
        parts = seeded(make_model, 7)
        found = fit(
            parts,
            batches,
            loss,
            self.CONFIG,
            evaluate=self.evaluate_until(None),
            checkpoint=tmp_path / "folder" / "run.pt",
        )
        assert same_bits(whole, parts)
        assert (found.step, found.loss, found.lr, found.grad_norm, found.evaluations) == (
            expected.step,
            expected.loss,
            expected.lr,
            expected.grad_norm,
            expected.evaluations,
        )
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["run.pt"]

    def test_another_process_ends_in_the_same_bits(self, tmp_path):
        """Killed for real between two checkpoints, then resumed here."""
        code = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import importlib.util
spec = importlib.util.spec_from_file_location("here", {__file__!r})
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
calls = []
def batches(rng):
    calls.append(None)
    if len(calls) == 14:
        os._exit(9)
    return here.batches(rng)
config = here.TestResume.CONFIG
here.fit(here.seeded(here.make_model, 0), batches, here.loss, config, checkpoint={str(tmp_path / "run.pt")!r})
"""
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        whole, parts = seeded(make_model, 0), seeded(make_model, 1)
        fit(whole, batches, loss, self.CONFIG)
        history = fit(parts, batches, loss, self.CONFIG, checkpoint=tmp_path / "run.pt")
        assert same_bits(whole, parts)
        assert len(history) == 23

    def test_a_finished_run_is_read_and_not_repeated(self, tmp_path):
        model, again = line(0), line(1)
        config = TrainConfig(steps=4)
        history = fit(model, line_batches, line_loss, config, checkpoint=tmp_path / "run.pt")

        def never(rng):
            raise AssertionError("a batch was drawn")

        found = fit(again, never, line_loss, config, checkpoint=tmp_path / "run.pt")
        assert same_bits(model, again)
        assert (found.loss, found.seconds) == (history.loss, pytest.approx(history.seconds, abs=0.1))

    def test_without_resuming_it_begins_anew(self, tmp_path):
        config = TrainConfig(steps=4)
        for seed in (1, 0):
            model = line(seed)
            fit(model, line_batches, line_loss, config, checkpoint=tmp_path / "run.pt", resume=False)
        whole = line(0)
        fit(whole, line_batches, line_loss, config)
        assert same_bits(model, whole)


class TestBatches:
    class Pair(NamedTuple):
        x: object
        y: object

    def test_floats_take_the_dtype_of_the_model_and_integers_keep_theirs(self):
        pair = tensors(self.Pair(np.ones((2, 3), dtype=np.float32), np.arange(2, dtype=np.uint8)), line())
        assert type(pair) is self.Pair
        assert (pair.x.dtype, pair.y.dtype) == (torch.float64, torch.uint8)

    def test_tuples_in_tuples_and_single_arrays(self):
        moved = tensors((np.ones(2), (torch.zeros(1), 3)), nn.Linear(1, 1))
        assert moved[0].dtype == torch.float32
        assert moved[1][1].item() == 3
        assert tensors(np.arange(3), line()).tolist() == [0, 1, 2]

    def test_a_read_only_array_is_copied(self):
        array = np.arange(3.0)
        array.setflags(write=False)
        tensors(array, line()).add_(1)
        assert array.tolist() == [0, 1, 2]


class TestHeldOut:
    def test_it_averages_over_the_batches_and_leaves_the_mode_alone(self):
        model = line()
        pieces = [line_batches(np.random.default_rng(n)) for n in range(3)]
        found = held_out(iter(pieces), loss=line_loss, double=lambda model, batch: 2 * line_loss(model, batch))
        whole = tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))
        expected = line_loss(model, tensors(whole, model)).item()
        for _ in range(2):  # the batches are kept: a generator would be empty the second time
            assert found(model) == {"loss": pytest.approx(expected), "double": pytest.approx(2 * expected)}
        assert model.training

    def test_nothing_to_measure_is_refused(self):
        with pytest.raises(ValueError, match="held_out: 0 batches and 1 metrics given"):
            held_out([], loss=line_loss)
        with pytest.raises(ValueError, match="held_out: 1 batches and 0 metrics given"):
            held_out([None])

    def test_the_mode_comes_back_after_an_error(self):
        model = line()
        with pytest.raises(Stop), evaluating(model):
            raise Stop
        assert model.training
        assert torch.is_grad_enabled()


def test_seeded_leaves_the_stream_alone_and_repeats():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    a, b, c = seeded(make_model, 0), seeded(make_model, 0), seeded(make_model, 1)
    assert torch.equal(torch.rand(2), expected)
    assert same_bits(a, b)
    assert not same_bits(a, c)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # used inside the compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", [{}, {"precision": "bfloat16"}, {"compile": True}])
def test_a_gpu_trains_resumes_and_reads_every_loss(tmp_path, change):
    config = TrainConfig(steps=53, lr=0.02, evaluate_every=25, **change)
    model = seeded(make_model, 0).cuda()
    first = fit(model, batches, loss, config, evaluate=held_out([batches(np.random.default_rng(0))], loss=loss))
    assert first.step == list(range(1, 54))
    assert first.final_loss() < 0.7 * first.loss[0]
    path = tmp_path / "run.pt"
    calls = iter([{}])

    def evaluate(model):
        if (metrics := next(calls, None)) is None:
            raise Stop
        return metrics

    with pytest.raises(Stop):
        fit(seeded(make_model, 0).cuda(), batches, loss, config, evaluate=evaluate, checkpoint=path)
    second = fit(seeded(make_model, 1).cuda(), batches, loss, config, checkpoint=path)
    assert second.step == first.step
    assert second.loss == pytest.approx(first.loss, abs=0.05)  # a GPU adds in no fixed order
