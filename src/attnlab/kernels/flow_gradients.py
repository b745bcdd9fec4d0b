"""Triton kernel for the gradients of causal flow attention with respect to q and k: the walk of `flow_gates`, backwards.

With a = d conserved incoming / t, b = d conserved outgoing / t, c = d incoming / t, d = d outgoing / t and A = phi(Q) phi(K)^T:

    d (1 / outgoing)_j = sum_{i >= j} A_ij a_i          dA_ij = a_i / outgoing_j + c_i  (j <= i)   +   b_j / incoming_i + d_j  (i <= j)
    d (1 / incoming)_i = sum_{j >= i} A_ij b_j          dphi(Q) = dA phi(K),   dphi(K) = dA^T phi(Q)

The weight of source t is t e_t / S_t with e = exp(o) and S its running sum. e_t is in every later S, hence

    d o_t = d weight_t weight_t - e_t sum_{s >= t} d weight_s weight_s / S_s

So what is carried from later chunks are again four vectors, sums of a phi(q), b phi(k), c phi(q) and d phi(k), and one number, the
sum of d weight weight / S. That number comes first here: in pieces, walk 0 sums it, walk 1 sums a phi(q) and b phi(k), walk 2
c phi(q) and d phi(k), and walk 3 makes the gradients. There eps, a relative 1e-6, is left out.

What is carried is, at every boundary, the gradient of the sums that the forward walk carries over it:

    sum of a phi(q): of sum phi(k) / outgoing      c phi(q): of sum phi(k)      d weight weight / S: of -S
    sum of b phi(k): of sum phi(q) / incoming      d phi(k): of sum phi(q)

So it starts from the gradient of the sums that a sequence ends with, and what remains is that of the sums it continued.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.flow_gates import Gates
from attnlab.kernels.flow_walks import (
    Layout,
    apart,
    capacities,
    features,
    launch,
    leave,
    passed,
    place,
    vector,
    walks,
)
from attnlab.kernels.launch import remembered


@triton.jit
def slope_of(ptr, wide):
    """phi'(x) [C, K], from x read once more: held in the layout of tables as well, features would not fit into registers."""
    x = tl.sigmoid(tl.load(ptr, mask=wide, other=0.0, eviction_policy="evict_first").to(tl.float32))
    return x * (1 - x)


