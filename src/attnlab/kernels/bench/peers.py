"""Who computes it: this package, and everyone worth comparing with. What is not torch is imported when it is asked for.

All get the same tensors [B, T, H, D], scale and decay; who wants [B, H, T, D] gets views. Conversions that only a peer needs
(float32 copies, features) are made before the clock starts, in its favour.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.kernels.bench.problems import LAYER, LAYERS, Problem, Shape
from attnlab.kernels.causal_flow import causal_flow
from attnlab.kernels.linear_decay import linear_decay_attention
from attnlab.mixers import causal_flow_attention, recurrence


@dataclass(frozen=True)
class Run:
    """An implementation, ready for one problem: what to call, its leaves, and the sizes it picked."""

    call: Callable[[], Tensor]  # outputs [B, T, H, V]
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Those that get a gradient."""
        return {name: x for name, x in self.tensors.items() if x.requires_grad}


@dataclass(frozen=True)
class Implementation:
    """Someone who computes a case.

    Attributes:
        prepare: makes it ready; what it raises becomes a row of the record.
        same: whether it computes the function of the case. Softmax does not: it stands there for its time, without an error.
        quadratic: whether its cost grows with the square of T.
        compiles: whether each shape costs many seconds of ``torch.compile``; such peers come last.
        devices: where it runs.
        shapes: where it stands; none: everywhere.
    """

    name: str
    prepare: Callable[[Problem], Run]
    same: bool = True
    quadratic: bool = False
    compiles: bool = False
    devices: tuple[str, ...] = ("cuda",)
    shapes: tuple[Shape, ...] | None = None


OURS = "attnlab"
EVERYWHERE = ("cuda", "cpu")


def linear_decay() -> Implementation:
    """`attnlab.kernels.linear_decay_attention`, without the final state, as all others."""

    def prepare(problem: Problem) -> Run:
        x, config = problem.copies(), {}
        if x["q"].is_cuda:
            from attnlab.kernels.decay_launch import tiles_for

            config = tiles_for(x["q"], x["v"], forgets=x["log_decay"].dim() == 1)._asdict()
        inputs = (x["q"], x["k"], x["v"], x["log_decay"])
        return Run(lambda: linear_decay_attention(*inputs, scale=problem.scale, return_state=False)[0], x, config)

    return Implementation(OURS, prepare, devices=EVERYWHERE)


def scan() -> Implementation:
    """`attnlab.kernels.aaren_scan`; the scores are given."""

    def prepare(problem: Problem) -> Run:
        x = problem.copies()
        return Run(lambda: aaren_scan(x["s"], x["v"])[0], x)

    return Implementation(OURS, prepare, devices=EVERYWHERE)


def flow() -> Implementation:
    """`attnlab.kernels.causal_flow`, without the final state."""

    def prepare(problem: Problem) -> Run:
        x = problem.copies()
        return Run(lambda: causal_flow(x["q"], x["k"], x["v"], return_state=False)[0], x)

    return Implementation(OURS, prepare, devices=EVERYWHERE)


def parallel(shapes: tuple[Shape, ...]) -> Implementation:
    """The quadratic form of `attnlab.mixers`, a masked product of [T, T] matrices, in float32 with TF32 products."""

    def prepare(problem: Problem) -> Run:
        x = _float32(problem)
        inputs = (x["q"], x["k"], x["v"], x["log_decay"])
        return Run(lambda: recurrence.parallel(*inputs, scale=problem.scale)[0], x)

    return Implementation("torch parallel", prepare, quadratic=True, devices=EVERYWHERE, shapes=shapes)


def fla(function: str, decay: str | None = None) -> Implementation:
    """A simple GLA of flash-linear-attention that takes the log decay under the name `decay`, or has none."""

    def prepare(problem: Problem) -> Run:
        attend = getattr(importlib.import_module("fla.ops.simple_gla"), function)
        x = problem.copies()
        options = {} if decay is None else {decay: x["log_decay"]}
        return Run(lambda: attend(x["q"], x["k"], x["v"], scale=problem.scale, **options)[0], x)

    return Implementation(f"fla {function}", prepare)


