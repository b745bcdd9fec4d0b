"""Triton kernels for the two gates of causal flow attention (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Every flow of token t is one feature vector times a running sum of others, with phi = sigmoid:

    t incoming_t = phi(q_t) . sum_{j <= t} phi(k_j)        t conserved incoming_t = phi(q_t) . sum_{j <= t} phi(k_j) / outgoing_j
    t outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i)        t conserved outgoing_t = phi(k_t) . sum_{i <= t} phi(q_i) / incoming_i

Inside a chunk running sums are one product with a triangle of ones, :func:`_running`; what is carried are four vectors of K channels:
sums of phi(q), phi(k), phi(q) / incoming and phi(k) / outgoing. A first pass sums the first two over every chunk, a second needs
their running sums and sums the last two, a third needs those. In a pass all chunks run at once; running sums over chunks are small.
eps = 1e-6 stands in both factors as in `attnlab.mixers.flow`.

A clamped flow has no slope, and conserved flows lie around the clamp: one that a rounding lifts over it loses its gradient. So the
sums are those of float32 whatever the inputs are; products of half-precision features cost dk 2 percent.

Backward, with a = d conserved incoming / t, b = d conserved outgoing / t, c = d incoming / t and d = d outgoing / t, and
A = phi(Q) phi(K)^T inside a chunk:

    dA_ij = a_i / outgoing_j + c_i  (j <= i)   +   b_j / incoming_i + d_j  (i <= j)

so dphi(Q) = dA phi(K) is one product a chunk and what is carried from both sides, and again three passes suffice: sums of
a phi(q) and b phi(k), then c and d with their sums, then the gradients. There eps, a relative 1e-6, is left out.

Numbers a token are laid out as [B, H, T] here, vectors a chunk as [B, H, chunks, K].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv, dot_precision, padded
from attnlab.kernels.launch import remembered

CHUNK = 64


@triton.jit
def place(T, H, C: tl.constexpr):
    """Batch row, head, tokens [C], where these stand in [B, H, T], and the number of the chunk in [B, H, chunks]."""
    chunks = tl.cdiv(T, C)
    i_h = tl.program_id(0) % H  # neighbours share rows of q and k
    i_n = tl.program_id(0) // H % chunks
    i_b = (tl.program_id(0) // H // chunks).to(tl.int64)
    t = (i_n * C + tl.arange(0, C)).to(tl.int64)
    return i_b, i_h, t, (i_b * H + i_h) * T + t, (i_b * H + i_h) * chunks + i_n


@triton.jit
def features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K: tl.constexpr, BK: tl.constexpr):
    """phi(q), phi(k) [C, K], 0 past the end, and the mask of what exists."""
    ks = tl.arange(0, BK)
    wide = (t < T)[:, None] & (ks < K)[None, :]
    q = tl.load(q_ptr + i_b * q_b + i_h * q_h + t[:, None] * q_t + ks[None, :], mask=wide, other=0.0)
    k = tl.load(k_ptr + i_b * k_b + i_h * k_h + t[:, None] * k_t + ks[None, :], mask=wide, other=0.0)
    return tl.where(wide, tl.sigmoid(q.to(tl.float32)), 0.0), tl.where(wide, tl.sigmoid(k.to(tl.float32)), 0.0), wide


@triton.jit
def _vector(ptr, chunk, K: tl.constexpr, BK: tl.constexpr):
    """What is carried into a chunk, [K]."""
    ks = tl.arange(0, BK)
    return tl.load(ptr + chunk * K + ks, mask=ks < K, other=0.0)


@triton.jit
def _total(ptr, x, weight, chunk, K: tl.constexpr, BK: tl.constexpr):
    """Store sum_t weight_t x_t of a chunk, [K]."""
    ks = tl.arange(0, BK)
    tl.store(ptr + chunk * K + ks, tl.sum(x * weight[:, None], 0), mask=ks < K)


@triton.jit
def _running(x, PART: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr):
    """Sums of x [C, K] over the tokens up to each, or from each on: a triangle of ones times x.

    Tensor cores multiply numbers of few digits exactly, so x comes as a sum of ``PARTS`` of them: what a part leaves is the next.
    """
    rows, columns = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[0])[None, :]
    if REVERSE:
        ones = tl.where(rows <= columns, 1.0, 0.0).to(PART)
    else:
        ones = tl.where(rows >= columns, 1.0, 0.0).to(PART)
    part = x.to(PART)
    total = tl.dot(ones, part)
    for _ in tl.static_range(PARTS - 1):
        x -= part.to(tl.float32)
        part = x.to(PART)
        total = tl.dot(ones, part, total)
    return total


@triton.jit
def _inverse(ptr, at, inside):
    """1 / flow [C], 0 past the end."""
    return tl.where(inside, 1.0 / tl.load(ptr + at, mask=inside, other=1.0), 0.0)


@remembered
@triton.jit
def _sums(
    q_ptr, k_ptr, a_ptr, b_ptr, sum_q_ptr, sum_k_ptr, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sums of phi(q) and phi(k) over every chunk, or of a phi(q) and b phi(k)."""
    i_b, i_h, t, at, chunk = place(T, H, C)
    q, k, _ = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    a = tl.load(a_ptr + at, mask=t < T, other=0.0) if WEIGHTED else tl.full([C], 1.0, tl.float32)
    b = tl.load(b_ptr + at, mask=t < T, other=0.0) if WEIGHTED else tl.full([C], 1.0, tl.float32)
    _total(sum_q_ptr, q, a, chunk, K, BK)
    _total(sum_k_ptr, k, b, chunk, K, BK)


