"""Losses and metrics against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab import data
from attnlab.models.language import Decoder, SoftmaxAttention
from attnlab.models.losses import bits, next_token_loss, perplexity, squared_error, target_accuracy, target_loss
from attnlab.models.training import seeded


def decoder(**options):
    return seeded(lambda: Decoder(17, 12, 2, lambda layer: SoftmaxAttention(12, 3), **options).double(), 0)


class Fixed(nn.Module):
    """Bets e^2 to 1 on the token itself, among four."""

    def forward(self, tokens):
        return F.one_hot(tokens, 4).double() * 2


def test_next_token_loss_is_the_mean_of_minus_log_probabilities():
    model = decoder()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    log_p = model(tokens[:, :-1]).log_softmax(-1)
    expected = -sum(log_p[b, t, tokens[b, t + 1]] for b in range(2) for t in range(3)) / 6
    assert next_token_loss(model, tokens).item() == pytest.approx(expected.item(), abs=1e-12)


def test_only_marked_places_count():
    batch = (torch.tensor([[0, 1, 2, 3]]), torch.tensor([[data.IGNORE, 1, 0, data.IGNORE]]))
    normaliser = math.log(math.exp(2) + 3)
    assert target_loss(Fixed(), batch).item() == pytest.approx((normaliser - 2 + normaliser) / 2)
    assert target_accuracy(Fixed(), batch).item() == 0.5


def test_squared_error():
    batch = (torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [4.0]]]))
    assert squared_error(nn.Identity(), batch).item() == 2.0


@pytest.mark.parametrize("nats", [0.0, 0.3, 2.248])
def test_bits_and_perplexity_tell_the_same(nats):
    assert 2 ** bits(nats) == pytest.approx(perplexity(nats))


def test_a_uniform_guess_among_96_characters():
    assert bits(math.log(96)) == pytest.approx(math.log2(96))
    assert perplexity(math.log(96)) == pytest.approx(96)


def test_a_model_with_small_weights_knows_nothing():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(17, size=(50, 38)))
    with torch.no_grad():
        assert next_token_loss(decoder(init_std=0.02), tokens).item() == pytest.approx(math.log(17), abs=0.01)
