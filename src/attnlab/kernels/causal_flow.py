"""Causal flow attention on any machine: gates and recurrence in Triton on a GPU. Taught in ``kernels/flowformer``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.kernels import arguments
from attnlab.kernels.dispatch import on_gpu, rows
from attnlab.mixers import flow


def causal_flow(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, clamp: float = 1.0) -> Tensor:
    """Flow attention over prefixes: two gates a token from conserved flows, around linear attention without decay.

    One walk over the chunks makes the gates and multiplies them into the features (`flow_gates`); what is left is linear attention
    without decay (`flow_sweep`). Elsewhere, and in float64, the chunked form of `attnlab.mixers.flow` runs.

    Args:
        q, k: [B, T, H, K], K at most 256.
        v: [B, T, H, V], V at most 256.
        eps: as in `attnlab.mixers.flow.causal_flow_attention`.
        clamp: bound on the conserved outgoing flow, positive and finite. The kernel sums exponentials of flows without taking out
            a maximum, so None, which the mixer takes for no bound, is refused.

    Returns:
        [B, T, H, V] in the dtype of `v`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, a clamp that is None or not positive and finite.
    """
    arguments.queries_keys_values(q, k, v)
    if clamp is None or not 0 < clamp < math.inf:
        raise ValueError(
            f"clamp={clamp} must be positive and finite; attnlab.mixers.causal_flow_attention takes None for no bound"
        )
    if not on_gpu("causal_flow", q):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, _ = flow.causal_flow_attention(q.to(work), k.to(work), v.to(work), eps=eps, clamp=clamp)
        return out.to(v.dtype)
    from attnlab.kernels.flow_sweep import CausalFlow

    with torch.cuda.device(q.device):
        return CausalFlow.apply(rows(q), rows(k), rows(v), eps, clamp)
