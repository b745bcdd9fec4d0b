"""What is computed: shapes, random tensors, the exact result of a sample, and what a pass must at least cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.mixers import aaren, causal_flow_attention, lightning_log_decay, recurrence

LAYER, LAYERS = 3, 24  # of the lightning decay schedule
CHUNK = 64  # of the operation counts


@dataclass(frozen=True)
class Shape:
    """Sequences, tokens a sequence, heads, key and value channels a head."""

    B: int
    T: int
    H: int
    K: int
    V: int

    @property
    def rows(self) -> int:
        """Tokens times heads."""
        return self.B * self.T * self.H

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in asdict(self).items())


@dataclass(frozen=True)
class Problem:
    """Tensors by name, which of them want a gradient, and the scale of the scores."""

    shape: Shape
    tensors: dict[str, Tensor]
    wanted: tuple[str, ...]
    scale: float

    def copies(self, *wanted: str) -> dict[str, Tensor]:
        """The tensors as leaves; those in `wanted`, by default the problem's own, want a gradient."""
        return {name: x.detach().requires_grad_(name in (wanted or self.wanted)) for name, x in self.tensors.items()}

    def sample(self, x: Tensor) -> Tensor:
        """First sequence, first and last head: of fixed decays the longest memory and the shortest."""
        heads = [0, self.shape.H - 1]
        return x[:1, :, heads] if x.dim() > 2 else x[heads]

    def exact(self) -> Problem:
        """The sample in float64, of the same numbers."""
        tensors = {name: self.sample(x.detach()).double() for name, x in self.tensors.items()}
        return Problem(self.shape, tensors, self.wanted, self.scale)


Draw = Callable[[Shape, torch.Generator, torch.dtype], Problem]


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def _qkv(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    tokens = (shape.B, shape.T, shape.H)
    return {name: _normal(generator, dtype, *tokens, n) for name, n in (("q", shape.K), ("k", shape.K), ("v", shape.V))}


def lightning(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Problem:
    """A fixed decay a head, from exp(0) to about exp(-7) a token, in the schedule of flash-linear-attention."""
    x = _qkv(shape, generator, dtype)
    x["log_decay"] = lightning_log_decay(shape.H, LAYER, LAYERS, schedule="fla").to(generator.device)
    return Problem(shape, x, ("q", "k", "v"), shape.K**-0.5)


def undecayed(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Problem:
    """A decay of 1 for every head."""
    x = _qkv(shape, generator, dtype)
    x["log_decay"] = torch.zeros(shape.H, device=generator.device)
    return Problem(shape, x, ("q", "k", "v"), shape.K**-0.5)


def gated(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Problem:
    """A gate a token that learns; they remember some twenty tokens."""
    x = _qkv(shape, generator, dtype)
    x["log_decay"] = F.logsigmoid(_normal(generator, torch.float32, shape.B, shape.T, shape.H)) / 16
    return Problem(shape, x, ("q", "k", "v", "log_decay"), shape.K**-0.5)


def one_query(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Problem:
    """Scores s of one query a head; the query [H, K] and the keys are there for peers that form the scores themselves."""
    x = _qkv(shape, generator, dtype) | {"q": _normal(generator, dtype, shape.H, shape.K)}
    x["s"] = torch.einsum("hk,bthk->bth", x["q"].float(), x["k"].float()) * shape.K**-0.5
    return Problem(shape, x, ("s", "v"), shape.K**-0.5)


def flows(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Problem:
    return Problem(shape, _qkv(shape, generator, dtype), ("q", "k", "v"), 1.0)


def linear_reference(problem: Problem) -> Tensor:
    x = problem.tensors
    size = 64 if problem.shape.T <= 4096 else 256  # fewer steps in Python
    return recurrence.chunked(x["q"], x["k"], x["v"], x["log_decay"], scale=problem.scale, chunk_size=size)[0]


def aaren_reference(problem: Problem) -> Tensor:
    return aaren(problem.tensors["s"], problem.tensors["v"], chunk_size=256)[0]


def flow_reference(problem: Problem) -> Tensor:
    x = problem.tensors
    return causal_flow_attention(x["q"], x["k"], x["v"], chunk_size=256)[0]


class Cost(NamedTuple):
    """Bytes that must move and operations in chunks of 64, for one token of one head."""

    bytes: float
    flops: float


Costs = Callable[[Shape, int], tuple[Cost, Cost]]  # forward and backward, for so many bytes a number


def linear_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    """q, k, v in and o out; backward q, k, v, do in and three gradients out. Two products of a chunk and two with a state
    forward, five and five backward."""
    k, v = shape.K, shape.V
    forward = Cost(size * 2 * (k + v), 2 * CHUNK * (k + v) + 4 * k * v)
    return forward, Cost(size * (4 * k + 3 * v), 2 * CHUNK * (3 * k + 2 * v) + 10 * k * v)


def gated_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    """The same, and a float32 gate that is read, read again, and has a gradient."""
    forward, backward = linear_cost(shape, size)
    return forward._replace(bytes=forward.bytes + 4), backward._replace(bytes=backward.bytes + 8)


def aaren_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    """Float32 scores and values in, outputs out; one product of a chunk forward, two backward."""
    product = 2 * CHUNK * shape.V
    return Cost(4 + 2 * size * shape.V, product), Cost(8 + 3 * size * shape.V, 2 * product)


def flow_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    """Linear attention, and for the flows one more product of a chunk forward, three backward."""
    forward, backward = linear_cost(shape, size)
    product = 2 * CHUNK * shape.K
    return forward._replace(flops=forward.flops + product), backward._replace(flops=backward.flops + 3 * product)


def softmax_flops(shape: Shape) -> tuple[float, float]:
    """Of causal softmax attention, a token and head: two products over T / 2 keys forward, five backward."""
    return shape.T * (shape.K + shape.V), shape.T * (3 * shape.K + 2 * shape.V)
