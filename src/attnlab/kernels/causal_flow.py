"""Causal flow attention on any machine: gates and recurrence in Triton on a GPU. Taught in ``kernels/flowformer``."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.kernels.dispatch import on_gpu, rows
from attnlab.kernels.linear_decay import WIDEST
from attnlab.mixers import checks, flow


def causal_flow(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, clamp: float = 1.0) -> Tensor:
    """Flow attention over prefixes: two gates a token from conserved flows, around linear attention without decay.

    One walk over the chunks makes the gates and multiplies them into the features (`flow_gates`); what is left is linear attention
    without decay (`flow_sweep`). Elsewhere, and in float64, the chunked form of `attnlab.mixers.flow` runs.

    Args:
        q, k: [B, T, H, K], K at most 256.
        v: [B, T, H, V], V at most 256.
        eps, clamp: as in `attnlab.mixers.flow.causal_flow_attention`.

    Returns:
        [B, T, H, V] in the dtype of `v`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, a clamp that is not positive.
    """
    checks.rank("q", q, "[B, T, H, K]")
    checks.rank("v", v, "[B, T, H, V]")
    checks.shape("k", k, tuple(q.shape), "[B, T, H, K] of q")
    checks.shape("v", v, (*q.shape[:3], v.shape[3]), "[B, T, H, V] with B, T, H of q")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, but q has {q.dtype}; cast one of them")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}; move one of them")
    for name, size in (("K", q.shape[3]), ("V", v.shape[3])):
        if size > WIDEST:
            raise ValueError(f"{name}={size} is wider than a program can hold; use heads of at most {WIDEST} channels")
    if not clamp > 0:
        raise ValueError(f"clamp={clamp} must be positive")
    if not on_gpu("causal_flow", q):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, _ = flow.causal_flow_attention(q.to(work), k.to(work), v.to(work), eps=eps, clamp=clamp)
        return out.to(v.dtype)
    from attnlab.kernels.flow_sweep import CausalFlow

    with torch.cuda.device(q.device):
        return CausalFlow.apply(rows(q), rows(k), rows(v), eps, clamp)
