"""The template of token mixers, ``Y = M(X) phi(X)``: what it consists of, and the class of all that follow it.

Taught in the chapter ``foundations/unified-long-sequence``, whose mixers stand in :mod:`attnlab.foundations.unified_long_sequence`;
those of :mod:`attnlab.mixers` follow it in :mod:`attnlab.foundations.unified_long_sequence_workspace`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Mixing(NamedTuple):
    """The two factors of a mixer's output: ``matrix`` [B, T, S] between places and ``values`` [B, S, D].

    S = T, and ``values`` are a map of each token alone; only the token MLP has hidden units there, S = 2 T of them, which read all
    tokens. A mixer with a matrix for each channel has ``matrix`` [B, D, T, S].
    """

    matrix: Tensor
    values: Tensor

    def output(self) -> Tensor:
        """``M phi(X)`` [B, T, D]; of complex factors the real part."""
        if self.matrix.ndim == 4:
            return torch.einsum("bdts,bsd->btd", self.matrix, self.values)
        y = self.matrix @ self.values
        return y.real if y.is_complex() else y


class Mixer(nn.Module):
    """A token mixer that knows its matrix.

    Args:
        width: D.
        length: T, for mixers that learn a weight for each place.

    Attributes:
        asks: whether the matrix depends on the data.
        causal: whether a token sees only itself and those before it.
        cost: numbers multiplied for T tokens of width D, to leading order.
        state: numbers kept to add one more token; a dash where the whole sequence is computed again.

    Raises:
        ValueError: a width or length below 1.
    """

    asks: bool = False
    causal: bool = True
    cost: str = ""
    state: str = ""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        for name, size in (("width", width), ("length", length)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.width, self.length = width, length

    def mix(self, x: Tensor) -> Mixing:
        """The template for x [B, T, D], with the matrix written out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The same output [B, T, D] without the matrix where there is a faster way."""
        return self.mix(x).output()
