"""Triton kernels of the Aaren scan: softmax attention of one fixed query over every prefix (Feng et al. 2024, arXiv:2405.13956).

    lse_t = log sum_{i <= t} exp(s_i)           o_t = sum_{i <= t} exp(s_i - lse_t) v_i

All that a program carries from chunk to chunk is (lse, o) of the last token: the triple (m, u, w) of the paper with u = 1.
Inside a chunk the weights form a lower triangle, as in flash attention, and one matrix product applies them. Backward, from the
right: with D_t = sum_{k >= t} exp(-lse_k) do_k, a vector, and E_t = sum_{k >= t} exp(-lse_k) (o_k . do_k - dlse_k), a scalar,

    dv_t = exp(s_t) D_t                         ds_t = exp(s_t) (v_t . D_t - E_t)

and because lse never falls, taking it from the first token on the right makes every exponent at most 0.
Sequences are cut into pieces: a first pass sums up each, and a program starts from the merged pieces before (after) its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.dispatch import multiprocessors, rows


@triton.jit
def _safe_exp(x, reference):
    """exp(x - reference), and 0 where both are -inf: a set without any weight."""
    return tl.exp(x - tl.where(reference == float("-inf"), 0.0, reference))


@triton.jit
def _since(first, lse):
    """exp(first - lse) for an lse that never fell since `first`; 0 for tokens that see no weight yet."""
    return tl.where(lse == float("-inf"), 0.0, _safe_exp(first, lse))


@triton.jit
def _program(T, H, PIECES, piece):
    """Which (batch, head) this program serves, and its tokens [first, last)."""
    i_u, i_p = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    first = i_p * piece
    return (i_u // H).to(tl.int64), i_u % H, i_u.to(tl.int64), i_p, first, tl.minimum(first + piece, T)


@triton.jit
def _summaries(
    s_ptr, v_ptr, m_ptr, u_ptr, w_ptr, T, H, PIECES, piece, v_b, v_t, v_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(m, u, w) of every piece: [U, PIECES] twice and [U, PIECES, V]."""
    i_b, i_h, i_u, i_p, first, last = _program(T, H, PIECES, piece)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    s_ptr += i_b * T * H + i_h
    v_ptr += i_b * v_b + i_h * v_h
    m, u, w = float("-inf"), 0.0, tl.zeros([BV], dtype=tl.float32)
    for c0 in range(first, last, C):
        t = (c0 + cs).to(tl.int64)
        s = tl.load(s_ptr + t * H, mask=t < last, other=float("-inf"))
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=(t < last)[:, None] & (vs < V)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(s, 0))
        p, keep = _safe_exp(s, top), _safe_exp(m, top)
        u = u * keep + tl.sum(p, 0)
        w = w * keep + tl.sum(p[:, None] * v.to(tl.float32), 0)
        m = top
    at = i_u * PIECES + i_p
    tl.store(m_ptr + at, m)
    tl.store(u_ptr + at, u)
    tl.store(w_ptr + at * V + vs, w, mask=vs < V)


