"""Ridge regression: the linear model that is fitted exactly, for every strength of its penalty at once.

Taught in the chapter ``foundations/random-features``, and used as a linear probe. The strength is chosen on a validation split,
never on the data that are reported. One eigendecomposition, of the smaller of the two Gram matrices, serves all strengths and all
targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAMBDAS: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-18, 5))
"""Penalties from 1e-9 to 100 in half decades, for features whose variances sum to 1."""


@dataclass(frozen=True)
class Ridge:
    """A fitted linear model, one column a target.

    Attributes:
        weights: [p, k], for features as they were given.
        intercept: [k].
        lam: the chosen penalty of each target, [k], in the unit of ``LAMBDAS``.
        errors: mean squared error on the validation split, [penalties, k].
    """

    weights: Tensor
    intercept: Tensor
    lam: Tensor
    errors: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Predictions [n, k] for features [n, p]."""
        return x @ self.weights + self.intercept


class Path:
    """All solutions of ``min_w |y - x w|² / n + lam |w|²`` for centred x and y, from one eigendecomposition.

    Features are divided by one number, so that their variances sum to 1: a penalty then means the same for every feature map,
    and the geometry between features stays as it is. The intercept is not penalised.

    Args:
        x: features, [n, p].
        y: targets, [n] or [n, k].
        dual: decompose the n x n matrix ``x xᵀ`` instead of the p x p matrix ``xᵀ x``; left out, the smaller one.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, numbers that are not finite, features that are all constant.
    """

    def __init__(self, x: Tensor, y: Tensor, *, dual: bool | None = None) -> None:
        y = _columns(x, y, "y")
        n, p = x.shape
        if n < 2:
            raise ValueError(f"x: {n} row(s) leave nothing after centring; give at least 2")
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        centred = x - self.x_mean
        self.scale = centred.square().sum().div(n).sqrt()
        if not self.scale > 0:
            raise ValueError("x: every feature is constant, so nothing can be learned from them")
        centred = centred / self.scale
        self.dual = n < p if dual is None else dual
        gram = (centred @ centred.T if self.dual else centred.T @ centred) / n
        values, vectors = torch.linalg.eigh(gram)
        self.values = values.clamp(min=0)  # [r], r = n or p: variances along the directions
        self.basis = centred.T @ vectors if self.dual else vectors  # [p, r]
        about = y - self.y_mean if self.dual else centred.T @ (y - self.y_mean)
        self.moments = vectors.T @ about / n  # [r, k]

    def directions(self, x: Tensor) -> Tensor:
        """Features [m, p] as coordinates [m, r] in which every solution is diagonal."""
        return (x - self.x_mean) / self.scale @ self.basis

    def shrunk(self, lam: float | Tensor) -> Tensor:
        """Coefficients [r, k] along the directions for one penalty, or for one penalty a target [k].

        Raises:
            ValueError: a penalty that is not positive.
        """
        lam = torch.as_tensor(lam, dtype=self.values.dtype, device=self.values.device)
        if not bool((lam > 0).all()):
            raise ValueError(f"lam={lam.tolist()} must be positive; for the limit of no penalty give 1e-12 in float64")
        return self.moments / (self.values[:, None] + lam)

    def predict(self, x: Tensor, lam: float | Tensor) -> Tensor:
        """Predictions [m, k] of the solution with this penalty."""
        return self.directions(x) @ self.shrunk(lam) + self.y_mean

    def weights(self, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """Weights [p, k] and intercept [k] of the solution with this penalty, for features as they were given."""
        weights = self.basis @ self.shrunk(lam) / self.scale
        return weights, self.y_mean - self.x_mean @ weights


def fit(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, lambdas: Sequence[float] = LAMBDAS) -> Ridge:
    """The ridge solution on (x, y) whose penalty errs least on (x_val, y_val), chosen for each target by itself.

    Args:
        x: features to fit, [n, p]; float64 where n and p are close.
        y: their targets, [n] or [n, k].
        x_val, y_val: the validation split; neither fitted nor fit to be reported.
        lambdas: penalties to choose from, for features whose variances sum to 1.

    Raises:
        ValueError: as ``Path``, no penalty given, or a validation split of another width or without rows.
    """
    if not lambdas:
        raise ValueError("lambdas: none given; leave it out for the default grid")
    path = Path(x, y)
    y_val = _columns(x_val, y_val, "y_val")
    if not len(x_val):
        raise ValueError("x_val: no rows; hold out a part of the data to choose the penalty on")
    if x_val.shape[1] != x.shape[1] or y_val.shape[1] != path.y_mean.shape[0]:
        raise ValueError(
            f"x_val {tuple(x_val.shape)} and y_val {tuple(y_val.shape)} must have the columns of x {tuple(x.shape)} "
            f"and the {path.y_mean.shape[0]} target(s) of y"
        )
    seen = path.directions(x_val)
    missed = [(seen @ path.shrunk(lam) + path.y_mean - y_val).square().mean(0) for lam in lambdas]
    errors = torch.stack(missed)  # [penalties, k]
    lam = torch.tensor(lambdas, dtype=errors.dtype, device=errors.device)[errors.argmin(0)]
    return Ridge(*path.weights(lam), lam, errors)


def relative_error(predicted: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over the variance of y, by column [k]: 0 is perfect, 1 is what the mean of y reaches.

    Raises:
        ValueError: shapes that differ, or a constant target.
    """
    y = y[:, None] if y.ndim == 1 else y
    predicted = predicted[:, None] if predicted.ndim == 1 else predicted
    if predicted.shape != y.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and y {tuple(y.shape)} must have the same shape")
    variance = y.var(0, correction=0)
    if not bool((variance > 0).all()):
        raise ValueError("y: a target is constant, so its error has no unit; leave it out")
    return (predicted - y).square().mean(0) / variance


def _columns(x: Tensor, y: Tensor, name: str) -> Tensor:
    """y as [n, k], after both were found to fit each other and to be finite."""
    if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y):
        raise ValueError(f"x {tuple(x.shape)} and {name} {tuple(y.shape)} must be [n, p] and [n] or [n, k]")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError(f"x and {name} must be finite; a NaN or infinity spoils every coefficient")
    return (y[:, None] if y.ndim == 1 else y).to(x.dtype)
