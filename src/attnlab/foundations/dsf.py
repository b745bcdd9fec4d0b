"""Understanding the Differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks (Sieber, Amo Alonso, Didier, Zeilinger, Orvieto 2024, arXiv:2405.15731).

Taught in the chapter ``foundations/dsf``. Every mixer is one record, :class:`Recurrence`, of a linear, time-varying system

    h_i = Lambda_i h_{i-1} + B_i u_i        y_i = C_i h_i + D_i u_i        h_{-1} = 0

and four evaluators compute the same outputs from it: :func:`recurrent` is the definition, :func:`scan` a parallel prefix,
:func:`chunked` matrix products inside chunks and one state between them, :func:`matrix` the whole transfer matrix. The matrices
stay factored, with K numbers of state for each of V channels; :func:`dense` writes them out for a few tokens, as an oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.mixers import checks

Evaluator = Callable[["Recurrence", Tensor], Tensor]
DENSE_TOKENS, DENSE_STATE = 16, 512  # a matrix of N x N numbers a token is for checking, not for computing


@dataclass(frozen=True)
class Recurrence:
    """A mixer as (Lambda, B, C, D), factored: state h [K, V] a head, whose column v is driven by channel v of the input alone.

    Attributes:
        log_lam: log of the diagonal of Lambda_i, [B, T, H, K|1, V|1]; above 0 where the transition amplifies.
        b: B_i, [B, T, H, K|1, V|1]: input u_v adds ``b[k, v] u_v`` to ``h[k, v]``.
        c: C_i, [B, T, H, K|1, V|1]: output ``y_v = sum_k c[k, v] h[k, v]``.
        d: the skip D_i, [B, T, H, V|1]; none: 0.
        rank_one: (left, right), each [B, T, H, K]: Lambda_i = (1 - left right^T) diag(e^log_lam), as in the delta rule;
            none: Lambda_i is diagonal.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a ``log_lam`` that is not finite.
    """

    log_lam: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None = None
    rank_one: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        batch, length, heads = _leading(self.log_lam)
        for name, x in {"log_lam": self.log_lam, "b": self.b, "c": self.c}.items():
            if x.ndim != 5 or tuple(x.shape[:3]) != (batch, length, heads):
                raise ValueError(
                    f"{name}: shape {tuple(x.shape)}, but [B, T, H, K or 1, V or 1] with B, T, H = {(batch, length, heads)} is wanted"
                )
        numbers, channels = self.size
        for name, x in {"log_lam": self.log_lam, "b": self.b, "c": self.c}.items():
            if x.shape[3] not in (1, numbers) or x.shape[4] not in (1, channels):
                raise ValueError(
                    f"{name}: shape {tuple(x.shape)} does not broadcast to K, V = {numbers}, {channels} of the others"
                )
        checks.finite("log_lam", self.log_lam)
        pair = {} if self.rank_one is None else dict(zip(("left", "right"), self.rank_one, strict=True))
        checks.numbers(log_lam=self.log_lam, b=self.b, c=self.c, d=self.d, **pair)
        for name, x in pair.items():
            checks.shape(name, x, (batch, length, heads, numbers), "[B, T, H, K]")
        if self.d is not None and (self.d.ndim != 4 or tuple(self.d.shape[:3]) != (batch, length, heads)):
            raise ValueError(f"d: shape {tuple(self.d.shape)}, but [B, T, H, V or 1] is wanted")

    @property
    def size(self) -> tuple[int, int]:
        """(K, V): numbers of state a channel, and channels (1 if no factor depends on the channel)."""
        shapes = [x.shape[3:] for x in (self.log_lam, self.b, self.c)]
        return max(s[0] for s in shapes), max(s[1] for s in shapes)

    @property
    def lam(self) -> Tensor:
        """The diagonal of Lambda_i, [B, T, H, K|1, V|1]."""
        return self.log_lam.exp()

    @property
    def shared(self) -> bool:
        """Whether one number a head and token is the whole transition: then it leaves the sums over channels."""
        return self.log_lam.shape[3:] == (1, 1) and self.b.shape[4] == self.c.shape[4] == 1

    def span(self, start: int, stop: int) -> Recurrence:
        """Tokens from ``start`` to ``stop``; the state before them is the caller's to add."""
        log_lam, b, c = (x[:, start:stop] for x in (self.log_lam, self.b, self.c))
        return Recurrence(log_lam, b, c, None if self.d is None else self.d[:, start:stop])


# ------------------------------------------------------------------------------------------------------------ evaluators


