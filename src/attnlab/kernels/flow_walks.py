"""What the walks of causal flow attention share, forward (`flow_gates`) and back (`flow_gradients`): places, sums, launches.

A program walks the chunks of one piece of one (sequence, head). Rows of a batch are sequences, or one row holds several
(`packed`), whose pieces are numbered through. So are chunks, from `begin // C + n` for sequence n, which leaves room for ragged tails.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv, dot_precision, multiprocessors, padded
from attnlab.kernels.packed import Sequences

STAGES = 2  # the next chunk is loaded while this one is computed
WARPS = 2  # few, so that many programs share a multiprocessor: a walk is one long chain of small steps
RESIDENT = 4  # programs that a multiprocessor runs at once: two warps of 255 registers a thread take a quarter of its registers
WALKS = 4  # of a sequence in pieces


@triton.jit
def place(
    bounds_ptr, pieces_ptr, owner_ptr, T, H, PIECES, piece, C: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """Where a program works.

    Batch row, sequence and head; number of the piece and of all pieces; first token and length of the sequence; where the sequence
    begins in [B, H, T], among all boundaries of chunks, and among all pieces.
    """
    i_h = tl.program_id(0) % H  # neighbours share rows of q and k
    if VARLEN:
        slot = tl.program_id(0) // H
        i_n = tl.load(owner_ptr + slot).to(tl.int64)
        begin = tl.load(bounds_ptr + i_n).to(tl.int64)
        length = (tl.load(bounds_ptr + i_n + 1) - begin).to(tl.int32)
        i_p = slot - tl.load(pieces_ptr + i_n)
        pieces = tl.cdiv(length, piece)
        i_b = i_n * 0
        far = i_h.to(tl.int64)
        line = far * T + begin
        edge = far * (T // C + PIECES) + begin // C + i_n
        bundle = far * PIECES + slot - i_p
    else:
        i_p = tl.program_id(0) // H % PIECES
        i_n = (tl.program_id(0) // H // PIECES).to(tl.int64)
        i_b, begin, length, pieces = i_n, i_n * 0, T, PIECES
        line = (i_n * H + i_h) * T
        edge = (i_n * H + i_h) * tl.cdiv(T, C)
        bundle = (i_n * H + i_h) * PIECES
    return i_b, i_n, i_h, i_p, pieces, begin, length, line, edge, bundle


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
def add(
    at, q0, k0, q1, k1, number,
    K: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Two pairs of vectors and a number, plus those at `at`."""
    if FIRST:
        q0 += vector(at, 0, K, BK)
        k0 += vector(at, 1, K, BK)
    if SECOND:
        q1 += vector(at, 2, K, BK)
        k1 += vector(at, 3, K, BK)
    if NUMBER:
        number += tl.load(at + 4 * K)
    return q0, k0, q1, k1, number


