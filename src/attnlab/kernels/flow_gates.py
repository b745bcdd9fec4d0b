"""Triton kernel for the two gates of causal flow attention (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Every flow of token t is a sum over tokens up to t of products phi(q_i) . phi(k_j). So inside a chunk one matrix
A = phi(Q) phi(K)^T holds them all, and the four flows are sums over its two triangles, plus what earlier chunks carry:

    incoming_i  = sum_{j <= i} A_ij / i            conserved incoming_i  = sum_{j <= i} A_ij / outgoing_j / i
    outgoing_j  = sum_{i <= j} A_ij / j            conserved outgoing_j  = sum_{i <= j} A_ij / incoming_i / j

The state is four vectors of K channels and one scalar; eps = 1e-6 stands in both factors as in `attnlab.mixers.flow`.

Backward, with a = d conserved incoming / t, b = d conserved outgoing / t, c = d incoming / t and d = d outgoing / t:

    dA_ij = a_i / outgoing_j + c_i  (j <= i)   +   b_j / incoming_i + d_j  (i <= j)

so dphi(Q) = dA phi(K) is a sum over the past and a sum over the future, again with one matrix a chunk and carried vectors. The
reverse sweep finds c and d, which need the future, and adds its half; the forward sweep adds the other. There eps, a relative
1e-6, is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _gates(
    q_ptr, k_ptr, weight_ptr, gate_ptr, in_ptr, out_ptr, sums_ptr, eps, clamp, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    q_ptr += i_b * q_b + i_h * q_h
    k_ptr += i_b * k_b + i_h * k_h
    at = i_b * T * H + i_h
    all_k, all_q = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    fixed_k, fixed_q = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    total = 0.0  # of exp(conserved outgoing), which the clamp bounds
    lower = cs[:, None] >= cs[None, :]
    upper = cs[:, None] <= cs[None, :]
    for c0 in range(0, T, C):
        t = (c0 + cs).to(tl.int64)
        inside = t < T
        wide = inside[:, None] & (ks < K)[None, :]
        raw_q = tl.load(q_ptr + t[:, None] * q_t + ks[None, :], mask=wide, other=0.0)
        raw_k = tl.load(k_ptr + t[:, None] * k_t + ks[None, :], mask=wide, other=0.0)
        q = tl.where(wide, tl.sigmoid(raw_q.to(tl.float32)), 0.0)
        k = tl.where(wide, tl.sigmoid(raw_k.to(tl.float32)), 0.0)
        q_eps, k_eps = tl.where(wide, q + eps, 0.0), tl.where(wide, k + eps, 0.0)
        sum_q, sum_k = tl.sum(q, 1), tl.sum(k, 1)
        n = (t + 1).to(tl.float32)
        a = tl.dot(q.to(raw_q.dtype), tl.trans(k.to(raw_k.dtype)), input_precision=DOT)
        low, up = tl.where(lower, a, 0.0), tl.where(upper, a, 0.0)
        incoming = (tl.sum(low, 1) + eps * tl.cumsum(sum_k, 0) + tl.sum(q_eps * (all_k + eps)[None, :], 1)) / n
        outgoing = (tl.sum(up, 0) + eps * tl.cumsum(sum_q, 0) + tl.sum(k_eps * (all_q + eps)[None, :], 1)) / n
        per_in = tl.where(inside, 1.0 / tl.where(inside, incoming, 1.0), 0.0)
        per_out = tl.where(inside, 1.0 / tl.where(inside, outgoing, 1.0), 0.0)
        conserved_in = tl.sum(low * per_out[None, :], 1) + eps * tl.cumsum(sum_k * per_out, 0)
        conserved_in = (conserved_in + tl.sum(q_eps * (fixed_k + eps)[None, :], 1)) / n
        conserved_out = tl.sum(up * per_in[:, None], 0) + eps * tl.cumsum(sum_q * per_in, 0)
        conserved_out = (conserved_out + tl.sum(k_eps * (fixed_q + eps)[None, :], 1)) / n
        e = tl.where(inside, tl.exp(tl.minimum(tl.maximum(conserved_out, -clamp), clamp)), 0.0)
        sums = total + tl.cumsum(e, 0)
        tl.store(weight_ptr + at + t * H, n * e / tl.where(inside, sums, 1.0), mask=inside)
        tl.store(gate_ptr + at + t * H, tl.sigmoid(conserved_in), mask=inside)
        tl.store(in_ptr + at + t * H, incoming, mask=inside)
        tl.store(out_ptr + at + t * H, outgoing, mask=inside)
        tl.store(sums_ptr + at + t * H, sums, mask=inside)
        all_k += tl.sum(k, 0)
        all_q += tl.sum(q, 0)
        fixed_k += tl.sum(k * per_out[:, None], 0)
        fixed_q += tl.sum(q * per_in[:, None], 0)
        total += tl.sum(e, 0)


@triton.jit
def _chunk(q_ptr, k_ptr, in_ptr, out_ptr, at, t, inside, ks, H, q_t, k_t, K: tl.constexpr, DOT: tl.constexpr):
    """phi(q), phi(k) [C, K], A [C, C] and the reciprocal flows [C] of one chunk; 0 past the end."""
    wide = inside[:, None] & (ks < K)[None, :]
    raw_q = tl.load(q_ptr + t[:, None] * q_t + ks[None, :], mask=wide, other=0.0)
    raw_k = tl.load(k_ptr + t[:, None] * k_t + ks[None, :], mask=wide, other=0.0)
    q = tl.where(wide, tl.sigmoid(raw_q.to(tl.float32)), 0.0)
    k = tl.where(wide, tl.sigmoid(raw_k.to(tl.float32)), 0.0)
    per_in = tl.where(inside, 1.0 / tl.load(in_ptr + at + t * H, mask=inside, other=1.0), 0.0)
    per_out = tl.where(inside, 1.0 / tl.load(out_ptr + at + t * H, mask=inside, other=1.0), 0.0)
    dtype = raw_q.dtype
    return q, k, tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision=DOT), per_in, per_out, wide


@triton.jit
def _gates_back_future(
    q_ptr, k_ptr, in_ptr, out_ptr, a_ptr, b_ptr, d_read_ptr, c_ptr, d_ptr, dq_ptr, dk_ptr,
    T, H, q_b, q_t, q_h, k_b, k_t, k_h, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """c and d [B, T, H], and what dphi(q), dphi(k) [B, T, H, K] get from later tokens."""
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    q_ptr += i_b * q_b + i_h * q_h
    k_ptr += i_b * k_b + i_h * k_h
    at = i_b * T * H + i_h
    a_q, b_k = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)  # later sums of a phi(q), b phi(k),
    c_q, d_k = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)  # c phi(q), d phi(k)
    lower = cs[:, None] >= cs[None, :]  # rows: sinks i, columns: sources j
    upper = cs[:, None] <= cs[None, :]
    chunks = tl.cdiv(T, C)
    for i in range(chunks):
        t = ((chunks - 1 - i) * C + cs).to(tl.int64)
        inside = t < T
        q, k, flow, per_in, per_out, wide = _chunk(
            q_ptr, k_ptr, in_ptr, out_ptr, at, t, inside, ks, H, q_t, k_t, K, DOT
        )
        a = tl.load(a_ptr + at + t * H, mask=inside, other=0.0)
        b = tl.load(b_ptr + at + t * H, mask=inside, other=0.0)
        d_read = tl.load(d_read_ptr + at + t * H, mask=inside, other=0.0)
        n = (t + 1).to(tl.float32)
        d_per_out = tl.sum(tl.where(lower, flow * a[:, None], 0.0), 0) + tl.sum(k * a_q[None, :], 1)
        d_per_in = tl.sum(tl.where(upper, flow * b[None, :], 0.0), 1) + tl.sum(q * b_k[None, :], 1) + d_read / n
        c = -per_in * per_in * d_per_in / n
        d = -per_out * per_out * d_per_out / n
        tl.store(c_ptr + at + t * H, c, mask=inside)
        tl.store(d_ptr + at + t * H, d, mask=inside)
        to_q = tl.where(upper, b[None, :] * per_in[:, None] + d[None, :], 0.0)
        to_k = tl.where(lower, a[:, None] * per_out[None, :] + c[:, None], 0.0)
        dq = tl.dot(to_q, k, input_precision=DOT) + per_in[:, None] * b_k[None, :] + d_k[None, :]
        dk = tl.dot(tl.trans(to_k), q, input_precision=DOT) + per_out[:, None] * a_q[None, :] + c_q[None, :]
        rows_at = (at + t * H)[:, None] * K + ks[None, :]
        tl.store(dq_ptr + rows_at, dq, mask=wide)
        tl.store(dk_ptr + rows_at, dk, mask=wide)
        a_q += tl.sum(q * a[:, None], 0)
        b_k += tl.sum(k * b[:, None], 0)
        c_q += tl.sum(q * c[:, None], 0)
        d_k += tl.sum(k * d[:, None], 0)


@triton.jit
def _gates_back_past(
    q_ptr, k_ptr, in_ptr, out_ptr, a_ptr, b_ptr, c_ptr, d_ptr, dq_future_ptr, dk_future_ptr, dq_ptr, dk_ptr,
    T, H, q_b, q_t, q_h, k_b, k_t, k_h, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq and dk [B, T, H, K]: earlier tokens' half, the sum of both, and the slope of the sigmoid."""
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    q_ptr += i_b * q_b + i_h * q_h
    k_ptr += i_b * k_b + i_h * k_h
    at = i_b * T * H + i_h
    all_q, all_k = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    fixed_q, fixed_k = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    lower = cs[:, None] >= cs[None, :]
    upper = cs[:, None] <= cs[None, :]
    for c0 in range(0, T, C):
        t = (c0 + cs).to(tl.int64)
        inside = t < T
        q, k, _, per_in, per_out, wide = _chunk(q_ptr, k_ptr, in_ptr, out_ptr, at, t, inside, ks, H, q_t, k_t, K, DOT)
        a = tl.load(a_ptr + at + t * H, mask=inside, other=0.0)
        b = tl.load(b_ptr + at + t * H, mask=inside, other=0.0)
        c = tl.load(c_ptr + at + t * H, mask=inside, other=0.0)
        d = tl.load(d_ptr + at + t * H, mask=inside, other=0.0)
        to_q = tl.where(lower, a[:, None] * per_out[None, :] + c[:, None], 0.0)
        to_k = tl.where(upper, b[None, :] * per_in[:, None] + d[None, :], 0.0)
        rows_at = (at + t * H)[:, None] * K + ks[None, :]
        dq = tl.load(dq_future_ptr + rows_at, mask=wide, other=0.0) + tl.dot(to_q, k, input_precision=DOT)
        dk = tl.load(dk_future_ptr + rows_at, mask=wide, other=0.0) + tl.dot(tl.trans(to_k), q, input_precision=DOT)
        dq += a[:, None] * fixed_k[None, :] + c[:, None] * all_k[None, :]
        dk += b[:, None] * fixed_q[None, :] + d[:, None] * all_q[None, :]
        tl.store(dq_ptr + rows_at, (dq * q * (1 - q)).to(dq_ptr.dtype.element_ty), mask=wide)
        tl.store(dk_ptr + rows_at, (dk * k * (1 - k)).to(dk_ptr.dtype.element_ty), mask=wide)
        all_q += tl.sum(q, 0)
        all_k += tl.sum(k, 0)
        fixed_q += tl.sum(q * per_in[:, None], 0)
        fixed_k += tl.sum(k * per_out[:, None], 0)


