"""The Triton kernels behind every linear attention with scalar decay, forward and backward.

`_sweep` computes, for one (sequence, head), a causal masked product and the recurrence behind it:

    out_t = scale * sum_{s <= t} exp(L_t - L_s) (q_t . k_s) v_s   +   scale * exp(L_t) q_t . start

with L the running sum of the log decay; `reverse` sums over s >= t with exp(L_s - L_t). The three gradients are this same product
with the roles exchanged (Lightning Attention-2, arXiv:2401.04658, section 3.3):

    o  = sweep(q, k, v)             dv = sweep(k, q, do, reverse)
    dq = sweep(do, v, k)            dk = sweep(v, do, q, reverse)

A program owns one (piece of a sequence, head, slice of v's channels). It walks its chunks with the state [K, slice] in float32
registers; nothing but q, k, v and out touches device memory. When sequences are too few to fill the GPU, each is cut into pieces:
`_piece_updates` first computes what each piece adds to the state, and a program starts from the sum of the pieces before its own.
Who launches them, and with which sizes, is in `attnlab.kernels.decay_launch`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnlab.kernels.launch import remembered

FORGOTTEN: tl.constexpr = tl.constexpr(20.0)  # exp(-20) = 2e-9: what has decayed this far adds nothing in float32


@triton.jit
def _place(slot, bounds_ptr, slots_ptr, owner_ptr, T, SLOTS, size, VARLEN: tl.constexpr):
    """Of a piece or part of `size` tokens, numbered through all sequences: its sequence, the first token of that and its length,
    and where the piece begins in it.
    """
    if VARLEN:
        i_n = tl.load(owner_ptr + slot)
        begin = tl.load(bounds_ptr + i_n)
        length = tl.load(bounds_ptr + i_n + 1) - begin
        return i_n.to(tl.int64), begin.to(tl.int64), length, (slot - tl.load(slots_ptr + i_n)) * size
    else:
        i_n = (slot // SLOTS).to(tl.int64)
        return i_n, i_n * 0, T, slot % SLOTS * size


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
def _grow(state, k, written, decay, DOT: tl.constexpr):
    """exp(decay) * state + k^T written."""
    return tl.dot(tl.trans(k), written, state * tl.exp(decay), input_precision=DOT)


@triton.jit
def _remembered(g, length, steps):
    """How many of the last `steps` spans of `length` tokens still count at log decay g a token."""
    lost = -g * length / FORGOTTEN  # the share of its memory that one span costs
    needed = (1.0 / tl.maximum(lost, 1e-6)).to(tl.int32) + 1
    return tl.where(lost * steps > 1.0, tl.minimum(needed, steps), steps)


@triton.jit
def _state(ptr, ks, vs, state_k, state_v, values, K: tl.constexpr, V: tl.constexpr, TOGETHER: tl.constexpr):
    """The state [BK, BV] at `ptr`. Of programs TOGETHER, only those of dv read it as it lies, the others transposed, but row by row."""
    here = (ks < K)[:, None] & (vs < V)[None, :]
    if TOGETHER:
        state = tl.load(ptr + ks[:, None] * V + vs[None, :], mask=here & values, other=0.0)
        across = (vs < V)[:, None] & (ks < K)[None, :]
        return state + tl.trans(tl.load(ptr + vs[:, None] * V + ks[None, :], mask=across & (values == 0), other=0.0))
    else:
        return tl.load(ptr + ks[:, None] * state_k + vs[None, :] * state_v, mask=here, other=0.0)


@remembered
@triton.jit
def _piece_updates(
    k_ptr, v_ptr, g_ptr, updates_ptr, sums_ptr, bounds_ptr, parts_ptr, owner_ptr,
    T, H, PARTS, part, piece, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, VARLEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What each part of a piece alone adds to the state, [parts, H, K, V]; with gates also its total log decay, [parts, H].

    Nobody reads those of the piece that is passed last, so they are not written.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    count = tl.num_programs(0) // NV // H
    i_v = tl.program_id(0) % NV
    i_p = tl.program_id(0) // NV % count
    rank = tl.program_id(0) // NV // count
    # the head that remembers longest is the first or the last: early
    i_h = tl.where(rank % 2 == 0, rank // 2, H - 1 - rank // 2)
    i_n, begin, length, first = _place(i_p, bounds_ptr, parts_ptr, owner_ptr, T, PARTS, part, VARLEN)
    if first < piece if REVERSE else first >= (tl.cdiv(length, piece) - 1) * piece:
        return
    last = tl.minimum(first + part, length)
    g = 0.0 if GATED else tl.load(g_ptr + i_h)  # a load inside the loop would cost its latency in every chunk
    if not GATED:  # nor those that are forgotten before the next piece begins
        between = first % piece // part if REVERSE else (piece - first % piece) // part - 1
        if between >= _remembered(g, part, between + 1):
            return
    ks, vs, cs = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_k, in_v = ks < K, vs < V
    row = begin * 0 if VARLEN else i_n
    k_ptr += row * k_b + begin * k_t + i_h * k_h
    v_ptr += row * v_b + begin * v_t + i_h * v_h
    g_ptr += (row * T + begin) * H + i_h
    chunks = tl.cdiv(last - first, C)
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
        write = tl.exp(b) if REVERSE else tl.exp(tl.minimum(total - b, 0.0))
        state = _grow(state, k, (v * write[:, None]).to(k.dtype), total, DOT)
        passed += total
    at = updates_ptr + (i_p * H + i_h).to(tl.int64) * K * V + ks[:, None] * V + vs[None, :]
    tl.store(at, state, mask=in_k[:, None] & in_v[None, :])
    if GATED:
        tl.store(sums_ptr + i_p * H + i_h, passed)


@triton.jit
def _sweep(
    program, reverse, q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr, bounds_ptr, pieces_ptr, owner_ptr,
    parts_ptr, mine_ptr, chunks_ptr, kept_ptr, products_ptr, rows_ptr, scale, T, H, PIECES, piece, part,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, mine_b, mine_t, mine_h, state_k, state_v, values,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, FAR: tl.constexpr, VARLEN: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
    SPLIT: tl.constexpr, KEEP: tl.constexpr, MEET: tl.constexpr, DOT: tl.constexpr, HALF: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program's share, from the right or not. Of programs TOGETHER, `values` says whether this one makes dv: states lie as its."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = program % NV
    i_h = program // NV % H
    i_p = program // NV // H
    if SPLIT and not TOGETHER:  # first those who have the most to read before they start
        i_p = tl.where(reverse, i_p, tl.num_programs(0) // NV // H - 1 - i_p)
    i_n, begin, length, first = _place(i_p, bounds_ptr, pieces_ptr, owner_ptr, T, PIECES, piece, VARLEN)
    last = tl.minimum(first + piece, length)
    row = begin * 0 if VARLEN else i_n
    token = row * T + begin  # of the sequence's first, through all rows

    ks, vs, cs = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    in_k, in_v = ks < K, vs < V
    in_state = in_k[:, None] & in_v[None, :]
    q_ptr += row * q_b + begin * q_t + i_h * q_h
    k_ptr += row * k_b + begin * k_t + i_h * k_h
    v_ptr += row * v_b + begin * v_t + i_h * v_h
    out_ptr += (token * H + i_h) * V
    g_ptr += token * H + i_h if GATED else i_h
    g = 0.0 if GATED else tl.load(g_ptr)
    if KEEP or MEET:
        # numbers go through all sequences
        chunk0 = tl.load(chunks_ptr + i_n).to(tl.int64) if VARLEN else i_n * tl.cdiv(T, C)
        mine_ptr += row * mine_b + begin * mine_t + i_h * mine_h

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if START:
        state += _state(start_ptr + (i_n * H + i_h) * K * V, ks, vs, state_k, state_v, values, K, V, TOGETHER)
    if SPLIT:  # what the parts passed before this piece have written
        part0 = tl.load(parts_ptr + i_n) if VARLEN else (i_n * tl.cdiv(T, part)).to(tl.int32)
        parts = tl.cdiv(length, part)
        passed = tl.where(reverse, tl.maximum(parts - (first + piece) // part, 0), first // part)
        reach = passed if GATED else _remembered(g, part, passed)
        if reach < passed:
            state *= 0.0
        for i in range(passed - reach, passed):
            j = tl.where(reverse, parts - 1 - i, i)
            if GATED:
                decay = tl.load(sums_ptr + (part0 + j) * H + i_h)
            else:
                decay = tl.minimum(part, length - j * part) * g
            at = updates_ptr + ((part0 + j) * H + i_h).to(tl.int64) * K * V
            state = state * tl.exp(decay) + _state(at, ks, vs, state_k, state_v, values, K, V, TOGETHER)

    way = tl.where(reverse, -1, 1)
    seen = (cs[:, None] - cs[None, :]) * way >= 0
    chunks = tl.cdiv(last - first, C)
    ahead = _gates(g_ptr, first + tl.where(reverse, (chunks - 1) * C, 0) + cs, first, last, H, GATED)
    if KEEP or MEET:  # numbers of (chunk, head), through all sequences: states behind chunks, for a decay that learns
        edge = (chunk0 + first // C + tl.where(reverse, chunks - 1, 0)) * H + i_h
        at_kept = ks[:, None] * V + vs[None, :]
    if MEET:
        kept = tl.load(kept_ptr + edge * K * V + at_kept, mask=in_state, other=0.0)
        tl.store(products_ptr + edge * NV + i_v, tl.sum(kept.to(tl.float32) * state))
    for i in range(chunks):
        c0 = first + tl.where(reverse, chunks - 1 - i, i) * C
        t = (c0 + cs).to(tl.int64) if FAR else c0 + cs
        inside = t < last
        b, total = _running_decay(ahead if GATED else g, tl.minimum(last - c0, C), GATED, C)
        ahead = _gates(g_ptr, t + way * C, first, last, H, GATED)
        wide = inside[:, None] & in_v[None, :]
        if KEEP or MEET:  # for the end of this step: nobody waits for them
            mine = tl.load(mine_ptr + t[:, None] * mine_t + vs[None, :], mask=wide, other=0.0)
        if MEET:
            edge -= H
            more = i + 1 < chunks
            kept = tl.load(kept_ptr + edge * K * V + at_kept, mask=in_state & more, other=0.0)
        q = tl.load(q_ptr + t[:, None] * q_t + ks[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        k = tl.load(k_ptr + t[:, None] * k_t + ks[None, :], mask=inside[:, None] & in_k[None, :], other=0.0)
        v = tl.load(v_ptr + t[:, None] * v_t + vs[None, :], mask=inside[:, None] & in_v[None, :], other=0.0)
        if TOGETHER:  # the direction is known at run time only
            to_end = tl.minimum(total - b, 0.0)
            log_weight = (b[:, None] - b[None, :]) * way
            read, write = tl.exp(tl.where(reverse, to_end, b)), tl.exp(tl.where(reverse, b, to_end))
        elif reverse:
            log_weight = b[None, :] - b[:, None]
            read, write = tl.exp(tl.minimum(total - b, 0.0)), tl.exp(b)
        else:
            log_weight = b[:, None] - b[None, :]
            read, write = tl.exp(b), tl.exp(tl.minimum(total - b, 0.0))
        weight = scale * tl.exp(tl.where(seen, log_weight, float("-inf")))  # no positive exponent, no inf * 0
        written = (v * write[:, None]).to(k.dtype)
        if HALF:  # as bfloat16: without decay the state can outgrow float16's range
            out = tl.dot(q.to(tl.bfloat16), state.to(tl.bfloat16))
        else:
            out = tl.dot(q.to(tl.float32), state, input_precision=DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT)
        state = _grow(state, k, written, total, DOT)  # before the outputs: tensor cores need not wait for weights
        out = tl.dot((scores * weight).to(v.dtype), v, out * (scale * read)[:, None], input_precision=DOT)
        tl.store(out_ptr + t[:, None] * (H * V) + vs[None, :], out.to(out_ptr.dtype.element_ty), mask=wide)
        if KEEP or MEET:
            sums = tl.sum(mine.to(tl.float32) * out, 1)
            tl.store(rows_ptr + ((token + t) * H + i_h) * NV + i_v, sums, mask=inside)
        if KEEP:
            tl.store(kept_ptr + edge * K * V + at_kept, state.to(kept_ptr.dtype.element_ty), mask=in_state)
            edge += H
        if MEET:
            tl.store(products_ptr + edge * NV + i_v, tl.sum(kept.to(tl.float32) * state), mask=more)
    if FINAL:  # the program that passed last over its (sequence, head)
        if tl.where(reverse, first == 0, last == length):
            at = final_ptr + (i_n * H + i_h) * K * V + ks[:, None] * state_k + vs[None, :] * state_v
            tl.store(at, state, mask=in_state & values)


@remembered
@triton.jit
def _single(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr, bounds_ptr, pieces_ptr, owner_ptr,
    parts_ptr, mine_ptr, chunks_ptr, kept_ptr, products_ptr, rows_ptr, scale, T, H, PIECES, piece, part,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, mine_b, mine_t, mine_h, state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, VARLEN: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
    SPLIT: tl.constexpr, KEEP: tl.constexpr, MEET: tl.constexpr, DOT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One sweep."""
    _sweep(
        tl.program_id(0), REVERSE, q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr, bounds_ptr, pieces_ptr, owner_ptr,
        parts_ptr, mine_ptr, chunks_ptr, kept_ptr, products_ptr, rows_ptr, scale, T, H, PIECES, piece, part,
        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, mine_b, mine_t, mine_h, state_k, state_v, True,
        K, V, BK, BV, C, GATED, FAR, VARLEN, START, FINAL, SPLIT, KEEP, MEET, DOT, HALF, False,
    )  # fmt: skip


