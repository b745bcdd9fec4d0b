"""The Aaren scan on any machine: softmax attention of one fixed query over every prefix. Taught in ``kernels/aaren``."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attnlab.kernels import arguments
from attnlab.kernels.dispatch import on_device_of, on_gpu, rows
from attnlab.kernels.packed import Sequences
from attnlab.mixers import checks
from attnlab.mixers.softmax_merge import Summary, aaren, merge


def aaren_scan(
    s: Tensor, v: Tensor, *, initial: Summary | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Summary]:
    """``o_t = sum_{i <= t} exp(s_i - lse_t) v_i`` with ``lse_t = log sum_{i <= t} exp(s_i)``, for every t.

    Differentiable in `s`, `v` and the initial summary, also through the final one. Memory is O(T V): no [T, T] matrix. On a GPU
    Triton runs it (scores and sums in float32), elsewhere the chunked form of `attnlab.mixers`; float64 always takes the latter.

    Args:
        s: scores of the fixed query, [B, T, H], in the dtype of `v`, or in float32 beside half precision; -inf leaves a token out.
        v: values, [B, T, H, V]; V at most 256.
        initial: the summary (m, u, w) of earlier tokens, [N, H], [N, H] and [N, H, V]; N = B, or the number of packed sequences.
        cu_seqlens: int tensor [N + 1], 0 = first < ... < last = T: B = 1 holds N sequences one after the other, each on its own.

    Returns:
        Outputs [B, T, H, V] in the dtype of `v`, 0 where no token had weight yet, and the summary of all tokens of every sequence,
        with the shapes of `initial`, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty sequence, a head wider than 256, bounds that do not rise from
            0 to T.
    """
    sequences = _check(s, v, initial, cu_seqlens)
    if not on_gpu("aaren_scan", v):
        return _torch_form(s, v, initial, sequences)
    from attnlab.kernels.prefix_softmax import PrefixSoftmax

    s = s.float().contiguous()
    with on_device_of(v):
        o, lse, end = PrefixSoftmax.apply(s, rows(v), sequences)
    last = lse[sequences.ends]
    summary = Summary(last, torch.isfinite(last).to(lse.dtype), end)
    if initial is None:
        return o, summary
    return _after(Summary(*(x.float() for x in initial)), o, lse, summary, sequences)


def _torch_form(s: Tensor, v: Tensor, initial: Summary | None, sequences: Sequences) -> tuple[Tensor, Summary]:
    """The chunked form of `attnlab.mixers`, one sequence after the other where several are packed."""
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    s, values = s.to(work), v.to(work)
    start = None if initial is None else Summary(*(x.to(work) for x in initial))
    if sequences.packed is None:
        o, summary = aaren(s, values, form="chunked", initial=start)
        return o.to(v.dtype), summary
    outs, summaries = [], []
    for n, (first, last) in enumerate(pairwise(sequences.bounds)):
        past = None if start is None else Summary(*(x[n : n + 1] for x in start))
        o, summary = aaren(s[:, first:last], values[:, first:last], form="chunked", initial=past)
        outs.append(o)
        summaries.append(summary)
    return torch.cat(outs, 1).to(v.dtype), Summary(*(torch.cat(x) for x in zip(*summaries, strict=True)))


def _after(past: Summary, o: Tensor, lse: Tensor, summary: Summary, sequences: Sequences) -> tuple[Tensor, Summary]:
    """What follows `past`: outputs and the summary of all, from o [B, T, H, V], lse [B, T, H] and `summary` of the new tokens alone.

    Sums stay in float32; only outputs are rounded to the dtype of `o`, and nothing is made of them later.
    """
    some = past.u > 0
    past = past._replace(m=past.m.masked_fill(~some, -torch.inf))  # without weight its unit means nothing
    u = torch.where(some, past.u, 1)
    score, mean = past.m + u.log(), past.w / u[..., None]  # as if it were one token
    _, owner = sequences.cut(1)
    score, mean = (x[:, None] if owner is None else x[owner][None] for x in (score, mean))  # beside the tokens
    share = torch.where(score > -torch.inf, score - lse, score).sigmoid()  # [B, T, H], of the past in every output
    return torch.lerp(o.float(), mean, share[..., None]).to(o.dtype), merge(past, summary)


def _check(s: Tensor, v: Tensor, initial: Summary | None, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of all rows; ValueError for anything that the kernels would read wrongly."""
    checks.rank("v", v, "[B, T, H, V]")
    batch, length, heads, width = v.shape
    checks.shape("s", s, tuple(v.shape[:3]), "[B, T, H] of v")
    arguments.narrow(V=width)
    arguments.floating(v=v)
    if s.dtype != v.dtype and not (s.dtype == torch.float32 and v.dtype in (torch.float16, torch.bfloat16)):
        raise ValueError(
            f"s: dtype {s.dtype}, but v has {v.dtype}; cast one of them (float32 scores suit half-precision values)"
        )
    arguments.beside("v", v, s=s, cu_seqlens=cu_seqlens)
    sequences = arguments.sequences(cu_seqlens, batch, length)
    if initial is not None:
        count = sequences.count(batch)
        checks.shape("initial.m", initial.m, (count, heads), "[N, H]")
        checks.shape("initial.u", initial.u, (count, heads), "[N, H]")
        checks.shape("initial.w", initial.w, (count, heads, width), "[N, H, V]")
        parts = {f"initial.{name}": x for name, x in initial._asdict().items()}
        arguments.floating(**parts)
        arguments.beside("v", v, **parts)
    return sequences
