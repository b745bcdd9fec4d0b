"""What the operators of this package ask of their tensors, with one wording for all of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attnlab.kernels.packed import Sequences
from attnlab.mixers import checks

WIDEST = 256  # a state of 256 x 64 still fits into the registers of one program


def queries_keys_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q and k [B, T, H, K] and v [B, T, H, V] fit together: one floating dtype, one device, no axis empty, K and V at most 256.

    Raises:
        ValueError: they do not.
    """
    checks.rank("q", q, "[B, T, H, K]")
    checks.rank("v", v, "[B, T, H, V]")
    batch, length, heads, width = q.shape
    channels = v.shape[3]
    checks.shape("k", k, (batch, length, heads, width), "[B, T, H, K] of q")
    checks.shape("v", v, (batch, length, heads, channels), "[B, T, H, V] with B, T, H of q")
    narrow(K=width, V=channels)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, but q has {q.dtype}; cast one of them")
    floating(q=q)
    beside("q", q, k=k, v=v)


def narrow(**widths: int) -> None:
    """Heads have at most 256 channels.

    Raises:
        ValueError: one has more.
    """
    for name, size in widths.items():
        if size > WIDEST:
            raise ValueError(f"{name}={size} is wider than a program can hold; use heads of at most {WIDEST} channels")


def floating(**tensors: Tensor | None) -> None:
    """Floating dtypes; ``None`` stands for an argument that was left out.

    Raises:
        ValueError: whole, boolean or complex numbers.
    """
    for name, x in tensors.items():
        if x is not None and not x.dtype.is_floating_point:
            raise ValueError(f"{name}: dtype {x.dtype}, but a floating dtype is wanted; cast it")


def beside(first: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """All on the device of ``reference``, the argument called ``first``; ``None`` stands for one that was left out.

    Raises:
        ValueError: another device.
    """
    device = reference.device
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name}: on {x.device}, but {first} is on {device}; move one of them")


def sequences(cu_seqlens: Tensor | None, batch: int, length: int) -> Sequences:
    """The sequences of `batch` rows of `length` tokens: one a row, or those that `cu_seqlens` packs into one row.

    Args:
        cu_seqlens: [N + 1] whole numbers, 0 = first < ... < last = length.

    Raises:
        ValueError: another shape or dtype, several rows, bounds that do not rise from 0 to `length`.
    """
    if cu_seqlens is None:
        return Sequences([0, length], None)
    if batch != 1:
        raise ValueError(f"cu_seqlens: packs sequences into one row, but there are B={batch}; reshape to B=1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, but [N + 1] int32 or int64 is wanted"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: {bounds[:6]}... must rise strictly from 0 to T={length}")
    return Sequences(bounds, cu_seqlens.int().contiguous())
