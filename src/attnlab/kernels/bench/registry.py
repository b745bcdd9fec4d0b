"""Operators x cases x shapes x implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attnlab.kernels.bench import peers, problems
from attnlab.kernels.bench.peers import Implementation
from attnlab.kernels.bench.problems import Costs, Draw, Problem, Shape

TOKENS = 65_536
LENGTHS = (1024, 4096, 16_384, 65_536)
MAIN = tuple(Shape(TOKENS // length, length, 16, 128, 128) for length in LENGTHS)  # here stand also those that compile
NARROW = tuple(Shape(TOKENS // length, length, heads, 64, 64) for heads in (8, 32) for length in LENGTHS)
MANY_ROWS = Shape(16, 32_768, 8, 64, 64)  # 128 rows of 32k tokens
TINY = (Shape(2, 96, 2, 16, 16), Shape(1, 70, 2, 12, 20))  # without a GPU


@dataclass(frozen=True)
class Case:
    """An operator with one kind of decay, and all who compute it; the first is ours."""

    operator: str
    name: str
    draw: Draw
    reference: Callable[[Problem], Tensor]
    costs: Costs
    implementations: tuple[Implementation, ...]
    more_shapes: tuple[Shape, ...] = ()
    narrow: bool = True  # whether heads of 64 channels are measured too

    def shapes(self, device: str, *, quick: bool) -> tuple[Shape, ...]:
        """``quick``: the main heads at both ends of T, and what the operator has of its own."""
        if device != "cuda":
            return TINY
        if quick:
            return (MAIN[0], MAIN[-1], *self.more_shapes)
        return (*MAIN, *(NARROW if self.narrow else ()), *self.more_shapes)

    def standing(self, shape: Shape, device: str, *, compiles: bool) -> list[Implementation]:
        """Who is measured at this shape, with or without those that compile."""
        return [
            x
            for x in self.implementations
            if x.compiles == compiles and device in x.devices and (x.shapes is None or shape in (*x.shapes, *TINY))
        ]


def _softmax() -> tuple[Implementation, ...]:
    return peers.sdpa("FLASH_ATTENTION"), peers.sdpa("CUDNN_ATTENTION"), peers.flex(MAIN[:3])


CASES = (
    Case(
        "linear_decay",
        "lightning decay",
        problems.lightning,
        problems.linear_reference,
        problems.linear_cost,
        (
            peers.linear_decay(),
            peers.parallel(MAIN[:2]),
            peers.fla("chunk_simple_gla", "g_gamma"),
            peers.fla("fused_chunk_simple_gla", "g_gamma"),
            peers.fla_lightning(),
            *_softmax(),
        ),
    ),
    Case(
        "scalar_gated",
        "gates",
        problems.gated,
        problems.linear_reference,
        problems.gated_cost,
        (
            peers.linear_decay(),
            peers.parallel(MAIN[:2]),
            peers.fla("chunk_simple_gla", "g"),
            peers.fla("fused_chunk_simple_gla", "g"),
        ),
    ),
    Case(
        "aaren_scan",
        "one query",
        problems.one_query,
        problems.aaren_reference,
        problems.aaren_cost,
        (
            peers.scan(),
            peers.sdpa("FLASH_ATTENTION", repeated=True),
            peers.sdpa("CUDNN_ATTENTION", repeated=True),
            peers.cumulated((*MAIN, MANY_ROWS)),
        ),
        (MANY_ROWS,),
    ),
    Case(
        "causal_flow",
        "clamp 1",
        problems.flows,
        problems.flow_reference,
        problems.flow_cost,
        (peers.flow(), peers.fla_normalised(), peers.chunked_flow(MAIN[:2])),
    ),
    Case(
        "linear_decay",
        "no decay",
        problems.undecayed,
        problems.linear_reference,
        problems.linear_cost,
        (
            peers.linear_decay(),
            peers.parallel(MAIN[:2]),
            peers.fla("chunk_simple_gla"),
            peers.fla("fused_chunk_simple_gla"),
        ),
        narrow=False,
    ),
)
OPERATORS = tuple(dict.fromkeys(case.operator for case in CASES))
