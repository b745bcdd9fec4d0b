"""The gradient of the log decay, from what the sweeps of `attnlab.kernels.decay_sweep` leave behind.

The decay of token s stands in every product of a query t >= s with a key before s. Summed over t and telescoped, with
`row_t = q_t . dq_t - k_t . dk_t`, its gradient is the sum of `row_t` over all t >= s. Taken literally that is a small difference
of large sums: every rounding of a later token stays in it. So the sum ends with the chunk, and what lies behind the chunk comes
in one number without a difference,

    d log_decay_s = sum_{t >= s in the chunk} row_t + scale * <S, D>,

with S the state after the chunk and D what all later tokens would read of it. The dq sweep keeps S, the dk sweep meets it with D,
and both leave their half of `row_t` before they round dq and dk to half precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv
from attnlab.kernels.launch import remembered
from attnlab.kernels.packed import Sequences


@remembered
@triton.jit
def _suffix_sums(
    reads_ptr, writes_ptr, products_ptr, out_ptr, bounds_ptr, chunks_ptr, owner_ptr, scale, T, H,
    NV: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, block of heads)."""
    blocks = tl.cdiv(H, BH)
    slot, hs = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    if VARLEN:
        i_n = tl.load(owner_ptr + slot)
        last = tl.load(bounds_ptr + i_n + 1)
        i_b = slot * 0
        t = tl.load(bounds_ptr + i_n) + (slot - tl.load(chunks_ptr + i_n)) * C + tl.arange(0, C)
    else:
        chunks = tl.cdiv(T, C)
        i_b = slot // chunks
        last = T
        t = slot % chunks * C + tl.arange(0, C)
    inside = (t < last)[:, None] & (hs < H)[None, :]
    at = (i_b * T + t)[:, None] * H + hs[None, :]
    row = tl.zeros([C, BH], dtype=tl.float32)
    behind = tl.zeros([BH], dtype=tl.float32)
    for i_v in range(NV):
        row += tl.load(reads_ptr + at * NV + i_v, mask=inside, other=0.0)
        row -= tl.load(writes_ptr + at * NV + i_v, mask=inside, other=0.0)
        behind += tl.load(products_ptr + (slot * H + hs) * NV + i_v, mask=hs < H, other=0.0)
    later = tl.sum(row, 0)[None, :] - tl.cumsum(row, 0) + row  # over t >= s
    tl.store(out_ptr + at, later + scale * behind[None, :], mask=inside)


class Boundaries(NamedTuple):
    """What two sweeps leave for the gradient of the decay, a share for every slice of K.

    Chunks are numbered through all sequences.

    Attributes:
        chunks: the first of every packed sequence, [N + 1]; None where every row is one sequence.
        states: [chunks, H, V, K], those of the dq sweep, which are the transposed states of the forward sweep.
        products: [chunks, H, slices], with the states of the dk sweep.
        reads, writes: [B, T, H, slices], of q . dq and k . dk, from before dq and dk are rounded.
    """

    chunks: Tensor | None
    states: Tensor
    products: Tensor
    reads: Tensor
    writes: Tensor


def boundaries(q: Tensor, v: Tensor, chunk: int, slices: int, sequences: Sequences, *, half: bool) -> Boundaries:
    """Room for them; states, V * K / chunk numbers a token and head, in half precision for half inputs."""
    batch, length, heads, width = q.shape
    parts, _ = sequences.cut(chunk)
    chunks = batch * parts.bounds[-1]
    return Boundaries(
        parts.packed,
        torch.empty(
            chunks, heads, v.shape[-1], width, dtype=torch.bfloat16 if half else torch.float32, device=q.device
        ),
        torch.empty(chunks, heads, slices, device=q.device),
        *torch.empty(2, batch, length, heads, slices, device=q.device),
    )


def decay_gradient(edges: Boundaries, scale: float, chunk: int, sequences: Sequences) -> Tensor:
    """Gradient of a log decay a token [B, T, H], float32; its sum over B and T is that of one a head."""
    batch, length, heads, slices = edges.reads.shape
    out = torch.empty(batch, length, heads, device=edges.reads.device)
    parts, owner = sequences.cut(chunk)
    block = min(16, triton.next_power_of_2(heads))  # neighbours in memory
    _suffix_sums[(len(edges.products) * cdiv(heads, block),)](
        edges.reads, edges.writes, edges.products, out, sequences.packed, parts.packed, owner, scale, length, heads,
        NV=slices, C=chunk, BH=block, VARLEN=owner is not None, num_warps=4,
    )  # fmt: skip
    return out
