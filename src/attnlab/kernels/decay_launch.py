"""Launches of the sweeps of `attnlab.kernels.decay_sweep`: sizes, pieces and packed sequences.

Forward is one launch. So is backward where all gradients go together: K = V, a constant decay, no states from or to elsewhere.
Else dq goes ahead; and dv and dk go apart where K and V differ or a decay learns, which is a launch more
(`attnlab.kernels.decay_gradient`). Sequences that are cut into pieces cost a first pass in each direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.kernels.decay_gradient import Boundaries, boundaries
from attnlab.kernels.decay_sweep import _piece_updates, _single, _together
from attnlab.kernels.dispatch import cdiv, dot_precision, multiprocessors, padded
from attnlab.kernels.packed import Sequences


class Tiles(NamedTuple):
    """Sizes of one launch: chunk length, width of a slice of v, warps, pipeline stages, pieces a row is cut into, parts of a piece."""

    chunk: int
    slice: int
    warps: int
    stages: int
    pieces: int = 1
    parts: int = 1

    def part(self, length: int) -> int:
        """Tokens a part of rows of this length: whole chunks, so that only the last part of a sequence is ragged."""
        return cdiv(length, self.pieces * self.parts * self.chunk) * self.chunk

    def piece(self, length: int) -> int:
        """Tokens a piece of rows of this length."""
        return self.parts * self.part(length)


def tiles_for(q: Tensor, v: Tensor, *, forgets: bool = False) -> Tiles:
    """Sizes that were fastest on an H200 (`python -m attnlab.kernels.bench` measures them).

    Args:
        forgets: whether heads have a decay each, so that most of them read one part of those before their piece.
    """
    batch, length, heads, width = q.shape
    widest = max(width, v.shape[-1])  # the backward sweeps exchange the two
    if q.dtype == torch.float32:
        chunk, slices, warps, stages = 32, 32, 4, 1
    elif widest > 128:
        chunk, slices, warps, stages = 64, 32, 4, 2
    else:
        chunk, slices, warps, stages = 64, 64, 4, 3 if widest <= 64 else 2
    whole = Tiles(chunk, min(slices, padded(v.shape[-1])), warps, stages)
    programs = batch * heads * cdiv(v.shape[-1], whole.slice)
    waves = 2 * multiprocessors(q.device)  # programs that run at once: two a multiprocessor
    if programs >= 1.5 * waves:
        return whole
    # Too few to fill the GPU: cut into two full waves, or into one where pieces would fall below 1024 tokens.
    wanted = max(min(2 * waves // programs, length // 1024), min(waves // programs, length // 128), 1)
    # The first pass waits for its longest chain of steps, a part; who comes behind has to read all parts that it remembers.
    cut = whole._replace(pieces=wanted, parts=max(length // wanted // 2048, 1) if forgets else 1)
    return cut._replace(pieces=cdiv(length, cut.piece(length)))


class Updates(NamedTuple):
    """What every part of a piece alone adds to the state: [parts, H, K, V], and its total log decay [parts, H] with gates."""

    states: Tensor
    sums: Tensor | None

    @property
    def mT(self) -> Updates:
        """The same, for states written transposed."""
        return Updates(self.states.mT, self.sums)


NONE = (None, None)


class Sweeps:
    """All launches over one set of inputs share sizes, decay and scale.

    Args:
        log_decay: [H] or [B, T, H], float32.
        length, batch, heads: of q.
    """

    def __init__(self, q: Tensor, log_decay: Tensor, scale: float, tiles: Tiles, sequences: Sequences) -> None:
        self.batch, self.length, self.heads = q.shape[:3]
        self.device, self.log_decay, self.scale = q.device, log_decay, scale
        self.tiles, self.sequences = tiles, sequences
        self.piece, self.part = tiles.piece(self.length), tiles.part(self.length)
        pieces, owner = sequences.cut(self.piece)
        self.count = sequences.count(self.batch)
        self.pieces = self.batch * pieces.bounds[-1]  # of all sequences
        self.parts, self.part_owner = sequences.cut(self.part) if self.split else (sequences, None)
        self.places = (sequences.packed, pieces.packed, owner, self.parts.packed)
        self.sizes = (self.length, self.heads, pieces.bounds[-1], self.piece, self.part)
        self.dot = dot_precision(q)
        self.half = q.dtype != torch.float32 and q.is_cuda  # the interpreter's bfloat16 is wrong
        self.gated = log_decay.dim() == 3
        self.key = (*self.sizes, self.gated, tiles)

    @property
    def constants(self) -> dict[str, Any]:
        """Of every launch."""
        gated, packed = self.gated, self.sequences.packed is not None
        return {"C": self.tiles.chunk, "GATED": gated, "VARLEN": packed, "DOT": self.dot, "num_warps": self.tiles.warps}

    @property
    def split(self) -> bool:
        """Whether some sequence has several pieces."""
        return self.pieces > self.count

    def updates(self, k: Tensor, v: Tensor, *, reverse: bool = False) -> Updates | None:
        """The first pass over sequences that are cut into pieces; None where they are not."""
        if not self.split:
            return None
        width, channels = k.shape[-1], v.shape[-1]
        parts = self.parts.bounds[-1]
        states = torch.empty(self.batch * parts, self.heads, width, channels, device=self.device)
        sums = torch.empty(states.shape[:2], device=self.device) if self.gated else None
        slices = min(self.tiles.slice, 32)  # a part is one chain of small steps, and more programs are there to wait
        steps = [x.stride() for x in (k, v)]
        _piece_updates.launch(
            (self.batch * parts * self.heads * cdiv(channels, slices),),
            (k, v, self.log_decay, states, sums, self.sequences.packed, self.parts.packed, self.part_owner),
            (*self.key, parts, width, channels, *steps, reverse),
            lambda: (
                (self.length, self.heads, parts, self.part, self.piece, *[step for x in steps for step in x[:3]]),
                {
                    "K": width, "V": channels, "BK": padded(width), "BV": slices, "REVERSE": reverse, "FAR": _far(k, v),
                    **self.constants, "num_stages": self.tiles.stages + 2,  # two blocks a chunk, not three: room for more
                },
            ),
        )  # fmt: skip
        return Updates(states, sums)

    def ahead(self, k: Tensor, v: Tensor) -> Callable[[], Updates | None]:
        """The first pass of the sweeps from the right, begun; call the result where it is needed.

        If it takes long it runs on a second stream: few programs are chains of steps, and the next sweep has room beside them.
        """
        if self.tiles.parts == 1 or not self.split or self.device.type == "cpu":
            return functools.partial(self.updates, k, v, reverse=True)
        here, side = torch.cuda.current_stream(self.device), _second_stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            updates = self.updates(k, v, reverse=True)

        def joined() -> Updates | None:
            here.wait_stream(side)
            for x in updates or ():
                if x is not None:
                    x.record_stream(here)
            return updates

        return joined

    def sweep(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        reverse: bool = False,
        start: Tensor | None = None,
        updates: Updates | None = None,
        final: bool = False,
        keep: Boundaries | None = None,
        meet: Boundaries | None = None,
        mine: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One sweep: out [B, T, H, V], and the state [N, H, K, V] after the last token if `final`.

        `start` and `updates` may both be transposed views: the dq sweep reads the states of the forward sweep. For the gradient of
        the decay `keep` has the states behind all chunks written, and `meet` the products of those with this sweep's; both have
        the products of every output with `mine`.
        """
        width, channels = q.shape[-1], v.shape[-1]
        out = _blank(v)
        last = torch.empty(self.count, self.heads, width, channels, device=self.device) if final else None
        states = [x for x in (start, updates.states if updates else None, last) if x is not None]
        layout = states[0].stride()[-2:] if states else (0, 0)
        edge = keep or meet
        behind = (*edge[:3], edge.reads if keep else edge.writes) if edge else (None, None, None, None)
        steps = [x.stride() for x in (q, k, v, q if mine is None else mine)]
        _single.launch(
            self._grid(channels),
            (q, k, v, self.log_decay, out, start, *(updates or NONE), last, *self.places, mine, *behind, self.scale),
            (*self.key, width, channels, *steps, layout, reverse, keep is None),
            lambda: (
                (*self.sizes, *[step for x in steps for step in x[:3]], *layout),
                {
                    "K": width, "V": channels, "BK": padded(width), "BV": self.tiles.slice, "REVERSE": reverse, "FAR": _far(q, k, v),
                    "START": start is not None, "FINAL": final, "SPLIT": updates is not None, "KEEP": keep is not None,
                    "MEET": meet is not None, "HALF": self.half, **self.constants, "num_stages": self.tiles.stages,
                },
            ),
        )  # fmt: skip
        return out, last

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        *,
        start: Tensor | None,
        behind: Updates | None,
        d_final: Tensor | None,
        final: bool,
        edges: Boundaries | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and, if `final`, the state [N, H, K, V] before the first token, from the right.

        `start` and `behind` are the state and the updates of the forward sweep. In one launch if nothing has to come first: neither
        the states that a gradient of the decay keeps, nor a long first pass, which hides beside dq.
        """
        square = k.shape[-1] == v.shape[-1]
        states = start is not None or d_final is not None
        if square and edges is None and not states and self.tiles.parts == 1:
            updates = self.updates(q, d_out, reverse=True)
            return self._in_one_launch(q, k, v, d_out, behind, updates=updates, final=final, queries=True)
        ahead = self.ahead(q, d_out)
        dq, _ = self.sweep(d_out, v, k, start=_mT(start), updates=_mT(behind), keep=edges, mine=q)
        updates = ahead()
        if square and edges is None:  # the meeting needs the registers of both
            return dq, *self._in_one_launch(q, k, v, d_out, start=d_final, updates=updates, final=final)[1:]
        back: Any = {"reverse": True, "start": d_final, "updates": updates}
        dv, first = self.sweep(k, q, d_out, **back, final=final)
        across: Any = {"reverse": True, "start": _mT(d_final), "updates": _mT(updates)}
        dk, _ = self.sweep(v, d_out, q, **across, meet=edges, mine=k)
        return dq, dk, dv, first

    def _in_one_launch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        behind: Updates | None = None,
        *,
        start: Tensor | None = None,
        updates: Updates | None = None,
        final: bool = False,
        queries: bool = False,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """dq if `queries`, dk, dv, and the state before the first token, from the right, if `final`: all in one launch, for K = V."""
        width = k.shape[-1]
        dq, dk, dv = _blank(q) if queries else None, _blank(k), _blank(v)
        first = torch.empty(self.count, self.heads, width, width, device=self.device) if final else None
        steps = [x.stride() for x in (q, k, v, d_out)]
        _together.launch(
            ((3 if queries else 2) * self._grid(width)[0],),
            (q, k, v, d_out, self.log_decay, dq, dk, dv, *(behind or NONE), start, *(updates or NONE), first, *self.places, self.scale),
            (*self.key, width, *steps),
            lambda: (
                (*self.sizes, *[step for x in steps for step in x[:3]]),
                {
                    "K": width, "BK": padded(width), "BV": self.tiles.slice, "FAR": _far(q, k, v, d_out), "START": start is not None,
                    "FINAL": final, "SPLIT": updates is not None, "HALF": self.half, **self.constants, "num_stages": self.tiles.stages,
                },
            ),
        )  # fmt: skip
        return dq, dk, dv, first

    def boundaries(self, q: Tensor, v: Tensor) -> Boundaries:
        """Room for what `keep` and `meet` write."""
        return boundaries(q, v, self.tiles.chunk, cdiv(q.shape[-1], self.tiles.slice), self.sequences, half=self.half)

    def _grid(self, channels: int) -> tuple[int]:
        return (self.pieces * self.heads * cdiv(channels, self.tiles.slice),)


def _blank(x: Tensor) -> Tensor:
    """Room for a result of the shape and dtype of `x`, contiguous whatever the strides of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _mT(x):
    return None if x is None else x.mT


def _far(*tensors: Tensor) -> bool:
    """Whether an offset inside one sequence can outgrow 32 bits; the wider arithmetic costs 5 %."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in tensors) or tensors[-1].shape[1:].numel() >= 2**31
