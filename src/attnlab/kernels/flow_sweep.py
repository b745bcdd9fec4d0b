"""Causal flow attention on a GPU (Flowformer, Wu et al. 2022, arXiv:2202.06258): gates that ride on the features.

    o_i = r_i phi(q_i) . sum_{j <= i} w_j phi(k_j) v_j^T,      r_i = gate_i / (i incoming_i)

So with the features r phi(q) and w phi(k) it is linear attention without decay, and `attnlab.kernels.decay_sweep` does the
rest. Neither the values nor the outputs are touched once more, which saves their traffic and, in half precision, two
roundings; and dq and dk, of features and gates together, are rounded once. r falls with the length T of the sequence, so the
features carry T r, which float16 holds, and the sweeps divide by T.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_launch import Sweeps, tiles_for
from attnlab.kernels.dispatch import rows
from attnlab.kernels.flow_gates import Gates, flow_gates
from attnlab.kernels.flow_gradients import gradients
from attnlab.kernels.packed import Sequences


class CausalFlow(torch.autograd.Function):
    """One walk for the features, one sweep; backward three sweeps and one walk."""

    @staticmethod
    def forward(ctx: Any, q, k, v, eps, clamp):
        reads, writes, gates = flow_gates(q, k, eps, clamp)
        sweeps = Sweeps(
            reads,
            _no_decay(q.shape[2], q.device),
            1 / q.shape[1],
            tiles_for(reads, v),
            Sequences([0, q.shape[1]], None),
        )
        starts = sweeps.starts(writes, v)
        out, _ = sweeps.sweep(reads, writes, v, start=starts)
        ctx.save_for_backward(q, k, v, reads, writes, starts, *gates)
        ctx.clamp, ctx.sweeps = clamp, sweeps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        q, k, v, reads, writes, starts, *gates = ctx.saved_tensors
        d_out, sweeps = rows(d_out), ctx.sweeps
        d_reads, _ = sweeps.sweep(d_out, v, writes, start=None if starts is None else starts.mT)
        d_writes, dv, _ = sweeps.keys_and_values(
            reads, writes, v, d_out, start=sweeps.starts(reads, d_out, reverse=True)
        )
        dq, dk = gradients(q, k, Gates(*gates), ctx.clamp, d_reads, d_writes)
        return dq, dk, dv, None, None


@functools.cache
def _no_decay(heads: int, device: torch.device) -> Tensor:
    """A decay of 1 for every head."""
    return torch.zeros(heads, device=device)
