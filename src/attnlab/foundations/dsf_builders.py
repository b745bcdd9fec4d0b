"""The table of the chapter ``foundations/dsf``: what each mixer puts into a :class:`~attnlab.foundations.dsf.Recurrence`.

Queries, keys and gates are [B, T, H, K]; the inputs that the record is evaluated on are values [B, T, H, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.foundations.dsf import Recurrence
from attnlab.mixers import checks, elu_plus_one, retnet_log_decay, rotate

# ------------------------------------------------------------------------------------------------- attention, normalised


def separable(psi: Tensor, phi: Tensor, log_eta: Tensor) -> Recurrence:
    """Attention with weights ``psi(q_i) . phi(k_j) / eta_i``.

    Lambda_i = eta_{i-1} / eta_i, B_i = phi(k_i) / eta_i, C_i = psi(q_i). The transition forgets nothing: it takes the old
    normaliser off and puts the new one on, so it may well exceed 1, and products telescope to eta_j / eta_i.

    Args:
        psi, phi: features [B, T, H, K].
        log_eta: log of the normaliser [B, T, H]. Lambda of the first token multiplies the zero state and is set to 1.
    """
    checks.shape("log_eta", log_eta, tuple(psi.shape[:3]), "[B, T, H] of psi")
    checks.finite("log_eta", log_eta)
    log_lam = torch.cat([torch.zeros_like(log_eta[:, :1]), log_eta[:, :-1] - log_eta[:, 1:]], 1)
    return Recurrence(log_lam[..., None, None], (phi * (-log_eta).exp()[..., None])[..., None], psi[..., None])


def linear_attention(q: Tensor, k: Tensor, feature_map: Callable[[Tensor], Tensor] = elu_plus_one) -> Recurrence:
    """eta_i is the sum of the weights of row i, for features of q and k that make it positive."""
    psi, phi = feature_map(q), feature_map(k)
    return separable(psi, phi, _log_row_sums(psi, phi))


def normalised_attention(q: Tensor, k: Tensor, log_eta: Tensor) -> Recurrence:
    """The mixer that the paper proposes: no feature map, and a normaliser learned from the token, ``log eta_i = w . u_i + b``.

    Weights may be negative and rows need not sum to 1.
    """
    return separable(q, k, log_eta)


def softmax_attention(q: Tensor, k: Tensor, order: int, scale: float | None = None) -> Recurrence:
    """Softmax with its exponential cut after ``order`` terms: the features of :func:`exponential_features`, then as linear attention.

    Raises:
        ValueError: a normaliser that is not positive, which an odd order can give.
    """
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    return linear_attention(root * q, root * k, lambda x: exponential_features(x, order))


def exponential_features(x: Tensor, order: int) -> Tensor:
    """Features with ``phi(q) . phi(k) = sum_{p <= order} (q . k)^p / p!``: all monomials ``x^m / sqrt(m!)`` up to that degree.

    [..., K] becomes [..., (K + order)! / (K! order!)]. The tensor powers of the paper list each monomial as often as its factors
    can be ordered, sum_p K^p in all; listed once each, with the root of its count as weight, they give the same products.

    Raises:
        ValueError: a negative order.
    """
    checks.at_least("order", order, 0)
    columns = [torch.ones_like(x[..., 0])]
    for degree in range(1, order + 1):
        for chosen in combinations_with_replacement(range(x.shape[-1]), degree):
            times = [chosen.count(channel) for channel in set(chosen)]
            column = x[..., list(chosen)].prod(-1)
            columns.append(column / math.sqrt(math.prod(math.factorial(n) for n in times)))
    return torch.stack(columns, -1)


def feature_count(width: int, order: int) -> int:
    """How many different monomials of ``width`` channels there are up to degree ``order``: the K of cut softmax."""
    return math.comb(width + order, order)


# ------------------------------------------------------------------------------------------------- state spaces and gates


def s6(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> Recurrence:
    """The selective state space of Mamba: Lambda_i = exp(-dt_i a), B_i = dt_i b_i. One step dt forgets and writes at once.

    Args:
        dt: steps [B, T, H, V], at least 0, one a channel.
        a: rates, positive, [K] or [V, K].
        b, c: [B, T, H, K].
        skip: D, [V].
    """
    checks.between("dt", dt, 0, torch.inf)
    rates = a.expand(dt.shape[-1], -1).mT  # [K, V]
    d = None if skip is None else skip.expand(*dt.shape)
    return Recurrence(-dt[..., None, :] * rates, dt[..., None, :] * b[..., None], c[..., None], d)


def ssd(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> Recurrence:
    """Mamba-2: one step dt [B, T, H] and one rate a [H] a head, so that Lambda_i is a number; ``skip`` D [H]."""
    checks.between("dt", dt, 0, torch.inf)
    d = None if skip is None else skip[:, None].expand(*dt.shape, 1)
    return Recurrence((-dt * a)[..., None, None], (dt[..., None] * b)[..., None], c[..., None], d)


def qlstm(forget: Tensor, write: Tensor, read: Tensor, exponent: Tensor | None = None) -> Recurrence:
    """The quasi-LSTM: one number of state a channel, three gates that look at the token and not at the state.

    Lambda_i = sigmoid(forget), B_i = sigmoid(write), C_i = sigmoid(read).

    Args:
        forget, write, read: pre-activations [B, T, H, V].
        exponent: if given, the transition is the reversed sigmoid ``sigmoid(-forget)^exponent = exp(-exponent softplus(forget))``.
    """
    log_lam = F.logsigmoid(forget) if exponent is None else exponent * F.logsigmoid(-forget)
    return Recurrence(log_lam[..., None, :], write.sigmoid()[..., None, :], read.sigmoid()[..., None, :])


# --------------------------------------------------------------------------------------------------- mixers of other books


def retention(q: Tensor, k: Tensor) -> Recurrence:
    """RetNet: a fixed number a head, on rotated queries and keys; the read carries the scale."""
    decay = retnet_log_decay(q.shape[2], dtype=q.dtype).to(q.device)
    log_lam = decay[:, None, None].expand(*q.shape[:3], 1, 1)
    return Recurrence(log_lam, rotate(k)[..., None], _scaled(rotate(q))[..., None])


def gla(q: Tensor, k: Tensor, log_decay: Tensor) -> Recurrence:
    """Gated linear attention: a number a key channel, ``log_decay`` [B, T, H, K]."""
    return Recurrence(log_decay[..., None], k[..., None], _scaled(q)[..., None])


def delta_rule(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Recurrence:
    """(Gated) DeltaNet: Lambda_i = (1 - beta k k^T) e^log_decay, B_i = beta k. Not diagonal, so outside the paper's frame.

    Args:
        beta: [B, T, H].
        log_decay: [B, T, H]; none: nothing fades.
    """
    write = beta[..., None] * k
    log_lam = torch.zeros_like(beta) if log_decay is None else log_decay
    return Recurrence(log_lam[..., None, None], write[..., None], _scaled(q)[..., None], rank_one=(write, k))


def _scaled(q: Tensor) -> Tensor:
    return q * q.shape[-1] ** -0.5


def _log_row_sums(psi: Tensor, phi: Tensor) -> Tensor:
    """log of ``psi_i . sum_{j <= i} phi_j`` [B, T, H]."""
    eta = (psi * phi.cumsum(1)).sum(-1)
    if bool((eta <= 0).any()):
        raise ValueError(
            f"eta: a normaliser is {eta.min().item():.3g}, but its log is needed; take features whose products are positive "
            "(of a cut exponential, an even order)"
        )
    return eta.log()
