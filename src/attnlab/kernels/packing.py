"""Sequences of different lengths, one after the other in one row, and the pieces that they are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.kernels.dispatch import cdiv


class Packing(NamedTuple):
    """Sequences of one row, and the pieces that they are cut into.

    Attributes:
        table: [2 N + 2 + pieces], first tokens of the sequences and the end, first pieces and their number, and the sequence of
            every piece.
        sequences, pieces: how many.
    """

    table: Tensor
    sequences: int
    pieces: int

    @property
    def bounds(self) -> Tensor:
        """[N + 1], first tokens of the sequences and the end."""
        return self.table[: self.sequences + 1]


def packing(bounds: Sequence[int], piece: int, device: torch.device) -> Packing:
    """Sequences between `bounds`, in pieces of at most `piece` tokens; no piece has tokens of two."""
    pieces = [cdiv(last - first, piece) for first, last in pairwise(bounds)]
    firsts = [sum(pieces[:n]) for n in range(len(pieces) + 1)]
    owners = [n for n, count in enumerate(pieces) for _ in range(count)]
    table = torch.tensor([*bounds, *firsts, *owners], dtype=torch.int64, device=device)
    return Packing(table, len(pieces), len(owners))