@triton.jit
def passed(
    start_ptr, sums_ptr, begin, end, eps, K: tl.constexpr, BK: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """eps + what comes from outside + sums over the pieces from `begin` to `end`; 0 what no walk has summed before."""
    start = tl.where(tl.arange(0, BK) < K, eps, 0.0)
    q0 = start if FIRST else start * 0.0
    k0 = q0
    q1 = start if SECOND else start * 0.0
    k1 = q1
    number = 0.0
    if START:
        q0, k0, q1, k1, number = add(start_ptr, q0, k0, q1, k1, number, K, BK, FIRST, SECOND, NUMBER)
    if SPLIT:
        for j in range(begin, end):
            at = sums_ptr + j * (4 * K + 1)
            q0, k0, q1, k1, number = add(at, q0, k0, q1, k1, number, K, BK, FIRST, SECOND, NUMBER)
    return q0, k0, q1, k1, number


@triton.jit
def leave(
    at, q0, k0, q1, k1, number, K: tl.constexpr, BK: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Store two pairs of vectors and a number at `at`."""
    if FIRST:
        put(at, 0, q0, K, BK)
        put(at, 1, k0, K, BK)
    if SECOND:
        put(at, 2, q1, K, BK)
        put(at, 3, k1, K, BK)
    if NUMBER:
        tl.store(at + 4 * K, number)


class Layout(NamedTuple):
    """Which tokens are a sequence, what it continues, and how it is cut.

    Attributes:
        sequences: of the row, or of every row.
        past: [N] int64, tokens that were before; None: none.
        lift: the most tokens that a sequence has at its end. Reads are multiplied by it.
        piece: tokens a piece, whole chunks, so that only the last of a sequence is ragged.
        pieces: a row.
        places: bounds, first pieces and owners of pieces for the kernels; None unless packed.
    """

    sequences: Sequences
    past: Tensor | None
    lift: float
    piece: int
    pieces: int
    places: tuple[Tensor | None, Tensor | None, Tensor | None]

    @property
    def split(self) -> bool:
        """Whether a sequence has several pieces."""
        return self.pieces > len(self.sequences.bounds) - 1

    @property
    def packed(self) -> bool:
        return self.sequences.packed is not None


def layout(q: Tensor, sequences: Sequences, past: Tensor | None = None) -> Layout:
    """For q [B, T, H, K]. A past is looked at, for which the GPU waits once."""
    length, chunk = q.shape[1], chunk_for(q)
    tokens = [last - first for first, last in pairwise(sequences.bounds)]
    before = [0] * len(tokens) if past is None else past.tolist()
    if sequences.packed is None:
        tokens *= len(before)  # every row has as many
    piece = cdiv(cdiv(length, pieces_for(q, max(tokens))), chunk) * chunk
    parts, owner = sequences.cut(piece)
    lift = max(now + then for now, then in zip(tokens, before, strict=True))
    return Layout(sequences, past, float(lift), piece, parts.bounds[-1], (sequences.packed, parts.packed, owner))


def chunk_for(q: Tensor) -> int:
    """Tokens a chunk: 32, or 16, the fewest that tensor cores take, of heads so wide that the registers hold no more."""
    return 32 if padded(q.shape[-1]) <= 64 else 16


def pieces_for(q: Tensor, longest: int) -> int:
    """Into how many pieces a row is cut: one if that fills the GPU, or if four walks would cost more than they gain.

    Where it holds several sequences, these are cut into pieces as long as those of one, if that shortens the way of the longest.
    """
    batch, length, heads, _ = q.shape
    wanted = min(RESIDENT * multiprocessors(q.device) // (batch * heads), length // 512)
    return wanted if longest * wanted >= WALKS * length else 1


def walks(sums: Tensor | None) -> range:
    """The walks that are needed: all four where there are sums over pieces, else the last."""
    return range(WALKS) if sums is not None else range(WALKS - 1, WALKS)


def launch(q: Tensor, k: Tensor, lay: Layout) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Grid, places and sizes, and compile-time arguments of a walk; and the memory of what pieces sum to if there are several.

    Programs are one a (sequence, head, piece). Sums over a piece are four vectors and a number, [B, H, pieces, 4 K + 1].
    Tables of half-precision inputs are made of bfloat16 in two parts, those of float32 by TF32 in three products. (The
    interpreter's bfloat16 is wrong.)
    """
    batch, length, heads, width = q.shape
    sums = torch.empty(batch, heads, lay.pieces, 4 * width + 1, device=q.device) if lay.split else None
    parts = 2 if q.is_cuda and q.dtype != torch.float32 else 1
    shape = {
        "K": width, "BK": padded(width), "C": chunk_for(q), "SPLIT": lay.split, "PARTS": parts, "DOT": dot_precision(q),
        "VARLEN": lay.packed, "PAST": lay.past is not None, "num_warps": WARPS, "num_stages": STAGES,
    }  # fmt: skip
    sizes = (lay.past, *lay.places, lay.lift, length, heads, lay.pieces, lay.piece)
    return (batch * heads * lay.pieces,), (*sizes, *q.stride()[:3], *k.stride()[:3]), shape, sums