@remembered
@triton.jit
def _walk_back(
    q_ptr, k_ptr, sums_ptr, carried_ptr, in_ptr, out_ptr, gate_ptr, given_ptr, total_ptr,
    d_reads_ptr, d_writes_ptr, dq_ptr, dk_ptr, start_ptr, end_ptr, clamp, past_ptr, bounds_ptr, pieces_ptr, owner_ptr, lift,
    T, H, PIECES, piece, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    VARLEN: tl.constexpr, PAST: tl.constexpr, START: tl.constexpr, END: tl.constexpr, FACTOR: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Walks 0, 1 and 2 leave the sums of a piece; walk 3 overwrites d reads and d writes with dq and dk.

    These have pointers of their own: the compiler would keep those of a chunk's loads for its stores, in half of all registers.
    """
    i_b, i_n, i_h, i_p, pieces, begin, length, line, edge, bundle = place(
        bounds_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, C, VARLEN
    )
    first = i_p * piece
    chunks = tl.cdiv(tl.minimum(first + piece, length) - first, C)
    q_ptr += i_b * q_b + begin * q_t + i_h * q_h
    k_ptr += i_b * k_b + begin * k_t + i_h * k_h
    origin = ((i_b * T + begin) * H + i_h) * K
    if SPLIT:
        sums_ptr += bundle * (4 * K + 1)
    if START:
        start_ptr += (i_n * H + i_h) * (4 * K + 1)
    if PAST:
        past = tl.load(past_ptr + i_n).to(tl.float32)
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    down, up = cs[:, None] >= cs[None, :], cs[:, None] <= cs[None, :]  # sinks down, sources across
    a_q, b_k, c_q, d_k, after = passed(
        start_ptr, sums_ptr, i_p + 1, pieces, 0.0, K, BK, START, SPLIT, WALK > 1, WALK > 2, WALK > 0
    )
    for i in range(chunks):
        c0 = first + (chunks - 1 - i) * C
        far = c0.to(tl.int64)
        t = c0 + cs
        inside = t < length
        wide = inside[:, None] & (ks < K)[None, :]
        n = (t + 1).to(tl.float32)
        if PAST:
            n += past
        at = line + t
        here, rows = origin + far * H * K, cs[:, None] * (H * K) + ks[None, :]
        k = features(k_ptr + far * k_t + cs[:, None] * k_t + ks[None, :], wide)
        d_writes = tl.load(d_writes_ptr + here + rows, mask=wide, other=0.0)
        given = tl.load(given_ptr + at, mask=inside, other=0.0)
        total = tl.load(total_ptr + at, mask=inside, other=1.0)
        strength = tl.exp(tl.minimum(tl.maximum(given, -clamp), clamp))
        weight = n * strength / total
        d_log = tl.sum(k * d_writes.to(tl.float32), 1) * weight  # 0 past the end, where k is
        lost = d_log / total
        if WALK > 0:
            q = features(q_ptr + far * q_t + cs[:, None] * q_t + ks[None, :], wide)
            d_reads = tl.load(d_reads_ptr + here + rows, mask=wide, other=0.0)
            per_in = tl.where(inside, 1.0 / tl.load(in_ptr + at, mask=inside, other=1.0), 0.0)
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
            read = lift * per_in / n * gate
            d_read = tl.sum(q * d_reads.to(tl.float32), 1)
            a = d_read * read * (1 - gate) / n
            later = after + tl.sum(tl.where(up, lost[None, :], 0.0), 1)
            slope = inside & (tl.abs(given) < clamp)  # a clamped flow has none
            b = tl.where(slope, d_log - strength * later, 0.0) / n
            if WALK > 1:
                per_out = tl.where(inside, 1.0 / tl.load(out_ptr + at, mask=inside, other=1.0), 0.0)
                table = capacities(q, k, PARTS, DOT)
                d_per_in = tl.sum(tl.where(up, table * b[None, :], 0.0), 1) + tl.sum(q * b_k[None, :], 1)
                d_per_out = tl.sum(tl.where(down, table * a[:, None], 0.0), 0) + tl.sum(k * a_q[None, :], 1)
                c = -per_in * per_in * (d_per_in + d_read * gate * lift / n) / n
                d = -per_out * per_out * d_per_out / n
                if WALK == 3:
                    carried = carried_ptr + (edge + c0 // C) * 4 * K
                    all_q, all_k = vector(carried, 0, K, BK), vector(carried, 1, K, BK)
                    fixed_q, fixed_k = vector(carried, 2, K, BK), vector(carried, 3, K, BK)
                    da = tl.where(down, a[:, None] * per_out[None, :] + c[:, None], 0.0)
                    da += tl.where(up, b[None, :] * per_in[:, None] + d[None, :], 0.0)
                    da = da.to(FACTOR)
                    dq = tl.dot(da, k.to(FACTOR), input_precision=DOT)
                    again = slope_of(q_ptr + far * q_t + cs[:, None] * q_t + ks[None, :], wide)
                    dq += a[:, None] * fixed_k[None, :] + c[:, None] * all_k[None, :]
                    dq += per_in[:, None] * b_k[None, :] + d_k[None, :] + read[:, None] * d_reads.to(tl.float32)
                    tl.store(dq_ptr + here + rows, (dq * again).to(dq_ptr.dtype.element_ty), mask=wide)
                    dk = tl.dot(tl.trans(da), q.to(FACTOR), input_precision=DOT)
                    again = slope_of(k_ptr + far * k_t + cs[:, None] * k_t + ks[None, :], wide)
                    dk += b[:, None] * fixed_q[None, :] + d[:, None] * all_q[None, :]
                    dk += per_out[:, None] * a_q[None, :] + c_q[None, :] + weight[:, None] * d_writes.to(tl.float32)
                    tl.store(dk_ptr + here + rows, (dk * again).to(dk_ptr.dtype.element_ty), mask=wide)
                c_q += tl.sum(q * apart(c)[:, None], 0)
                d_k += tl.sum(k * apart(d)[:, None], 0)
            a_q += tl.sum(q * apart(a)[:, None], 0)
            b_k += tl.sum(k * apart(b)[:, None], 0)
        after += tl.sum(lost, 0)
    if WALK < 3:
        mine = sums_ptr + i_p * (4 * K + 1)
        leave(mine, a_q, b_k, c_q, d_k, after, K, BK, WALK == 1, WALK == 2, WALK == 0)
    elif END:
        if i_p == 0:
            mine = end_ptr + (i_n * H + i_h) * (4 * K + 1)
            leave(mine, a_q, b_k, c_q, d_k, after, K, BK, True, True, True)


def gradients(
    q: Tensor,
    k: Tensor,
    gates: Gates,
    clamp: float,
    lay: Layout,
    d_reads: Tensor,
    d_writes: Tensor,
    d_end: Tensor | None = None,
    with_start: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq and dk [B, T, H, K], in the memory of the gradients of what :func:`attnlab.kernels.flow_gates.flow_gates` returned.

    `d_end` is the gradient of its last result, the third here that of its `start`; both may be left out.
    """
    factor = tl.bfloat16 if q.dtype == torch.bfloat16 and q.is_cuda else tl.float32
    ahead = None if d_end is None else _mirrored(d_end)
    left = (
        torch.empty(lay.sequences.count(q.shape[0]), q.shape[2], 4 * q.shape[3] + 1, device=q.device)
        if with_start
        else None
    )
    grid, sizes, shape, sums = launch(q, k, lay)
    for walk in walks(sums):
        _walk_back[grid](
            q, k, sums, *gates, d_reads, d_writes, d_reads, d_writes, ahead, left, float(clamp), *sizes,
            **shape, START=ahead is not None, END=with_start, FACTOR=factor, WALK=walk,
        )  # fmt: skip
    return d_reads, d_writes, None if left is None else _mirrored(left)


def _mirrored(sums: Tensor) -> Tensor:
    """What is carried back from gradients of the sums carried forward, or these from it: the other order, the number negated."""
    vectors = sums[..., :-1].unflatten(-1, (4, -1)).flip(-2).flatten(-2)
    return torch.cat([vectors, -sums[..., -1:]], -1)