@triton.jit
def _forward(
    s_ptr, v_ptr, m_ptr, u_ptr, w_ptr, o_ptr, lse_ptr, T, H, PIECES, piece, v_b, v_t, v_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and lse [B, T, H]."""
    i_b, i_h, i_u, i_p, first, last = _program(T, H, PIECES, piece)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    s_ptr += i_b * T * H + i_h
    v_ptr += i_b * v_b + i_h * v_h
    lse_ptr += i_b * T * H + i_h
    o_ptr += (i_b * T * H + i_h) * V
    m, u, w = float("-inf"), 0.0, tl.zeros([BV], dtype=tl.float32)
    for j in range(i_p):  # merge the pieces before this one
        at = i_u * PIECES + j
        m_j = tl.load(m_ptr + at)
        top = tl.maximum(m, m_j)
        keep, new = _safe_exp(m, top), _safe_exp(m_j, top)
        u = u * keep + tl.load(u_ptr + at) * new
        w = w * keep + tl.load(w_ptr + at * V + vs, mask=vs < V, other=0.0) * new
        m = top
    before = m + tl.log(tl.where(u > 0, u, 1.0))  # -inf while there was no weight
    mean = w / tl.where(u > 0, u, 1.0)
    for c0 in range(first, last, C):
        t = (c0 + cs).to(tl.int64)
        inside = t < last
        s = tl.load(s_ptr + t * H, mask=inside, other=float("-inf"))
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=inside[:, None] & (vs < V)[None, :], other=0.0)
        seen = tl.where(cs[:, None] >= cs[None, :], s[None, :], float("-inf"))
        top = tl.maximum(
            tl.max(seen, 1), before
        )  # per row: a maximum over the whole chunk would sink early rows to 0 / 0
        p, keep = _safe_exp(seen, top[:, None]), _safe_exp(before, top)
        u_rows = tl.sum(p, 1) + keep
        o = tl.dot(p.to(v.dtype), v, keep[:, None] * mean[None, :], input_precision=DOT)
        o = o / tl.where(u_rows > 0, u_rows, 1.0)[:, None]
        lse = top + tl.log(tl.where(u_rows > 0, u_rows, 1.0))
        tl.store(
            o_ptr + t[:, None] * (H * V) + vs[None, :],
            o.to(o_ptr.dtype.element_ty),
            mask=inside[:, None] & (vs < V)[None, :],
        )
        tl.store(lse_ptr + t * H, lse, mask=inside)
        mean = tl.sum(
            tl.where((cs == C - 1)[:, None], o, 0.0), 0
        )  # past the end nothing has weight, so the last row serves
        before = tl.sum(tl.where(cs == C - 1, lse, 0.0), 0)


@triton.jit
def _flows_back(
    lse_ptr, o_ptr, do_ptr, dlse_ptr, d_ptr, e_ptr, T, H, PIECES, piece, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """D and E of every piece, with lse taken from its first token: [U, PIECES, V] and [U, PIECES]."""
    i_b, i_h, i_u, i_p, first, last = _program(T, H, PIECES, piece)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    lse_ptr += i_b * T * H + i_h
    dlse_ptr += i_b * T * H + i_h
    o_ptr += (i_b * T * H + i_h) * V
    do_ptr += i_b * do_b + i_h * do_h
    reference = tl.load(lse_ptr + first.to(tl.int64) * H, mask=first < last, other=0.0)
    d, e = tl.zeros([BV], dtype=tl.float32), 0.0
    for c0 in range(first, last, C):
        t = (c0 + cs).to(tl.int64)
        inside = t < last
        lse = tl.load(lse_ptr + t * H, mask=inside, other=float("inf"))
        wide = inside[:, None] & (vs < V)[None, :]
        o = tl.load(o_ptr + t[:, None] * (H * V) + vs[None, :], mask=wide, other=0.0).to(tl.float32)
        do = tl.load(do_ptr + t[:, None] * do_t + vs[None, :], mask=wide, other=0.0).to(tl.float32)
        p = _since(reference, lse)
        d += tl.sum(p[:, None] * do, 0)
        e += tl.sum(p * (tl.sum(o * do, 1) - tl.load(dlse_ptr + t * H, mask=inside, other=0.0)), 0)
    at = i_u * PIECES + i_p
    tl.store(d_ptr + at * V + vs, d, mask=vs < V)
    tl.store(e_ptr + at, e)


@triton.jit
def _backward(
    s_ptr, v_ptr, lse_ptr, o_ptr, do_ptr, dlse_ptr, d_ptr, e_ptr, ds_ptr, dv_ptr,
    T, H, PIECES, piece, v_b, v_t, v_h, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ds [B, T, H] and dv [B, T, H, V]."""
    i_b, i_h, i_u, i_p, first, last = _program(T, H, PIECES, piece)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    start = i_b * T * H + i_h
    s_ptr += start
    lse_ptr += start
    dlse_ptr += start
    ds_ptr += start
    o_ptr += start * V
    dv_ptr += start * V
    v_ptr += i_b * v_b + i_h * v_h
    do_ptr += i_b * do_b + i_h * do_h
    d, e = tl.zeros([BV], dtype=tl.float32), 0.0
    reference = float("inf")  # lse of the first token on the right; inf: there is none
    for i in range(PIECES - 1 - i_p):  # from the last piece to the one after this
        j = PIECES - 1 - i
        begin = (j * piece).to(tl.int64)
        here = tl.load(lse_ptr + begin * H, mask=begin < T, other=float("inf"))
        keep = _safe_exp(here, reference)
        at = i_u * PIECES + j
        d = d * keep + tl.load(d_ptr + at * V + vs, mask=vs < V, other=0.0)
        e = e * keep + tl.load(e_ptr + at)
        reference = here
    chunks = tl.cdiv(tl.maximum(last - first, 0), C)
    for i in range(chunks):
        c0 = first + (chunks - 1 - i) * C
        t = (c0 + cs).to(tl.int64)
        inside = t < last
        wide = inside[:, None] & (vs < V)[None, :]
        s = tl.load(s_ptr + t * H, mask=inside, other=float("-inf"))
        lse = tl.load(lse_ptr + t * H, mask=inside, other=float("inf"))
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=wide, other=0.0)
        o = tl.load(o_ptr + t[:, None] * (H * V) + vs[None, :], mask=wide, other=0.0)
        do = tl.load(do_ptr + t[:, None] * do_t + vs[None, :], mask=wide, other=0.0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - tl.load(dlse_ptr + t * H, mask=inside, other=0.0)
        later = cs[:, None] <= cs[None, :]  # row i: the token, column k: the outputs that see it
        p = _safe_exp(tl.where(later, s[:, None], float("-inf")), lse[None, :])
        from_right = _safe_exp(s, reference)
        dv = tl.dot(p.to(do.dtype), do, from_right[:, None] * d[None, :], input_precision=DOT)
        ds = tl.sum(v.to(tl.float32) * dv, 1) - tl.sum(p * delta[None, :], 1) - from_right * e
        tl.store(dv_ptr + t[:, None] * (H * V) + vs[None, :], dv.to(dv_ptr.dtype.element_ty), mask=wide)
        tl.store(ds_ptr + t * H, ds, mask=inside)
        here = tl.load(lse_ptr + c0.to(tl.int64) * H)
        p_here = _since(here, lse)
        keep = _safe_exp(here, reference)
        d = d * keep + tl.sum(p_here[:, None] * do.to(tl.float32), 0)
        e = e * keep + tl.sum(p_here * delta, 0)
        reference = here


def pieces_for(s: Tensor) -> tuple[int, int]:
    """How many pieces each sequence is cut into, and their length: about eight programs a multiprocessor, 512 tokens or more."""
    batch, length, heads = s.shape
    wanted = triton.cdiv(8 * multiprocessors(s.device), batch * heads)
    piece = triton.cdiv(max(triton.cdiv(length, wanted), min(512, length)), CHUNK) * CHUNK
    return triton.cdiv(length, piece), piece


CHUNK = 64


class PrefixSoftmax(torch.autograd.Function):
    """(o, lse) from scores [B, T, H] in float32 and values [B, T, H, V]; both outputs are differentiable."""

    @staticmethod
    def forward(ctx: Any, s, v, cut):
        batch, length, heads = s.shape
        width = v.shape[-1]
        pieces, piece = cut
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        lse = torch.empty_like(s)
        m, u = s.new_empty(2, batch, heads, pieces)
        w = s.new_empty(batch, heads, pieces, width)
        sizes = (length, heads, pieces, piece, *v.stride()[:3])
        shape = {"V": width, "BV": max(16, triton.next_power_of_2(width)), "C": CHUNK}
        grid = (batch * heads * pieces,)
        if pieces > 1:
            _summaries[grid](s, v, m, u, w, *sizes, **shape, num_warps=4, num_stages=3)
        _forward[grid](s, v, m, u, w, o, lse, *sizes, **shape, DOT=_precision(v), num_warps=4, num_stages=3)
        ctx.save_for_backward(s, v, o, lse)
        ctx.cut = cut
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o, d_lse):
        s, v, o, lse = ctx.saved_tensors
        batch, length, heads = s.shape
        width = v.shape[-1]
        pieces, piece = ctx.cut
        d_o, d_lse = rows(d_o), d_lse.contiguous()
        ds, dv = torch.empty_like(s), torch.empty(v.shape, dtype=v.dtype, device=v.device)
        d = s.new_empty(batch, heads, pieces, width)
        e = s.new_empty(batch, heads, pieces)
        sizes = (length, heads, pieces, piece)
        shape = {"V": width, "BV": max(16, triton.next_power_of_2(width)), "C": CHUNK}
        grid = (batch * heads * pieces,)
        if pieces > 1:
            _flows_back[grid](lse, o, d_o, d_lse, d, e, *sizes, *d_o.stride()[:3], **shape, num_warps=4, num_stages=3)
        _backward[grid](
            s, v, lse, o, d_o, d_lse, d, e, ds, dv, *sizes, *v.stride()[:3], *d_o.stride()[:3],
            **shape, DOT=_precision(v), num_warps=4, num_stages=2,
        )  # fmt: skip
        return ds, dv, None


def _precision(v: Tensor) -> str:
    return "tf32x3" if v.dtype == torch.float32 else "tf32"
