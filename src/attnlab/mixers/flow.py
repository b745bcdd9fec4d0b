"""Flow attention: linear attention in which tokens compete (Flowformer, Wu et al. 2022, arXiv:2202.06258).

Values flow from sources (keys) to sinks (queries) along capacities ``phi(q_i) . phi(k_j)``, phi = sigmoid. Fixing what every
source sends at 1 makes sinks compete, and what then reaches sink i says how important it is; fixing what every sink
receives at 1 makes sources compete. Constants follow the released code: eps inside both factors of a flow, a clamp of the
sources' conserved flow at 1 (which is active: that flow is n / m on average), and the factors m and n / m.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnlab.mixers import checks
from attnlab.mixers.recurrence import attend

FlowForm = Literal["recurrent", "chunked", "cumsum"]


class Flow(NamedTuple):
    """Flows through sinks i [B, N, H] and sources j [B, M, H]; conserved ones after the other side is fixed at 1."""

    incoming: Tensor  # I_i: what sink i receives, its row sum
    outgoing: Tensor  # O_j: what source j sends, its column sum
    conserved_incoming: Tensor  # what sink i receives if every source sends 1
    conserved_outgoing: Tensor  # what source j sends if every sink receives 1


class FlowState(NamedTuple):
    """All that the causal form remembers of the past: five sums over tokens, and how many tokens there were."""

    sources: Tensor  # [B, H, K], of phi(k)
    sinks: Tensor  # [B, H, K], of phi(q)
    fixed_sources: Tensor  # [B, H, K], of phi(k) / O
    fixed_sinks: Tensor  # [B, H, K], of phi(q) / I
    log_weight: Tensor  # [B, H], log of the sum of exp(conserved outgoing flow)
    memory: Tensor  # [B, H, K, V], of phi(k) c v^T
    length: Tensor  # [B] int64, tokens


def flow_quantities(q: Tensor, k: Tensor, *, eps: float = 1e-6) -> Flow:
    """The flows of the graph between queries [B, N, H, K] and keys [B, M, H, K], in linear time.

    With eps = 0: I = A 1, O = A^T 1, conserved I = A (1 / O), conserved O = A^T (1 / I) for A = phi(Q) phi(K)^T; the conserved
    incoming flows sum to M and the conserved outgoing ones to N.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    checks.heads(q, k, k, same_length=False)
    sinks, sources = q.sigmoid(), k.sigmoid()
    incoming = _through(sinks, sources.sum(1, keepdim=True), eps)
    outgoing = _through(sources, sinks.sum(1, keepdim=True), eps)
    return Flow(
        incoming,
        outgoing,
        conserved_incoming=_through(sinks, (sources / outgoing[..., None]).sum(1, keepdim=True), eps),
        conserved_outgoing=_through(sources, (sinks / incoming[..., None]).sum(1, keepdim=True), eps),
    )


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    competition: bool = True,
    allocation: bool = True,
) -> Tensor:
    """Flow attention in which every sink sees every source.

    Args:
        q: [B, N, H, K].
        k, v: [B, M, H, K] and [B, M, H, V].
        eps: added to both factors of a flow.
        clamp: bound on the size of the conserved outgoing flow before the softmax; none: no bound. The released variants use
            1 (core, vision), 5 (language) and 10 (reinforcement learning).
        competition: weigh values by M softmax(conserved outgoing flow).
        allocation: gate outputs by sigmoid(conserved incoming flow * N / M).

    Returns:
        [B, N, H, V].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a ``clamp`` that is not positive.
    """
    checks.heads(q, k, v, same_length=False)
    flow = flow_quantities(q, k, eps=eps)
    n, m = q.shape[1], k.shape[1]
    if competition:
        v = v * (m * _clamped(flow.conserved_outgoing, clamp).softmax(1))[..., None]
    memory = torch.einsum("bmhk,bmhv->bhkv", k.sigmoid(), v)
    o = torch.einsum("bnhk,bhkv->bnhv", q.sigmoid() / flow.incoming[..., None], memory)
    return o * (flow.conserved_incoming * n / m).sigmoid()[..., None] if allocation else o


