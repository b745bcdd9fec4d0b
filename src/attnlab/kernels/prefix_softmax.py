"""Triton kernels of the Aaren scan: softmax attention of one fixed query over every prefix (Feng et al. 2024, arXiv:2405.13956).

    lse_t = log sum_{i <= t} exp(s_i)           o_t = sum_{i <= t} exp(s_i - lse_t) v_i

All that a chunk needs of those before it is (lse, o) of its left neighbour's last token: the triple (m, u, w) of the paper with
u = 1. So a first pass sums up every chunk, the scan of these summaries is the same problem 32 times shorter, and a second pass
runs all chunks at once; the tree has as many levels as T has digits in base 32. Inside a chunk the weights form a lower triangle,
as in flash attention, and one matrix product applies them. Backward goes the same way from the right: with
delta_k = dlse_k - o_k . do_k, D_t = sum_{k >= t} exp(-lse_k) do_k, a vector, and E_t = sum_{k >= t} exp(-lse_k) delta_k, a scalar,

    dv_t = exp(s_t) D_t                         ds_t = exp(s_t) (v_t . D_t + E_t)

and because lse never falls, sums relative to lse of their first token have no exponent above 0. A chunk's sums are such, and their
scan is again the same problem, with this lse for s and lse, D and E of the chunks for do and delta, and no v.
Where several sequences are packed into one row, no chunk crosses a bound; a program asks `owner` whose it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.dispatch import dot_precision, padded, rows
from attnlab.kernels.launch import remembered
from attnlab.kernels.packed import Sequences

CHUNK = 32  # a token costs as many exponentials, and few warps wait for each other least


@triton.jit
def _weight(x, reference):
    """exp(x - reference); the reference is above -inf."""
    return tl.exp2((x - reference) * 1.4426950408889634)


@triton.jit
def _finite(x):
    """x, and for -inf a number below all scores: a reference for a set without any weight, which makes its weights 0."""
    return tl.maximum(x, -2e38)


@triton.jit
def _some(x):
    """The weight of a set, in units of exp(x): none if x is -inf."""
    return tl.where(x == float("-inf"), 0.0, 1.0)


@triton.jit
def _merge(m, u, m_later, u_later):
    """The paper's merge of two sets: their maximum and the sum of exp(s - maximum)."""
    top = tl.maximum(m, m_later)
    return top, u * _weight(m, top) + u_later * _weight(m_later, top)


@triton.jit
def _before(keep_later, e_later, keep, e):
    """Two steps of e_t = delta_t + keep_t e_{t + 1} in one, from the right."""
    return keep * keep_later, e + keep * e_later


