"""One gated linear recurrence, in three forms that compute the same function.

Per head, with a state S [K, V] and one token's query q, key k [K] and value v [V]:

    decay   Sbar = diag(a) S           a in (0, 1], one number a head or one a key channel
    write   S' = Sbar + k (w v - e Sbar^T k)^T
    read    o = scale * S'^T q

Four switches make a family of it: the decay ``a`` (1: nothing fades), the write strength ``w``, the erase strength ``e``
(0: Hebbian, only add; ``e = w``: the delta rule, replace what the key held) and the scale. The error ``v - Sbar^T k`` is
measured on the decayed state, and a token reads its own write.

:func:`recurrent` is the definition. :func:`chunked` turns almost all of it into matrix products: O(T / C) steps.
:func:`parallel` is one chunk of all tokens. Decays travel as logs, and no form ever exponentiates a positive number: it
exponentiates sums of log decays between two tokens, which are at most 0, so nothing overflows however long the sequence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from attnlab.mixers import checks

Form = Literal["recurrent", "chunked", "parallel"]


class Switches(TypedDict, total=False):
    """What may be set besides the decay; every one may be left out.

    Keys:
        write: strength ``w`` of the write, [B, T, H]; none: 1.
        erase: strength ``e`` of the erasure, [B, T, H]; none: 0.
        scale: of the read; none: ``K ** -0.5``.
        initial_state: S before the first token, [B, H, K, V]; none: zeros.
    """

    write: Tensor | None
    erase: Tensor | None
    scale: float | None
    initial_state: Tensor | None


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, **switches: Unpack[Switches]
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written: one Python step a token. Slow, and what all other forms are held to.

    Args:
        q, k: queries and keys, [B, T, H, K], float32 or float64.
        v: values, [B, T, H, V].
        log_decay: log of ``a``, at most 0: [H] fixed, [B, T, H] a token, [B, T, H, K] a token and key channel; none: a = 1.
        switches: ``write``, ``erase``, ``scale``, ``initial_state``; see :class:`Switches`.

    Returns:
        Outputs [B, T, H, V] and the state after the last token, [B, H, K, V], ready for the next call.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no tokens, gates that are NaN or infinite, ``log_decay > 0``.
    """
    x = _prepare(q, k, v, log_decay, **switches)
    decay = x.log_decay.exp().expand(-1, q.shape[1], -1, -1)[..., None]  # [B|1, T, H, K|1, 1]
    state, outputs = x.state, []
    for t in range(q.shape[1]):
        state = decay[:, t] * state  # decay first: the error below is measured on what is left
        u = x.v[:, t]  # [B, H, V]
        if x.erase_k is not None:
            u = u - _read(x.erase_k[:, t], state)
        state = state + x.k[:, t, :, :, None] * u[:, :, None, :]  # [B, H, K, 1] * [B, H, 1, V]
        outputs.append(_read(x.q[:, t], state))
    return torch.stack(outputs, 1), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    chunk_size: int = 64,
    **switches: Unpack[Switches],
) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: matrix products inside, for all chunks at once, and a short loop over the T / C states between.

    2 T (C (K + V) + 2 K V) operations a head where nothing is erased: linear in T, and a good C is near K. Arguments, results
    and errors as in :func:`recurrent`. After Qin et al. 2024 (arXiv:2401.04658, algorithm 1) for the Hebbian case and Yang
    et al. 2024 (arXiv:2406.06484) for the delta rule.

    Args:
        chunk_size: C, at least 1; the last chunk may be shorter.
    """
    checks.at_least("chunk_size", chunk_size)
    x = _prepare(q, k, v, log_decay, **switches)
    length = q.shape[1]
    whole = length - length % chunk_size
    state, outputs = x.state, []
    # The tail is a shorter chunk of its own, not a padded one: padding would decay the state for tokens that never came.
    for start, stop, size in ((0, whole, chunk_size), (whole, length, length - whole)):
        if start < stop:
            output, state = _chunks(x.span(start, stop), size, state)
            outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, **switches: Unpack[Switches]
) -> tuple[Tensor, Tensor]:
    """All tokens as one chunk: the [T, T] matrix of an attention, ``((Q K^T) * decay) V``, here without softmax.

    Quadratic in T, and the least precise in float32 where much decays: weights are differences of cumulated log decays, and
    of a sum of 10^4 float32 keeps the third decimal. Arguments, results and errors as in :func:`recurrent`.
    """
    x = _prepare(q, k, v, log_decay, **switches)
    return _chunks(x, q.shape[1], x.state)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    form: Form = "chunked",
    chunk_size: int = 64,
    **switches: Unpack[Switches],
) -> tuple[Tensor, Tensor]:
    """The recurrence in the ``form`` asked for; ``chunk_size`` is for ``"chunked"`` alone. See :func:`recurrent`.

    Raises:
        ValueError: an unknown form, and what the forms raise.
    """
    checks.one_of("form", form, ("recurrent", "chunked", "parallel"))
    if form == "chunked":
        return chunked(q, k, v, log_decay, chunk_size=chunk_size, **switches)
    run = recurrent if form == "recurrent" else parallel
    return run(q, k, v, log_decay, **switches)


def decayed_scores(q: Tensor, k: Tensor, cumulated: Tensor) -> Tensor:
    """Scores of one chunk with the decay between the two tokens: lower triangular, [..., C, C].

    ``A[i, j] = sum_c q[i, c] k[j, c] exp(cumulated[i, c] - cumulated[j, c])`` for i >= j, else 0.

    Args:
        q, k: [..., C, K].
        cumulated: cumulated log decays [..., C, 1], where all channels share one, or [..., C, K].
    """
    if cumulated.shape[-1] == 1:
        gap = cumulated - cumulated.mT  # [..., C, C], positive only above the diagonal
        above = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
        return (q @ k.mT) * gap.masked_fill(above, -torch.inf).exp()
    return _channel_scores(q, k, cumulated)


def _channel_scores(q: Tensor, k: Tensor, cumulated: Tensor) -> Tensor:
    """:func:`decayed_scores` where every channel has a decay of its own, in O(C K log C + C^2) memory.

    Now the decay does not factor out of the sum over channels. It does split at any token m in between,
    ``exp(c_i - c_j) = exp(c_i - c_m) exp(c_m - c_j)``, and both factors are at most 1 if j <= m <= i. So the quarter in
    which i lies in the second half of the chunk and j in the first is one matrix product, anchored at the last token of
    the first half; the two triangles that remain are the same problem at half the size, solved together.
    """
    length = q.shape[-2]
    if length == 1:
        return (q * k).sum(-1, keepdim=True)
    if length % 2:  # one more token that nobody sees: its row and column are cut off again
        q, k, cumulated = (torch.cat([x, x[..., -1:, :]], -2) for x in (q, k, cumulated))
        return _channel_scores(q, k, cumulated)[..., :-1, :-1]
    q, k, cumulated = (x.unflatten(-2, (2, length // 2)) for x in (q, k, cumulated))  # [..., 2, C/2, K]
    diagonal = _channel_scores(q, k, cumulated)  # [..., 2, C/2, C/2]
    first, second = cumulated.unbind(-3)  # [..., C/2, K]
    anchor = first[..., -1:, :]
    corner = (q[..., 1, :, :] * (second - anchor).exp()) @ (k[..., 0, :, :] * (anchor - first).exp()).mT
    upper = torch.cat([diagonal[..., 0, :, :], torch.zeros_like(corner)], -1)
    return torch.cat([upper, torch.cat([corner, diagonal[..., 1, :, :]], -1)], -2)


class _Inputs(NamedTuple):
    """Checked arguments with the switches folded in; ``log_decay`` [1, 1, H, 1] if it is the same for all tokens."""

    q: Tensor  # [B, T, H, K], scaled
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V], times the write strength
    erase_k: Tensor | None  # [B, T, H, K], the key times the erase strength
    log_decay: Tensor  # [B|1, T|1, H, K|1]
    state: Tensor  # [B, H, K, V]

    def span(self, start: int, stop: int) -> _Inputs:
        """Tokens from ``start`` to ``stop``."""
        erase_k = None if self.erase_k is None else self.erase_k[:, start:stop]
        steady = self.log_decay.shape[1] == 1
        log_decay = self.log_decay if steady else self.log_decay[:, start:stop]
        q, k, v = (x[:, start:stop] for x in (self.q, self.k, self.v))
        return _Inputs(q, k, v, erase_k, log_decay, self.state)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    write: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> _Inputs:
    """Check the arguments, then bring every switch to the shape that broadcasts."""
    checks.heads(q, k, v)
    checks.numbers(q=q, log_decay=log_decay, write=write, erase=erase, initial_state=initial_state)
    batch, length, n_heads, width = q.shape
    for name, gate in (("write", write), ("erase", erase)):
        if gate is not None:
            checks.shape(name, gate, (batch, length, n_heads), "[B, T, H]")
            checks.finite(name, gate)
    if log_decay is None:
        log_decay = q.new_zeros(n_heads)
    checks.log_decay(log_decay, (batch, length, n_heads, width))
    if initial_state is None:
        initial_state = q.new_zeros(batch, n_heads, width, v.shape[-1])
    checks.shape("initial_state", initial_state, (batch, n_heads, width, v.shape[-1]), "[B, H, K, V]")
    return _Inputs(
        q=q * (width**-0.5 if scale is None else scale),
        k=k,
        v=v if write is None else write[..., None] * v,
        erase_k=None if erase is None else erase[..., None] * k,
        log_decay=_broadcastable(log_decay),
        state=initial_state,
    )


def _broadcastable(log_decay: Tensor) -> Tensor:
    """[H] to [1, 1, H, 1], [B, T, H] to [B, T, H, 1]; a decay a channel stays [B, T, H, K]."""
    if log_decay.ndim == 1:
        return log_decay[None, None, :, None]
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay


def _chunks(x: _Inputs, size: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of ``x`` in chunks of ``size``, which divides their number.

    Let c_i be the log decay cumulated from the chunk's start to token i, S the state at its start, and u_i what token i
    adds to the row of its key. Unrolling the recurrence inside one chunk gives

        o_i = (q_i e^{c_i}) S + sum_{j <= i} A_ij u_j           A = decayed_scores(q, k, c)
        S'  = e^{c_C} S + sum_j (k_j e^{c_C - c_j})^T u_j
        u_i = w_i v_i                                           if nothing is erased
        u_i = w_i v_i - (e_i k_i e^{c_i}) S - sum_{j < i} L_ij u_j       L = decayed_scores(e k, k, c)

    The last line is a unit lower triangular system. Its right side is affine in S, so it is solved once for all chunks
    (the WY form): u = U - P S with U, P = (1 + L)^{-1} (w v, e k e^c).
    """
    q, k, u = (_fold(y, size) for y in (x.q, x.k, x.v))  # [B, N, H, C, K or V]
    cumulated = _fold(x.log_decay, size).cumsum(-2)  # [B|1, N|1, H, C, K|1]
    total = cumulated[..., -1:, :]
    keys = (k * (total - cumulated).exp()).mT  # [B, N, H, K, C]
    if x.erase_k is None:
        starts, state = _states(total.exp().mT, keys @ u, None, state)
    else:
        erase_k = _fold(x.erase_k, size)
        right = torch.cat([u, erase_k * cumulated.exp()], -1)  # [B, N, H, C, V + K]
        below = decayed_scores(erase_k, k, cumulated)  # the solver takes its diagonal for 1 and reads below it only
        solved = torch.linalg.solve_triangular(below, right, upper=False, unitriangular=True)
        u, probes = solved.split([u.shape[-1], k.shape[-1]], -1)
        starts, state = _states(total.exp().mT, keys @ u, keys @ probes, state)
        u = u - probes @ starts
    output = (q * cumulated.exp()) @ starts + decayed_scores(q, k, cumulated) @ u  # [B, N, H, C, V]
    return output.transpose(2, 3).flatten(1, 2), state


def _states(keep: Tensor, gain: Tensor, erased: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk, [B, N, H, K, V], and after the last: S' = keep * S + gain - erased S.

    Args:
        keep: [B|1, N|1, H, K|1, 1].
        gain: [B, N, H, K, V].
        erased: [B, N, H, K, K] or none.
        state: [B, H, K, V].
    """
    keep = keep.expand(-1, gain.shape[1], -1, -1, -1)
    starts = []
    for n in range(gain.shape[1]):
        starts.append(state)
        change = gain[:, n] if erased is None else gain[:, n] - erased[:, n] @ state
        state = keep[:, n] * state + change
    return torch.stack(starts, 1), state


def _fold(x: Tensor, size: int) -> Tensor:
    """[B, T, H, D] to [B, N, H, C, D]; what is the same for all tokens (T = 1) becomes one chunk that all share."""
    if x.shape[1] == 1:
        x = x.expand(-1, size, -1, -1)
    return x.unflatten(1, (-1, size)).transpose(2, 3).contiguous()  # one copy here, or one in every product


def _read(q: Tensor, state: Tensor) -> Tensor:
    """S^T q: [B, H, K] and [B, H, K, V] to [B, H, V]."""
    return torch.einsum("bhk,bhkv->bhv", q, state)
