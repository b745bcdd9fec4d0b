"""Which tokens a rank holds. With a causal mask this decides who works and who waits.

Taught in the chapter ``foundations/unified-long-sequence``. Zigzag is the layout of Llama 3's context parallelism
(arXiv:2407.21783), striped that of Brandon et al. 2023 (arXiv:2311.09431).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def positions(length: int, ranks: int, layout: Layout = "contiguous") -> Tensor:
    """Positions ``[ranks, length / ranks]`` of the tokens of every rank, ascending in each row.

    ``contiguous``: rank r holds piece r of ``ranks``. ``zigzag``: pieces r and 2 ranks - 1 - r of 2 ranks, an early and a late
    one, so that all have equally much to attend to. ``striped``: tokens r, r + ranks, r + 2 ranks, ...

    Raises:
        ValueError: an unknown layout, or a length that the pieces do not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    pieces = 2 * ranks if layout == "zigzag" else ranks
    if length < 1 or length % pieces:
        raise ValueError(
            f"length={length} is not a positive multiple of {pieces}, the pieces of {layout!r} on {ranks} ranks; "
            f"pad the sequence to {-(-max(length, 1) // pieces) * pieces}"
        )
    token = torch.arange(length)
    if layout == "contiguous":
        return token.view(ranks, -1)
    if layout == "striped":
        return token.view(-1, ranks).T.contiguous()
    piece = token.view(pieces, -1)
    return torch.cat([piece[:ranks], piece[ranks:].flip(0)], 1)


def shard(x: Tensor, ranks: int, layout: Layout = "contiguous", axis: int = 1) -> list[Tensor]:
    """What each rank holds of ``x``, whose tokens lie along ``axis``."""
    return [x.index_select(axis, row.to(x.device)) for row in positions(x.shape[axis], ranks, layout)]


def unshard(parts: Sequence[Tensor], layout: Layout = "contiguous", axis: int = 1) -> Tensor:
    """Put the parts of all ranks back into the order of the sequence: the inverse of :func:`shard`."""
    whole = torch.cat(list(parts), axis)
    order = positions(whole.shape[axis], len(parts), layout).flatten()
    return whole.index_select(axis, order.argsort().to(whole.device))


def causal_pairs(length: int, ranks: int, layout: Layout = "contiguous") -> Tensor:
    """Query-key pairs that each rank computes under a causal mask, ``[ranks]``: token t attends to t + 1 tokens."""
    return (positions(length, ranks, layout) + 1).sum(1)
