"""Triton kernel for the two gates of causal flow attention (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Every flow of token t is one feature vector times a running sum of others, with phi = sigmoid:

    t incoming_t = phi(q_t) . sum_{j <= t} phi(k_j)        t conserved incoming_t = phi(q_t) . sum_{j <= t} phi(k_j) / outgoing_j
    t outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i)        t conserved outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i) / incoming_i

and the weight of source t is t exp(o_t) / sum_{s <= t} exp(o_s), with o the clamped conserved outgoing flow. A program walks the
chunks of one (sequence, head). Inside a chunk all four flows are sums over rows or columns of one table of capacities,
A = phi(Q) phi(K)^T. What is carried from chunk to chunk are four vectors of K channels, sums of phi(q), phi(k), phi(q) / incoming
and phi(k) / outgoing, and one number, the sum of exp(o). eps = 1e-6 stands in both factors as in `attnlab.mixers.flow`.

Where sequences are too few to fill the GPU, each is cut into pieces and walked four times. Flows need the sums of phi over earlier
pieces, conserved flows need flows, and weights need conserved flows: walk 0 sums phi(q) and phi(k) over each piece, walk 1 these
over their flow, walk 2 exp(o), and walk 3, which alone writes results, starts from all of that. One piece needs walk 3 only.

A clamped flow has no slope, and conserved flows lie around the clamp: one that a rounding lifts over it loses its gradient. So the
capacities are those of float32 whatever the inputs are; products of half-precision features cost dk 2 percent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv, dot_precision, multiprocessors, padded
from attnlab.kernels.launch import remembered

STAGES = 2  # the next chunk is loaded while this one is computed
WARPS = 2  # few, so that many programs share a multiprocessor: a walk is one long chain of small steps
RESIDENT = 4  # programs that a multiprocessor runs at once: two warps of 255 registers a thread take a quarter of its registers
WALKS = 4  # of a sequence in pieces


@triton.jit
def place(T, H, PIECES, piece, C: tl.constexpr):
    """Batch row, head, piece, number of the (sequence, head), first token of the piece, and its number of chunks."""
    i_h = tl.program_id(0) % H  # neighbours share rows of q and k
    i_p = tl.program_id(0) // H % PIECES
    i_b = (tl.program_id(0) // H // PIECES).to(tl.int64)
    first = i_p * piece
    return i_b, i_h, i_p, i_b * H + i_h, first, tl.cdiv(tl.minimum(first + piece, T) - first, C)


@triton.jit
def features(ptr, wide):
    """phi(x) [C, K] in float32, 0 past the end."""
    return tl.where(wide, tl.sigmoid(tl.load(ptr, mask=wide, other=0.0).to(tl.float32)), 0.0)


@triton.jit
def capacities(q, k, PARTS: tl.constexpr, DOT: tl.constexpr):
    """q k^T [C, C] as in float32: with two parts a factor is a bfloat16 and a rest, and only products of rests are left out."""
    if PARTS == 1:
        return tl.dot(q, tl.trans(k), input_precision=DOT)
    else:
        q_most, k_most = q.to(tl.bfloat16), k.to(tl.bfloat16)
        q_rest, k_rest = (q - q_most.to(tl.float32)).to(tl.bfloat16), (k - k_most.to(tl.float32)).to(tl.bfloat16)
        table = tl.dot(q_rest, tl.trans(k_most))
        table = tl.dot(q_most, tl.trans(k_rest), table)
        return tl.dot(q_most, tl.trans(k_most), table)


@triton.jit
def through(x, total, eps):
    """(x + eps) . total for every row x, [C]; the vector carries its own eps."""
    return tl.sum(x * total[None, :], 1) + eps * tl.sum(total, 0)


@triton.jit
def apart(x):
    """x [C] itself, from shared memory: here ends the layout in which tensor cores leave tables.

    The compiler would extend it to the features that x weighs, would take their sigmoid once more in it, and hold what is carried
    in it too, where a thread has many times as much of a vector.
    """
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def vector(ptr, i: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Vector i of those at `ptr`, [K]."""
    ks = tl.arange(0, BK)
    return tl.load(ptr + i * K + ks, mask=ks < K, other=0.0)


@triton.jit
def put(ptr, i: tl.constexpr, x, K: tl.constexpr, BK: tl.constexpr):
    """Store x as vector i."""
    ks = tl.arange(0, BK)
    tl.store(ptr + i * K + ks, x, mask=ks < K)


