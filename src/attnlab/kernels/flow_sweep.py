"""Causal flow attention on a GPU (Flowformer, Wu et al. 2022, arXiv:2202.06258): gates that ride on the features.

    o_i = r_i phi(q_i) . sum_{j <= i} w_j phi(k_j) v_j^T,      r_i = gate_i / (i incoming_i)

So with the features r phi(q) and w phi(k) it is linear attention without decay, and `attnlab.kernels.decay_sweep`
does the rest. Neither the values nor the outputs are touched once more, which saves their traffic and, in half precision, two
roundings; and dq and dk, of features and gates together, are rounded once. r falls with the number of tokens, so the features carry
r times the most that a sequence has at its end, which float16 holds, and the sweeps divide by that number. The state of the sweep is
the plain sum of w phi(k) v^T, so a :class:`attnlab.mixers.FlowState` is one thing here and in the torch form.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_launch import Sweeps, Updates, tiles_for
from attnlab.kernels.dispatch import rows
from attnlab.kernels.flow_gates import Gates, flow_gates
from attnlab.kernels.flow_gradients import gradients
from attnlab.kernels.flow_walks import layout
from attnlab.kernels.packed import Sequences
from attnlab.mixers.flow import FlowState


def flow_sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float,
    clamp: float,
    sequences: Sequences,
    initial_state: FlowState | None = None,
    return_state: bool = True,
) -> tuple[Tensor, FlowState | None]:
    """:func:`attnlab.kernels.causal_flow.causal_flow` of arguments that fit, their last axes contiguous."""
    start = memory = past = None
    if initial_state is not None:
        start, past = _joined(initial_state), initial_state.length.contiguous()
        memory = initial_state.memory.float().contiguous()
    lay = layout(q, sequences, past)
    o, end, memory = CausalFlow.apply(q, k, v, start, memory, eps, clamp, lay, return_state)
    if end is None:
        return o, None
    if sequences.packed is None:
        tokens = torch.full(q.shape[:1], q.shape[1], dtype=torch.int64, device=q.device)
    else:
        tokens = sequences.packed.diff().long()
    return o, _parted(end, memory, tokens if past is None else tokens + past)


def _joined(state: FlowState) -> Tensor:
    """The sums of a state as the walks carry them, [N, H, 4 K + 1]."""
    vectors = (state.sinks, state.sources, state.fixed_sinks, state.fixed_sources)
    return torch.cat([*(x.float() for x in vectors), state.log_weight.float().exp()[..., None]], -1)


def _parted(sums: Tensor, memory: Tensor, length: Tensor) -> FlowState:
    """The state of which these are the sums."""
    sinks, sources, fixed_sinks, fixed_sources = sums[..., :-1].chunk(4, -1)
    return FlowState(sources, sinks, fixed_sources, fixed_sinks, sums[..., -1].log(), memory, length)


class CausalFlow(torch.autograd.Function):
    """One walk for the features, one sweep; backward three sweeps and one walk. Of a state the walks take the sums, the sweep the memory."""

    @staticmethod
    def forward(ctx: Any, q, k, v, start, memory, eps, clamp, lay, with_state):
        ctx.set_materialize_grads(False)
        reads, writes, gates, end = flow_gates(q, k, eps, clamp, lay, start, with_state)
        sweeps = Sweeps(reads, _no_decay(q.shape[2], q.device), 1 / lay.lift, tiles_for(reads, v), lay.sequences)
        updates = sweeps.updates(writes, v)
        out, final = sweeps.sweep(reads, writes, v, start=memory, updates=updates, final=with_state)
        ctx.save_for_backward(q, k, v, memory, reads, writes, *gates, *(updates or ()))
        ctx.clamp, ctx.lay, ctx.sweeps = clamp, lay, sweeps
        return out, end, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out, d_end, d_final):
        q, k, v, memory, reads, writes, *saved = ctx.saved_tensors
        held = len(Gates._fields)
        gates, behind = Gates(*saved[:held]), Updates(*saved[held:]) if saved[held:] else None
        lay, sweeps = ctx.lay, ctx.sweeps
        d_out = torch.zeros_like(v, memory_format=torch.contiguous_format) if d_out is None else rows(d_out)
        d_final = None if d_final is None else d_final.contiguous() * lay.lift  # each sweep scales what it reads
        wanted = ctx.needs_input_grad[3:5]
        how: Any = {"start": memory, "behind": behind, "d_final": d_final, "edges": None}
        d_reads, d_writes, dv, d_memory = sweeps.gradients(reads, writes, v, d_out, **how, final=wanted[1])
        dq, dk, d_start = gradients(q, k, gates, ctx.clamp, lay, d_reads, d_writes, d_end, wanted[0])
        d_memory = None if d_memory is None else d_memory / lay.lift
        return dq, dk, dv, d_start, d_memory, None, None, None, None


@functools.cache
def _no_decay(heads: int, device: torch.device) -> Tensor:
    """A decay of 1 for every head."""
    return torch.zeros(heads, device=device)
