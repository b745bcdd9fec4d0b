"""Linear attention with scalar decay as a function that torch differentiates, from the launches of `attnlab.kernels.decay_launch`."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnlab.kernels.decay_gradient import decay_gradient
from attnlab.kernels.decay_launch import Sweeps, Updates
from attnlab.kernels.dispatch import rows


class LinearDecay(torch.autograd.Function):
    """Four sweeps: one forward, three backward."""

    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, start, scale, sequences, tiles, with_state=True):
        ctx.set_materialize_grads(False)
        sweeps = Sweeps(q, log_decay, scale, tiles, sequences)
        updates = sweeps.updates(k, v)
        out, final = sweeps.sweep(q, k, v, start=start, updates=updates, final=with_state)
        ctx.save_for_backward(q, k, v, log_decay, start, *(updates or ()))
        ctx.sweeps = sweeps
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out, d_final):
        q, k, v, g, start, *pieces = ctx.saved_tensors
        sweeps = ctx.sweeps
        d_out = torch.zeros_like(v) if d_out is None else rows(d_out)
        # The states run with the inputs here and with d_out below; each sweep scales what it reads, hence the division.
        d_final = None if d_final is None else d_final.float().contiguous() / sweeps.scale
        edges = sweeps.boundaries(q, v) if ctx.needs_input_grad[3] else None
        behind = Updates(*pieces) if pieces else None
        how: Any = {"start": start, "behind": behind, "d_final": d_final, "edges": edges}
        dq, dk, dv, d_start = sweeps.gradients(q, k, v, d_out, **how, final=ctx.needs_input_grad[4])
        dg = None
        if edges is not None:
            dg = decay_gradient(edges, sweeps.scale, sweeps.tiles.chunk, sweeps.sequences)
            dg = dg if g.dim() == 3 else dg.sum((0, 1))
        return dq, dk, dv, dg, None if d_start is None else d_start * sweeps.scale, None, None, None, None
