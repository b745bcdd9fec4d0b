"""The Aaren scan on any machine: softmax attention of one fixed query over every prefix. Taught in ``kernels/aaren``."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.kernels.dispatch import on_gpu, rows
from attnlab.mixers import checks
from attnlab.mixers.softmax_merge import Summary, aaren

WIDEST = 256


def aaren_scan(s: Tensor, v: Tensor, *, initial: Summary | None = None) -> tuple[Tensor, Summary]:
    """``o_t = sum_{i <= t} exp(s_i - lse_t) v_i`` with ``lse_t = log sum_{i <= t} exp(s_i)``, for every t.

    Differentiable in `s`, `v` and the initial summary, also through the final one. Memory is O(T V): no [T, T] matrix. On a GPU
    Triton runs it (scores and sums in float32), elsewhere the chunked form of `attnlab.mixers`; float64 always takes the latter.

    Args:
        s: scores of the fixed query, [B, T, H]; -inf leaves a token out.
        v: values, [B, T, H, V]; V at most 256.
        initial: the summary (m, u, w) of earlier tokens, [B, H], [B, H] and [B, H, V].

    Returns:
        Outputs [B, T, H, V] in the dtype of `v`, 0 where no token had weight yet, and the summary of all tokens.

    Raises:
        ValueError: shapes or devices that do not fit, an empty sequence, a head wider than 256.
    """
    checks.rank("v", v, "[B, T, H, V]")
    checks.shape("s", s, tuple(v.shape[:3]), "[B, T, H] of v")
    if v.shape[-1] > WIDEST:
        raise ValueError(f"V={v.shape[-1]} is wider than a program can hold; use heads of at most {WIDEST} channels")
    if s.device != v.device:
        raise ValueError(f"s: on {s.device}, but v is on {v.device}; move one of them")
    if initial is not None:
        batch, _, heads, width = v.shape
        checks.shape("initial.m", initial.m, (batch, heads), "[B, H] of v")
        checks.shape("initial.u", initial.u, (batch, heads), "[B, H] of v")
        checks.shape("initial.w", initial.w, (batch, heads, width), "[B, H, V] of v")
    if not on_gpu("aaren_scan", v):
        work = torch.float64 if v.dtype == torch.float64 else torch.float32
        start = None if initial is None else Summary(*(x.to(work) for x in initial))
        o, summary = aaren(s.to(work), v.to(work), form="chunked", initial=start)
        return o.to(v.dtype), summary
    from attnlab.kernels.prefix_softmax import PrefixSoftmax, pieces_for

    s = s.float()
    if initial is not None:  # the past is one more token: score log(sum of weights), value their mean
        m, u, w = (x.float() for x in initial)
        some = u.clamp_min(torch.finfo(u.dtype).tiny)
        s = torch.cat([torch.where(u > 0, m + some.log(), -torch.inf)[:, None], s], 1)
        v = torch.cat([(w / some[..., None])[:, None].to(v.dtype), v], 1)
    s = s.contiguous()
    o, lse = PrefixSoftmax.apply(s, rows(v), pieces_for(s))
    summary = Summary(lse[:, -1], torch.isfinite(lse[:, -1]).to(lse.dtype), o[:, -1].float())
    return o if initial is None else o[:, 1:], summary
