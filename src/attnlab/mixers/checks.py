"""What every mixer asks of its arguments, with one wording for all of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def numbers(**tensors: Tensor | None) -> None:
    """All float32 or all float64, on one device; ``None`` stands for an argument that was left out.

    Half precision is refused: sums over thousands of tokens lose the newest ones in it.

    Raises:
        ValueError: another dtype, or tensors that differ in dtype or device.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    first, reference = next(iter(given.items()))
    if reference.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{first}: dtype {reference.dtype}, but the sums need float32 or float64; cast the inputs first"
        )
    for name, x in given.items():
        if x.dtype != reference.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, but {first} has {reference.dtype}; cast one of them")
        if x.device != reference.device:
            raise ValueError(f"{name}: on {x.device}, but {first} is on {reference.device}; move one of them")


def shape(name: str, x: Tensor, wanted: tuple[int, ...], axes: str) -> None:
    """``x`` has exactly the shape ``wanted``, whose axes are called ``axes`` (for the message).

    Raises:
        ValueError: any other shape.
    """
    if x.shape != wanted:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, but {axes} = {wanted} is wanted")


def rank(name: str, x: Tensor, axes: str) -> None:
    """``x`` has the axes listed in ``axes``, written like ``"[B, T, H, K]"``, none of them empty.

    Raises:
        ValueError: more or fewer axes, or an axis of length 0.
    """
    if x.ndim != axes.count(",") + 1:
        raise ValueError(f"{name}: shape {tuple(x.shape)} has {x.ndim} axes, but {axes} is wanted")
    if 0 in x.shape:
        empty = axes.strip("[]").split(", ")[x.shape.index(0)]
        raise ValueError(f"{name}: shape {tuple(x.shape)} has {empty}=0; pass at least one")


def heads(q: Tensor, k: Tensor, v: Tensor, *, same_length: bool = True) -> None:
    """Queries [B, T, H, K], keys [B, S, H, K] and values [B, S, H, V] fit together; S = T where ``same_length``.

    Raises:
        ValueError: wrong axes, an empty axis, sizes that disagree, or a dtype or device that does.
    """
    rank("q", q, "[B, T, H, K]")
    batch, length, n_heads, width = q.shape
    for name, x, last in (("k", k, "K"), ("v", v, "V")):
        rank(name, x, f"[B, {'T' if same_length else 'S'}, H, {last}]")
    if same_length:
        shape("k", k, (batch, length, n_heads, width), "[B, T, H, K] of q")
    else:
        shape("k", k, (batch, k.shape[1], n_heads, width), "[B, S, H, K] with B, H, K of q")
    shape("v", v, (*k.shape[:3], v.shape[3]), "[B, S, H, V] with B, S, H of k")
    numbers(q=q, k=k, v=v)


def finite(name: str, x: Tensor) -> None:
    """No NaN and no infinity.

    Raises:
        ValueError: any.
    """
    if _looking() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: holds NaN or infinite values; gates must be finite (clamp a log decay, say at -80)")


def log_decay(x: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """Shape [H], [B, T, H] or [B, T, H, K] for ``sizes`` = (B, T, H, K), finite, and at most 0.

    Raises:
        ValueError: another shape, NaN, an infinity, or a positive value.
    """
    allowed = (sizes[2:3], sizes[:3], sizes)
    if tuple(x.shape) not in allowed:
        raise ValueError(
            f"log_decay: shape {tuple(x.shape)}, but [H], [B, T, H] or [B, T, H, K] is wanted: one of {allowed}"
        )
    finite("log_decay", x)
    if _looking() and bool((x > 0).any()):
        raise ValueError(
            f"log_decay: up to {x.max().item():.3g}, but a decay is at most 1, so its log at most 0; "
            "pass log(a), for instance logsigmoid of a gate"
        )


def between(name: str, x: Tensor, low: float, high: float) -> None:
    """Finite values in [``low``, ``high``].

    Raises:
        ValueError: a value outside.
    """
    finite(name, x)
    if _looking() and (bool((x < low).any()) or bool((x > high).any())):
        raise ValueError(
            f"{name}: values from {x.min().item():.3g} to {x.max().item():.3g}, but [{low:g}, {high:g}] is wanted"
        )


def at_least(name: str, value: int, least: int = 1) -> None:
    """A whole number, ``least`` or more.

    Raises:
        ValueError: a smaller or a fractional one.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")


def one_of(name: str, value: str, options: Collection[str]) -> None:
    """``value`` is one of ``options``.

    Raises:
        ValueError: it is not.
    """
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(options)}")


def _looking() -> bool:
    """Whether values can be looked at: a compiler traces the call without any."""
    return not torch.compiler.is_compiling()
