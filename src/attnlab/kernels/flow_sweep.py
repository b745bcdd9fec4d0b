"""Causal flow attention on a GPU (Flowformer, Wu et al. 2022, arXiv:2202.06258): gates that ride on the features.

    o_i = r_i phi(q_i) . sum_{j <= i} w_j phi(k_j) v_j^T,      r_i = gate_i / (i incoming_i)

So with the features r phi(q) and w phi(k) it is linear attention without decay, and :func:`attnlab.kernels.decay_sweep.sweep`
does the rest. Neither the values nor the outputs are touched once more, which saves their traffic and, in half precision, two
roundings; and dq and dk, of features and gates together, are rounded once. r falls with the length T of the sequence, so the
features carry T r, which float16 holds, and the sweeps divide by T.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_sweep import Updates, piece_updates, sweep, tiles_for
from attnlab.kernels.dispatch import rows
from attnlab.kernels.flow_gates import Gates, features, flow_gates, gradients, launch, place, positions
from attnlab.kernels.launch import remembered


@remembered
@triton.jit
def _weighted(
    q_ptr, k_ptr, read_ptr, weight_ptr, reads_ptr, writes_ptr, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """read phi(q) and weight phi(k), [B, T, H, K]."""
    i_b, i_h, t, at, _ = place(T, H, C)
    q, k, wide = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    read = tl.load(read_ptr + at, mask=t < T, other=0.0)
    weight = tl.load(weight_ptr + at, mask=t < T, other=0.0)
    to = ((i_b * T + t) * H + i_h)[:, None] * K + tl.arange(0, BK)[None, :]
    tl.store(reads_ptr + to, (q * read[:, None]).to(reads_ptr.dtype.element_ty), mask=wide)
    tl.store(writes_ptr + to, (k * weight[:, None]).to(writes_ptr.dtype.element_ty), mask=wide)


@remembered
@triton.jit
def _weights_back(
    q_ptr, k_ptr, d_reads_ptr, d_writes_ptr, d_read_ptr, d_weight_ptr, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """d read = phi(q) . d reads, and d weight = phi(k) . d writes."""
    i_b, i_h, t, at, _ = place(T, H, C)
    q, k, wide = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    of = ((i_b * T + t) * H + i_h)[:, None] * K + tl.arange(0, BK)[None, :]
    d_reads = tl.load(d_reads_ptr + of, mask=wide, other=0.0).to(tl.float32)
    d_writes = tl.load(d_writes_ptr + of, mask=wide, other=0.0).to(tl.float32)
    tl.store(d_read_ptr + at, tl.sum(q * d_reads, 1), mask=t < T)
    tl.store(d_weight_ptr + at, tl.sum(k * d_writes, 1), mask=t < T)


class CausalFlow(torch.autograd.Function):
    """Three passes for the gates, one sweep; backward three sweeps and three passes."""

    @staticmethod
    def forward(ctx: Any, q, k, v, eps, clamp):
        gates = flow_gates(q, k, eps, clamp)
        length = q.shape[1]
        share = length / (positions(q) * gates.incoming)  # T / (t incoming)
        read = share * gates.gate
        reads, writes = torch.empty(2, *q.shape, dtype=q.dtype, device=q.device)
        grid, sizes, shape = launch(q, k)
        _weighted[grid](q, k, read, gates.weight, reads, writes, *sizes, **shape)
        tiles, decay = tiles_for(reads, v), _no_decay(q.shape[2], q.device)
        updates = piece_updates(writes, v, decay, tiles)
        out, _ = sweep(reads, writes, v, decay, 1 / length, tiles, updates=updates)
        ctx.save_for_backward(q, k, v, reads, writes, share, read, *gates, *(updates or ()))
        ctx.clamp, ctx.tiles = clamp, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        q, k, v, reads, writes, share, read, *saved = ctx.saved_tensors
        gates, pieces = Gates(*saved[:8]), saved[8:]
        d_out, tiles = rows(d_out), ctx.tiles
        length, decay = q.shape[1], _no_decay(q.shape[2], q.device)
        behind = Updates(*pieces) if pieces else None
        ahead = piece_updates(reads, d_out, decay, tiles, reverse=True)
        arguments = (decay, 1 / length, tiles)
        d_reads, _ = sweep(d_out, v, writes, *arguments, updates=behind.mT if behind else None)
        d_writes, _ = sweep(v, d_out, reads, *arguments, updates=ahead.mT if ahead else None, reverse=True)
        dv, _ = sweep(writes, reads, d_out, *arguments, updates=ahead, reverse=True)
        d_read, d_weight = torch.empty(2, *read.shape, device=q.device)
        grid, sizes, shape = launch(q, k)
        _weights_back[grid](q, k, d_reads, d_writes, d_read, d_weight, *sizes, **shape)
        of_gates = (d_weight, d_read * share, d_read * gates.gate * length)
        dq, dk = gradients(q, k, gates, ctx.clamp, read, *of_gates, d_reads, d_writes)
        return dq, dk, dv, None, None


@functools.cache
def _no_decay(heads: int, device: torch.device) -> Tensor:
    """A decay of 1 for every head."""
    return torch.zeros(heads, device=device)
