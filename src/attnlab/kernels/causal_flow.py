"""Causal flow attention on any machine: gates and recurrence in Triton on a GPU. Taught in ``kernels/flowformer``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnlab.kernels.dispatch import on_gpu, rows
from attnlab.kernels.linear_decay import WIDEST, linear_decay_attention
from attnlab.mixers import checks, flow


def causal_flow(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, clamp: float = 1.0) -> Tensor:
    """Flow attention over prefixes: two gates a token from conserved flows, around linear attention without decay.

    The gates come from three passes over all chunks (`flow_gates`); what is left is `linear_decay_attention` on sigmoid features.
    Elsewhere, and in float64, the chunked form of `attnlab.mixers.flow` runs.

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
    checks.shape("k", k, tuple(q.shape), "[B, T, H, K] of q")
    if k.dtype != q.dtype:
        raise ValueError(f"k: dtype {k.dtype}, but q has {q.dtype}; cast one of them")
    if q.shape[-1] > WIDEST:
        raise ValueError(f"K={q.shape[-1]} is wider than a program can hold; use heads of at most {WIDEST} channels")
    if not clamp > 0:
        raise ValueError(f"clamp={clamp} must be positive")
    if not on_gpu("causal_flow", q):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, _ = flow.causal_flow_attention(q.to(work), k.to(work), v.to(work), eps=eps, clamp=clamp)
        return out.to(v.dtype)
    from attnlab.kernels.flow_gates import FlowGates
    from attnlab.kernels.row_gate import RowGate

    weight, gate, read = FlowGates.apply(rows(q), rows(k), eps, clamp)
    v_weighted = RowGate.apply(rows(v), weight)
    decay = _no_decay(q.shape[2], q.device)
    out, _ = linear_decay_attention(q.sigmoid(), k.sigmoid(), v_weighted, decay, scale=1.0, return_state=False)
    return RowGate.apply(out, gate * read)


@functools.cache
def _no_decay(heads: int, device: torch.device) -> Tensor:
    """A decay of 1 for every head; kept, so that its values are checked once."""
    return torch.zeros(heads, device=device)