def fla_lightning() -> Implementation:
    """The lightning attention of flash-linear-attention, which makes the same decays by itself."""

    def prepare(problem: Problem) -> Run:
        attend = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn
        x = problem.copies()
        return Run(lambda: attend(x["q"], x["k"], x["v"], LAYER, LAYERS, scale=problem.scale)[0], x)

    return Implementation("fla chunk_lightning_attn", prepare)


def fla_normalised() -> Implementation:
    """Normalised linear attention of flash-linear-attention on sigmoid features: flow attention without its gates."""

    def prepare(problem: Problem) -> Run:
        attend = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        features = {name: problem.tensors[name].sigmoid().requires_grad_() for name in "qk"}
        x = problem.copies() | features
        return Run(lambda: attend(x["q"], x["k"], x["v"], scale=1.0, normalize=True)[0], x)

    return Implementation("fla chunk_linear_attn (no gates)", prepare, same=False)


def sdpa(backend: str, *, repeated: bool = False) -> Implementation:
    """Causal softmax attention of torch; `repeated` gives all tokens of a head one query, which is what Aaren computes."""

    def prepare(problem: Problem) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        x = problem.copies("q", "k", "v")

        def call() -> Tensor:
            q = x["q"].expand_as(x["k"])  # [B, T, H, K], also from [H, K]
            with sdpa_kernel(chosen):
                o = F.scaled_dot_product_attention(
                    q.transpose(1, 2),  # [B, H, T, K]
                    x["k"].transpose(1, 2),
                    x["v"].transpose(1, 2),
                    is_causal=True,
                    scale=problem.scale,
                )
            return o.transpose(1, 2)

        return Run(call, x)

    name = f"SDPA {backend.partition('_')[0].lower()}, " + ("query repeated" if repeated else "softmax")
    return Implementation(name, prepare, same=repeated, quadratic=True)


def flex(shapes: tuple[Shape, ...]) -> Implementation:
    """Compiled softmax attention with the same decays added to the scores, as ALiBi does it."""

    def prepare(problem: Problem) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        x, length = problem.copies(), problem.shape.T
        decay = x["log_decay"]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(decay.device))
        attend = torch.compile(flex_attention, dynamic=False)

        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + decay[h] * (i - j)

        def call() -> Tensor:
            q, k, v = (x[name].transpose(1, 2) for name in "qkv")
            return attend(q, k, v, score_mod=biased, block_mask=mask, scale=problem.scale).transpose(1, 2)

        return Run(call, x)

    return Implementation("flex_attention, softmax", prepare, same=False, quadratic=True, compiles=True, shapes=shapes)


def cumulated(shapes: tuple[Shape, ...]) -> Implementation:
    """Aaren as three prefix sums of torch, compiled on a GPU."""

    def attend(s: Tensor, v: Tensor) -> Tensor:
        top = s.amax(1, keepdim=True)
        sums = ((s - top).exp()[..., None] * v).cumsum(1)
        return (sums * (top - s.logcumsumexp(1)).exp()[..., None]).to(v.dtype)

    def prepare(problem: Problem) -> Run:
        x = problem.copies()
        form = _compiled(attend, x["v"])
        return Run(lambda: form(x["s"], x["v"]), x)

    return Implementation("torch cumulated", prepare, compiles=True, devices=EVERYWHERE, shapes=shapes)


def chunked_flow(shapes: tuple[Shape, ...]) -> Implementation:
    """Flow attention as `attnlab.mixers` has it, compiled on a GPU, in float32 with TF32 products; at most 128 chunks, which
    the compiler unrolls."""

    def prepare(problem: Problem) -> Run:
        x = _float32(problem)
        size = max(64, problem.shape.T // 128)
        form = _compiled(lambda q, k, v: causal_flow_attention(q, k, v, chunk_size=size)[0], x["v"])
        return Run(lambda: form(x["q"], x["k"], x["v"]), x, {"chunk": size})

    return Implementation("torch chunked", prepare, compiles=True, devices=EVERYWHERE, shapes=shapes)


def _float32(problem: Problem) -> dict[str, Tensor]:
    """Copies of the tensors, for forms that sum in the dtype of their inputs."""
    return {name: x.detach().float().requires_grad_(name in problem.wanted) for name, x in problem.tensors.items()}


def _compiled(form: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """The compiler pays off on a GPU only."""
    return torch.compile(form, dynamic=False) if x.is_cuda else form
