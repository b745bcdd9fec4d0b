"""Sequences of a row, one or several packed one after the other, and their cuts into parts that cross no bound.

Parts are numbered through all sequences without gaps. So the parts of a packed row are a packed row themselves, of one token a part,
and a scan over them is the same problem again.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.kernels.dispatch import cdiv


class Sequences(NamedTuple):
    """Where the sequences of a row begin and end.

    Attributes:
        bounds: 0 = first < ... < last = T, [N + 1] numbers: sizes of launches and tensors are read here without waiting for a GPU.
        packed: the same on the device of the tokens, int32, which kernels read; None where every row is one sequence.
    """

    bounds: list[int]
    packed: Tensor | None

    def count(self, batch: int) -> int:
        """How many sequences there are in so many rows."""
        return batch if self.packed is None else len(self.bounds) - 1

    def cut(self, size: int) -> tuple[Sequences, Tensor | None]:
        """Parts of `size` tokens, and fewer at the end of a sequence.

        Returns:
            The same sequences with a part for a token, and the sequence of every part [parts], int32; None unless packed.
        """
        if self.packed is None:
            return Sequences([0, cdiv(self.bounds[1], size)], None), None
        bounds = [0, *accumulate(cdiv(end - begin, size) for begin, end in pairwise(self.bounds))]
        counts = (self.packed.diff() + size - 1) // size
        packed = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        parts = torch.arange(bounds[-1], dtype=torch.int32, device=packed.device)
        return Sequences(bounds, packed), torch.searchsorted(packed[1:], parts, right=True, out_int32=True)

    @property
    def ends(self) -> tuple[Any, Any]:
        """The last tokens, as an index: of [B, T, ...] it leaves [N, ...], and [B, ...] unless packed."""
        return (slice(None), -1) if self.packed is None else (0, self.packed[1:] - 1)