@triton.jit
def _pick(role, of_values, of_keys, of_queries):
    return tl.where(role == 0, of_values, tl.where(role == 1, of_keys, of_queries))


@remembered
@triton.jit
def _together(
    q_ptr, k_ptr, v_ptr, do_ptr, g_ptr, dq_ptr, dk_ptr, dv_ptr, behind_ptr, behind_sums_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr,
    bounds_ptr, pieces_ptr, owner_ptr, parts_ptr, scale, T, H, PIECES, piece, part,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, FAR: tl.constexpr, VARLEN: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
    SPLIT: tl.constexpr, DOT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dv, dk and, where there is a place for it, dq, for K = V. What a program loads, its neighbours of the others have in cache.

    A program picks its pointers; copies of the loop would need the registers and the shared memory of all.
    """
    NV: tl.constexpr = (K + BV - 1) // BV
    # sweep(k, q, do), sweep(v, do, q) and, from the left, sweep(do, v, k)
    ROLES: tl.constexpr = 2 if dq_ptr is None else 3
    role = tl.program_id(0) % (ROLES * NV) // NV
    out_ptr = tl.where(role == 0, dv_ptr, dk_ptr)
    if dq_ptr is not None:
        out_ptr = tl.where(role == 2, dq_ptr, out_ptr)
        if SPLIT:
            updates_ptr = tl.where(role == 2, behind_ptr, updates_ptr)
        if SPLIT and GATED:
            sums_ptr = tl.where(role == 2, behind_sums_ptr, sums_ptr)
    _sweep(
        tl.program_id(0) // (ROLES * NV) * NV + tl.program_id(0) % NV, role < 2,
        _pick(role, k_ptr, v_ptr, do_ptr), _pick(role, q_ptr, do_ptr, v_ptr), _pick(role, do_ptr, q_ptr, k_ptr), g_ptr,
        out_ptr, start_ptr, updates_ptr, sums_ptr, final_ptr, bounds_ptr, pieces_ptr, owner_ptr,
        parts_ptr, None, None, None, None, None, scale, T, H, PIECES, piece, part,
        _pick(role, k_b, v_b, do_b), _pick(role, k_t, v_t, do_t), _pick(role, k_h, v_h, do_h),
        _pick(role, q_b, do_b, v_b), _pick(role, q_t, do_t, v_t), _pick(role, q_h, do_h, v_h),
        _pick(role, do_b, q_b, k_b), _pick(role, do_t, q_t, k_t), _pick(role, do_h, q_h, k_h),
        0, 0, 0, K, 1, role == 0,
        K, K, BK, BV, C, GATED, FAR, VARLEN, START, FINAL, SPLIT, False, False, DOT, HALF, True,
    )  # fmt: skip
