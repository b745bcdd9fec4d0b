"""Linear attention with scalar decay, on any machine: Triton on a GPU, the chunked torch form elsewhere, one signature.

It is the core of Lightning Attention-2, TransNormerLLM, RetNet (on rotated queries and keys), simple GLA and Mamba-2.
Taught in the chapters ``kernels/lightning-attention-2`` and ``kernels/lightning-attention``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnlab.kernels import arguments
from attnlab.kernels.dispatch import on_device_of, on_gpu, rows
from attnlab.kernels.packed import Sequences
from attnlab.mixers import checks, recurrence


@overload
def linear_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[False],
) -> tuple[Tensor, None]: ...
def linear_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``o_t = scale * sum_{s <= t} exp(L_t - L_s) (q_t . k_s) v_s`` with L the running sum of the log decay.

    Differentiable in every argument but `scale`, also through the states; the gradient of the decay needs room for one state a
    chunk of 64 tokens. Inputs may be strided views, such as slices of one
    joint projection; only the last axis must be contiguous, else it is copied once. On a GPU float32, bfloat16 and
    float16 run in Triton with float32 states; float64 falls back to torch with a warning.

    Args:
        q, k: queries and keys, [B, T, H, K]; K at most 256, best a power of two.
        v: values, [B, T, H, V]; V at most 256.
        log_decay: log of the decay, at most 0: [H] one a head, or [B, T, H] one a token.
        scale: finite and not 0; K ** -0.5 by default.
        initial_state: [N, H, K, V], float32; N = B, or the number of packed sequences.
        return_state: whether to write the state after the last token; without it the GPU writes 4 to 6 % less.
        cu_seqlens: int tensor [N + 1], 0 = first < ... < last = T: B = 1 holds N sequences one after the other.

    Returns:
        Outputs [B, T, H, V] in the dtype of `v`, and the state after the last token of every sequence, [N, H, K, V], float32
        (float64 for float64 inputs), or None without `return_state`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, a scale of 0 or NaN, a positive or NaN log decay (on a GPU,
            where looking would stall the stream, only `cu_seqlens` and log decays of shape [H] are looked at, the latter once
            each).
    """
    sequences = _check(q, k, v, log_decay, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite and not 0; leave it out for K ** -0.5")
    if not on_gpu("linear_decay_attention", q):
        out, final = _torch_form(q, k, v, log_decay, scale, initial_state, sequences)
        return out, final if return_state else None
    from attnlab.kernels.decay_function import LinearDecay
    from attnlab.kernels.decay_launch import tiles_for

    q, k, v = rows(q), rows(k), rows(v)
    start = None if initial_state is None else initial_state.float().contiguous()
    decay = log_decay.float().contiguous()
    with on_device_of(q):
        tiles = tiles_for(q, v, forgets=decay.dim() == 1)
        return LinearDecay.apply(q, k, v, decay, start, float(scale), sequences, tiles, return_state)


def _torch_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """The chunked form of `attnlab.mixers`, one sequence after the other where several are packed."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, w, log_decay = q.to(work), k.to(work), v.to(work), log_decay.to(work)
    start = None if initial_state is None else initial_state.to(work)
    if sequences.packed is None:
        out, final = recurrence.chunked(q, k, w, log_decay, scale=scale, initial_state=start)
        return out.to(v.dtype), final
    outs, finals = [], []
    for n, (first, last) in enumerate(pairwise(sequences.bounds)):
        piece = slice(first, last)
        out, final = recurrence.chunked(
            q[:, piece],
            k[:, piece],
            w[:, piece],
            log_decay if log_decay.dim() == 1 else log_decay[:, piece],
            scale=scale,
            initial_state=None if start is None else start[n : n + 1],
        )
        outs.append(out)
        finals.append(final)
    return torch.cat(outs, 1).to(v.dtype), torch.cat(finals)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Sequences:
    """The sequences of all rows; ValueError for anything that the kernels would read wrongly."""
    arguments.queries_keys_values(q, k, v)
    arguments.floating(log_decay=log_decay, initial_state=initial_state)
    arguments.beside("q", q, log_decay=log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    batch, length, heads, width = q.shape
    if log_decay.dim() == 4:
        raise ValueError(
            "log_decay: [B, T, H, K] decays every channel on its own; use attnlab.mixers.recurrence.chunked"
        )
    if log_decay.is_cuda and log_decay.dim() != 1:
        checks.shape("log_decay", log_decay, (batch, length, heads), "[B, T, H] of q")
    else:
        _check_decay(log_decay, (batch, length, heads, width))
    sequences = arguments.sequences(cu_seqlens, batch, length)
    if initial_state is not None:
        wanted = (sequences.count(batch), heads, width, v.shape[3])
        checks.shape("initial_state", initial_state, wanted, "[N, H, K, V]")
    return sequences


_SEEN = WeakTensorKeyDictionary()  # head decays that were looked at, with their version


def _check_decay(log_decay: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """The values of a log decay; those of a module's constant buffer on a GPU are read once, not in every step."""
    keep = log_decay.is_cuda and not log_decay.is_inference()  # inference tensors do not count their changes
    if keep and _SEEN.get(log_decay) == log_decay._version and log_decay.shape == sizes[2:3]:
        return
    checks.log_decay(log_decay.detach(), sizes)
    if keep:
        _SEEN[log_decay] = log_decay._version
