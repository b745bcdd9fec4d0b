"""The one Triton kernel behind every linear attention with scalar decay, forward and backward.

`sweep` computes, for one (sequence, head), a causal masked product and the recurrence behind it:

    out_t = scale * sum_{s <= t} exp(L_t - L_s) (q_t . k_s) v_s   +   scale * exp(L_t) q_t . start

with L the running sum of the log decay; `reverse=True` sums over s >= t with exp(L_s - L_t). The three gradients are this
same product with the roles exchanged (Lightning Attention-2, arXiv:2401.04658, section 3.3):

    o  = sweep(q, k, v)             dv = sweep(k, q, do, reverse)
    dq = sweep(do, v, k)            dk = sweep(v, do, q, reverse)

so forward and backward are four launches of one kernel. A program owns one (piece of a sequence, head, slice of v's channels).
It walks its chunks with the state [K, slice] in float32 registers; nothing but q, k, v and out touches device memory.
When sequences are too few to fill the GPU, each is cut into pieces: `piece_updates` first computes what each piece adds to the
state, and a program starts from the sum of the pieces before its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_gradient import Boundaries, boundaries, decay_gradient
from attnlab.kernels.dispatch import cdiv, dot_precision, multiprocessors, padded, rows
from attnlab.kernels.launch import remembered

FORGOTTEN: tl.constexpr = tl.constexpr(30.0)  # exp(-30) = 1e-13: what has decayed this far adds nothing in float32


@triton.jit
def _gates(g_ptr, t, first, last, H, GATED: tl.constexpr):
    """Log decays of the tokens t [C], 0 outside [first, last). Loaded one chunk ahead, so that nobody waits for them."""
    if GATED:
        return tl.load(g_ptr + t * H, mask=(t >= first) & (t < last), other=0.0)
    else:
        return 0.0


@triton.jit
def _running_decay(g, valid, GATED: tl.constexpr, C: tl.constexpr):
    """Inclusive running log decay inside a chunk [C], and its total over the `valid` tokens.

    With one decay a head the first is the same in every chunk, and the compiler hoists its exponentials.
    """
    if GATED:
        return tl.cumsum(g, 0), tl.sum(g, 0)
    else:
        return (tl.arange(0, C) + 1) * g, valid * g


@triton.jit
def _grow(state, k, v, decay, weight, DOT: tl.constexpr):
    """exp(decay) * state + k^T diag(weight) v."""
    v = (v * weight[:, None]).to(k.dtype)
    return tl.dot(tl.trans(k), v, state * tl.exp(decay), input_precision=DOT)


@triton.jit
def _remembered(g, length, steps):
    """How many of the last `steps` spans of `length` tokens still count at log decay g a token."""
    lost = -g * length / FORGOTTEN  # the share of its memory that one span costs
    needed = (1.0 / tl.maximum(lost, 1e-6)).to(tl.int32) + 1
    return tl.where(lost * steps > 1.0, tl.minimum(needed, steps), steps)


@remembered
@triton.jit
def _piece_updates(
    k_ptr, v_ptr, g_ptr, updates_ptr, sums_ptr,
    T, H, PIECES, piece, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What each piece alone adds to the state, [U, PIECES, K, V]; with gates also its total log decay, [U, PIECES]."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_p = tl.program_id(0) // NV % PIECES
    i_u = tl.program_id(0) // NV // PIECES
    i_b, i_h = (i_u // H).to(tl.int64), i_u % H
    first = i_p * piece
    last = tl.minimum(first + piece, T)
    ks, vs, cs = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_k, in_v = ks < K, vs < V
    k_ptr += i_b * k_b + i_h * k_h
    v_ptr += i_b * v_b + i_h * v_h
    g_ptr += i_b * T * H + i_h if GATED else i_h
    chunks = tl.cdiv(last - first, C)
    g = 0.0 if GATED else tl.load(g_ptr)  # a load inside the loop would cost its latency in every chunk
    needed = chunks if GATED else _remembered(g, C, chunks)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    passed = 0.0
    ahead = _gates(g_ptr, first + ((chunks - 1) * C if REVERSE else 0) + cs, first, last, H, GATED)
    for i in range(chunks - needed, chunks):
        c0 = first + ((chunks - 1 - i) if REVERSE else i) * C
        t = (c0 + cs).to(tl.int64) if FAR else c0 + cs
        inside = t < last
        b, total = _running_decay(ahead if GATED else g, tl.minimum(last - c0, C), GATED, C)
        ahead = _gates(g_ptr, t - C if REVERSE else t + C, first, last, H, GATED)
        k = tl.load(k_ptr + t[:, None] * k_t + ks[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
        state = _grow(state, k, v, total, tl.exp(b) if REVERSE else tl.exp(tl.minimum(total - b, 0.0)), DOT)
        passed += total
    at = updates_ptr + (i_u * PIECES + i_p).to(tl.int64) * K * V + ks[:, None] * V + vs[None, :]
    tl.store(at, state, mask=in_k[:, None] & in_v[None, :])
    if GATED:
        tl.store(sums_ptr + i_u * PIECES + i_p, passed)


@remembered
@triton.jit
def _sweep(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr, cu_ptr, kept_ptr, products_ptr, scale,
    T, H, PIECES, piece,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, VARLEN: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
    SPLIT: tl.constexpr, KEEP: tl.constexpr, MEET: tl.constexpr, DOT: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_p = tl.program_id(0) // NV % PIECES
    i_u = tl.program_id(0) // NV // PIECES  # which (sequence, head)
    i_b, i_h = (i_u // H).to(tl.int64), i_u % H
    first = i_p * piece
    if VARLEN:
        begin = tl.load(cu_ptr + i_b).to(tl.int64)
        length = (tl.load(cu_ptr + i_b + 1) - begin).to(tl.int32)
        token = begin
        chunk0 = begin // C + i_b  # numbers of chunks through all sequences, for KEEP and MEET
        i_b = i_b * 0
    else:
        length = T
        token = i_b * T
        chunk0 = i_b * tl.cdiv(T, C)
    last = tl.minimum(first + piece, length)

    ks, vs, cs = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_k, in_v = ks < K, vs < V
    in_state = in_k[:, None] & in_v[None, :]
    at_state = ks[:, None] * state_k + vs[None, :] * state_v
    base = begin if VARLEN else i_b * 0
    q_ptr += i_b * q_b + base * q_t + i_h * q_h
    k_ptr += i_b * k_b + base * k_t + i_h * k_h
    v_ptr += i_b * v_b + base * v_t + i_h * v_h
    out_ptr += (token * H + i_h) * V
    g_ptr += token * H + i_h if GATED else i_h
    g = 0.0 if GATED else tl.load(g_ptr)

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if START:
        state += tl.load(start_ptr + i_u.to(tl.int64) * K * V + at_state, mask=in_state, other=0.0)
    if SPLIT:  # what the pieces passed before this one have written
        passed = (PIECES - 1 - i_p) if REVERSE else i_p
        reach = passed if GATED else _remembered(g, piece, passed)
        if reach < passed:
            state *= 0.0
        for i in range(passed - reach, passed):
            j = (PIECES - 1 - i) if REVERSE else i
            if GATED:
                decay = tl.load(sums_ptr + i_u * PIECES + j)
            else:
                decay = tl.maximum(tl.minimum(piece, length - j * piece), 0) * g
            at = updates_ptr + (i_u * PIECES + j).to(tl.int64) * K * V + at_state
            state = state * tl.exp(decay) + tl.load(at, mask=in_state, other=0.0)

    if REVERSE:
        seen = cs[:, None] <= cs[None, :]
    else:
        seen = cs[:, None] >= cs[None, :]
    chunks = tl.cdiv(tl.maximum(last - first, 0), C)
    ahead = _gates(g_ptr, first + ((chunks - 1) * C if REVERSE else 0) + cs, first, last, H, GATED)
    for i in range(chunks):
        c0 = first + ((chunks - 1 - i) if REVERSE else i) * C
        t = (c0 + cs).to(tl.int64) if FAR else c0 + cs
        inside = t < last
        b, total = _running_decay(ahead if GATED else g, tl.minimum(last - c0, C), GATED, C)
        ahead = _gates(g_ptr, t - C if REVERSE else t + C, first, last, H, GATED)
        boundary = (chunk0 + c0 // C) * H + i_h  # behind this chunk, where KEEP and MEET serve a decay that learns
        if MEET:
            kept = tl.load(kept_ptr + boundary * K * V + ks[:, None] * V + vs[None, :], mask=in_state, other=0.0)
            tl.store(products_ptr + boundary * NV + i_v, tl.sum(kept.to(tl.float32) * state))
        q = tl.load(q_ptr + t[:, None] * q_t + ks[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        k = tl.load(k_ptr + t[:, None] * k_t + ks[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
        if REVERSE:
            log_weight = b[None, :] - b[:, None]
            read, write = tl.exp(tl.minimum(total - b, 0.0)), tl.exp(b)
        else:
            log_weight = b[:, None] - b[None, :]
            read, write = tl.exp(b), tl.exp(tl.minimum(total - b, 0.0))
        weight = scale * tl.exp(tl.where(seen, log_weight, float("-inf")))  # no positive exponent, no inf * 0
        scores = tl.dot(q, tl.trans(k), input_precision=DOT) * weight
        out = tl.dot(q.to(READ), state.to(READ), input_precision=DOT) * (scale * read)[:, None]
        out = tl.dot(scores.to(v.dtype), v, out, input_precision=DOT)
        tl.store(
            out_ptr + t[:, None] * (H * V) + vs[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & in_v[None, :],
        )
        state = _grow(state, k, v, total, write, DOT)
        if KEEP:
            at = kept_ptr + boundary * K * V + ks[:, None] * V + vs[None, :]
            tl.store(at, state.to(kept_ptr.dtype.element_ty), mask=in_state)
    if FINAL:  # the program that passed last over its (sequence, head)
        if i_p == (0 if REVERSE else PIECES - 1):
            tl.store(final_ptr + i_u.to(tl.int64) * K * V + at_state, state, mask=in_state)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: chunk length, width of a slice of v, warps, pipeline stages, pieces a sequence is cut into."""

    chunk: int
    slice: int
    warps: int
    stages: int
    pieces: int = 1


