"""Stacked models are the same models, also after training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models.stacked import Stacked
from attnlab.models.training import TrainConfig, fit, seeded


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.register_buffer("shift", torch.arange(3.0))
        self.inner = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.inner(x + self.shift)


def models():
    return [seeded(Small, seed).double() for seed in range(3)]


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def draw(rng):
    x = rng.standard_normal((3, 16, 3))
    return x, x[..., :2] ** 2


def test_outputs_are_those_of_each_model_on_its_inputs():
    alone = models()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    wanted = torch.stack([model(part) for model, part in zip(alone, x, strict=True)])
    torch.testing.assert_close(Stacked(alone)(x), wanted, rtol=0, atol=1e-14)
    for model, again in zip(alone, Stacked(alone).unstack(), strict=True):
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_training_together_is_training_alone():
    config = TrainConfig(12, lr=1e-2, weight_decay=0.0, clip=None)
    stack = Stacked(models())
    fit(stack, draw, loss, config, progress=False)
    for index, (model, together) in enumerate(zip(models(), stack.unstack(), strict=True)):
        fit(model, lambda rng, i=index: tuple(part[i] for part in draw(rng)), loss, config, progress=False)
        x = torch.randn(7, 3, dtype=torch.float64)
        torch.testing.assert_close(
            together(x), model(x), rtol=0, atol=1e-6
        )  # Adam's epsilon is not scaled with the loss


def test_buffers_move_with_the_parameters():
    stack = Stacked(models()).float()
    assert stack(torch.randn(3, 5, 3)).dtype == torch.float32


def test_what_cannot_be_stacked_is_named():
    with pytest.raises(ValueError, match="models: at least one is wanted, not none"):
        Stacked([])
    with pytest.raises(ValueError, match="models: number 1 has other parameters than number 0"):
        Stacked([Small(3), Small(4)])
