"""Exact attention of a sequence whose tokens lie on several ranks, in three ways that differ in what travels.

Ring: queries stay, keys and values pass by (Li et al. 2021, arXiv:2105.13120; Liu et al. 2023, arXiv:2310.01889). Ulysses: an
all-to-all turns shards of tokens into shards of heads and back (arXiv:2309.14509). Gathered: every rank gets all keys and values
(as in Llama 3, arXiv:2407.21783). All return what one process computes, up to rounding, and so do their gradients.
Taught in the chapter ``foundations/unified-long-sequence``; the bytes are counted by :func:`attnlab.scale.traffic.bytes_sent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.mixers import checks
from attnlab.mixers.softmax_merge import Summary, empty, read
from attnlab.scale.blocks import Settings, accumulator, attend, gradients
from attnlab.scale.layouts import LAYOUTS, Layout, positions
from attnlab.scale.traffic import METHODS, Method
from attnlab.scale.wire import Wire

BLOCK = 512


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wire: Wire,
    *,
    causal: bool = False,
    layout: Layout = "zigzag",
    scale: float | None = None,
    block_size: int = BLOCK,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks; keys and values travel around the ring meanwhile.

    Args:
        q: this rank's queries [B, n, H, K]; all ranks hold equally many tokens.
        k, v: its keys [B, n, G, K] and values [B, n, G, V]; G divides H.
        wire: to the other ranks.
        causal: token t sees tokens up to t of the whole sequence.
        layout: which tokens of the sequence these are; see :func:`attnlab.scale.layouts.positions`.
        scale: of the scores, by default ``K ** -0.5``.
        block_size: keys taken at once.

    Returns:
        [B, n, H, V], in the dtype of ``v``.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or (the message names the rank) ranks that differ in sizes, dtype,
            method, layout, ``causal`` or ``scale``.
    """
    at, settings = _prepare(q, k, v, wire, "ring", causal, layout, scale, block_size)
    return Ring.apply(q, k, v, wire, at, settings)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wire: Wire,
    *,
    causal: bool = False,
    layout: Layout = "zigzag",
    scale: float | None = None,
    block_size: int = BLOCK,
) -> Tensor:
    """The same after all ranks have been sent all keys and values: one step, any mask, and memory for the whole sequence.

    Arguments, result and errors are those of :func:`ring_attention`.
    """
    at, settings = _prepare(q, k, v, wire, "gathered", causal, layout, scale, block_size)
    k, v = (_Gather.apply(x, wire) for x in (k, v))  # [ranks, B, n, G, D]
    whole = at.flatten().argsort()  # ascending positions, as blocks want them
    k, v = (x.transpose(0, 1).flatten(1, 2).index_select(1, whole) for x in (k, v))
    return Local.apply(q, k, v, at[wire.rank], torch.arange(k.shape[1], device=q.device), settings)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wire: Wire,
    *,
    causal: bool = False,
    layout: Layout = "contiguous",
    scale: float | None = None,
    block_size: int = BLOCK,
) -> Tensor:
    """The same by an exchange: each rank attends over the whole sequence with 1 / ranks of the heads.

    Arguments, result and errors are those of :func:`ring_attention`; the ranks must divide both H and G.
    """
    at, settings = _prepare(q, k, v, wire, "ulysses", causal, layout, scale, block_size)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] % wire.ranks:
            raise ValueError(
                f"{name}: {x.shape[2]} heads cannot be shared out to {wire.ranks} ranks; use ring_attention, "
                "or as many ranks as divide the heads of keys and queries"
            )
    order = at.flatten().argsort()
    q, k, v = (_by_heads(x, wire).index_select(1, order) for x in (q, k, v))  # [B, T, H / ranks, D]
    everywhere = torch.arange(q.shape[1], device=q.device)
    o = Local.apply(q, k, v, everywhere, everywhere, settings)
    return _by_tokens(o.index_select(1, order.argsort()), wire)


# ---------------------------------------------------------------------------------------------------------------- the ring


