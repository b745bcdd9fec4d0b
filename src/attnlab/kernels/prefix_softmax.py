"""Triton kernels of the Aaren scan: softmax attention of one fixed query over every prefix (Feng et al. 2024, arXiv:2405.13956).

    lse_t = log sum_{i <= t} exp(s_i)           o_t = sum_{i <= t} exp(s_i - lse_t) v_i

All that a chunk needs of those before it is (lse, o) of its left neighbour's last token: the triple (m, u, w) of the paper with
u = 1. So a first pass sums up every chunk, the scan of these summaries is the same problem 32 times shorter, and a second pass
runs all chunks at once; the tree has as many levels as T has digits in base 32. Inside a chunk the weights form a lower triangle,
as in flash attention, and one matrix product applies them. Backward, from the right: with D_t = sum_{k >= t} exp(-lse_k) do_k, a vector, and E_t = sum_{k >= t} exp(-lse_k) (o_k . do_k - dlse_k), a scalar,

    dv_t = exp(s_t) D_t                         ds_t = exp(s_t) (v_t . D_t - E_t)

and because lse never falls, taking it from the first token on the right makes every exponent at most 0.
There sequences are cut into pieces: a first pass sums up each, and a program walks its piece from the merged pieces after it.
Where several sequences are packed into one row, no chunk and no piece crosses a bound; a program asks `owner` whose it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.dispatch import cdiv, dot_precision, multiprocessors, padded, rows
from attnlab.kernels.launch import remembered
from attnlab.kernels.packed import Sequences


@triton.jit
def _safe_exp(x, reference):
    """exp(x - reference), and 0 where both are -inf: a set without any weight."""
    return tl.exp(x - tl.where(reference == float("-inf"), 0.0, reference))


@triton.jit
def _merge(m, u, m_later, u_later):
    """The paper's merge of two sets: their maximum and the sum of exp(s - maximum)."""
    top = tl.maximum(m, m_later)
    return top, u * _safe_exp(m, top) + u_later * _safe_exp(m_later, top)


@triton.jit
def _since(first, lse):
    """exp(first - lse) for an lse that never fell since `first`; 0 for tokens that see no weight yet."""
    return tl.where(lse == float("-inf"), 0.0, _safe_exp(first, lse))


@triton.jit
def _place(part, cu_ptr, parts_ptr, owner_ptr):
    """Of a part of packed sequences: how many of its sequence come before and after it, and the tokens of that, [begin, end)."""
    i_n = tl.load(owner_ptr + part)
    before = part - tl.load(parts_ptr + i_n)
    after = tl.load(parts_ptr + i_n + 1) - 1 - part
    return before, after, tl.load(cu_ptr + i_n), tl.load(cu_ptr + i_n + 1)