@triton.jit
def _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C: tl.constexpr, VARLEN: tl.constexpr):
    """Batch row and head, the chunk of this program, how many of its sequence come before and after, and its tokens [first, end).

    Neighbours share rows of v.
    """
    i_h, chunk = tl.program_id(0) % H, tl.program_id(0) // H
    if VARLEN:
        i_n = tl.load(owner_ptr + chunk)
        before = chunk - tl.load(chunks_ptr + i_n)
        after = tl.load(chunks_ptr + i_n + 1) - 1 - chunk
        first, end = tl.load(cu_ptr + i_n) + before * C, tl.load(cu_ptr + i_n + 1)
    else:
        before = chunk % CHUNKS
        after = CHUNKS - 1 - before
        first, end = before * C, T
    return (chunk // CHUNKS).to(tl.int64), i_h, chunk.to(tl.int64), before, after, first, end


@triton.jit
def _wide(inside, V: tl.constexpr, BV: tl.constexpr):
    """Which entries of a tile [C, BV] there are."""
    if V == BV:
        return inside[:, None]
    else:
        return inside[:, None] & (tl.arange(0, BV) < V)[None, :]


@remembered
@triton.jit
def _summaries(
    s_ptr, v_ptr, lse_ptr, mean_ptr, cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, v_b, v_t, v_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """(lse, mean) of every chunk: [B, chunks, H] and [B, chunks, H, V], as if each were a token."""
    i_b, i_h, chunk, _, _, first, end = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    inside = cs < end - first
    s = tl.load(s_ptr + (i_b * T + first) * H + i_h + cs * H, mask=inside, other=float("-inf"))
    v_ptr += i_b * v_b + i_h * v_h + first.to(tl.int64) * v_t
    v = tl.load(v_ptr + cs[:, None] * v_t + vs[None, :], mask=_wide(inside, V, BV), other=0.0)
    top = tl.max(s, 0)
    p = _weight(s, _finite(top))
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
    i_b, i_h, chunk, before, _, first, end = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    inside = cs < end - first
    wide = _wide(inside, V, BV)
    start, token = (i_b * T + first) * H + i_h, cs * H
    s = tl.load(s_ptr + start + token, mask=inside, other=float("-inf"))
    v_ptr += i_b * v_b + i_h * v_h + first.to(tl.int64) * v_t
    v = tl.load(v_ptr + cs[:, None] * v_t + vs[None, :], mask=wide, other=0.0)
    left = (chunk - 1) * H + i_h
    carried = tl.load(carried_lse_ptr + left, mask=before > 0, other=float("-inf"))
    mean = tl.load(carried_mean_ptr + left * V + vs, mask=(before > 0) & (vs < V), other=0.0)
    # the running maximum of each token, not that of the chunk, which would sink early tokens to 0 / 0
    top, u = tl.associative_scan((_finite(s), _some(s)), 0, _merge)
    top, u = _merge(_finite(carried), _some(carried), top, u)
    lse = top + tl.log(tl.where(u > 0, u, 1.0))
    p = _weight(tl.where(cs[:, None] >= cs[None, :], s[None, :], float("-inf")), lse[:, None])
    o = tl.dot(p.to(v.dtype), v, _weight(carried, lse)[:, None] * mean[None, :], input_precision=DOT)
    tl.store(o_ptr + start * V + token[:, None] * V + vs[None, :], o.to(o_ptr.dtype.element_ty), mask=wide)
    tl.store(lse_ptr + start + token, tl.where(u > 0, lse, float("-inf")), mask=inside)


@remembered
@triton.jit
def _sums(
    lse_ptr, o_ptr, do_ptr, delta_ptr, e_ptr, first_ptr, d_ptr, first_e_ptr,
    cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Of every chunk lse of its first token, and D and E relative to it: [B, chunks, H], [B, chunks, H, V] and [B, chunks, H].

    And E of the chunk from every token on, relative to the token's lse: [B, T, H]. Where o is given, delta is dlse so far.
    """
    i_b, i_h, chunk, _, _, first, end = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    inside = cs < end - first
    wide = _wide(inside, V, BV)
    start, token = (i_b * T + first) * H + i_h, cs * H
    reference = tl.load(lse_ptr + start)
    lse = tl.load(lse_ptr + start + token, mask=inside, other=float("inf"))
    following = tl.load(lse_ptr + start + token + H, mask=cs + 1 < end - first, other=float("inf"))
    delta = tl.zeros([C], tl.float32)
    if delta_ptr is not None:
        delta += tl.load(delta_ptr + start + token, mask=inside, other=0.0)
    do_ptr += i_b * do_b + i_h * do_h + first.to(tl.int64) * do_t
    do = tl.load(do_ptr + cs[:, None] * do_t + vs[None, :], mask=wide, other=0.0).to(tl.float32)
    if o_ptr is not None:
        o = tl.load(o_ptr + start * V + token[:, None] * V + vs[None, :], mask=wide, other=0.0).to(tl.float32)
        delta -= tl.sum(o * do, 1)
    keep = _weight(tl.where(inside, lse, float("-inf")), _finite(following))
    _, e = tl.associative_scan((keep, delta), 0, _before, reverse=True)
    at = chunk * H + i_h
    tl.store(e_ptr + start + token, e, mask=inside)
    tl.store(first_ptr + at, reference)
    tl.store(first_e_ptr + at, tl.sum(tl.where(cs == 0, e, 0.0), 0))
    p = _weight(reference, _finite(lse))
    tl.store(d_ptr + at * V + vs, tl.sum(p[:, None] * do, 0), mask=vs < V)


@remembered
@triton.jit
def _backward(
    s_ptr, v_ptr, lse_ptr, do_ptr, e_ptr, first_ptr, carried_d_ptr, carried_e_ptr, ds_ptr, dv_ptr,
    cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, v_b, v_t, v_h, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ds [B, T, H] and dv [B, T, H, V], from the scans of all chunks; ds without v . dv where there is no v."""
    i_b, i_h, chunk, _, after, first, end = _chunk(cu_ptr, chunks_ptr, owner_ptr, T, H, CHUNKS, C, VARLEN)
    cs, vs = tl.arange(0, C), tl.arange(0, BV)
    inside = cs < end - first
    wide = _wide(inside, V, BV)
    start, token = (i_b * T + first) * H + i_h, cs * H
    s = tl.load(s_ptr + start + token, mask=inside, other=float("-inf"))
    lse = _finite(tl.load(lse_ptr + start + token, mask=inside, other=float("inf")))
    e = tl.load(e_ptr + start + token, mask=inside, other=0.0)
    do_ptr += i_b * do_b + i_h * do_h + first.to(tl.int64) * do_t
    do = tl.load(do_ptr + cs[:, None] * do_t + vs[None, :], mask=wide, other=0.0)
    if v_ptr is not None:
        v_ptr += i_b * v_b + i_h * v_h + first.to(tl.int64) * v_t
        v = tl.load(v_ptr + cs[:, None] * v_t + vs[None, :], mask=wide, other=0.0)
    right = (chunk + 1) * H + i_h
    reference = _finite(tl.load(first_ptr + right, mask=after > 0, other=float("inf")))
    carried_d = tl.load(carried_d_ptr + right * V + vs, mask=(after > 0) & (vs < V), other=0.0)
    carried_e = tl.load(carried_e_ptr + right, mask=after > 0, other=0.0)
    later = cs[:, None] <= cs[None, :]  # row: the token, column: the outputs that see it
    p = _weight(tl.where(later, s[:, None], float("-inf")), lse[None, :])
    share = _weight(s, reference)
    dv = tl.dot(p.to(do.dtype), do, share[:, None] * carried_d[None, :], input_precision=DOT)
    ds = _weight(s, lse) * e + share * carried_e
    if v_ptr is not None:
        ds += tl.sum(v.to(tl.float32) * dv, 1)
    tl.store(dv_ptr + start * V + token[:, None] * V + vs[None, :], dv.to(dv_ptr.dtype.element_ty), mask=wide)
    tl.store(ds_ptr + start + token, ds, mask=inside)


class PrefixSoftmax(torch.autograd.Function):
    """(o, lse, end) from scores [B, T, H] in float32 and values [B, T, H, V]; all of them are differentiable.

    The end [N, H, V] is o of the last token of every sequence in float32, before it is rounded to the dtype of the values; N is B
    where none are packed.
    """

    @staticmethod
    def forward(ctx: Any, s, v, sequences):
        o, lse, end = _prefixes(s, v, sequences)
        ctx.save_for_backward(s, v, o, lse)
        ctx.set_materialize_grads(False)  # of an end that nobody reads
        ctx.sequences = sequences
        return o, lse, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o, d_lse, d_end):
        s, v, o, lse = ctx.saved_tensors
        d_o = rows(_arrived(o, d_o, d_end, ctx.sequences))
        d_lse = None if d_lse is None else d_lse.contiguous()
        return *_suffixes(s, v, lse, o, d_o, d_lse, ctx.sequences), None


def _arrived(o: Tensor, d_o: Tensor | None, d_end: Tensor | None, sequences: Sequences) -> Tensor:
    """The gradient of o, with that of the last tokens in float32 in it."""
    d_o = torch.zeros_like(o) if d_o is None else d_o
    if d_end is None:
        return d_o
    d_o = d_o.clone()
    d_o[sequences.ends] += d_end
    return d_o


def _warps(x: Tensor) -> int:
    """One for every 128 bytes of a token's row: a tile of 32 tokens is then 128 bytes a thread."""
    return max(1, padded(x.shape[-1]) * x.element_size() // 128)


def _prefixes(s: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """o and lse of every prefix, and the last o of every sequence in float32, [N, H, V].

    What a chunk starts from is the same question about chunks, so it is answered in the same way, and in float32.
    """
    batch, length, heads = s.shape
    width = v.shape[-1]
    parts, owner = sequences.cut(CHUNK)
    chunks = parts.bounds[-1]
    o, lse = v.new_empty(v.shape), torch.empty_like(s)
    sizes = (sequences.packed, parts.packed, owner, length, heads, chunks, *v.stride()[:3])
    shape = {"V": width, "BV": padded(width), "C": CHUNK, "VARLEN": owner is not None, "num_warps": _warps(v)}
    grid = (batch * chunks * heads,)
    carried, end = (lse, o), None  # one chunk each: nobody reads what is carried
    if chunks > len(parts.bounds) - 1 or v.dtype != torch.float32:
        s_of, v_of = s.new_empty(batch, chunks, heads), s.new_empty(batch, chunks, heads, width)
        _summaries[grid](s, v, s_of, v_of, *sizes, **shape)
        means, lses, end = _prefixes(s_of, v_of, parts)
        carried = (lses, means)
    _forward[grid](s, v, *carried, o, lse, *sizes, **shape, DOT=dot_precision(v))
    return o, lse, o[sequences.ends].clone() if end is None else end


def _suffixes(
    s: Tensor, v: Tensor | None, lse: Tensor, o: Tensor | None, do: Tensor, delta: Tensor | None, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """ds and dv, from dlse for delta; without v and o, the scans (E, D) of all chunks, each relative to its s."""
    batch, length, heads, width = do.shape
    parts, owner = sequences.cut(CHUNK)
    chunks = parts.bounds[-1]
    ds, dv, e = torch.empty_like(s), do.new_empty(do.shape), torch.empty_like(s)
    first, carried_e = s.new_empty(2, batch, chunks, heads)
    carried_d = s.new_empty(batch, chunks, heads, width)
    sizes = (sequences.packed, parts.packed, owner, length, heads, chunks)
    shape = {"V": width, "BV": padded(width), "C": CHUNK, "VARLEN": owner is not None, "num_warps": _warps(do)}
    grid = (batch * chunks * heads,)
    of_do = do.stride()[:3]
    _sums[grid](lse, o, do, delta, e, first, carried_d, carried_e, *sizes, *of_do, **shape)
    if chunks > len(parts.bounds) - 1:
        carried_e, carried_d = _suffixes(first, None, first, None, carried_d, carried_e, parts)
    of_v = of_do if v is None else v.stride()[:3]
    _backward[grid](
        s, v, lse, do, e, first, carried_d, carried_e, ds, dv, *sizes, *of_v, *of_do,
        **shape, DOT=dot_precision(do),
    )  # fmt: skip
    return ds, dv
