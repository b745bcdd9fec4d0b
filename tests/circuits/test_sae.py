"""The two small autoencoders: what has unit norm, what training does, what dead means, refusals."""

from __future__ import annotations

import pytest
import torch

from attnlab.circuits.sae import Autoencoder, dead_share, fit_autoencoder


@pytest.fixture
def planted() -> torch.Tensor:
    """Rows made of one or two of 8 directions in 13 dimensions, float64."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8, 13, generator=rng, dtype=torch.float64), dim=1)
    weights = torch.rand(63, 8, generator=rng, dtype=torch.float64) * (torch.rand(63, 8, generator=rng) < 0.2)
    return weights.double() @ directions


@pytest.mark.parametrize("epochs", [0, 1, 7])
def test_the_papers_rows_have_unit_norm_after_every_step(planted, epochs):
    model, losses = fit_autoencoder(planted, m=10, epochs=epochs)
    assert len(losses) == epochs
    assert model.encoder.shape == (10, 13)
    assert model.decoder.shape == (13, 10)
    torch.testing.assert_close(model.encoder.norm(dim=1), torch.ones(10).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decoder.norm(dim=1), torch.ones(13).double(), rtol=0, atol=1e-6)


def test_the_standard_kind_has_unit_dictionary_vectors_and_a_free_encoder(planted):
    model, _ = fit_autoencoder(planted, m=10, kind="standard", epochs=20)
    torch.testing.assert_close(model.decoder.norm(dim=0), torch.ones(10).double(), rtol=0, atol=1e-6)
    assert (model.encoder.norm(dim=1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["paper", "standard"])
def test_projected_gradients_are_orthogonal_to_what_has_unit_norm(planted, kind):
    model = Autoencoder(13, 10, kind).double()
    c, back = model(planted)
    ((back - planted).pow(2).mean() + c.sum(-1).mean()).backward()
    model.project_gradients()
    for weight, axis in model.constrained():
        assert weight.grad.norm() > 0
        assert (weight.grad * weight).sum(axis).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["paper", "standard"])
def test_the_loss_falls_on_a_planted_dictionary(planted, kind):
    _, losses = fit_autoencoder(planted, m=16, kind=kind, epochs=200)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ["paper", "standard"])
def test_without_l1_low_rank_rows_are_written_back(planted, kind):
    """The wrong axis of the decoder costs no reconstruction here: the encoder's ReLU and the tied bias make up for it."""
    model, _ = fit_autoencoder(planted, m=16, kind=kind, l1=0.0, epochs=800, lr=1e-2)
    left = (model(planted)[1] - planted).pow(2).sum() / (planted - planted.mean(0)).pow(2).sum()
    assert left < 0.01


def test_the_seed_decides_and_the_global_stream_is_left_alone(planted):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = (fit_autoencoder(planted, m=5, epochs=3, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.encoder, same.encoder)
    assert not torch.equal(one.encoder, other.encoder)


def test_dead_rows_have_no_active_feature():
    activations = torch.tensor([[[0.0, 0.0], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert dead_share(activations) == 0.75


def test_tiny_writes_under_a_large_l1_die(planted):
    """The pitfall: unscaled vectors against a fixed L1 weight. Scaled to norm 1, most of them live."""
    small, _ = fit_autoencoder(planted * 1e-3, m=10, l1=1.0, epochs=400)
    assert dead_share(small.encode(planted * 1e-3)) == 1.0
    scaled, _ = fit_autoencoder(planted * 10, m=10, l1=1e-3, epochs=400)
    assert dead_share(scaled.encode(planted * 10)) < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 1}, "m=1 features cannot tell"),
        ({"kind": "tied"}, "kind='tied' is unknown; use 'paper'"),
        ({"l1": -0.1}, "must not be negative"),
        ({"epochs": -1}, "must not be negative"),
    ],
)
def test_bad_settings_are_refused(planted, change, message):
    with pytest.raises(ValueError, match=message):
        fit_autoencoder(planted, **({"m": 4, "epochs": 1} | change))


def test_bad_rows_are_refused(planted):
    with pytest.raises(ValueError, match=r"shape \(0, 13\); give at least one row"):
        fit_autoencoder(planted[:0])
    with pytest.raises(ValueError, match=r"give at least one row, \[n, d\]"):
        fit_autoencoder(planted[0])
    planted[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fit_autoencoder(planted)
