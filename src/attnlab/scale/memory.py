"""How long a sequence may be before memory runs out, and what each means of saving it contributes.

Taught in the chapter ``foundations/unified-long-sequence``. Bytes are counted, not sampled: every tensor that torch allocates
on the way, and when it is freed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from attnlab.mixers import blockwise_attention
from attnlab.scale.attention import ring_attention
from attnlab.scale.launch import threads
from attnlab.scale.wire import Wire

HEADS, WIDTH, BLOCK = 4, 64, 128


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside ``with``, on this thread: ``now`` and, at their most, ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()  # tensors that are counted
        self._users: dict[int, int] = {}  # tensors by the memory they lie in: views share it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x not in self._seen:
                self._add(x)
        return result

    def _add(self, x: Tensor) -> None:
        place, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if not self._users.get(place):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[place] = self._users.get(place, 0) + 1
        self._seen[x] = True
        weakref.finalize(x, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as the formula has it, with all scores [B, H, T, T] at once."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def peak_plain(length: int) -> int:
    """Bytes of one process that computes all scores at once."""
    return _peak(lambda: plain_attention(*_draw(length)))


def peak_blocks(length: int) -> int:
    """Bytes of one process that takes ``BLOCK`` keys at a time."""
    return _peak(lambda: blockwise_attention(*_draw(length), causal=False, block_size=BLOCK))


def peak_ring(length: int, ranks: int, block_size: int | None = None) -> int:
    """Bytes of the rank that needs most; without ``block_size`` all scores of two shards at once."""
    return max(threads(_ring_peak, ranks, length // ranks, block_size))


def longest(peak: Callable[[int], int], budget: int, lengths: tuple[int, int, int] = (512, 1024, 2048)) -> int:
    """The longest sequence within ``budget`` bytes, from three measured lengths.

    Peaks are sums of tensors, so they are a polynomial of the length of degree 2 at most: three lengths determine it.
    """
    c2, c1, c0 = np.polyfit(lengths, [peak(length) for length in lengths], 2)
    if c2 < 1e-6:  # rounding of what is linear
        return int((budget - c0) / c1)
    return int((-c1 + math.sqrt(c1**2 + 4 * c2 * (budget - c0))) / (2 * c2))


def _ring_peak(wire: Wire, tokens: int, block_size: int | None) -> int:
    size = block_size or tokens
    return _peak(lambda: ring_attention(*_draw(tokens), wire, layout="contiguous", block_size=size))


def _draw(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, tokens, HEADS, WIDTH) for _ in range(3))
    return q, k, v


def _peak(job: Callable[[], Tensor]) -> int:
    with torch.no_grad(), PeakBytes() as count:
        job()
    return count.peak
