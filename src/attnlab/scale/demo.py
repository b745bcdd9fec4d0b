"""Distributed attention against one process, on the same numbers: errors, bytes on the wire, seconds.

The functions are jobs for :func:`attnlab.scale.launch.processes`, :func:`~attnlab.scale.launch.threads` and torchrun.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.scale.attention import gathered_attention, ring_attention, ulysses_attention
from attnlab.scale.layouts import LAYOUTS, Layout, shard
from attnlab.scale.traffic import METHODS, Method, bytes_sent
from attnlab.scale.wire import ThreadWire, Wire

FORMS = {"ring": ring_attention, "ulysses": ulysses_attention, "gathered": gathered_attention}

#: scores that :func:`one_process` takes at once, over batch and heads: 1 GiB in float64
SCORES = 2**27


@dataclass(frozen=True)
class Problem:
    """A batch of sequences [batch, length, heads, width], the same on every rank: drawn from ``seed`` on the CPU."""

    length: int = 256
    heads: int = 4
    kv_heads: int = 4
    width: int = 16
    batch: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def draw(self) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            torch.randn(self.batch, self.length, n, self.width, generator=generator, dtype=torch.float64).to(self.dtype)
            for n in heads
        ]

    def bytes(self, method: Method, ranks: int, *, backward: bool) -> int:
        """What the formula says that a rank sends."""
        element = self.dtype.itemsize
        return bytes_sent(
            method,
            ranks,
            self.batch * self.length // ranks,
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.width,
            element=element,
            gradient=max(element, 4),
            backward=backward,
        )


class Reference(NamedTuple):
    """q, k, v and the gradient of the output as drawn, and what one process finds from them (:func:`one_process`)."""

    drawn: list[Tensor]
    wanted: list[Tensor]


def reference(problem: Problem, device: torch.device | str = "cpu") -> Reference:
    """The numbers of a problem and its solution, on ``device``."""
    drawn = [x.to(device) for x in problem.draw()]
    q, k, v, do = (x.double() for x in drawn)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o = _in_blocks(*inputs, causal=problem.causal)
    o.backward(do)
    return Reference(drawn, [o.detach(), *(x.grad for x in inputs if x.grad is not None)])


def one_process(problem: Problem, device: torch.device | str = "cpu") -> list[Tensor]:
    """Output and gradients of q, k, v from torch's own attention, in float64 [batch, length, heads, width].

    Queries are taken in blocks of at most :data:`SCORES` scores, which backward computes again: memory grows with the length,
    also where torch has no fused kernel for float64, as on a GPU.
    """
    return reference(problem, device).wanted


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(groups, 2) for x in (k, v))))
    batch, heads, length, _ = query.shape
    block = max(1, SCORES // (batch * heads * length))
    pieces = [
        checkpoint(_rows, query, key, value, start, min(start + block, length), causal, use_reentrant=False)
        for start in range(0, length, block)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _rows(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, causal: bool) -> Tensor:
    """Attention of the queries from ``start`` to ``stop`` over all keys, or over those up to their own place."""
    rows, mask = query[:, :, start:stop], None
    if causal:
        key, value = key[:, :, :stop], value[:, :, :stop]
        mask = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask)


def compare(
    wire: Wire,
    method: Method,
    layout: Layout,
    problem: Problem,
    repeats: int = 3,
    known: Reference | None = None,
) -> dict[str, Any]:
    """One forward and backward of this rank's shard against :func:`one_process`.

    Args:
        known: the :func:`reference` of this problem, where it has been computed already.

    Returns:
        ``method``, ``layout``, ``device``; ``error`` and ``gradient error``, the largest differences relative to the largest number;
        bytes sent, counted and by formula; seconds of forward and backward, the best of ``repeats`` after a barrier.
    """
    known = known or reference(problem, _device())
    mine = [shard(x, wire.ranks, layout)[wire.rank] for x in known.drawn]
    row: dict[str, Any] = {"method": method, "layout": layout, "device": known.drawn[0].device.type}
    for _ in range(repeats):
        found = _once(wire, method, layout, problem, mine, row)
    for name, parts in {"error": slice(0, 1), "gradient error": slice(1, 4)}.items():
        row[name] = max(
            float((x.double() - shard(y, wire.ranks, layout)[wire.rank]).abs().max() / y.abs().max())
            for x, y in zip(found[parts], known.wanted[parts], strict=True)
        )
    return row


def local_only_error(problem: Problem, ranks: int) -> float:
    """What would be lost without a wire: the largest relative difference to one process if ranks saw their own tokens only."""
    drawn, (wanted, *_) = reference(problem)
    worst = 0.0
    for q, k, v, whole in zip(*(shard(x, ranks) for x in (*drawn[:3], wanted)), strict=True):
        alone = ring_attention(q, k, v, ThreadWire(0, 1, [], 1.0), causal=problem.causal, layout="contiguous")
        worst = max(worst, float((alone - whole).abs().max() / wanted.abs().max()))
    return worst


def every_form(wire: Wire, problem: Problem, repeats: int = 3) -> list[dict[str, Any]]:
    """:func:`compare` for each method with each layout, all against one :func:`reference`."""
    known = reference(problem, _device())
    return [compare(wire, method, layout, problem, repeats, known) for method in METHODS for layout in LAYOUTS]


def losing_one(wire: Wire, how: Literal["dies", "hangs"]) -> None:
    """A job whose last rank ends without a word, or does not come for an hour, while the others wait for it."""
    if wire.rank == wire.ranks - 1:
        if how == "dies":
            os._exit(1)
        time.sleep(3600)
    wire.barrier()


def _once(
    wire: Wire, method: Method, layout: Layout, problem: Problem, mine: list[Tensor], row: dict[str, Any]
) -> list[Tensor]:
    q, k, v, do = mine
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with _Clock(wire, row, "forward"):
        o = FORMS[method](inputs[0], inputs[1], inputs[2], wire, causal=problem.causal, layout=layout)
    with _Clock(wire, row, "backward"):
        o.backward(do)
    for name in ("forward", "backward"):
        row[f"{name} bytes, formula"] = problem.bytes(method, wire.ranks, backward=name == "backward")
    return [o.detach(), *(x.grad for x in inputs if x.grad is not None)]


class _Clock:
    """Seconds (the best so far) and bytes of what happens inside, all ranks starting together."""

    def __init__(self, wire: Wire, row: dict[str, Any], name: str) -> None:
        self.wire, self.row, self.name = wire, row, name

    def __enter__(self) -> None:
        self.wire.barrier()
        self.wire.reset()
        self.start = _now()

    def __exit__(self, *error: object) -> None:
        seconds = _now() - self.start
        self.row[f"{self.name} s"] = min(seconds, self.row.get(f"{self.name} s", seconds))
        self.row[f"{self.name} bytes"] = self.wire.sent


def _on_gpu() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_backend() == "nccl"


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")


def _now() -> float:
    if _on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()