class FlowGates(torch.autograd.Function):
    """Competition weight of every source, allocation gate of every sink, and 1 / (t incoming): three times [B, T, H], float32."""

    @staticmethod
    def forward(ctx: Any, q, k, eps, clamp):
        batch, length, heads, _ = q.shape
        weight, gate, incoming, outgoing, sums = torch.empty(5, batch, length, heads, device=q.device)
        grid, sizes, shape = _launch(q, k)
        _gates[grid](q, k, weight, gate, incoming, outgoing, sums, eps, clamp, *sizes, **shape)
        n = _positions(q)
        ctx.save_for_backward(q, k, weight, gate, incoming, outgoing, sums)
        ctx.clamp = clamp
        return weight, gate, 1.0 / (n * incoming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight, d_gate, d_read):
        q, k, weight, gate, incoming, outgoing, sums = ctx.saved_tensors
        n = _positions(q)
        a = d_gate * gate * (1 - gate) / n
        # weight_t = t e_t / S_t, and e_t is in every later S
        e = weight * sums / n
        later = (d_weight * weight / sums).flip(1).cumsum(1).flip(1)
        open_ = (e > math.exp(-ctx.clamp) * (1 + 1e-6)) & (
            e < math.exp(ctx.clamp) * (1 - 1e-6)
        )  # a clamped flow has no slope
        b = torch.where(open_, d_weight * weight - e * later, 0.0) / n
        c, d = torch.empty_like(a), torch.empty_like(a)
        dq_future, dk_future = torch.empty(2, *q.shape, device=q.device)
        dq, dk = (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device),
        )
        grid, sizes, shape = _launch(q, k)
        flows = (q, k, incoming, outgoing, a, b)
        _gates_back_future[grid](*flows, d_read.contiguous(), c, d, dq_future, dk_future, *sizes, **shape)
        _gates_back_past[grid](*flows, c, d, dq_future, dk_future, dq, dk, *sizes, **shape)
        return dq, dk, None, None


def _positions(q: Tensor) -> Tensor:
    """1, 2, ..., T along the second axis of [B, T, H]."""
    return torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.float32)[:, None]


def _launch(q: Tensor, k: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and compile-time arguments that the three kernels share: one program a (sequence, head)."""
    batch, length, heads, width = q.shape
    shape = {
        "K": width,
        "BK": max(16, triton.next_power_of_2(width)),
        "C": 64,
        "DOT": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4 if width <= 64 else 8,
        "num_stages": 1,
    }
    return (batch * heads,), (length, heads, *q.stride()[:3], *k.stride()[:3]), shape
