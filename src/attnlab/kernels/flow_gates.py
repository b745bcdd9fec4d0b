"""Triton kernel for the two gates of causal flow attention (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Every flow of token t is one feature vector times a running sum of others, with phi = sigmoid:

    t incoming_t = phi(q_t) . sum_{j <= t} phi(k_j)        t conserved incoming_t = phi(q_t) . sum_{j <= t} phi(k_j) / outgoing_j
    t outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i)        t conserved outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i) / incoming_i

and the weight of source t is t exp(o_t) / sum_{s <= t} exp(o_s), with o the clamped conserved outgoing flow. A program walks the
chunks of one (sequence, head). Inside a chunk all four flows are sums over rows or columns of one table of capacities,
A = phi(Q) phi(K)^T. What is carried from chunk to chunk are four vectors of K channels, sums of phi(q), phi(k), phi(q) / incoming
and phi(k) / outgoing, and one number, the sum of exp(o). They start from those of a past, if there is one, and end as what the
next call starts from. eps = 1e-6 stands in both factors as in `attnlab.mixers.flow`.

Where sequences are too few to fill the GPU, each is cut into pieces and walked four times. Flows need the sums of phi over earlier
pieces, conserved flows need flows, and weights need conserved flows: walk 0 sums phi(q) and phi(k) over each piece, walk 1 these
over their flow, walk 2 exp(o), and walk 3, which alone writes results, starts from all of that. One piece needs walk 3 only.

A clamped flow has no slope, and conserved flows lie around the clamp: one that a rounding lifts over it loses its gradient. So the
capacities are those of float32 whatever the inputs are; products of half-precision features cost dk 2 percent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv
from attnlab.kernels.flow_walks import (
    Layout,
    apart,
    capacities,
    chunk_for,
    features,
    launch,
    leave,
    passed,
    place,
    put,
    through,
    walks,
)
from attnlab.kernels.launch import remembered


@remembered
@triton.jit
def _walk(
    q_ptr, k_ptr, sums_ptr, carried_ptr, in_ptr, out_ptr, gate_ptr, given_ptr, total_ptr, reads_ptr, writes_ptr,
    start_ptr, end_ptr, eps, clamp, past_ptr, bounds_ptr, pieces_ptr, owner_ptr, lift,
    T, H, PIECES, piece, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    VARLEN: tl.constexpr, PAST: tl.constexpr, START: tl.constexpr, END: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Walks 0, 1 and 2 leave the sums of a piece; walk 3 writes lift gate phi(q) / (t incoming), weight phi(k), :class:`Gates`
    and, behind the last piece, the sums to go on from.
    """
    i_b, i_n, i_h, i_p, pieces, begin, length, line, edge, bundle = place(
        bounds_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, C, VARLEN
    )
    first = i_p * piece
    q_ptr += i_b * q_b + begin * q_t + i_h * q_h
    k_ptr += i_b * k_b + begin * k_t + i_h * k_h
    reads_ptr += ((i_b * T + begin) * H + i_h) * K
    writes_ptr += ((i_b * T + begin) * H + i_h) * K
    if SPLIT:
        sums_ptr += bundle * (4 * K + 1)
    if START:
        start_ptr += (i_n * H + i_h) * (4 * K + 1)
    if PAST:
        past = tl.load(past_ptr + i_n).to(tl.float32)
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    down, up = cs[:, None] >= cs[None, :], cs[:, None] <= cs[None, :]  # sinks down, sources across
    all_q, all_k, fixed_q, fixed_k, total = passed(
        start_ptr, sums_ptr, 0, i_p, eps, K, BK, START, SPLIT, WALK > 0, WALK > 1, WALK > 2
    )
    for i in range(tl.cdiv(tl.minimum(first + piece, length) - first, C)):
        c0 = first + i * C
        far = c0.to(tl.int64)  # a sequence may have more than 2^31 numbers, a chunk has not
        t = c0 + cs
        inside = t < length
        wide = inside[:, None] & (ks < K)[None, :]
        q = features(q_ptr + far * q_t + cs[:, None] * q_t + ks[None, :], wide)
        k = features(k_ptr + far * k_t + cs[:, None] * k_t + ks[None, :], wide)
        if WALK == 3:
            carried = carried_ptr + (edge + c0 // C) * 4 * K
            put(carried, 0, all_q, K, BK)
            put(carried, 1, all_k, K, BK)
            put(carried, 2, fixed_q, K, BK)
            put(carried, 3, fixed_k, K, BK)
        if WALK > 0:
            n = (t + 1).to(tl.float32)
            if PAST:
                n += past
            table = capacities(q, k, PARTS, DOT)
            to_sinks = tl.where(down, table + eps * tl.sum(k, 1)[None, :], 0.0)  # (phi(q) + eps) phi(k)
            to_sources = tl.where(up, table + eps * tl.sum(q, 1)[:, None], 0.0)
            incoming = tl.sum(to_sinks, 1) + through(q, all_k, eps)
            outgoing = tl.sum(to_sources, 0) + through(k, all_q, eps)
            per_in = tl.where(inside, n / tl.where(inside, incoming, 1.0), 0.0)
            per_out = tl.where(inside, n / tl.where(inside, outgoing, 1.0), 0.0)
            if WALK > 1:
                given = tl.sum(to_sources * per_in[:, None], 0) + through(k, fixed_q, eps)
                given = given / n
                strength = tl.where(inside, tl.exp(tl.minimum(tl.maximum(given, -clamp), clamp)), 0.0)
                if WALK == 3:
                    got = tl.sum(to_sinks * per_out[None, :], 1) + through(q, fixed_k, eps)
                    gate = tl.sigmoid(got / n)
                    running = total + tl.cumsum(strength, 0)
                    at = line + t
                    tl.store(in_ptr + at, incoming / n, mask=inside)
                    tl.store(out_ptr + at, outgoing / n, mask=inside)
                    tl.store(gate_ptr + at, gate, mask=inside)
                    tl.store(given_ptr + at, given, mask=inside)
                    tl.store(total_ptr + at, running, mask=inside)
                    to, rows = far * H * K, cs[:, None] * (H * K) + ks[None, :]
                    reads = q * apart(lift * per_in / n * gate)[:, None]
                    writes = k * apart(n * strength / running)[:, None]
                    tl.store(reads_ptr + to + rows, reads.to(reads_ptr.dtype.element_ty), mask=wide)
                    tl.store(writes_ptr + to + rows, writes.to(writes_ptr.dtype.element_ty), mask=wide)
                total += tl.sum(strength, 0)
            fixed_q += tl.sum(q * apart(per_in)[:, None], 0)
            fixed_k += tl.sum(k * apart(per_out)[:, None], 0)
        all_q += tl.sum(q, 0)
        all_k += tl.sum(k, 0)
    if WALK < 3:
        mine = sums_ptr + i_p * (4 * K + 1)
        leave(mine, all_q, all_k, fixed_q, fixed_k, total, K, BK, WALK == 0, WALK == 1, WALK == 2)
    elif END:
        if i_p == pieces - 1:
            mine = end_ptr + (i_n * H + i_h) * (4 * K + 1)
            leave(mine, all_q - eps, all_k - eps, fixed_q - eps, fixed_k - eps, total, K, BK, True, True, True)


class Gates(NamedTuple):
    """What the gradients need of the forward walk, float32.

    Attributes:
        carried: [B, H, chunks, 4, K], what earlier tokens sum to: phi(q), phi(k), phi(q) / incoming, phi(k) / outgoing.
        incoming, outgoing: [B, H, T], flows.
        gate: [B, H, T], of every sink, the sigmoid of its conserved incoming flow.
        given: [B, H, T], the conserved outgoing flow before the clamp.
        total: [B, H, T], the running sum of exp(clamped conserved outgoing flow).
    """

    carried: Tensor
    incoming: Tensor
    outgoing: Tensor
    gate: Tensor
    given: Tensor
    total: Tensor


def flow_gates(
    q: Tensor, k: Tensor, eps: float, clamp: float, lay: Layout, start: Tensor | None = None, with_end: bool = False
) -> tuple[Tensor, Tensor, Gates, Tensor | None]:
    """The features of q and k [B, T, H, K] with their gates: lift gate phi(q) / (t incoming) and weight phi(k), of the same shape.

    `start` are the sums that the sequences continue and, in the same order, the last result those that they end with: [N, H, 4 K + 1],
    of phi(q), phi(k), phi(q) / incoming, phi(k) / outgoing and exp(clamped conserved outgoing flow).
    """
    batch, length, heads, width = q.shape
    chunks = length // chunk_for(q) + lay.pieces if lay.packed else cdiv(length, chunk_for(q))
    gates = Gates(
        torch.empty(batch, heads, chunks, 4, width, device=q.device),
        *torch.empty(5, batch, heads, length, device=q.device),
    )
    reads, writes = torch.empty(2, *q.shape, dtype=q.dtype, device=q.device)
    end = torch.empty(lay.sequences.count(batch), heads, 4 * width + 1, device=q.device) if with_end else None
    grid, sizes, shape, sums = launch(q, k, lay)
    for walk in walks(sums):
        _walk[grid](
            q, k, sums, *gates, reads, writes, start, end, float(eps), float(clamp), *sizes,
            **shape, START=start is not None, END=with_end, WALK=walk,
        )  # fmt: skip
    return reads, writes, gates, end
