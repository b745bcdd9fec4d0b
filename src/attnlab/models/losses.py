"""Losses and metrics with the signature that training and evaluation take: a model and a batch to one number."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.data import IGNORE


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of every token given those before it, in nats, for tokens [B, T + 1]: T predictions a row."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def target_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy in nats at the marked places of a batch (tokens, targets [B, T]); ``data.IGNORE`` marks the others."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def target_accuracy(model: nn.Module, batch: Any) -> Tensor:
    """Share of the marked places of a batch (tokens, targets [B, T]) at which the largest logit is the target's."""
    tokens, targets = batch
    marked = targets != IGNORE
    return (model(tokens).argmax(-1) == targets)[marked].double().mean()


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error over a batch (inputs [B, T, F], targets [B, T, O])."""
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def bits(nats: float) -> float:
    """A cross entropy in bits: for characters, bits per character. 2 to this power is the perplexity, as is e^nats."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """e^nats: among how many equally likely tokens a model with this cross entropy is as unsure as it is."""
    return math.exp(nats)
