"""Oracles of ``attnlab.foundations.pavlovian_capacity`` and of the look at a real model's keys."""

from __future__ import annotations

import pytest
import torch

from attnlab.foundations import pavlovian as chapter
from attnlab.foundations import pavlovian_capacity as store
from attnlab.foundations import pavlovian_keys as keys

NAN = torch.eye(3)[None, :2] * torch.tensor([1, 1, float("nan")])  # [1, 2, 3]
NAN[0, 0, 2] = 0


def unit(*shape, seed=0):
    return store.sphere(torch.Generator().manual_seed(seed), *shape).double()


def normalised(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_crosstalk_is_what_the_store_answers_beyond_the_value():
    k, v = normalised(unit(2, 13, 7)), unit(2, 13, 5, seed=1)
    answer = chapter.recall(chapter.learn(chapter.Hebb(1.0), k, v)[:, -1:], k)
    torch.testing.assert_close(store.crosstalk(k, v), answer - v, rtol=0, atol=1e-12)


def test_orthogonal_keys_have_none():
    k = torch.linalg.qr(unit(9, 9))[0]
    assert store.noise_power(k, unit(9, 4)).max() < 1e-24
    assert store.noise_power(k[:1], unit(1, 4)).item() < 1e-24


def test_the_closed_forms():
    assert store.guaranteed(512, 0.1, 0.5) == pytest.approx(25.6**0.5)
    assert store.average_case(64, 0.5) == 33
    assert store.chain_noise_theory(1, 17, 128) == pytest.approx(1 / 8)
    assert store.averaged_noise_theory(4, None, n=65, d_k=64) == pytest.approx(1 / 4)
    assert store.averaged_noise_theory(4, 128, n=65, d_k=64) == pytest.approx(3 / 4)


def test_the_bound_on_errors():
    x = 8 / 32
    assert store.error_bound(3, 2, 8, 64) == pytest.approx(1 - (1 - x**2) ** 3)
    assert store.error_bound(1, 1, 8, 64) == pytest.approx(x)
    small = store.error_bound(4, 3, 1, 1000)
    assert small == pytest.approx(4 * (1 / 500) ** 3, rel=1e-6)


def test_failure_sets_in_with_the_pairs_and_falls_with_the_width():
    chances = [store.failure_probability(n, 64) for n in (1, 2, 16, 32, 64, 256)]
    assert chances[0] == 0
    assert chances == sorted(chances)
    assert chances[-1] > 0.99
    assert store.failure_probability(16, 64, d_v=4096) < store.failure_probability(16, 64, d_v=4)  # less spread
    assert store.predicted(64) < store.predicted(128)


def test_capacity_lies_between_the_guarantee_and_the_average_case():
    n = store.capacity(64, 0, draws=40)
    assert store.guaranteed(64) < n < store.average_case(64)
    assert store.capacity(1, 0, draws=40) == 1


def test_a_chain_of_one_layer_is_a_store_and_signs_clean_it():
    one = store.chain(1, 8, "none", 0, d=64, draws=5)
    assert one.to_dict("records") == store.chain(1, 8, "sign", 0, d=64, draws=5).to_dict("records")
    raw, clean = (store.chain(6, 8, how, 0, d=64, draws=5) for how in ("none", "sign"))
    assert raw.noise.is_monotonic_increasing
    assert raw.failed.is_monotonic_increasing
    assert clean.noise.iloc[-1] < raw.noise.iloc[-1]
    assert (store.chain(1, 1, "none", 0, d=64, draws=5).noise < 1e-12).all()


def test_slopes_are_those_of_a_power():
    import pandas as pd

    rows = [(d, seed, "x", 3 * d**0.5) for d in (16, 32, 64, 128) for seed in (0, 1)]
    assert store.slopes(pd.DataFrame(rows, columns=["d_k", "seed", "criterion", "n"]), "x") == pytest.approx([0.5, 0.5])


def test_random_keys_are_random_and_one_direction_is_not():
    k, v = unit(3, 40, 16).float(), unit(3, 40, 8, seed=1).float()
    plain = keys.geometry(k, v)
    assert plain.dimension.between(10, 24).all()
    assert (plain["from K"] == 39 / 16).all()
    shifted = keys.geometry(k + 3 * k[:, :1], v)
    assert (shifted.dimension < plain.dimension).all()
    assert (shifted.cosine > plain.cosine).all()
    torch.testing.assert_close(
        torch.tensor(keys.geometry(k + 5, v, centre=True).noise), torch.tensor(keys.geometry(k, v, centre=True).noise),
        rtol=1e-3, atol=0,
    )  # fmt: skip
    assert set(keys.comparison(k, v)["keys"]) == {"SmolLM2", "SmolLM2, centred", "random directions"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: store.crosstalk(torch.ones(3, 4), torch.ones(3, 1)), "k: norms up to 2, but unit keys are wanted"),
        (lambda: store.crosstalk(torch.ones(0, 4), torch.ones(0, 1)), "k: shape"),
        (
            lambda: store.crosstalk(NAN, torch.ones(1, 2, 1)),
            "k: 1 of 6 numbers are NaN or infinite; leave such pairs out",
        ),
        (lambda: store.noise_power(unit(1, 2, 3), NAN), "v: 1 of 6 numbers are NaN or infinite"),
        (lambda: store.failing_draws(NAN, torch.ones(1, 2, 1), 2), "k: 1 of 6 numbers are NaN or infinite"),
        (lambda: store.failing_draws(unit(1, 2, 3), unit(1, 2, 3), 3), "n=3: from 1 to 2 pairs are there; draw more"),
        (lambda: store.failing_draws(unit(1, 2, 3), unit(1, 2, 3), 0), "n=0: from 1 to 2 pairs are there"),
        (lambda: store.guaranteed(0), "d_k=0 must be a positive number"),
        (lambda: store.guaranteed(64, float("nan")), "epsilon=nan must be a positive number"),
        (lambda: store.error_bound(1, 1, 32, 64), "n=32 must be below delta"),
        (lambda: store.error_bound(0, 1, 3, 64), "depth=0 must be a positive number"),
        (lambda: store.chain(2, 4, "wash", 0), "clean_up='wash' is unknown; use one of none, norm, sign"),
    ],
)
def test_what_cannot_be_asked_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
