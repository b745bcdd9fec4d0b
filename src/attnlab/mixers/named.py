"""The mixers of the papers, each as one setting of the four switches of :mod:`attnlab.mixers.recurrence`.

Only the core: projections, short convolutions, norms and output gates belong to a layer around it. All functions take the
options of :func:`~attnlab.mixers.recurrence.attend` by name (``form``, ``chunk_size``, ``scale``, ``initial_state``) and return outputs
and the final state. Unless a docstring says otherwise, q and k are [B, T, H, K], v is [B, T, H, V], states [B, H, K, V],
and bad input raises ``ValueError``.

==================== ================================== ======= =======
mixer                decay a                            write w erase e
==================== ================================== ======= =======
linear attention     1                                  1       0
retention, lightning fixed, a head                      1       0
GLA                  a token and key channel            1       0
HGRN-2               a token and key channel, k = 1 - a 1       0
HGRN                 the same, one channel a head       1       0
SSD (Mamba-2)        a token                            step    0
delta rule           1                                  b       b
gated delta rule     a token                            b       b
==================== ================================== ======= =======
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.mixers import checks
from attnlab.mixers.decays import retnet_log_decay
from attnlab.mixers.recurrence import Form, attend


class How(TypedDict, total=False):
    """What the caller may choose besides the mathematics; see :func:`~attnlab.mixers.recurrence.attend`."""

    form: Form
    chunk_size: int
    scale: float | None
    initial_state: Tensor | None


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, the positive feature map of Katharopoulos et al. 2020."""
    return F.elu(x) + 1