def causal_flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    competition: bool = True,
    allocation: bool = True,
    form: FlowForm = "chunked",
    chunk_size: int = 64,
    initial_state: FlowState | None = None,
) -> tuple[Tensor, FlowState]:
    """Flow attention in which token t sees tokens up to t: every sum becomes a prefix sum, divided by t.

    A source competes with its own prefix and its weight is then frozen: causal, but not a softmax for every sink, so the
    last output is not that of :func:`flow_attention`. Three prefix sums give flows, conserved flows and weights; what
    remains is linear attention without decay. ``"recurrent"`` and ``"chunked"`` are the forms of that recurrence, and
    ``"cumsum"`` builds all states [B, T, H, K, V], as the released code does.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        initial_state: what an earlier call returned; none: t starts at 1.
        eps, clamp, competition, allocation: as in :func:`flow_attention`.

    Returns:
        Outputs [B, T, H, V] and the state after the last token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown form, a ``clamp`` that is not positive.
    """
    checks.heads(q, k, v)
    checks.one_of("form", form, ("recurrent", "chunked", "cumsum"))
    past = _nothing(q, v) if initial_state is None else _checked(initial_state, q, v)
    sinks, sources = q.sigmoid(), k.sigmoid()
    steps = torch.arange(1, q.shape[1] + 1, device=q.device)
    t = (past.length[:, None] + steps).to(q.dtype)[..., None]  # [B, T, 1]

    all_sources = _prefix_sum(sources, past.sources)  # [B, T, H, K]
    all_sinks = _prefix_sum(sinks, past.sinks)
    incoming = _through(sinks, all_sources, eps) / t  # [B, T, H], a mean over the prefix
    outgoing = _through(sources, all_sinks, eps) / t

    fixed_sources = _prefix_sum(sources / outgoing[..., None], past.fixed_sources)
    fixed_sinks = _prefix_sum(sinks / incoming[..., None], past.fixed_sinks)
    conserved_incoming = _through(sinks, fixed_sources, eps) / t
    conserved_outgoing = _clamped(_through(sources, fixed_sinks, eps) / t, clamp)

    log_weight = torch.logaddexp(conserved_outgoing.logcumsumexp(1), past.log_weight[:, None])
    weight = t * (conserved_outgoing - log_weight).exp() if competition else None

    reads = sinks / (t * incoming)[..., None]
    if form == "cumsum":
        o, memory = _all_states(reads, sources, v if weight is None else weight[..., None] * v, past.memory)
    else:
        o, memory = attend(
            reads, sources, v, write=weight, scale=1.0, initial_state=past.memory, form=form, chunk_size=chunk_size
        )
    if allocation:
        o = o * conserved_incoming.sigmoid()[..., None]
    return o, FlowState(
        sources=all_sources[:, -1],
        sinks=all_sinks[:, -1],
        fixed_sources=fixed_sources[:, -1],
        fixed_sinks=fixed_sinks[:, -1],
        log_weight=log_weight[:, -1],
        memory=memory,
        length=past.length + q.shape[1],
    )


def check_state(state: FlowState, sequences: int, q: Tensor, v: Tensor) -> None:
    """Every part of a state is for these ``sequences``, and for the heads and channels of q [B, T, H, K] and v [B, T, H, V].

    Raises:
        ValueError: no :class:`FlowState`, a part of another shape, lengths that are not int64.
    """
    if not isinstance(state, FlowState):
        raise ValueError(
            f"initial_state: {type(state).__name__}, but the FlowState that an earlier call returned is wanted"
        )
    row = (sequences, *q.shape[2:])
    shapes = {"log_weight": row[:2], "memory": (*row, v.shape[3]), "length": row[:1]}
    for name, part in state._asdict().items():
        if not isinstance(part, Tensor):
            raise ValueError(f"initial_state.{name}: {type(part).__name__}, but a tensor is wanted; see FlowState")
        checks.shape(f"initial_state.{name}", part, shapes.get(name, row), "sizes of the sequences, q and v")
    if state.length.dtype != torch.int64:
        raise ValueError(f"initial_state.length: dtype {state.length.dtype}, but torch.int64 is wanted; cast it")


def _through(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """Capacity between tokens ``x`` [B, T, H, K] and a sum of tokens, with eps in both factors: [B, T, H]."""
    return ((x + eps) * (total + eps)).sum(-1)


def _clamped(flow: Tensor, clamp: float | None) -> Tensor:
    if clamp is None:
        return flow
    if not clamp > 0:
        raise ValueError(f"clamp={clamp} must be positive, or None for no bound")
    return flow.clamp(-clamp, clamp)


def _prefix_sum(x: Tensor, before: Tensor) -> Tensor:
    """Sum of all tokens up to each, on top of ``before`` [B, ...]: [B, T, ...]."""
    return before[:, None] + x.cumsum(1)


def _all_states(q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention with every state in memory, [B, T, H, K, V]; for comparison only."""
    states = _prefix_sum(k[..., :, None] * v[..., None, :], before)
    return torch.einsum("bthk,bthkv->bthv", q, states), states[:, -1]


def _nothing(q: Tensor, v: Tensor) -> FlowState:
    """The state before the first token."""
    batch, _, heads, width = q.shape
    zeros = q.new_zeros(batch, heads, width)
    no_weight = q.new_full((batch, heads), -torch.inf)
    no_tokens = torch.zeros(batch, dtype=torch.int64, device=q.device)
    return FlowState(zeros, zeros, zeros, zeros, no_weight, q.new_zeros(batch, heads, width, v.shape[-1]), no_tokens)


def _checked(state: FlowState, q: Tensor, v: Tensor) -> FlowState:
    """The state, if every part has the shape, dtype and device of this batch.

    Raises:
        ValueError: one has not.
    """
    check_state(state, q.shape[0], q, v)
    sums = {f"initial_state.{name}": part for name, part in state._asdict().items() if name != "length"}
    checks.numbers(q=q, **sums)
    if state.length.device != q.device:
        raise ValueError(f"initial_state.length: on {state.length.device}, but q is on {q.device}; move one of them")
    return state
