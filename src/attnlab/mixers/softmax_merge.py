"""Softmax attention as a sum that can be taken in pieces.

Softmax attention over a set of tokens with scores s_i and values v_i needs three numbers a piece, [m, u, w]:

    m = max_i s_i       u = sum_i e^{s_i - m}       w = sum_i e^{s_i - m} v_i       output w / u

Two pieces :func:`merge` into the summary of their union. The merge is associative and commutative with the empty piece
(-inf, 0, 0) as neutral element, so pieces may be tokens (an RNN, Aaren), prefixes (a scan), blocks of keys (FlashAttention)
or devices. m only sets the unit in which u and w are written: outputs do not depend on it and no gradient passes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.mixers import checks

ScanForm = Literal["recurrent", "scan", "chunked", "parallel"]


class Summary(NamedTuple):
    """Softmax attention over a set of tokens: unit ``m`` [...], denominator ``u`` [...], numerator ``w`` [..., V]."""

    m: Tensor
    u: Tensor
    w: Tensor

    def span(self, start: int, stop: int | None = None) -> Summary:
        """Entries ``start`` to ``stop`` of axis 1, which counts tokens or chunks."""
        return Summary(*(x[:, start:stop] for x in self))

    def at(self, index: int) -> Summary:
        """Entry ``index`` of axis 1, which is dropped."""
        return Summary(*(x[:, index] for x in self))


def empty(
    shape: Sequence[int], width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Summary:
    """The neutral element: the summary of no tokens, for values of ``width``."""
    zeros = torch.zeros(*shape, dtype=dtype, device=device)
    return Summary(torch.full_like(zeros, -torch.inf), zeros, zeros[..., None].expand(*shape, width))


def leaf(s: Tensor, v: Tensor) -> Summary:
    """The summary (s, 1, v) of single tokens with scores ``s`` [...] and values ``v`` [..., V]; score -inf gives the empty one."""
    m = s.detach()
    u = (s - _finite(m)).exp()  # 1, with the gradient of the score in it
    return Summary(m, u, u[..., None] * v)


def merge(a: Summary, b: Summary) -> Summary:
    """The summary of the union: both are rewritten in the larger unit, then added. Shapes broadcast."""
    m = torch.maximum(a.m, b.m)
    unit = _finite(m)  # two empty pieces: -inf - 0, never -inf - (-inf)
    of_a, of_b = (a.m - unit).exp(), (b.m - unit).exp()  # at most 1, and one of them is 1
    return Summary(m, of_a * a.u + of_b * b.u, of_a[..., None] * a.w + of_b[..., None] * b.w)


def read(summary: Summary) -> Tensor:
    """The output ``w / u`` [..., V]; 0 where there are no tokens."""
    return summary.w / torch.where(summary.u == 0, 1, summary.u)[..., None]


def aaren(
    s: Tensor,
    v: Tensor,
    *,
    form: ScanForm = "chunked",
    chunk_size: int = 64,
    initial: Summary | None = None,
) -> tuple[Tensor, Summary]:
    """Attention of one fixed query over every prefix: o_t averages v_1..v_t with weights softmax(s_1..s_t).

    Feng et al. 2024 (arXiv:2405.13956). The query is in the scores, ``s_t = q . k_t`` (with ``K ** -0.5`` if wanted).
    ``"recurrent"`` merges one token at a time; ``"scan"`` merges pieces of length 1, 2, 4, ... (Hillis and Steele, T log T
    merges); ``"chunked"`` takes prefixes inside chunks by a masked matrix product and merges along the chunks;
    ``"parallel"`` is one chunk of all tokens.

    Args:
        s: scores [B, T, H], float32 or float64; -inf leaves a token out.
        v: values [B, T, H, V].
        chunk_size: C of ``"chunked"``.
        initial: summary of the tokens before, with shapes [B, H] and [B, H, V]; none: nothing came before.

    Returns:
        Outputs [B, T, H, V] (0 where nothing was seen) and the summary of all tokens, to be passed on as ``initial``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no tokens, a score of NaN or +inf, an unknown form.
    """
    checks.rank("s", s, "[B, T, H]")
    checks.rank("v", v, "[B, T, H, V]")
    checks.shape("v", v, (*s.shape, v.shape[-1]), "[B, T, H, V] with B, T, H of s")
    checks.numbers(s=s, v=v)
    checks.one_of("form", form, ("recurrent", "scan", "chunked", "parallel"))
    checks.at_least("chunk_size", chunk_size)
    if not bool((s < torch.inf).all()):
        raise ValueError("s: holds NaN or +inf; scores must be finite, or -inf to leave a token out")
    batch, length, heads, width = v.shape
    if initial is None:
        initial = empty((batch, heads), width, dtype=v.dtype, device=v.device)
    for name, x, wanted in zip("muw", initial, [(batch, heads), (batch, heads), (batch, heads, width)], strict=True):
        checks.shape(f"initial.{name}", x, wanted, "[B, H, V]" if name == "w" else "[B, H]")
        checks.numbers(v=v, **{f"initial.{name}": x})

    if form == "recurrent":
        prefixes = _running(initial, (leaf(s[:, t], v[:, t]) for t in range(length)))
    elif form == "scan":
        prefixes = merge(_prepend_axis(initial), _scan(leaf(s, v)))
    else:
        prefixes = _chunks(s, v, min(chunk_size, length) if form == "chunked" else length, initial)
    return read(prefixes), prefixes.at(-1)


def summarise(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Summary:
    """Attention of every query over one block of keys, unfinished: a summary [B, T, H] with values [B, T, H, V].

    Args:
        q: [B, T, H, K].
        k, v: a block [B, S, H, K] and [B, S, H, V].
        scale: of the scores, by default ``K ** -0.5``.
        mask: what a query may see, bool [T, S]; none: everything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    checks.heads(q, k, v, same_length=False)
    scores = torch.einsum("bthk,bshk->bths", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
    m = scores.detach().amax(-1)  # [B, T, H]
    p = (scores - _finite(m)[..., None]).exp()
    return Summary(m, p.sum(-1), torch.einsum("bths,bshv->bthv", p, v))


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    block_size: int,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Exact softmax attention, one block of keys at a time: the [T, S] matrix never exists as a whole.

    The recurrence inside FlashAttention (Dao et al. 2022, arXiv:2205.14135), without its tiling of queries.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, H, K] and [B, S, H, V]; S = T if ``causal``.
        causal: token t sees tokens up to t.
        block_size: keys a block.
        window: token t sees the last ``window`` tokens only, itself included; needs ``causal``, at most T.
        scale: by default ``K ** -0.5``.

    Returns:
        [B, T, H, V].

    Raises:
        ValueError: sizes that do not fit, ``window`` without ``causal`` or longer than the sequence.
    """
    checks.heads(q, k, v, same_length=causal)
    checks.at_least("block_size", block_size)
    length = q.shape[1]
    if window is not None:
        checks.at_least("window", window)
        if not causal or window > length:
            raise ValueError(f"window={window} needs causal=True and at most T={length} tokens; None sees everything")
    position = torch.arange(max(length, k.shape[1]), device=q.device)
    total = empty(q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    blocks = (x.split(block_size, axis) for x, axis in ((position[: k.shape[1]], 0), (k, 1), (v, 1)))
    for at, key, value in zip(*blocks, strict=True):
        ago = position[:length, None] - at  # [T, block]
        mask = (ago >= 0) & (ago < (window or length)) if causal else None
        total = merge(total, summarise(q, key, value, scale=scale, mask=mask))
    return read(total)


def split_kv_attention(q: Tensor, k: Tensor, v: Tensor, splits: int, *, scale: float | None = None) -> Tensor:
    """Softmax attention with the keys cut into ``splits`` parts that know nothing of each other until one last merge.

    How one new token attends to a long cache on many processors, or on many devices. Shapes as in
    :func:`blockwise_attention`, not causal.

    Raises:
        ValueError: sizes that do not fit, or more splits than keys.
    """
    checks.heads(q, k, v, same_length=False)
    checks.at_least("splits", splits)
    if splits > k.shape[1]:
        raise ValueError(f"splits={splits} is more than the S={k.shape[1]} keys; use at most one split a key")
    parts = zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True)
    return read(reduce(merge, [summarise(q, key, value, scale=scale) for key, value in parts]))


def _finite(m: Tensor) -> Tensor:
    """``m``, with 0 for the -inf of an empty piece, so that it can be subtracted."""
    return m.masked_fill(m == -torch.inf, 0)


def _prepend_axis(summary: Summary) -> Summary:
    """[B, ...] to [B, 1, ...]."""
    return Summary(*(x[:, None] for x in summary))


def _running(state: Summary, pieces: Iterable[Summary]) -> Summary:
    """Merge pieces [B, ...] one after the other; all states on the way, [B, N, ...]."""
    states = []
    for piece in pieces:
        state = merge(state, piece)
        states.append(state)
    return Summary(*(torch.stack(x, 1) for x in zip(*states, strict=True)))


def _scan(prefixes: Summary) -> Summary:
    """Hillis and Steele: in each round every entry takes in the one ``reach`` before it, and doubles what it covers."""
    reach = 1
    while reach < prefixes.u.shape[1]:
        merged = merge(prefixes.span(0, -reach), prefixes.span(reach))
        prefixes = Summary(*(torch.cat(x, 1) for x in zip(prefixes.span(0, reach), merged, strict=True)))
        reach *= 2
    return prefixes


def _chunks(s: Tensor, v: Tensor, size: int, initial: Summary) -> Summary:
    """Prefix summaries: inside all chunks at once, then along the chunks. Padding with -inf adds empty tokens."""
    length = s.shape[1]
    missing = -length % size
    s = F.pad(s, (0, 0, 0, missing), value=-torch.inf).unflatten(1, (-1, size))  # [B, N, C, H]
    v = F.pad(v, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size))  # [B, N, C, H, V]
    inside = _prefixes(s, v)
    last = Summary(*(x[:, :, -1] for x in inside))  # [B, N, H]
    ends = _running(initial, (last.at(n) for n in range(s.shape[1])))
    starts = Summary(*(torch.cat([x[:, None], y[:, :-1]], 1)[:, :, None] for x, y in zip(initial, ends, strict=True)))
    prefixes = merge(starts, inside)  # [B, N, 1, H] with [B, N, C, H]
    return Summary(*(x.flatten(1, 2)[:, :length] for x in prefixes))


def _prefixes(s: Tensor, v: Tensor) -> Summary:
    """Summaries of all prefixes along axis -2 of ``s`` [..., C, H] and -3 of ``v`` [..., C, H, V], by one matrix product."""
    s = s.mT  # [..., H, C]
    # Each prefix in the unit of its own maximum: with one unit for all, early prefixes would underflow to 0 / 0.
    m = s.detach().cummax(-1).values
    gap = s[..., None, :] - _finite(m)[..., :, None]  # [..., H, C, C]: at most 0 where token i <= prefix t
    above = torch.ones(gap.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    p = gap.masked_fill(above, -torch.inf).exp()
    return Summary(m.mT, p.sum(-1).mT, (p @ v.transpose(-2, -3)).transpose(-2, -3))