def taylor_features(x: Tensor) -> Tensor:
    """Features with ``phi(q) . phi(k) = 1 + s + s^2 / 2``, where ``s = q . k / sqrt(K)``: exp(s) up to O(s^3).

    [..., K] becomes [..., 1 + K + K^2] (Arora et al. 2024, arXiv:2402.18668).
    """
    x = x * x.shape[-1] ** -0.25  # half of the scale in q, half in k
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
    normalise: bool = True,
    eps: float = 1e-10,
    **how: Unpack[How],
) -> tuple[Tensor, Tensor]:
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): a = 1, w = 1, e = 0 on features of q and k.

    The normaliser ``z_t = sum_{s <= t} phi(k_s)`` obeys the same recurrence for a value that is always 1, so it is carried
    as one more column of v: with ``normalise`` the state is [B, H, K', V + 1] for features of width K'.

    Args:
        feature_map: of q and of k; positive if ``normalise``, else the denominator can vanish.
        normalise: divide by ``scale * phi(q) . z + eps``; the scale then cancels up to eps.
        eps: by default that of flash-linear-attention.
    """
    q, k = feature_map(q), feature_map(k)
    if not normalise:
        return attend(q, k, v, **how)
    o, state = attend(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), **how)
    return o[..., :-1] / (o[..., -1:] + eps), state


def rotate(x: Tensor, *, offset: int = 0, base: float = 10_000.0) -> Tensor:
    """Rotary positions: channel pair (c, c + K/2) of token t turns by ``(offset + t) base^(-2c / K)``. [B, T, H, K].

    Raises:
        ValueError: an odd K.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: K={x.shape[-1]} channels do not pair up; rotary positions need an even K")
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = (offset + torch.arange(x.shape[1], device=x.device))[:, None, None] * speed  # [T, 1, K/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.split(half, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def retention(
    q: Tensor, k: Tensor, v: Tensor, *, rotary: bool = True, offset: int = 0, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """Retention (RetNet, Sun et al. 2023, arXiv:2307.08621): a fixed a head, w = 1, e = 0, on rotated q and k.

    Args:
        rotary: turn q and k by their position; without it, GLA with a constant gate.
        offset: position of the first token, for a sequence that goes on from ``initial_state``.
    """
    if rotary:
        q, k = rotate(q, offset=offset), rotate(k, offset=offset)
    return attend(q, k, v, retnet_log_decay(q.shape[2], dtype=q.dtype).to(q.device), **how)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """Lightning attention (Qin et al. 2024, arXiv:2401.04658, eq. 3-4): a fixed a head, w = 1, e = 0.

    The paper has no scale and normalises the output instead: pass ``scale=1.0`` for its formula.

    Args:
        log_decay: [H], for instance of :func:`~attnlab.mixers.decays.lightning_log_decay`.
    """
    checks.rank("log_decay", log_decay, "[H]")
    return attend(q, k, v, log_decay, **how)


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """Gated linear attention (Yang et al. 2024, arXiv:2312.06635): a [B, T, H, K] from the token, w = 1, e = 0."""
    checks.rank("log_decay", log_decay, "[B, T, H, K]")
    return attend(q, k, v, log_decay, **how)


def hgrn2(q: Tensor, v: Tensor, log_forget: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """HGRN-2 (Qin et al. 2024, arXiv:2404.07904): GLA whose key is what the gate lets go, k = 1 - a; w = 1, e = 0.

    Args:
        log_forget: log a, [B, T, H, K].
    """
    checks.rank("log_forget", log_forget, "[B, T, H, K]")
    return attend(q, -torch.expm1(log_forget), v, log_forget, **how)


def hgrn(
    x: Tensor,
    log_forget: Tensor,
    *,
    form: Form = "chunked",
    chunk_size: int = 16,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """HGRN (Qin et al. 2023, arXiv:2311.04823): ``h_t = f_t h_{t-1} + (1 - f_t) x_t``, a vector and no q.

    HGRN-2 with one channel a head: K = V = 1, q = 1, k = 1 - f. Every channel then has a [C, C] matrix of its own, hence
    the smaller chunks.

    Args:
        x: inputs [B, T, D], before the factor 1 - f.
        log_forget: log f, at most 0, [B, T, D].
        initial_state: h before the first token, [B, D].

    Returns:
        h of every token [B, T, D], and of the last [B, D].
    """
    checks.rank("x", x, "[B, T, D]")
    checks.shape("log_forget", log_forget, tuple(x.shape), "[B, T, D] of x")
    checks.numbers(x=x, log_forget=log_forget, initial_state=initial_state)
    if initial_state is not None:
        checks.shape("initial_state", initial_state, (x.shape[0], x.shape[2]), "[B, D]")
        initial_state = initial_state[..., None, None]
    o, state = hgrn2(
        torch.ones_like(x)[..., None],
        x[..., None],
        log_forget[..., None],
        form=form,
        chunk_size=chunk_size,
        initial_state=initial_state,
    )
    return o[..., 0], state[..., 0, 0]


def ssd(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, *, skip: Tensor | None = None, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """State-space duality (Mamba-2, Dao & Gu 2024, arXiv:2405.21060): a = exp(-dt exp(a_log)), w = dt, e = 0.

    Reads are C, keys are B, values are x: ``scale`` is 1 unless given, so that the skip path keeps its weight.

    Args:
        x: [B, T, H, V].
        dt: step sizes, at least 0, [B, T, H].
        a_log: [H].
        b, c: [B, T, H, K].
        skip: D, [H]: adds ``D x`` to the output.

    Returns:
        Outputs [B, T, H, V] and the state [B, H, K, V].
    """
    checks.heads(c, b, x)
    checks.shape("dt", dt, tuple(x.shape[:3]), "[B, T, H]")
    checks.between("dt", dt, 0, torch.inf)
    checks.shape("a_log", a_log, (x.shape[2],), "[H]")
    how.setdefault("scale", 1.0)
    o, state = attend(c, b, x, -dt * a_log.exp(), write=dt, **how)
    if skip is None:
        return o, state
    checks.shape("skip", skip, (x.shape[2],), "[H]")
    return o + skip[:, None] * x, state


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """DeltaNet (Yang et al. 2024, arXiv:2406.06484): a = 1, w = e = b. A write replaces what its key held.

    Keys of length 1 are the caller's to make; then a token multiplies the state by ``1 - b k k^T``, with eigenvalue 1 - b.

    Args:
        beta: b [B, T, H] in [0, 2]; above 1 the eigenvalue is negative, which counting and parity need.
    """
    checks.between("beta", beta, 0, 2)
    return attend(q, k, v, write=beta, erase=beta, **how)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a from the token, w = e = b; decay first, then the correction.

    Args:
        log_decay: [B, T, H].
        beta: b [B, T, H] in [0, 2].
    """
    checks.rank("log_decay", log_decay, "[B, T, H]")
    checks.between("beta", beta, 0, 2)
    return attend(q, k, v, log_decay, write=beta, erase=beta, **how)