def recurrent(record: Recurrence, u: Tensor) -> Tensor:
    """The definition, one token after the other; the only evaluator that takes every transition.

    Args:
        record: of B, T, H.
        u: inputs [B, T, H, V].

    Returns:
        y [B, T, H, V]; empty for T = 0.

    Raises:
        ValueError: inputs that do not fit the record.
    """
    _check_inputs(record, u)
    added = (record.b * u[..., None, :]).expand(-1, -1, -1, record.size[0], -1)  # [B, T, H, K, V]
    state, states = u.new_zeros(u.shape[0], u.shape[2], record.size[0], u.shape[3]), []  # [B, H, K, V]
    for i, (lam, new) in enumerate(zip(record.lam.unbind(1), added.unbind(1), strict=True)):
        state = lam * state
        if record.rank_one is not None:
            left, right = (x[:, i, :, :, None] for x in record.rank_one)  # [B, H, K, 1]
            state = state - left * (right * state).sum(-2, keepdim=True)
        state = state + new
        states.append(state)
    return _skip(record, u, (record.c * torch.stack(states, 1)).sum(-2) if states else torch.zeros_like(u))


def scan(record: Recurrence, u: Tensor) -> Tensor:
    """A parallel prefix over pairs (log Lambda, B u): log T rounds, each :func:`combine` reaching twice as far.

    Arguments, result and errors as in :func:`recurrent`; Lambda must be diagonal.
    """
    _check_inputs(record, u, diagonal_for="scan")
    added = record.b * u[..., None, :]  # [B, T, H, K, V]
    pair, reach = (record.log_lam.expand_as(added), added.expand(-1, -1, -1, record.size[0], -1)), 1
    pair = (pair[0].expand_as(pair[1]), pair[1])
    while reach < u.shape[1]:
        later = combine(tuple(x[:, :-reach] for x in pair), tuple(x[:, reach:] for x in pair))  # type: ignore[arg-type]
        pair = tuple(torch.cat([x[:, :reach], y], 1) for x, y in zip(pair, later, strict=True))  # type: ignore[assignment]
        reach *= 2
    return _skip(record, u, (record.c * pair[1]).sum(-2))


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two stretches of tokens as one: transitions multiply (their logs add), and what the first added passes through the second."""
    (log_lam, added), (log_lam_next, added_next) = first, second
    return log_lam + log_lam_next, log_lam_next.exp() * added + added_next


def chunked(record: Recurrence, u: Tensor, chunk_size: int = 16) -> Tensor:
    """The transfer matrix inside chunks of ``chunk_size`` tokens, one state between them: O(T C + T / C N) work.

    Arguments, result and errors as in :func:`recurrent`; Lambda must be diagonal.

    Raises:
        ValueError: a ``chunk_size`` below 1.
    """
    checks.at_least("chunk_size", chunk_size)
    _check_inputs(record, u, diagonal_for="chunked")
    state = u.new_zeros(u.shape[0], u.shape[2], record.size[0], u.shape[3])
    outputs = [u[:, :0]]
    for start in range(0, u.shape[1], chunk_size):
        part, x = record.span(start, start + chunk_size), u[:, start : start + chunk_size]
        since = part.log_lam.cumsum(1)  # [B, C, H, K|1, V|1], log of what is left of the state before the chunk
        carried = (part.c * since.exp() * state[:, None]).sum(-2)
        outputs.append(_apply(transfer(part), x) + carried)
        until = since[:, -1:] - since  # from each token to the end of the chunk
        state = since[:, -1].exp() * state + (until.exp() * part.b * x[..., None, :]).sum(1)
    return torch.cat(outputs, 1)


def matrix(record: Recurrence, u: Tensor) -> Tensor:
    """The whole transfer matrix times the inputs: attention without softmax, O(T^2).

    Arguments, result and errors as in :func:`recurrent`; Lambda must be diagonal.
    """
    _check_inputs(record, u, diagonal_for="matrix")
    return _apply(transfer(record), u)


EVALUATORS: dict[str, Evaluator] = {"recurrent": recurrent, "scan": scan, "chunked": chunked, "matrix": matrix}


def transfer(record: Recurrence) -> Tensor:
    """Phi [B, H, V|1, T, T] with ``Phi_ij = C_i (prod_{k=j+1..i} Lambda_k) B_j``, plus D_i at i = j and 0 above the diagonal.

    Products of transitions are differences of cumulated logs, so a transition above 1 is as good as one below.

    Raises:
        ValueError: a transition that is not diagonal.
    """
    _require_diagonal(record, "transfer")
    length = record.c.shape[1]
    above = torch.ones(length, length, dtype=torch.bool, device=record.c.device).triu(1)
    passed = record.log_lam.cumsum(1)  # [B, T, H, K|1, V|1]
    if record.shared:  # one transition for all channels: it leaves the sum, and the rest is a product of two matrices
        passed = passed[..., 0, 0].transpose(1, 2)  # [B, H, T]
        kept = (passed[..., :, None] - passed[..., None, :]).masked_fill(above, -torch.inf).exp()
        scores = _channels(record.c, record) @ _channels(record.b, record).mT  # [B, H, T, T]
        phi = (scores * kept)[:, :, None]
    else:
        gap = passed[:, :, None] - passed[:, None]  # [B, T, T, H, K|1, V|1]
        kept = gap.masked_fill(above[..., None, None, None], -torch.inf).exp()
        terms = record.c[:, :, None] * record.b[:, None] * kept
        phi = terms.expand(*terms.shape[:4], record.size[0], -1).sum(-2).permute(0, 3, 4, 1, 2)  # [B, H, V|1, T, T]
    if record.d is None:
        return phi
    return phi + torch.diag_embed(record.d.permute(0, 2, 3, 1))


# ---------------------------------------------------------------------------------------------------------------- oracle


class Dense(NamedTuple):
    """The matrices of the paper for one head: Lambda [T, N, N], B [T, N, V], C [T, V, N], D [T, V, V], with N = V K."""

    lam: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def outputs(self, u: Tensor) -> Tensor:
        """y [T, V] from u [T, V], by the two lines of the definition."""
        state, outputs = self.lam.new_zeros(self.lam.shape[1]), []
        for i in range(len(u)):
            state = self.lam[i] @ state + self.b[i] @ u[i]
            outputs.append(self.c[i] @ state + self.d[i] @ u[i])
        return torch.stack(outputs)


def dense(record: Recurrence, channels: int, *, batch: int = 0, head: int = 0) -> Dense:
    """Write one head of one sequence out, with the state in the order of the paper: ``h[v K + k]``, as in I_V (x) phi.

    Args:
        record: at most 16 tokens and N = 512.
        channels: V.

    Raises:
        ValueError: more tokens or a larger state than that.
    """
    length, (numbers, _) = record.c.shape[1], record.size
    if length > DENSE_TOKENS or channels * numbers > DENSE_STATE:
        raise ValueError(
            f"record: {length} tokens with N = {channels * numbers}, but dense matrices are for at most {DENSE_TOKENS} tokens and "
            f"N = {DENSE_STATE}; use an evaluator"
        )

    def state_like(x: Tensor) -> Tensor:  # [T, V, K]
        return x[batch, :, head].expand(length, numbers, channels).mT

    eye = torch.eye(channels, dtype=record.c.dtype, device=record.c.device)
    lam = torch.diag_embed(state_like(record.lam).flatten(1))
    if record.rank_one is not None:
        left, right = (x[batch, :, head] for x in record.rank_one)  # [T, K]
        erase = torch.einsum("tk,tl->tkl", left, right)
        lam = lam - torch.stack([torch.kron(eye, e) for e in erase]) @ lam
    b = torch.einsum("tvk,vw->tvkw", state_like(record.b), eye).flatten(1, 2)
    c = torch.einsum("tvk,vw->twvk", state_like(record.c), eye).flatten(2)
    d = torch.zeros_like(c[:, :, :1]).expand(-1, -1, channels)
    if record.d is not None:
        d = torch.diag_embed(record.d[batch, :, head].expand(length, channels))
    return Dense(lam, b, c, d)


# ---------------------------------------------------------------------------------------------------------------- inside


def _leading(x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 5:
        raise ValueError(f"log_lam: shape {tuple(x.shape)}, but [B, T, H, K or 1, V or 1] is wanted")
    batch, length, heads = x.shape[:3]
    return batch, length, heads


def _check_inputs(record: Recurrence, u: Tensor, diagonal_for: str | None = None) -> None:
    """u fits the record, and the record the evaluator."""
    if diagonal_for is not None:
        _require_diagonal(record, diagonal_for)
    leading, channels = tuple(record.c.shape[:3]), record.size[1]
    if u.ndim != 4 or tuple(u.shape[:3]) != leading or (channels > 1 and u.shape[3] != channels):
        wanted = (*leading, channels if channels > 1 else "V")
        raise ValueError(f"u: shape {tuple(u.shape)}, but [B, T, H, V] = {wanted} of the record is wanted")
    checks.numbers(c=record.c, u=u)


def _require_diagonal(record: Recurrence, name: str) -> None:
    if record.rank_one is not None:
        raise ValueError(
            f"record: its transition is diagonal minus rank one (a delta rule), and {name} multiplies diagonal ones only; "
            "use recurrent, or the chunked form of attnlab.mixers.delta_rule"
        )


def _channels(x: Tensor, record: Recurrence) -> Tensor:
    """[B, T, H, K|1, 1] to [B, H, T, K]."""
    return x.expand(-1, -1, -1, record.size[0], -1)[..., 0].transpose(1, 2)


def _apply(phi: Tensor, u: Tensor) -> Tensor:
    """Phi [B, H, V|1, T, T] times u [B, T, H, V]."""
    if phi.shape[2] == 1:
        return (phi[:, :, 0] @ u.transpose(1, 2)).transpose(1, 2)
    return torch.einsum("bhvij,bjhv->bihv", phi, u)


def _skip(record: Recurrence, u: Tensor, y: Tensor) -> Tensor:
    return y if record.d is None else y + record.d * u
