"""One gate a row, forward and backward: x [B, T, H, V] times w [B, T, H], multiplied in float32 and rounded once.

PyTorch would widen x to the dtype of w, write that, and read it again to narrow it: four times the traffic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.dispatch import cdiv, padded, rows
from attnlab.kernels.launch import remembered


@triton.jit
def _rows(T, H, R: tl.constexpr):
    """The rows of this program [R] as int64, and the sequence, token and head of each."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    return r, r // H // T, r // H % T, r % H


@remembered
@triton.jit
def _gate(
    x_ptr, w_ptr, out_ptr, count, T, H, x_b, x_t, x_h, w_b, w_t, w_h,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r, b, t, h = _rows(T, H, R)
    vs = tl.arange(0, BV)
    inside = (r < count)[:, None] & (vs < V)[None, :]
    w = tl.load(w_ptr + b * w_b + t * w_t + h * w_h, mask=r < count, other=0.0)
    x = tl.load(x_ptr + (b * x_b + t * x_t + h * x_h)[:, None] + vs[None, :], mask=inside, other=0.0)
    out = x.to(tl.float32) * w[:, None]
    tl.store(out_ptr + r[:, None] * V + vs[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@remembered
@triton.jit
def _gate_back(
    x_ptr, w_ptr, d_ptr, dx_ptr, dw_ptr, count, T, H, x_b, x_t, x_h, w_b, w_t, w_h, d_b, d_t, d_h,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dx = d w, and dw = x . d over the channels, written in the layout of w."""
    r, b, t, h = _rows(T, H, R)
    vs = tl.arange(0, BV)
    inside = (r < count)[:, None] & (vs < V)[None, :]
    at_w = b * w_b + t * w_t + h * w_h
    w = tl.load(w_ptr + at_w, mask=r < count, other=0.0)
    x = tl.load(x_ptr + (b * x_b + t * x_t + h * x_h)[:, None] + vs[None, :], mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + (b * d_b + t * d_t + h * d_h)[:, None] + vs[None, :], mask=inside, other=0.0).to(tl.float32)
    dx = (d * w[:, None]).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + r[:, None] * V + vs[None, :], dx, mask=inside)
    tl.store(dw_ptr + at_w, tl.sum(x * d, 1), mask=r < count)


class RowGate(torch.autograd.Function):
    """``x * w[..., None]`` in the dtype of x; x [B, T, H, V] with a contiguous last axis, w [B, T, H] float32 of any dense layout."""

    @staticmethod
    def forward(ctx: Any, x, w):
        ctx.save_for_backward(x, w)
        out = x.new_empty(x.shape)
        grid, sizes, shape = _launch(x)
        _gate[grid](x, w, out, *sizes, *x.stride()[:3], *w.stride(), **shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d):
        x, w = ctx.saved_tensors
        d = rows(d)
        dx, dw = x.new_empty(x.shape), torch.empty_like(w)
        grid, sizes, shape = _launch(x)
        _gate_back[grid](x, w, d, dx, dw, *sizes, *x.stride()[:3], *w.stride(), *d.stride()[:3], **shape)
        return dx, dw


def _launch(x: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes and compile-time arguments: some 4096 numbers a program."""
    batch, length, heads, width = x.shape
    count, tile = batch * length * heads, padded(width)
    each = max(1, 4096 // tile)
    return (cdiv(count, each),), (count, length, heads), {"V": width, "BV": tile, "R": each, "num_warps": 4}