@triton.jit
def passed(
    sums_ptr, begin, end, eps, K: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """eps + sums over the pieces from `begin` to `end`, two pairs of vectors and a number; 0 what no walk has summed before."""
    start = tl.where(tl.arange(0, BK) < K, eps, 0.0)
    q0 = start if FIRST else start * 0.0
    k0 = q0
    q1 = start if SECOND else start * 0.0
    k1 = q1
    number = 0.0
    if SPLIT:
        for j in range(begin, end):
            at = sums_ptr + j * (4 * K + 1)
            if FIRST:
                q0 += vector(at, 0, K, BK)
                k0 += vector(at, 1, K, BK)
            if SECOND:
                q1 += vector(at, 2, K, BK)
                k1 += vector(at, 3, K, BK)
            if NUMBER:
                number += tl.load(at + 4 * K)
    return q0, k0, q1, k1, number


@remembered
@triton.jit
def _walk(
    q_ptr, k_ptr, sums_ptr, carried_ptr, in_ptr, out_ptr, gate_ptr, given_ptr, total_ptr, reads_ptr, writes_ptr, eps, clamp,
    T, H, PIECES, piece, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """Walks 0, 1 and 2 leave the sums of a piece; walk 3 writes T gate phi(q) / (t incoming), weight phi(k) and :class:`Gates`."""
    i_b, i_h, i_p, i_u, first, chunks = place(T, H, PIECES, piece, C)
    q_ptr += i_b * q_b + i_h * q_h
    k_ptr += i_b * k_b + i_h * k_h
    reads_ptr += (i_b * T * H + i_h) * K
    writes_ptr += (i_b * T * H + i_h) * K
    if SPLIT:
        sums_ptr += i_u * PIECES * (4 * K + 1)
    cs, ks = tl.arange(0, C), tl.arange(0, BK)
    down, up = cs[:, None] >= cs[None, :], cs[:, None] <= cs[None, :]  # sinks down, sources across
    all_q, all_k, fixed_q, fixed_k, total = passed(sums_ptr, 0, i_p, eps, K, BK, SPLIT, WALK > 0, WALK > 1, WALK > 2)
    for i in range(chunks):
        c0 = first + i * C
        far = c0.to(tl.int64)  # a sequence may have more than 2^31 numbers, a chunk has not
        t = c0 + cs
        inside = t < T
        wide = inside[:, None] & (ks < K)[None, :]
        q = features(q_ptr + far * q_t + cs[:, None] * q_t + ks[None, :], wide)
        k = features(k_ptr + far * k_t + cs[:, None] * k_t + ks[None, :], wide)
        if WALK == 3:
            carried = carried_ptr + (i_u * tl.cdiv(T, C) + c0 // C) * 4 * K
            put(carried, 0, all_q, K, BK)
            put(carried, 1, all_k, K, BK)
            put(carried, 2, fixed_q, K, BK)
            put(carried, 3, fixed_k, K, BK)
        if WALK > 0:
            n = (t + 1).to(tl.float32)
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
                    at = i_u * T + t
                    tl.store(in_ptr + at, incoming / n, mask=inside)
                    tl.store(out_ptr + at, outgoing / n, mask=inside)
                    tl.store(gate_ptr + at, gate, mask=inside)
                    tl.store(given_ptr + at, given, mask=inside)
                    tl.store(total_ptr + at, running, mask=inside)
                    to, rows = far * H * K, cs[:, None] * (H * K) + ks[None, :]
                    reads = q * apart(T * per_in / n * gate)[:, None]
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
        if WALK == 0:
            put(mine, 0, all_q, K, BK)
            put(mine, 1, all_k, K, BK)
        elif WALK == 1:
            put(mine, 2, fixed_q, K, BK)
            put(mine, 3, fixed_k, K, BK)
        else:
            tl.store(mine + 4 * K, total)


class Gates(NamedTuple):
    """What the gradients need of the forward walk, float32.

    Attributes:
        carried: [B, H, chunks, 4, K], what earlier chunks sum to: phi(q), phi(k), phi(q) / incoming, phi(k) / outgoing.
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


def flow_gates(q: Tensor, k: Tensor, eps: float, clamp: float) -> tuple[Tensor, Tensor, Gates]:
    """The features of q and k [B, T, H, K] with their gates: T gate phi(q) / (t incoming) and weight phi(k), of the same shape."""
    batch, length, heads, width = q.shape
    gates = Gates(
        torch.empty(batch, heads, cdiv(length, chunk_for(q)), 4, width, device=q.device),
        *torch.empty(5, batch, heads, length, device=q.device),
    )
    reads, writes = torch.empty(2, *q.shape, dtype=q.dtype, device=q.device)
    grid, sizes, shape, sums = launch(q, k)
    for walk in walks(sums):
        _walk[grid](q, k, sums, *gates, reads, writes, float(eps), float(clamp), *sizes, **shape, WALK=walk)
    return reads, writes, gates


def chunk_for(q: Tensor) -> int:
    """Tokens a chunk: 32, or 16, the fewest that tensor cores take, of heads so wide that the registers hold no more."""
    return 32 if padded(q.shape[-1]) <= 64 else 16


def pieces_for(q: Tensor) -> int:
    """Into how many pieces a sequence is cut: one if that fills the GPU, or if four walks would cost more than they gain."""
    batch, length, heads, _ = q.shape
    wanted = min(RESIDENT * multiprocessors(q.device) // (batch * heads), length // 512)
    return wanted if wanted >= WALKS else 1


def walks(sums: Tensor | None) -> range:
    """The walks that are needed: all four where there are sums over pieces, else the last."""
    return range(WALKS) if sums is not None else range(WALKS - 1, WALKS)


def launch(q: Tensor, k: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, Any], Tensor | None]:
    """Grid, sizes and compile-time arguments of a walk, and the memory of what pieces sum to if there are several.

    Programs are one a (sequence, head, piece). Sums over a piece are four vectors and a number, [B, H, pieces, 4 K + 1].
    Tables of half-precision inputs are made of bfloat16 in two parts, those of float32 by TF32 in three products. (The
    interpreter's bfloat16 is wrong.)
    """
    batch, length, heads, width = q.shape
    chunk = chunk_for(q)
    piece = cdiv(cdiv(length, pieces_for(q)), chunk) * chunk  # whole chunks, so that only the last is ragged
    pieces = cdiv(length, piece)
    sums = torch.empty(batch, heads, pieces, 4 * width + 1, device=q.device) if pieces > 1 else None
    parts = 2 if q.is_cuda and q.dtype != torch.float32 else 1
    shape = {
        "K": width, "BK": padded(width), "C": chunk, "SPLIT": pieces > 1, "PARTS": parts, "DOT": dot_precision(q),
        "num_warps": WARPS, "num_stages": STAGES,
    }  # fmt: skip
    sizes = (length, heads, pieces, piece, *q.stride()[:3], *k.stride()[:3])
    return (batch * heads * pieces,), sizes, shape, sums