@remembered
@triton.jit
def _flows(
    q_ptr, k_ptr, all_q_ptr, all_k_ptr, in_ptr, out_ptr, sum_q_ptr, sum_k_ptr, eps, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Incoming and outgoing flows, and sums of phi(q) / incoming and phi(k) / outgoing over every chunk."""
    i_b, i_h, t, at, chunk = place(T, H, C)
    q, k, wide = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    q_eps, k_eps = tl.where(wide, q + eps, 0.0), tl.where(wide, k + eps, 0.0)
    all_q, all_k = _vector(all_q_ptr, chunk, K, BK), _vector(all_k_ptr, chunk, K, BK)
    n = (t + 1).to(tl.float32)
    incoming = tl.sum(q_eps * (_running(k, PART, PARTS, False) + (all_k + eps)[None, :]), 1)
    outgoing = tl.sum(k_eps * (_running(q, PART, PARTS, False) + (all_q + eps)[None, :]), 1)
    tl.store(in_ptr + at, incoming / n, mask=t < T)
    tl.store(out_ptr + at, outgoing / n, mask=t < T)
    _total(sum_q_ptr, q, n / tl.where(t < T, incoming, 1.0), chunk, K, BK)
    _total(sum_k_ptr, k, n / tl.where(t < T, outgoing, 1.0), chunk, K, BK)


@remembered
@triton.jit
def _conserved(
    q_ptr, k_ptr, fixed_q_ptr, fixed_k_ptr, in_ptr, out_ptr, conserved_in_ptr, conserved_out_ptr, eps,
    T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Conserved incoming and outgoing flows."""
    i_b, i_h, t, at, chunk = place(T, H, C)
    q, k, wide = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    q_eps, k_eps = tl.where(wide, q + eps, 0.0), tl.where(wide, k + eps, 0.0)
    fixed_q, fixed_k = _vector(fixed_q_ptr, chunk, K, BK), _vector(fixed_k_ptr, chunk, K, BK)
    per_in, per_out = _inverse(in_ptr, at, t < T), _inverse(out_ptr, at, t < T)
    n = (t + 1).to(tl.float32)
    gets = tl.sum(q_eps * (_running(k * per_out[:, None], PART, PARTS, False) + (fixed_k + eps)[None, :]), 1)
    gave = tl.sum(k_eps * (_running(q * per_in[:, None], PART, PARTS, False) + (fixed_q + eps)[None, :]), 1)
    tl.store(conserved_in_ptr + at, gets / n, mask=t < T)
    tl.store(conserved_out_ptr + at, gave / n, mask=t < T)


@remembered
@triton.jit
def _flows_back(
    q_ptr, k_ptr, in_ptr, out_ptr, a_ptr, b_ptr, d_read_ptr, a_q_ptr, b_k_ptr, c_ptr, d_ptr, sum_q_ptr, sum_k_ptr,
    T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """c and d, and sums of c phi(q) and d phi(k) over every chunk."""
    i_b, i_h, t, at, chunk = place(T, H, C)
    q, k, _ = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    per_in, per_out = _inverse(in_ptr, at, t < T), _inverse(out_ptr, at, t < T)
    a = tl.load(a_ptr + at, mask=t < T, other=0.0)
    b = tl.load(b_ptr + at, mask=t < T, other=0.0)
    d_read = tl.load(d_read_ptr + at, mask=t < T, other=0.0)
    n = (t + 1).to(tl.float32)
    later_q, later_k = _vector(a_q_ptr, chunk, K, BK), _vector(b_k_ptr, chunk, K, BK)
    d_per_out = tl.sum(k * (_running(q * a[:, None], PART, PARTS, True) + later_q[None, :]), 1)
    d_per_in = tl.sum(q * (_running(k * b[:, None], PART, PARTS, True) + later_k[None, :]), 1) + d_read / n
    c = -per_in * per_in * d_per_in / n
    d = -per_out * per_out * d_per_out / n
    tl.store(c_ptr + at, c, mask=t < T)
    tl.store(d_ptr + at, d, mask=t < T)
    _total(sum_q_ptr, q, c, chunk, K, BK)
    _total(sum_k_ptr, k, d, chunk, K, BK)


@remembered
@triton.jit
def _gradients(
    q_ptr, k_ptr, in_ptr, out_ptr, a_ptr, b_ptr, c_ptr, d_ptr,
    all_q_ptr, all_k_ptr, fixed_q_ptr, fixed_k_ptr, a_q_ptr, b_k_ptr, c_q_ptr, d_k_ptr,
    read_ptr, weight_ptr, dq_ptr, dk_ptr, T, H, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq and dk [B, T, H, K]: dq_ptr and dk_ptr come with the gradients of read phi(q) and weight phi(k), and are overwritten."""
    i_b, i_h, t, at, chunk = place(T, H, C)
    q, k, wide = features(q_ptr, k_ptr, i_b, i_h, t, T, q_b, q_t, q_h, k_b, k_t, k_h, K, BK)
    per_in, per_out = _inverse(in_ptr, at, t < T), _inverse(out_ptr, at, t < T)
    a = tl.load(a_ptr + at, mask=t < T, other=0.0)
    b = tl.load(b_ptr + at, mask=t < T, other=0.0)
    c = tl.load(c_ptr + at, mask=t < T, other=0.0)
    d = tl.load(d_ptr + at, mask=t < T, other=0.0)
    cs = tl.arange(0, C)
    da = tl.where(
        cs[:, None] >= cs[None, :], a[:, None] * per_out[None, :] + c[:, None], 0.0
    )  # sinks down, sources across
    da += tl.where(cs[:, None] <= cs[None, :], b[None, :] * per_in[:, None] + d[None, :], 0.0)
    da = da.to(FACTOR)
    dq = tl.dot(da, k.to(FACTOR), input_precision=DOT)
    dq += (
        a[:, None] * _vector(fixed_k_ptr, chunk, K, BK)[None, :]
        + c[:, None] * _vector(all_k_ptr, chunk, K, BK)[None, :]
    )
    dq += per_in[:, None] * _vector(b_k_ptr, chunk, K, BK)[None, :] + _vector(d_k_ptr, chunk, K, BK)[None, :]
    dk = tl.dot(tl.trans(da), q.to(FACTOR), input_precision=DOT)
    dk += (
        b[:, None] * _vector(fixed_q_ptr, chunk, K, BK)[None, :]
        + d[:, None] * _vector(all_q_ptr, chunk, K, BK)[None, :]
    )
    dk += per_out[:, None] * _vector(a_q_ptr, chunk, K, BK)[None, :] + _vector(c_q_ptr, chunk, K, BK)[None, :]
    rows = ((i_b * T + t) * H + i_h)[:, None] * K + tl.arange(0, BK)[None, :]
    read = tl.load(read_ptr + at, mask=t < T, other=0.0)
    weight = tl.load(weight_ptr + at, mask=t < T, other=0.0)
    dq += read[:, None] * tl.load(dq_ptr + rows, mask=wide, other=0.0).to(tl.float32)
    dk += weight[:, None] * tl.load(dk_ptr + rows, mask=wide, other=0.0).to(tl.float32)
    tl.store(dq_ptr + rows, (dq * q * (1 - q)).to(dq_ptr.dtype.element_ty), mask=wide)
    tl.store(dk_ptr + rows, (dk * k * (1 - k)).to(dk_ptr.dtype.element_ty), mask=wide)


class Gates(NamedTuple):
    """What the kernels make of q and k; numbers a token [B, H, T] and vectors a chunk [2, B, H, chunks, K], float32.

    Attributes:
        weight: of every source, t exp(o_t) / sum_{s <= t} exp(o_s) with o the clamped conserved outgoing flow.
        gate: of every sink, the sigmoid of its conserved incoming flow.
        incoming, outgoing, conserved_out, strength: flows, and exp(o).
        everything, fixed: what earlier chunks sum to, of phi(q) and phi(k), and of these over their flow.
    """

    weight: Tensor
    gate: Tensor
    incoming: Tensor
    outgoing: Tensor
    conserved_out: Tensor
    strength: Tensor
    everything: Tensor
    fixed: Tensor


def flow_gates(q: Tensor, k: Tensor, eps: float, clamp: float) -> Gates:
    """The gates of q and k [B, T, H, K], in three passes over all chunks."""
    incoming, outgoing, conserved_in, conserved_out = _tokens(4, q)
    grid, sizes, shape = launch(q, k)
    sums = _chunks(2, q)
    _sums[grid](q, k, None, None, *sums, *sizes, **shape, WEIGHTED=False)
    everything = _before(sums)
    sums = _chunks(2, q)
    _flows[grid](q, k, *everything, incoming, outgoing, *sums, eps, *sizes, **shape, **_parts(q))
    fixed = _before(sums)
    flows = (incoming, outgoing, conserved_in, conserved_out)
    _conserved[grid](q, k, *fixed, *flows, eps, *sizes, **shape, **_parts(q))
    strength = conserved_out.clamp(-clamp, clamp).exp()
    weight = positions(q) * strength / strength.cumsum(-1)
    return Gates(weight, conserved_in.sigmoid(), incoming, outgoing, conserved_out, strength, everything, fixed)


def gradients(
    q: Tensor, k: Tensor, gates: Gates, clamp: float, read: Tensor, d_weight: Tensor, d_gate: Tensor, d_inverse: Tensor,
    d_reads: Tensor, d_writes: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dk [B, T, H, K], in the memory of ``d_reads`` and ``d_writes``.

    Args:
        read: [B, H, T], what phi(q) was multiplied with; phi(k) was with ``gates.weight``.
        d_weight, d_gate, d_inverse: [B, H, T], of the weight, the gate, and 1 / (t incoming).
        d_reads, d_writes: [B, T, H, K], of read phi(q) and weight phi(k).
    """
    n, weight, strength = positions(q), gates.weight, gates.strength
    a = d_gate * gates.gate * (1 - gates.gate) / n
    # weight_t = t e_t / S_t, and e_t is in every later S
    later = (d_weight * weight / strength.cumsum(-1)).flip(-1).cumsum(-1).flip(-1)
    slope = (gates.conserved_out.abs() < clamp) / n  # a clamped flow has none
    b = (d_weight * weight - strength * later) * slope
    c, d = _tokens(2, q)
    grid, sizes, shape = launch(q, k)
    sums = _chunks(2, q)
    _sums[grid](q, k, a, b, *sums, *sizes, **shape, WEIGHTED=True)
    by_ab = _after(sums)
    sums = _chunks(2, q)
    flows = (q, k, gates.incoming, gates.outgoing, a, b)
    _flows_back[grid](*flows, d_inverse, *by_ab, c, d, *sums, *sizes, **shape, **_parts(q))
    carried = (*gates.everything, *gates.fixed, *by_ab, *_after(sums))
    factor = tl.bfloat16 if q.dtype == torch.bfloat16 and q.is_cuda else tl.float32
    outputs = (read, weight, d_reads, d_writes)
    _gradients[grid](*flows, c, d, *carried, *outputs, *sizes, **shape, FACTOR=factor, DOT=dot_precision(q))
    return d_reads, d_writes


def _tokens(count: int, q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    return torch.empty(count, batch, heads, length, device=q.device)


def _chunks(count: int, q: Tensor) -> Tensor:
    batch, length, heads, width = q.shape
    return torch.empty(count, batch, heads, cdiv(length, CHUNK), width, device=q.device)


def _before(sums: Tensor) -> Tensor:
    """What all earlier chunks sum to, from sums over each [2, B, H, chunks, K]."""
    return torch.cat([torch.zeros_like(sums[..., :1, :]), sums[..., :-1, :].cumsum(-2)], -2)


def _after(sums: Tensor) -> Tensor:
    """The same for all later chunks."""
    return _before(sums.flip(-2)).flip(-2)


def _parts(q: Tensor) -> dict[str, Any]:
    """How sums inside a chunk are split: into bfloat16, two for 16 digits, three for all of float32. (The interpreter's is wrong.)"""
    if not q.is_cuda:
        return {"PART": tl.float32, "PARTS": 1}
    return {"PART": tl.bfloat16, "PARTS": 3 if q.dtype == torch.float32 else 2}


def positions(q: Tensor) -> Tensor:
    """1, 2, ..., T."""
    return torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.float32)


def launch(q: Tensor, k: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes and compile-time arguments that the kernels share: one program a (sequence, head, chunk)."""
    batch, length, heads, width = q.shape
    shape = {"K": width, "BK": padded(width), "C": CHUNK, "num_warps": 4 if width <= 64 else 8, "num_stages": 1}
    grid = (batch * heads * cdiv(length, CHUNK),)
    return grid, (length, heads, *q.stride()[:3], *k.stride()[:3]), shape
