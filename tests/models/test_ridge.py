"""Ridge regression: primal and dual, limits of the penalty, the choice on a validation split."""

from __future__ import annotations

import pytest
import torch

from attnlab.models import ridge


def problem(n, p, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) + 3  # a mean that must not matter
    w = torch.randn(p, k, generator=generator, dtype=torch.float64)
    return x, x @ w + 5 + torch.randn(n, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "p"), [(7, 23), (23, 7), (11, 11), (2, 1)])
@pytest.mark.parametrize("lam", [1e-6, 1e-2, 10.0])
def test_dual_equals_primal_and_the_normal_equations(n, p, lam):
    x, y = problem(n, p)
    new = problem(5, p, seed=1)[0]
    dual, primal = (ridge.Path(x, y, dual=which) for which in (True, False))
    torch.testing.assert_close(dual.predict(new, lam), primal.predict(new, lam), rtol=1e-8, atol=1e-8)
    centred, scale = x - x.mean(0), primal.scale
    gram = centred.T @ centred / n + lam * scale**2 * torch.eye(p, dtype=x.dtype)
    direct = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)) / n)
    for path in (dual, primal):
        weights, intercept = path.weights(lam)
        torch.testing.assert_close(weights, direct, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(new @ weights + intercept, path.predict(new, lam), rtol=1e-9, atol=1e-9)


def test_the_smaller_matrix_is_decomposed():
    assert ridge.Path(*problem(5, 9)).dual
    assert not ridge.Path(*problem(9, 5)).dual


def test_almost_no_penalty_interpolates_and_a_huge_one_predicts_the_mean():
    x, y = problem(9, 20)
    path = ridge.Path(x, y)
    torch.testing.assert_close(path.predict(x, 1e-13), y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.predict(x, 1e12), y.mean(0).expand_as(y), rtol=1e-8, atol=1e-8)


def test_a_target_that_the_features_carry_is_found():
    x, _ = problem(40, 6)
    w = torch.arange(6.0, dtype=torch.float64)
    y = x @ w - 2
    model = ridge.fit(x[:30], y[:30], x[30:], y[30:], [1e-13])
    torch.testing.assert_close(model.weights[:, 0], w, rtol=1e-8, atol=1e-8)
    assert model.intercept.item() == pytest.approx(-2, abs=1e-7)
    assert ridge.relative_error(model.predict(x), y).item() < 1e-16


def test_the_penalty_is_that_of_the_least_validation_error_for_each_target():
    x, y = problem(30, 25, k=3)
    y[:, 2] = torch.randn(
        30, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )  # noise: nothing to learn
    model = ridge.fit(x[:20], y[:20], x[20:], y[20:])
    path = ridge.Path(x[:20], y[:20])
    for lam, errors in zip(ridge.LAMBDAS, model.errors, strict=True):
        torch.testing.assert_close((path.predict(x[20:], lam) - y[20:]).square().mean(0), errors)
    for k in range(3):
        assert model.lam[k].item() == ridge.LAMBDAS[int(model.errors[:, k].argmin())]
        alone = ridge.fit(x[:20], y[:20, k], x[20:], y[20:, k])
        torch.testing.assert_close(alone.weights[:, 0], model.weights[:, k])
    assert model.lam[2] > model.lam[0]


def test_the_unit_of_features_does_not_matter():
    x, y = problem(12, 20)
    one, other = (ridge.fit(s * x[:8], y[:8], s * x[8:], y[8:]) for s in (1.0, 1e4))
    assert torch.equal(one.lam, other.lam)
    torch.testing.assert_close(one.predict(x), other.predict(1e4 * x), rtol=1e-6, atol=1e-6)


def test_relative_error_is_one_for_the_mean():
    y = torch.tensor([1.0, 2.0, 6.0])
    assert ridge.relative_error(torch.full((3,), 3.0), y).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ridge.Path(x[0], y), r"\[n, p\]"),
        (lambda x, y: ridge.Path(x, y[:3]), r"\[n, p\]"),
        (lambda x, y: ridge.Path(x[:1], y[:1]), "at least 2"),
        (lambda x, y: ridge.Path(torch.ones_like(x), y), "constant"),
        (lambda x, y: ridge.Path(x / 0, y), "finite"),
        (lambda x, y: ridge.Path(x, y).predict(x, 0.0), "positive"),
        (lambda x, y: ridge.fit(x, y, x, y, []), "default grid"),
        (lambda x, y: ridge.fit(x, y, x[:0], y[:0]), "hold out"),
        (lambda x, y: ridge.fit(x, y, x[:, :2], y), "columns of x"),
        (lambda x, y: ridge.fit(x, y, x, y[:, :1]), "target"),
        (lambda x, y: ridge.relative_error(y[:3], y), "same shape"),
        (lambda x, y: ridge.relative_error(y, torch.ones_like(y)), "constant"),
    ],
)
def test_bad_input_is_told_what_would_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem(6, 4))