@triton.jit
def _piece(cu_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, VARLEN: tl.constexpr):
    """Batch row and head of this program, its piece among all, how many of the sequence come later, and its tokens [first, last)."""
    i_u, i_p = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    at = i_u.to(tl.int64) * PIECES + i_p
    if VARLEN:
        before, after, begin, end = _place(i_p, cu_ptr, pieces_ptr, owner_ptr)
        first = begin + before * piece
    else:
        after, end = PIECES - 1 - i_p, T
        first = i_p * piece
    return (i_u // H).to(tl.int64), i_u % H, at, after, first, tl.minimum(first + piece, end)


@triton.jit
def _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C: tl.constexpr, VARLEN: tl.constexpr):
    """Batch row and head, the chunk of this program among all and in its sequence, its tokens [C] and which of them there are.

    Neighbours share rows of v.
    """
    i_h, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    if VARLEN:
        i_c, _, begin, end = _place(chunk, cu_ptr, chunks_ptr, owner_ptr)
        t = begin + i_c * C + tl.arange(0, C)
    else:
        i_c, end = chunk % CHUNKS, T
        t = i_c * C + tl.arange(0, C)
    return (chunk // CHUNKS).to(tl.int64), i_h, chunk.to(tl.int64), i_c, t, t < end


@remembered
@triton.jit
def _summaries(
    s_ptr, v_ptr, lse_ptr, mean_ptr, cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, v_b, v_t, v_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """(lse, mean) of every chunk: [B, chunks, H] and [B, chunks, H, V], as if each were a token."""
    i_b, i_h, chunk, _, t, inside = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    vs = tl.arange(0, BV)
    s = tl.load(s_ptr + (i_b * T + t) * H + i_h, mask=inside, other=float("-inf"))
    wide = inside[:, None] & (vs < V)[None, :]
    v = tl.load(v_ptr + i_b * v_b + i_h * v_h + t[:, None].to(tl.int64) * v_t + vs[None, :], mask=wide, other=0.0)
    top = tl.max(s, 0)
    p = _safe_exp(s, top)
    u = tl.sum(p, 0)
    some = tl.where(u > 0, u, 1.0)
    at = chunk * H + i_h
    tl.store(lse_ptr + at, top + tl.log(some))  # -inf where there is no weight
    tl.store(mean_ptr + at * V + vs, tl.sum(p[:, None] * v.to(tl.float32), 0) / some, mask=vs < V)


@remembered
@triton.jit
def _forward(
    s_ptr, v_ptr, carried_lse_ptr, carried_mean_ptr, o_ptr, lse_ptr,
    cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, v_b, v_t, v_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and lse [B, T, H], from the scans of all chunks."""
    i_b, i_h, chunk, i_c, t, inside = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    wide = inside[:, None] & (vs < V)[None, :]
    s = tl.load(s_ptr + (i_b * T + t) * H + i_h, mask=inside, other=float("-inf"))
    v = tl.load(v_ptr + i_b * v_b + i_h * v_h + t[:, None].to(tl.int64) * v_t + vs[None, :], mask=wide, other=0.0)
    earlier = (chunk - 1) * H + i_h
    before = tl.load(carried_lse_ptr + earlier, mask=i_c > 0, other=float("-inf"))
    mean = tl.load(carried_mean_ptr + earlier * V + vs, mask=(i_c > 0) & (vs < V), other=0.0)
    # the running maximum of each token, not that of the chunk, which would sink early tokens to 0 / 0
    top, u = tl.associative_scan((s, tl.where(s == float("-inf"), 0.0, 1.0)), 0, _merge)
    top, u = _merge(before, tl.where(before == float("-inf"), 0.0, 1.0), top, u)
    lse = top + tl.log(tl.where(u > 0, u, 1.0))  # -inf while there is no weight
    p = _safe_exp(tl.where(cs[:, None] >= cs[None, :], s[None, :], float("-inf")), lse[:, None])
    o = tl.dot(p.to(v.dtype), v, _safe_exp(before, lse)[:, None] * mean[None, :], input_precision=DOT)
    token = (i_b * T + t) * H + i_h
    tl.store(o_ptr + token[:, None] * V + vs[None, :], o.to(o_ptr.dtype.element_ty), mask=wide)
    tl.store(lse_ptr + token, lse, mask=inside)


@remembered
@triton.jit
def _flows_back(
    lse_ptr, o_ptr, do_ptr, dlse_ptr, d_ptr, e_ptr,
    cu_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """D and E of every piece, with lse taken from its first token: [B, H, PIECES, V] and [B, H, PIECES]."""
    i_b, i_h, at, _, first, last = _piece(cu_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, VARLEN)
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
    tl.store(d_ptr + at * V + vs, d, mask=vs < V)
    tl.store(e_ptr + at, e)


@remembered
@triton.jit
def _backward(
    s_ptr, v_ptr, lse_ptr, o_ptr, do_ptr, dlse_ptr, d_ptr, e_ptr, ds_ptr, dv_ptr,
    cu_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, v_b, v_t, v_h, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ds [B, T, H] and dv [B, T, H, V]."""
    i_b, i_h, at, after, first, last = _piece(cu_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, VARLEN)
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
    for i in range(after):  # from the last piece of the sequence to the one after this
        j = after - i
        here = tl.load(lse_ptr + (first + j * piece).to(tl.int64) * H)
        keep = _safe_exp(here, reference)
        d = d * keep + tl.load(d_ptr + (at + j) * V + vs, mask=vs < V, other=0.0)
        e = e * keep + tl.load(e_ptr + at + j)
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
    wanted = cdiv(8 * multiprocessors(s.device), batch * heads)
    piece = cdiv(max(cdiv(length, wanted), min(512, length)), CHUNK) * CHUNK
    return cdiv(length, piece), piece


SHORT = 32  # forward: a token costs as many exponentials, and few warps wait for each other least
CHUNK = 64  # backward, whose programs walk from chunk to chunk


class PrefixSoftmax(torch.autograd.Function):
    """(o, lse, end) from scores [B, T, H] in float32 and values [B, T, H, V]; all of them are differentiable.

    The end [N, H, V] is o of the last token of every sequence in float32, before it is rounded to the dtype of the values; N is B
    where none are packed. Backward, pieces have `piece` tokens, a multiple of CHUNK.
    """

    @staticmethod
    def forward(ctx: Any, s, v, piece, sequences):
        o, lse, end = _prefixes(s, v, sequences)
        ctx.save_for_backward(s, v, o, lse)
        ctx.set_materialize_grads(False)  # of an end that nobody reads
        ctx.piece, ctx.sequences = piece, sequences
        return o, lse, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o, d_lse, d_end):
        s, v, o, lse = ctx.saved_tensors
        batch, length, heads = s.shape
        width = v.shape[-1]
        parts, owner = ctx.sequences.cut(ctx.piece)
        pieces = parts.bounds[-1]
        d_o = rows(_arrived(o, d_o, d_end, ctx.sequences))
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.contiguous()
        ds, dv = torch.empty_like(s), v.new_empty(v.shape)
        d = s.new_empty(batch, heads, pieces, width)
        e = s.new_empty(batch, heads, pieces)
        sizes = (ctx.sequences.packed, parts.packed, owner, length, heads, pieces, ctx.piece)
        shape = {"V": width, "BV": padded(width), "C": CHUNK, "VARLEN": owner is not None}
        grid = (batch * heads * pieces,)
        if pieces > len(parts.bounds) - 1:  # some sequence has several
            _flows_back[grid](lse, o, d_o, d_lse, d, e, *sizes, *d_o.stride()[:3], **shape, num_warps=4, num_stages=3)
        _backward[grid](
            s, v, lse, o, d_o, d_lse, d, e, ds, dv, *sizes, *v.stride()[:3], *d_o.stride()[:3],
            **shape, DOT=dot_precision(v), num_warps=4, num_stages=2,
        )  # fmt: skip
        return ds, dv, None, None


def _arrived(o: Tensor, d_o: Tensor | None, d_end: Tensor | None, sequences: Sequences) -> Tensor:
    """The gradient of o, with that of the last tokens in float32 in it."""
    d_o = torch.zeros_like(o) if d_o is None else d_o
    if d_end is None:
        return d_o
    d_o = d_o.clone()
    d_o[sequences.ends] += d_end
    return d_o


def _prefixes(s: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """o and lse of every prefix, and the last o of every sequence in float32, [N, H, V].

    What a chunk starts from is the same question about chunks, so it is answered in the same way, and in float32.
    """
    batch, length, heads = s.shape
    width = v.shape[-1]
    parts, owner = sequences.cut(SHORT)
    chunks = parts.bounds[-1]
    o, lse = v.new_empty(v.shape), torch.empty_like(s)
    sizes = (sequences.packed, parts.packed, owner, length, heads, chunks, *v.stride()[:3])
    shape = {"V": width, "BV": padded(width), "C": SHORT, "VARLEN": owner is not None, "num_warps": cdiv(width, 64)}
    grid = (batch * chunks * heads,)
    carried, end = (lse, o), None  # one chunk each: nobody reads what is carried
    if chunks > len(parts.bounds) - 1 or v.dtype != torch.float32:
        s_of, v_of = s.new_empty(batch, chunks, heads), s.new_empty(batch, chunks, heads, width)
        _summaries[grid](s, v, s_of, v_of, *sizes, **shape)
        means, lses, end = _prefixes(s_of, v_of, parts)
        carried = (lses, means)
    _forward[grid](s, v, *carried, o, lse, *sizes, **shape, DOT=dot_precision(v))
    return o, lse, o[sequences.ends].clone() if end is None else end