class Updates(NamedTuple):
    """What every piece of a sequence alone adds to the state: [B, H, pieces, K, V], and its total log decay if there are gates."""

    states: Tensor
    sums: Tensor

    @property
    def mT(self) -> Updates:
        """The same, for states written transposed."""
        return Updates(self.states.mT, self.sums)


def tiles_for(q: Tensor, v: Tensor, *, packed: bool = False) -> Tiles:
    """Sizes that were fastest on an H200 (`python -m attnlab.kernels.bench` measures them)."""
    batch, length, heads, width = q.shape
    widest = max(width, v.shape[-1])  # the backward sweeps exchange the two
    if q.dtype == torch.float32:
        chunk, slices, warps, stages = 32, 32, 4, 1
    elif widest > 128:
        chunk, slices, warps, stages = 64, 32, 4, 2
    else:
        chunk, slices, warps, stages = 64, 64, 4, 3 if widest <= 64 else 2
    slices = min(slices, padded(v.shape[-1]))
    programs = batch * heads * cdiv(v.shape[-1], slices)
    waves = 2 * multiprocessors(q.device)  # programs that run at once: two a multiprocessor
    pieces = 1
    if (
        not packed and programs < 1.5 * waves
    ):  # too few to fill the GPU: cut into four full waves, 1024 tokens a piece or more
        wanted = max(1, min(4 * waves // programs, length // 1024))
        pieces = cdiv(length, _piece_length(length, wanted, chunk))
    return Tiles(chunk, slices, warps, stages, pieces)


def sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    tiles: Tiles,
    *,
    reverse: bool = False,
    start: Tensor | None = None,
    updates: Updates | None = None,
    final: bool = False,
    cu_seqlens: Tensor | None = None,
    keep: Boundaries | None = None,
    meet: Boundaries | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch: out [B, T, H, V], and the state [N, H, K, V] after the last token if `final`.

    `start` and `updates` may both be transposed views: the dq sweep reads the states of the forward sweep. `keep` has the states
    behind all chunks written, `meet` the products of those with this sweep's, for the gradient of the decay.
    """
    batch, length, heads, width = q.shape
    channels = v.shape[-1]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = torch.empty(sequences, heads, width, channels, device=v.device) if final else None
    states = [x for x in (start, updates.states if updates else None, last) if x is not None]
    layout = states[0].stride()[-2:] if states else (0, 0)
    slices = cdiv(channels, tiles.slice)
    behind = keep or meet or (None, None)
    _sweep[(sequences * heads * tiles.pieces * slices,)](
        q, k, v, log_decay, out, start, *(updates or (None, None)), last, cu_seqlens, *behind, scale,
        length, heads, tiles.pieces, _piece_length(length, tiles.pieces, tiles.chunk), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *layout,
        K=width, V=channels, BK=padded(width), BV=tiles.slice, C=tiles.chunk,
        REVERSE=reverse, GATED=log_decay.dim() == 3, FAR=_far(q, k, v), VARLEN=cu_seqlens is not None,
        START=start is not None, FINAL=final, SPLIT=tiles.pieces > 1,
        KEEP=keep is not None, MEET=meet is not None, **_precision(q),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, last


def piece_updates(k: Tensor, v: Tensor, log_decay: Tensor, tiles: Tiles, *, reverse: bool = False) -> Updates | None:
    """The first pass over sequences that are cut into pieces; None where they are not."""
    if tiles.pieces == 1:
        return None
    batch, length, heads, width = k.shape
    channels = v.shape[-1]
    states = torch.empty(batch, heads, tiles.pieces, width, channels, device=k.device)
    sums = torch.empty(batch, heads, tiles.pieces, device=k.device)
    slices = cdiv(channels, tiles.slice)
    _piece_updates[(batch * heads * tiles.pieces * slices,)](
        k, v, log_decay, states, sums,
        length, heads, tiles.pieces, _piece_length(length, tiles.pieces, tiles.chunk), *k.stride()[:3], *v.stride()[:3],
        K=width, V=channels, BK=padded(width), BV=tiles.slice, C=tiles.chunk,
        REVERSE=reverse, GATED=log_decay.dim() == 3, FAR=_far(k, v), DOT=dot_precision(k),
        num_warps=tiles.warps, num_stages=tiles.stages + 1,  # two blocks a chunk instead of three leave room for one more
    )  # fmt: skip
    return Updates(states, sums)


class LinearDecay(torch.autograd.Function):
    """Four sweeps: one forward, three backward."""

    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, start, scale, cu, tiles, with_state=True):
        ctx.set_materialize_grads(False)
        updates = piece_updates(k, v, log_decay, tiles)
        out, final = sweep(
            q, k, v, log_decay, scale, tiles, start=start, updates=updates, final=with_state, cu_seqlens=cu
        )
        ctx.save_for_backward(q, k, v, log_decay, start, cu, *(updates or ()))
        ctx.scale, ctx.tiles = scale, tiles
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out, d_final):
        q, k, v, g, start, cu, *pieces = ctx.saved_tensors
        scale, tiles = ctx.scale, ctx.tiles
        d_out = torch.zeros_like(v) if d_out is None else rows(d_out)
        # The states run with the inputs here and with d_out below; each sweep scales what it reads, hence the division.
        ahead = None if d_final is None else d_final.float().contiguous() / scale
        behind = Updates(*pieces) if pieces else None
        before = piece_updates(q, d_out, g, tiles, reverse=True)
        slices = cdiv(q.shape[-1], tiles.slice)
        edges = boundaries(q, v, tiles.chunk, slices, cu) if ctx.needs_input_grad[3] else None
        dq, _ = sweep(d_out, v, k, g, scale, tiles, start=_mT(start), updates=_mT(behind), cu_seqlens=cu, keep=edges)
        back: Any = {"reverse": True, "cu_seqlens": cu}
        dv, d_start = sweep(k, q, d_out, g, scale, tiles, start=ahead, updates=before, final=start is not None, **back)
        dk, _ = sweep(v, d_out, q, g, scale, tiles, start=_mT(ahead), updates=_mT(before), meet=edges, **back)
        dg = None
        if edges is not None:
            dg = decay_gradient(q, dq, k, dk, edges.products, scale, tiles.chunk, cu)
            dg = dg if g.dim() == 3 else dg.sum((0, 1))
        return dq, dk, dv, dg, None if d_start is None else d_start * scale, None, None, None, None


def _mT(x):
    return None if x is None else x.mT


def _piece_length(length: int, pieces: int, chunk: int) -> int:
    """Tokens a piece: whole chunks, so that only the last piece is ragged."""
    return cdiv(cdiv(length, pieces), chunk) * chunk


def _precision(x: Tensor) -> dict[str, Any]:
    """How products are formed. Half precisions read the state as bfloat16: without decay it can outgrow float16's range."""
    narrow = x.dtype != torch.float32 and x.is_cuda  # the interpreter's bfloat16 is wrong
    return {"DOT": dot_precision(x), "READ": tl.bfloat16 if narrow else tl.float32}


def _far(*tensors: Tensor) -> bool:
    """Whether an offset inside one sequence can outgrow 32 bits; the wider arithmetic costs 5 %."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in tensors) or tensors[-1].shape[1:].numel() >= 2**31
