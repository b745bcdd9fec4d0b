r"""Small sparse autoencoders on vectors: the one of the paper's code, and the standard one beside it.

Both read :math:`x \in R^d` as :math:`c = \mathrm{ReLU}(W_e (x - b) + b_e) \in R^m` and write it back as
:math:`\hat x = W_d c + b`, and both are trained on :math:`\mathrm{MSE}(\hat x, x) + \lambda\, \mathrm{mean}\,\|c\|_1`. They
differ in what has unit norm, which decides what the L1 term can do.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["paper", "standard"]


class Autoencoder(nn.Module):
    """An autoencoder of either kind.

    Args:
        d: width of the vectors.
        m: number of features, at least 2.
        kind: ``"paper"``: the *rows* of both matrices have unit norm, also those of the decoder ``[d, m]``, whose rows run over
            features (O'Neill & Bui 2024, their code). ``"standard"``: the *columns* of the decoder, one dictionary vector a
            feature, have unit norm and the encoder is free (Bricken et al. 2023).
        seed: of the first weights.

    Raises:
        ValueError: for fewer than two features or an unknown kind.
    """

    def __init__(self, d: int, m: int, kind: Kind = "paper", seed: int = 0) -> None:
        super().__init__()
        if m < 2:
            raise ValueError(f"m={m} features cannot tell two prompts apart; use at least 2")
        if kind not in ("paper", "standard"):
            raise ValueError(
                f"kind={kind!r} is unknown; use 'paper' (unit rows) or 'standard' (unit dictionary vectors)"
            )
        self.kind: Kind = kind
        rng = torch.Generator().manual_seed(seed)
        self.encoder = nn.Parameter(unit(torch.randn(m, d, generator=rng), 1))  # W_e [m, d]
        self.decoder = nn.Parameter(torch.randn(d, m, generator=rng))  # W_d [d, m]
        bound = 1 / math.sqrt(d)
        self.encoder_bias = nn.Parameter((2 * torch.rand(m, generator=rng) - 1) * bound)  # b_e [m]
        self.bias = nn.Parameter(torch.zeros(d))  # b [d], tied: subtracted before, added after
        if kind == "standard":
            with torch.no_grad():
                self.decoder.copy_(self.encoder.T)  # columns are the encoder's rows
        self.constrain()

    def constrained(self) -> list[tuple[nn.Parameter, int]]:
        """The matrices that have unit norm, each with the axis along which it is taken."""
        if self.kind == "paper":
            return [(self.encoder, 1), (self.decoder, 1)]
        return [(self.decoder, 0)]

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring the constrained matrices back to unit norm."""
        for weight, axis in self.constrained():
            weight.copy_(unit(weight, axis))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take from each gradient what would only change a norm."""
        for weight, axis in self.constrained():
            if weight.grad is not None:
                weight.grad -= (weight.grad * weight).sum(axis, keepdim=True) * weight

    def encode(self, x: Tensor) -> Tensor:
        """Activations of the features: ``[..., d] -> [..., m]``."""
        return F.relu((x - self.bias) @ self.encoder.T + self.encoder_bias)

    def decode(self, c: Tensor) -> Tensor:
        """Back to vectors: ``[..., m] -> [..., d]``."""
        return c @ self.decoder.T + self.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations ``[..., m]`` and reconstruction ``[..., d]``."""
        c = self.encode(x)
        return c, self.decode(c)


def fit_autoencoder(
    x: Tensor,
    m: int = 200,
    *,
    kind: Kind = "paper",
    l1: float = 0.02,
    epochs: int = 500,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[Autoencoder, list[float]]:
    """Train an autoencoder on all rows of ``x`` [n, d] at once, ``epochs`` times with Adam; ``epochs=0`` leaves it untrained.

    The standard kind starts its bias at the mean of the rows, the paper's code at zero.

    Returns:
        the autoencoder and the loss of every epoch.

    Raises:
        ValueError: for no rows, rows that are not finite, a negative ``l1`` or ``epochs``, fewer than two features.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(f"x has shape {tuple(x.shape)}; give at least one row, [n, d]")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds numbers that are not finite; the autoencoder would have no gradient")
    if l1 < 0 or epochs < 0:
        raise ValueError(f"l1={l1} and epochs={epochs} must not be negative")
    model = Autoencoder(x.shape[1], m, kind, seed).to(x)
    if kind == "standard":
        model.bias.data.copy_(x.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(epochs):
        c, back = model(x)
        loss = F.mse_loss(back, x) + l1 * c.sum(-1).mean()  # c >= 0, so its sum is its L1 norm
        optimizer.zero_grad()
        loss.backward()
        model.project_gradients()
        optimizer.step()
        model.constrain()
        losses.append(float(loss.detach()))
    return model.requires_grad_(False), losses


def dead_share(activations: Tensor) -> float:
    """Share of rows ``[..., m]`` on which no feature is active: their argmax is feature 0 whatever the row says."""
    return float((activations.amax(-1) <= 0).double().mean())


def unit(weight: Tensor, axis: int) -> Tensor:
    """The matrix with unit norm along an axis."""
    return F.normalize(weight, dim=axis)
