"""Causal flow attention on any machine: gates and recurrence in Triton on a GPU. Taught in ``kernels/flowformer``."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from attnlab.kernels import arguments
from attnlab.kernels.dispatch import on_device_of, on_gpu, rows
from attnlab.kernels.packed import Sequences
from attnlab.mixers import flow
from attnlab.mixers.flow import FlowState


@overload
def causal_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    clamp: float = 1.0,
    initial_state: FlowState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[True] = True,
) -> tuple[Tensor, FlowState]: ...
@overload
def causal_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    clamp: float = 1.0,
    initial_state: FlowState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: Literal[False],
) -> tuple[Tensor, None]: ...
def causal_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    clamp: float = 1.0,
    initial_state: FlowState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, FlowState | None]:
    """Flow attention over prefixes: two gates a token from conserved flows, around linear attention without decay.

    One walk over the chunks makes the gates and multiplies them into the features (`flow_gates`); what is left is linear attention
    without decay (`flow_sweep`). Elsewhere, and in float64, the chunked form of `attnlab.mixers.flow` runs, on one packed sequence
    after the other. Differentiable in q, k, v and all sums of the initial state, also through those of the final state.

    Args:
        q, k: [B, T, H, K], K at most 256.
        v: [B, T, H, V], V at most 256.
        eps: as in `attnlab.mixers.flow.causal_flow_attention`.
        clamp: bound on the conserved outgoing flow, positive and finite. The kernel sums exponentials of flows without taking out
            a maximum, so None, which the mixer takes for no bound, is refused.
        initial_state: what an earlier call returned, or the mixer with such a clamp; N = B sequences, or those packed.
        cu_seqlens: int tensor [N + 1], 0 = first < ... < last = T: B = 1 holds N sequences one after the other.
        return_state: whether to write the state after the last token.

    Returns:
        [B, T, H, V] in the dtype of `v`, and the state of every sequence after its last token, its sums in float32 (float64 for
        float64 inputs), or None without `return_state`. With a state or bounds a GPU is waited for once, to see lengths.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T = 0, a clamp that is None or not positive and finite.
    """
    sequences = _check(q, k, v, initial_state, cu_seqlens)
    if clamp is None or not 0 < clamp < math.inf:
        raise ValueError(
            f"clamp={clamp} must be positive and finite; attnlab.mixers.causal_flow_attention takes None for no bound"
        )
    if not on_gpu("causal_flow", q):
        o, state = _torch_form(q, k, v, eps, clamp, initial_state, sequences)
        return o, state if return_state else None
    from attnlab.kernels.flow_sweep import flow_sweep

    with on_device_of(q):
        return flow_sweep(
            rows(q),
            rows(k),
            rows(v),
            eps=eps,
            clamp=clamp,
            sequences=sequences,
            initial_state=initial_state,
            return_state=return_state,
        )


def _torch_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float,
    clamp: float,
    initial_state: FlowState | None,
    sequences: Sequences,
) -> tuple[Tensor, FlowState]:
    """The chunked form of `attnlab.mixers`, one sequence after the other where several are packed."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, w = q.to(work), k.to(work), v.to(work)
    state = initial_state
    if state is not None:
        state = FlowState(*(part.to(work) if part.is_floating_point() else part for part in state))
    if sequences.packed is None:
        o, state = flow.causal_flow_attention(q, k, w, eps=eps, clamp=clamp, initial_state=state)
        return o.to(v.dtype), state
    outs, states = [], []
    for n, (first, last) in enumerate(pairwise(sequences.bounds)):
        tokens = (x[:, first:last] for x in (q, k, w))
        past = None if state is None else FlowState(*(part[n : n + 1] for part in state))
        o, end = flow.causal_flow_attention(*tokens, eps=eps, clamp=clamp, initial_state=past)
        outs.append(o)
        states.append(end)
    return torch.cat(outs, 1).to(v.dtype), FlowState(*map(torch.cat, zip(*states, strict=True)))


def _check(q: Tensor, k: Tensor, v: Tensor, state: FlowState | None, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of all rows; ValueError for anything that the kernels would read wrongly."""
    arguments.queries_keys_values(q, k, v)
    arguments.beside("q", q, cu_seqlens=cu_seqlens)
    sequences = arguments.sequences(cu_seqlens, *q.shape[:2])
    if state is None:
        return sequences
    flow.check_state(state, sequences.count(q.shape[0]), q, v)
    parts = {f"initial_state.{name}": part for name, part in state._asdict().items()}
    arguments.beside("q", q, **parts)
    del parts["initial_state.length"]
    arguments.floating(**parts)
    return sequences
