"""Causal flow attention on a GPU (Flowformer, Wu et al. 2022, arXiv:2202.06258): gates that ride on the features.

    o_i = r_i phi(q_i) . sum_{j <= i} w_j phi(k_j) v_j^T,      r_i = gate_i / (i incoming_i)

So with the features r phi(q) and w phi(k) it is linear attention without decay, and :func:`attnlab.kernels.decay_sweep.sweep`
does the rest. Neither the values nor the outputs are touched once more, which saves their traffic and, in half precision, two
roundings; and dq and dk, of features and gates together, are rounded once. r falls with the length T of the sequence, so the
features carry T r, which float16 holds, and the sweeps divide by T.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_sweep import Updates, piece_updates, sweep, tiles_for
from attnlab.kernels.dispatch import rows
from attnlab.kernels.flow_gates import Gates, flow_gates
from attnlab.kernels.flow_gradients import gradients


class CausalFlow(torch.autograd.Function):
    """One walk for the features, one sweep; backward three sweeps and one walk."""

    @staticmethod
    def forward(ctx: Any, q, k, v, eps, clamp):
        reads, writes, gates = flow_gates(q, k, eps, clamp)
        tiles, decay = tiles_for(reads, v), _no_decay(q.shape[2], q.device)
        updates = piece_updates(writes, v, decay, tiles)
        out, _ = sweep(reads, writes, v, decay, 1 / q.shape[1], tiles, updates=updates)
        ctx.save_for_backward(q, k, v, reads, writes, *gates, *(updates or ()))
        ctx.clamp, ctx.tiles = clamp, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        q, k, v, reads, writes, *saved = ctx.saved_tensors
        held = len(Gates._fields)
        gates, behind = Gates(*saved[:held]), Updates(*saved[held:]) if saved[held:] else None
        d_out, tiles, decay = rows(d_out), ctx.tiles, _no_decay(q.shape[2], q.device)
        ahead = piece_updates(reads, d_out, decay, tiles, reverse=True)
        arguments = (decay, 1 / q.shape[1], tiles)
        d_reads, _ = sweep(d_out, v, writes, *arguments, updates=behind.mT if behind else None)
        d_writes, _ = sweep(v, d_out, reads, *arguments, updates=ahead.mT if ahead else None, reverse=True)
        dv, _ = sweep(writes, reads, d_out, *arguments, updates=ahead, reverse=True)
        dq, dk = gradients(q, k, gates, ctx.clamp, d_reads, d_writes)
        return dq, dk, dv, None, None


@functools.cache
def _no_decay(heads: int, device: torch.device) -> Tensor:
    """A decay of 1 for every head."""
    return torch.zeros(heads, device=device)