class Ring(torch.autograd.Function):
    """Forward: keys and values go round. Backward: once more, with their gradients, which come home."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, wire: Wire, at: Tensor, settings: Settings) -> Tensor:
        ctx.wire, ctx.settings = wire, settings
        total = _nothing(q, v)
        key, value = k, v
        for step in range(wire.ranks):
            passing = wire.shift(key, value) if step < wire.ranks - 1 else None  # on their way while we compute
            attend(total, q, key, value, at[wire.rank], at[(wire.rank - step) % wire.ranks], settings)
            if passing:
                key, value = passing()
        o = read(total)
        ctx.save_for_backward(q, k, v, o, _log_sum(total), at)
        return o.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        do, wire = grads[0], ctx.wire
        q, k, v, o, lse, at = ctx.saved_tensors
        delta = (do * o).sum(-1)  # [B, n, H]
        dq, dk, dv = (torch.zeros_like(x, dtype=o.dtype) for x in (q, k, v))
        key, value = k, v
        for step in range(wire.ranks):
            passing = wire.shift(key, value) if step < wire.ranks - 1 else None
            source = at[(wire.rank - step) % wire.ranks]
            gradients(dq, dk, dv, q, key, value, do, lse, delta, at[wire.rank], source, ctx.settings)
            dk, dv = wire.shift(dk, dv)()  # they follow their keys and values; the last step brings them home
            if passing:
                key, value = passing()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


# ------------------------------------------------------------------------------------------------------- one rank, all keys


class Local(torch.autograd.Function):
    """Attention over keys that are all here, block by block, with the same backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, settings: Settings) -> Tensor:
        total = _nothing(q, v)
        attend(total, q, k, v, q_at, k_at, settings)
        o = read(total)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, o, _log_sum(total), q_at, k_at)
        return o.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, o, lse, q_at, k_at = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=o.dtype) for x in (q, k, v))
        gradients(dq, dk, dv, q, k, v, grads[0], lse, (grads[0] * o).sum(-1), q_at, k_at, ctx.settings)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


# ------------------------------------------------------------------------------------------------------- operations on a wire


class _Gather(torch.autograd.Function):
    """[...] to [ranks, ...]; backward every rank gets the sum of what all ranks found for its piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.wire.swap(grads[0]).sum(0), None


class _Swap(torch.autograd.Function):
    """[ranks, ...] to [ranks, ...]; its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.swap(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.wire.swap(grads[0]), None


def _by_heads(x: Tensor, wire: Wire) -> Tensor:
    """Some tokens with all heads [B, n, H, D] to all tokens, rank after rank, with some heads [B, ranks n, H / ranks, D]."""
    pieces = x.unflatten(2, (wire.ranks, -1)).movedim(2, 0)  # [ranks, B, n, H / ranks, D]
    return _Swap.apply(pieces, wire).transpose(0, 1).flatten(1, 2)


def _by_tokens(x: Tensor, wire: Wire) -> Tensor:
    """The way back: [B, ranks n, H / ranks, D] to [B, n, H, D]."""
    pieces = x.unflatten(1, (wire.ranks, -1)).movedim(1, 0)  # [ranks, B, n, H / ranks, D]
    return _Swap.apply(pieces, wire).movedim(0, 2).flatten(2, 3)


# ------------------------------------------------------------------------------------------------------------------ details


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wire: Wire,
    method: Method,
    causal: bool,
    layout: Layout,
    scale: float | None,
    block_size: int,
) -> tuple[Tensor, Settings]:
    """Check the shards, here and between ranks; the positions [ranks, n] of all ranks' tokens, and how to attend."""
    checks.rank("q", q, "[B, T, H, K]")
    checks.rank("k", k, "[B, T, G, K]")
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    checks.shape("k", k, (batch, length, groups, width), "[B, T, G, K] with B, T, K of q")
    checks.rank("v", v, "[B, T, G, V]")
    checks.shape("v", v, (batch, length, groups, v.shape[3]), "[B, T, G, V] with B, T, G of k")
    if heads % groups:
        raise ValueError(f"k: {groups} heads do not divide the {heads} heads of q")
    for name, x in (("k", k), ("v", v)):
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    settings = _settings(q, causal, scale, block_size, layout)
    wire.agree(
        {
            **dict(zip("BTHGKV", (batch, length, heads, groups, width, v.shape[3]), strict=True)),
            "bytes a number": q.element_size(),
            "bfloat16": q.dtype == torch.bfloat16,
            f"method (of {', '.join(METHODS)}, from 0)": METHODS.index(method),
            f"layout (of {', '.join(LAYOUTS)}, from 0)": LAYOUTS.index(layout) if layout in LAYOUTS else -1,
            "causal": causal,
            "scale": settings.scale,
        },
        q.device,
    )
    return positions(length * wire.ranks, wire.ranks, layout).to(q.device), settings


def _settings(q: Tensor, causal: bool, scale: float | None, block_size: int, layout: Layout) -> Settings:
    checks.at_least("block_size", block_size)
    # A zigzag rank holds an early and a late piece. A block that spans both would make early queries look at late keys.
    piece = q.shape[1] // (2 if layout == "zigzag" else 1)
    blocks = max(1, -(-piece // block_size))
    return Settings(q.shape[-1] ** -0.5 if scale is None else scale, causal, -(-piece // blocks))


def _nothing(q: Tensor, v: Tensor) -> Summary:
    """The summary of no keys for every query, in memory of its own."""
    return Summary(*(x.clone() for x in empty(q.shape[:3], v.shape[-1], dtype=accumulator(q), device=q.device)))


def _log_sum(total: Summary) -> Tensor:
    """Logarithm of the softmax denominator [B, T, H]."""
    return total.m + total.u.log()
