"""The gradient of the log decay, from what the sweeps of `attnlab.kernels.decay_sweep` leave behind.

The decay of token s stands in every product of a query t >= s with a key before s. Summed over t and telescoped, with
`row_t = q_t . dq_t - k_t . dk_t`, its gradient is the sum of `row_t` over all t >= s. Taken literally that is a small difference
of large sums: every rounding of a later token stays in it. So the sum ends with the chunk, and what lies behind the chunk comes
in one number without a difference,

    d log_decay_s = sum_{t >= s in the chunk} row_t + scale * <S, D>,

with S the state after the chunk and D what all later tokens would read of it. The dq sweep keeps S, the dk sweep meets it with D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab.kernels.dispatch import cdiv, padded
from attnlab.kernels.launch import remembered


@remembered
@triton.jit
def _suffix_sums(
    q_ptr, dq_ptr, k_ptr, dk_ptr, products_ptr, out_ptr, cu_ptr, owner_ptr, scale, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, head)."""
    slot, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    if VARLEN:
        i_n = tl.load(owner_ptr + slot).to(tl.int64)
        begin = tl.load(cu_ptr + i_n).to(tl.int64)
        last = tl.load(cu_ptr + i_n + 1).to(tl.int64)
        i_b = slot * 0
        t = begin + (slot - begin // C - i_n) * C + tl.arange(0, C)
    else:
        chunks = tl.cdiv(T, C)
        i_b = slot // chunks
        last = T
        t = slot % chunks * C + tl.arange(0, C)
    inside = t < last
    ks = tl.arange(0, BK)
    wide = inside[:, None] & (ks < K)[None, :]
    tight = ((i_b * T + t) * H + i_h)[:, None] * K + ks[None, :]  # dq and dk are ours, q and k may be views
    q = tl.load(q_ptr + i_b * q_b + i_h * q_h + t[:, None] * q_t + ks[None, :], mask=wide, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + i_b * k_b + i_h * k_h + t[:, None] * k_t + ks[None, :], mask=wide, other=0.0).to(tl.float32)
    dq = tl.load(dq_ptr + tight, mask=wide, other=0.0).to(tl.float32)
    dk = tl.load(dk_ptr + tight, mask=wide, other=0.0).to(tl.float32)
    row = tl.sum(q * dq - k * dk, 1)
    behind = 0.0
    for i_v in range(NV):
        behind += tl.load(products_ptr + (slot * H + i_h) * NV + i_v)
    later = tl.sum(row, 0) - tl.cumsum(row, 0) + row  # over t >= s
    tl.store(out_ptr + (i_b * T + t) * H + i_h, later + scale * behind, mask=inside)


class Boundaries(NamedTuple):
    """What two sweeps exchange at the end of every chunk. Chunks are numbered through all sequences; packed ones may skip a number.

    Attributes:
        states: [chunks, H, V, K], those of the dq sweep, which are the transposed states of the forward sweep.
        products: [chunks, H, slices], with the states of the dk sweep.
    """

    states: Tensor
    products: Tensor


def boundaries(q: Tensor, v: Tensor, chunk: int, slices: int, cu_seqlens: Tensor | None) -> Boundaries:
    """Room for them: V * K / chunk numbers a token and head, in half precision for half inputs."""
    batch, length, heads, width = q.shape
    chunks = batch * cdiv(length, chunk) if cu_seqlens is None else length // chunk + len(cu_seqlens) - 1
    kept = torch.bfloat16 if q.dtype != torch.float32 and q.is_cuda else torch.float32
    return Boundaries(
        torch.empty(chunks, heads, v.shape[-1], width, dtype=kept, device=q.device),
        torch.zeros(chunks, heads, slices, device=q.device),
    )


def decay_gradient(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, products: Tensor, scale: float, chunk: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradient of a log decay a token [B, T, H], float32; its sum over B and T is that of one a head."""
    batch, length, heads, width = q.shape
    out = torch.empty(batch, length, heads, device=q.device)
    chunks, _, slices = products.shape
    _suffix_sums[(chunks * heads,)](
        q, dq, k, dk, products, out, cu_seqlens, _owners(cu_seqlens, chunk, chunks), scale, length, heads,
        *q.stride()[:3], *k.stride()[:3],
        K=width, BK=padded(width), NV=slices, C=chunk, VARLEN=cu_seqlens is not None, num_warps=4,
    )  # fmt: skip
    return out


def _owners(cu_seqlens: Tensor | None, chunk: int, chunks: int) -> Tensor | None:
    """The packed sequence of every chunk: sequence n starts with chunk `begin // C + n`, which leaves room for ragged tails."""
    if cu_seqlens is None:
        return None
    starts = cu_seqlens[:-1] // chunk + torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.searchsorted(starts, torch.arange(chunks, device=starts.device), right=True) - 1
