"""Attention of some queries over some keys, forward and backward, when both know their place in the sequence.

Positions are ascending on both sides, so the queries that may see a block of keys at all are the last ones: only they are
computed. Sums are taken in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.mixers.softmax_merge import Summary, merge, summarise


class Settings(NamedTuple):
    """Factor of the scores, whether later keys are hidden, keys that are taken at once."""

    scale: float
    causal: bool
    block_size: int


class Block(NamedTuple):
    """Keys ``keys`` that queries from ``first`` on may see, with a mask [queries, keys] where not all of them see all."""

    first: int
    keys: slice
    mask: Tensor | None


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which sums over keys are taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible(q_at: Tensor, k_at: Tensor, settings: Settings) -> Iterator[Block]:
    """The blocks of keys at positions ``k_at`` [S] that queries at ``q_at`` [T] may see; those that no query sees are left out."""
    for start in range(0, len(k_at), settings.block_size):
        keys = slice(start, min(start + settings.block_size, len(k_at)))
        if not settings.causal:
            yield Block(0, keys, None)
            continue
        at = k_at[keys]
        first = int(torch.searchsorted(q_at, at[0]))  # earlier queries precede every key of the block
        if first < len(q_at):
            everything = bool(q_at[first] >= at[-1])
            yield Block(first, keys, None if everything else q_at[first:, None] >= at)


def attend(total: Summary, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, settings: Settings) -> None:
    """Merge attention over ``k`` [B, S, G, K] and ``v`` [B, S, G, V] into ``total`` of the queries [B, T, H, K], in place.

    Each of the G key heads serves H / G query heads in a row.
    """
    for first, keys, mask in visible(q_at, k_at, settings):
        key, value = (_for_queries(x[:, keys], q) for x in (k, v))
        piece = summarise(q[:, first:].to(key.dtype), key, value, scale=settings.scale, mask=mask)
        for old, new in zip(total.span(first), merge(total.span(first), piece), strict=True):
            old.copy_(new)


def gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    q_at: Tensor,
    k_at: Tensor,
    settings: Settings,
) -> None:
    """Add what this block contributes to ``dq`` [B, T, H, K], ``dk`` [B, S, G, K] and ``dv`` [B, S, G, V], in place.

    ``lse`` [B, T, H] is the logarithm of the softmax denominator over *all* keys and ``delta`` [B, T, H] the product of output
    and output gradient, so that with P = e^(S - lse) the gradient of the scores is P (dO V^T - delta): every block can be
    differentiated alone, in any order (Dao et al. 2022, arXiv:2205.14135, section 3.1).
    """
    groups = k.shape[2]
    for first, keys, mask in visible(q_at, k_at, settings):
        key, value = (_for_queries(x[:, keys], q) for x in (k, v))
        query, gradient = q[:, first:].to(key.dtype), do[:, first:].to(key.dtype)
        scores = torch.einsum("bthk,bshk->bhts", query, key) * settings.scale
        p = (scores - lse[:, first:].mT[..., None]).exp()  # [B, H, T, S]
        if mask is not None:
            p = p.masked_fill(~mask, 0)
        ds = p * (torch.einsum("bthv,bshv->bhts", gradient, value) - delta[:, first:].mT[..., None]) * settings.scale
        dq[:, first:] += torch.einsum("bhts,bshk->bthk", ds, key)
        dk[:, keys] += _per_group(torch.einsum("bhts,bthk->bshk", ds, query), groups)
        dv[:, keys] += _per_group(torch.einsum("bhts,bthv->bshv", p, gradient), groups)


def _for_queries(x: Tensor, q: Tensor) -> Tensor:
    """[B, S, G, D] to [B, S, H, D], in the dtype of sums."""
    return x.to(accumulator(x)).repeat_interleave(q.shape[2] // x.shape[2], 2)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """[B, S, H, D] to [B, S, G, D]: the gradients of the query heads that share a key head add up."""
    return x.unflatten(2, (groups, -1)).sum(3)
