"""Files of training runs: whole or absent, no code inside, and refused when they belong to something else."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from attnlab.models import checkpoints
from attnlab.models.training import History, TrainConfig, decay_groups, fit, seeded

CONFIG = TrainConfig(steps=6, checkpoint_every=2)


def make_model(width=3):
    return seeded(lambda: nn.Linear(width, 1), 0)


def batches(rng):
    return rng.normal(size=(4, 3))


def loss(model, batch):
    return (model(batch) - 1).square().mean()


def optimizer_of(model, config=CONFIG):
    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.lr)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.pt"
    fit(make_model(), batches, loss, CONFIG, checkpoint=path)
    return path


def load(path, model=None, config=CONFIG):
    model = make_model() if model is None else model
    return checkpoints.load(path, model, optimizer_of(model, config), config)


def test_the_history_comes_back(path):
    model = make_model()
    expected = fit(model, batches, loss, CONFIG)
    found = History(**load(path))
    assert (found.step, found.loss, found.lr) == (expected.step, expected.loss, expected.lr)


def test_moments_come_back(tmp_path):
    model = make_model()
    optimizer = optimizer_of(model)
    loss(model, torch.ones(4, 3)).backward()
    optimizer.step()
    checkpoints.save(tmp_path / "run.pt", model, optimizer, CONFIG, History())
    other = make_model()
    fresh = optimizer_of(other)
    checkpoints.load(tmp_path / "run.pt", other, fresh, CONFIG)
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[old].keys() == fresh.state[new].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer.state[old].items():
            assert torch.equal(fresh.state[new][name], value)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_previous_file(path, monkeypatch, error):
    before = path.read_bytes()

    def half(value, stream):
        stream.write(b"half a file")
        raise error

    monkeypatch.setattr(checkpoints.torch, "save", half)
    with pytest.raises(type(error)):
        checkpoints.save(path, make_model(), optimizer_of(make_model()), CONFIG, History())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_what_a_killed_process_left_is_written_over(path):
    """A killed process cannot clean up: its half of a file stays beside the whole one and does no harm."""
    before = path.read_bytes()
    partial = path.with_name("run.pt.partial")
    partial.write_bytes(before[: len(before) // 2])
    assert load(path)["step"] == [1, 2, 3, 4, 5, 6]
    checkpoints.save(path, make_model(), optimizer_of(make_model()), CONFIG, History())
    assert not partial.exists()
    assert load(path)["step"] == []


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"checkpoint: .*run.pt cannot be read as one \(\w+\); give another path, or res"
    ):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"format": 1}, protocol=2)])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as one"):
        load(path)


@pytest.mark.parametrize("value", [torch.ones(3), {"model": {}}, [1]])
def test_a_file_of_other_tensors_is_refused(path, value):
    torch.save(value, path)
    with pytest.raises(ValueError, match="cannot be read as one"):
        load(path)


class Payload:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_code_in_a_file_does_not_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save({"format": 1, "config": {}, "model": {}, "optimizer": {}, "history": Payload()}, path)
    with pytest.raises(ValueError, match="cannot be read as one"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_another_configuration_is_named(path):
    with pytest.raises(ValueError, match=r"run.pt was written with steps=6 and not 7, seed=0 and not 3; give another"):
        load(path, config=replace(CONFIG, steps=7, seed=3))


def test_how_often_to_look_may_change(path):
    load(path, config=replace(CONFIG, evaluate_every=1, checkpoint_every=None))


def test_another_model_is_refused_before_anything_changes(path):
    model = make_model(width=4)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"run.pt holds parameters of another model"):
        load(path, model)
    assert torch.equal(model.weight, before)


def test_another_format_is_refused(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"format": 2}, path)
    with pytest.raises(ValueError, match="has format 2, not 1"):
        load(path)


def test_it_holds_plain_values(path):
    saved = torch.load(path, weights_only=True)
    assert saved["config"] == asdict(CONFIG)
    assert set(saved["history"]) == set(asdict(History()))
