"""What a patched run is judged by: one number a pair, read at the last position.

A metric is a function of a :class:`Readout`. It asks for the logits that it needs: a logit difference touches two rows of the
unembedding, a probability all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import PAD, Batch


class Readout:
    """The end of a run: ``copies`` side by side of one batch, so ``R = copies * B`` rows.

    Args:
        model: the model that unembeds.
        resid: residual stream after the last block, ``[R, T, d_model]``; only the last position is read.
        batch: the ``B`` pairs that each copy holds.
    """

    def __init__(self, model: HookedLM, resid: Tensor, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.normed = model.readout(resid)  # [R, d_model]
        self.copies = len(self.normed) // len(batch)

    @cached_property
    def logits(self) -> Tensor:
        """All logits, ``[R, V]``."""
        return self.model.logits(self.normed)

    def tile(self, values: Tensor) -> Tensor:
        """Repeat a per-pair table for every copy: ``[B, ...] -> [R, ...]``."""
        return values.repeat(self.copies, *[1] * (values.ndim - 1)).to(self.normed.device)

    def logit(self, tokens: Tensor) -> Tensor:
        """Logits of per-pair ``tokens`` [B, k], ``[R, k]``, without unembedding the rest."""
        return self.model.logits(self.normed, self.tile(tokens.clamp(min=0)))


Metric = Callable[[Readout], Tensor]


def logit_diff(end: Readout) -> Tensor:
    """Logit of the (first) answer minus logit of the (first) foil, ``[R]``."""
    pair = torch.stack([end.batch.answers[:, 0], end.batch.foils[:, 0]], dim=1)
    logits = end.logit(pair)
    return logits[:, 0] - logits[:, 1]


def log_odds(end: Readout) -> Tensor:
    """Log of (probability of any answer / probability of any foil) in logits, ``[R]``.

    With one answer and one foil this is :func:`logit_diff`. Unlike :func:`prob_diff` it does not saturate, so gradients
    through it stay informative where the model is sure.
    """

    def mass(tokens: Tensor) -> Tensor:
        return end.logit(tokens).masked_fill(end.tile(tokens) == PAD, -torch.inf).logsumexp(1)

    return mass(end.batch.answers) - mass(end.batch.foils)


def prob_diff(end: Readout) -> Tensor:
    """Probability of all answers minus probability of all foils, ``[R]``."""
    probs = end.logits.softmax(-1)

    def mass(tokens: Tensor) -> Tensor:
        tokens = end.tile(tokens)
        return (probs.gather(1, tokens.clamp(min=0)) * (tokens != PAD)).sum(1)

    return mass(end.batch.answers) - mass(end.batch.foils)


def accuracy(end: Readout) -> Tensor:
    """1 where the answer has the largest logit of the whole vocabulary, ``[R]``."""
    return (end.logits.argmax(-1) == end.tile(end.batch.answers[:, 0])).to(end.logits.dtype)


def top_token(end: Readout) -> Tensor:
    """The token with the largest logit of the whole vocabulary, ``[R]``: the model's answer."""
    return end.logits.argmax(-1)


def choice_accuracy(end: Readout) -> Tensor:
    """1 where the answer beats the other ``options`` of the pair, ``[R]``; chance is one over their number.

    Raises:
        ValueError: if the pairs have no options.
    """
    if end.batch.options.shape[1] < 2:
        raise ValueError("choice_accuracy needs pairs with at least two options; use accuracy for an open answer")
    options = end.tile(end.batch.options)
    logits = end.logit(end.batch.options).masked_fill(options == PAD, -torch.inf)
    return (logits.argmax(-1) == 0).to(logits.dtype)  # the right option stands first


def log_prob(end: Readout) -> Tensor:
    """Log probability of the (first) answer in nats, ``[R]``."""
    return end.logits.log_softmax(-1).gather(1, end.tile(end.batch.answers[:, :1]))[:, 0]


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (logit_diff, log_odds, prob_diff, accuracy, choice_accuracy, log_prob)
}
