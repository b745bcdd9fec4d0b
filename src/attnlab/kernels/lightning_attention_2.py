"""Lightning Attention-2 (Qin et al. 2024, arXiv:2401.04658): causal linear attention with decay, cut into tiles.

Taught in the chapter ``kernels/lightning-attention-2``. :func:`walk` is the readable twin of the Triton kernel in
``attnlab.kernels.decay_sweep``: the same loop over tiles, with plain tensors. :func:`gradients` shows that the backward pass is
that loop three times more. :func:`factored` is the shortcut that overflows, :func:`cost` and :func:`launch` count what the forms
and the kernel cost, and :func:`kernel_source` cuts the kernel into the pieces that the chapter explains. What is timed stands
in :mod:`attnlab.kernels.lightning_attention_2_runs`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from attnlab.lab import Source
from attnlab.mixers import checks, chunked, parallel, recurrent

# ------------------------------------------------------------------------------------------------------- the tiles


class TileDecay(NamedTuple):
    """The decay lambda of every head as one tile of c tokens meets it; r, s = 1..c count inside the tile (algorithm 1)."""

    mask: Tensor  # M[r, s] = lambda^(r - s) for r >= s, else 0: [H, c, c]
    read: Tensor  # lambda^r, from the tile's start to the token that reads the state: [H, c, 1]
    write: Tensor  # lambda^(c - s), from the token that writes to the tile's end: [H, c, 1]
    total: Tensor  # lambda^c: [H, 1, 1]


class How(TypedDict, total=False):
    """What :func:`gradients` passes on to :func:`tile_sweep`."""

    chunk_size: int
    scale: float


def tile_decay(log_decay: Tensor, size: int) -> TileDecay:
    """The four faces of a decay [H] in a tile of ``size`` tokens, at least 1."""
    checks.at_least("size", size)
    g = log_decay[:, None, None]  # [H, 1, 1]
    steps = torch.arange(1, size + 1, dtype=g.dtype, device=g.device)
    r, s = steps[:, None], steps[None, :]  # [c, 1], [1, c]
    return TileDecay(
        mask=torch.where(r >= s, g * (r - s), -torch.inf).exp(),
        read=(g * r).exp(),
        write=(g * (size - r)).exp(),
        total=(g * size).exp(),
    )


def walk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and last state [B, H, K, V] of q, k, v [B, H, T, D]."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outs = []
    tiles = zip(*(x.split(chunk_size, 2) for x in (q, k, v)), strict=True)
    for q_i, k_i, v_i in tiles:  # [B, H, c, D], the last c may be smaller
        decay = tile_decay(log_decay, q_i.shape[2])
        inside = (q_i @ k_i.mT * decay.mask) @ v_i
        through = (decay.read * q_i) @ state
        outs.append(inside + through)
        state = decay.total * state + (decay.write * k_i).mT @ v_i
    return torch.cat(outs, 2), state


def tile_sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int = 64,
    scale: float = 1.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``out_t = scale * sum_{s <= t} lambda^(t - s) (q_t . k_s) v_s`` by :func:`walk`; ``reverse``: over s >= t.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: log of lambda, at most 0, [H].
        chunk_size: tokens a tile, at least 1; the last tile may be shorter.
        scale: of the output; the paper has none.
        reverse: the same for a sequence that is read from its end.

    Returns:
        The outputs [B, T, H, V] and the state that the last tile leaves, [B, H, K, V].

    Raises:
        ValueError: shapes or dtypes that do not fit, no tokens, a decay that is positive or not [H], a chunk size below 1.
    """
    checks.heads(q, k, v)
    checks.rank("log_decay", log_decay, "[H]")
    checks.log_decay(log_decay, (q.shape[0], q.shape[1], q.shape[2], q.shape[3]))
    checks.at_least("chunk_size", chunk_size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if reverse:
        q, k, v = (x.flip(2) for x in (q, k, v))
    out, state = walk(q, k, v, log_decay, chunk_size)
    out = out.flip(2) if reverse else out
    return scale * out.transpose(1, 2), state


def gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, d_out: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of :func:`tile_sweep` from the gradient of its output."""
    dq, _ = tile_sweep(d_out, v, k, log_decay, **how)
    dk, _ = tile_sweep(v, d_out, q, log_decay, **how, reverse=True)
    dv, _ = tile_sweep(k, q, d_out, log_decay, **how, reverse=True)
    return dq, dk, dv


def slipped_sweep(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk_size: int = 64) -> Tensor:
    """:func:`tile_sweep` with two conventions mixed: reads decay by ``lambda^(r - 1)``, writes by ``lambda^(c - s)``.

    Equation 9 of the paper counts a tile's tokens from 0, algorithm 1 from 1; each is right with its own writes. Mixed,
    everything that comes through the state is one step too young, which no test without decay can see.
    """
    right, _ = tile_sweep(q, k, v, log_decay, chunk_size=chunk_size)
    tiles = zip(*(x.split(chunk_size, 1) for x in (q, k, v)), strict=True)
    inside = torch.cat([tile_sweep(q_i, k_i, v_i, log_decay, chunk_size=chunk_size)[0] for q_i, k_i, v_i in tiles], 1)
    return inside + (right - inside) / log_decay.exp()[:, None]  # [H, 1] beside [B, T, H, V]


def factored(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same outputs from ``lambda^t q_t`` and ``lambda^(-s) k_s``: no mask of decays, but a number that grows with s.

    ``lambda^(-s)`` leaves the range of float32 at ``s = 88.7 / log(1 / lambda)``, and every later output is lost.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    t = torch.arange(1, q.shape[2] + 1, dtype=q.dtype, device=q.device)
    cumulated = log_decay[:, None, None] * t[:, None]  # [H, T, 1]
    scores = (q * cumulated.exp()) @ (k * (-cumulated).exp()).mT
    return (scores.tril() @ v).transpose(1, 2)


def first_lost_token(out: Tensor) -> list[int | None]:
    """For every head of outputs [B, T, H, V], the number (from 1) of the first token that is not finite; None if all are."""
    lost = ~torch.isfinite(out).all(-1).all(0)  # [T, H]
    return [int(head.int().argmax()) + 1 if bool(head.any()) else None for head in lost.mT]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|`` in the norm of all entries."""
    return float((found - wanted).norm() / wanted.norm())


def form_errors(length: int, chunk_size: int, *, seed: int = 0) -> dict[str, float]:
    """How far the forms are from the recurrence, in float64 on random tokens and decays of three heads; by name.

    ``"slip"`` is :func:`slipped_sweep`, with these decays and without any: what a test must see, and cannot see.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 3, width, generator=generator, dtype=torch.float64) for width in (12, 12, 20))
    g = -torch.rand(3, generator=generator, dtype=torch.float64)
    wanted, undecayed = (recurrent(q, k, v, decay, scale=1.0)[0] for decay in (g, 0 * g))
    return {
        "T": length,
        "C": chunk_size,
        "tiled": relative_error(tile_sweep(q, k, v, g, chunk_size=chunk_size)[0], wanted),
        "chunked": relative_error(chunked(q, k, v, g, chunk_size=chunk_size, scale=1.0)[0], wanted),
        "parallel": relative_error(parallel(q, k, v, g, scale=1.0)[0], wanted),
        "slip": relative_error(slipped_sweep(q, k, v, g, chunk_size=chunk_size), wanted),
        "slip, no decay": relative_error(slipped_sweep(q, k, v, 0 * g, chunk_size=chunk_size), undecayed),
    }


# ------------------------------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Cost:
    """What one head of one sequence costs.

    Attributes:
        flops: operations in products, 2 a multiply-add.
        steps: how many of them must wait for the one before.
        kept: numbers that exist for a while beside inputs and outputs.
    """

    flops: int
    steps: int
    kept: int


FORMS = ("recurrent", "cumulative sum", "tiled", "masked product", "softmax")


def cost(form: str, length: int, width: int, *, value_width: int | None = None, chunk_size: int = 64) -> Cost:
    """Count a form on ``length`` tokens with heads of ``width`` (K) and ``value_width`` (V, left out: K).

    ``"softmax"`` counts the lower triangle of a fused kernel and no exponentials; ``"masked product"`` the whole square, which a
    dense product computes. ``"tiled"`` keeps its state on chip, as the kernel does.

    Raises:
        ValueError: an unknown form, sizes below 1.
    """
    checks.one_of("form", form, FORMS)
    v_width = width if value_width is None else value_width
    for name, size in (("length", length), ("width", width), ("value_width", v_width), ("chunk_size", chunk_size)):
        checks.at_least(name, size)
    state = width * v_width
    if form == "recurrent":
        return Cost(4 * length * state, length, state)
    if form == "cumulative sum":
        return Cost(4 * length * state, 1, length * state)
    if form == "masked product":
        return Cost(2 * length**2 * (width + v_width), 1, length**2)
    if form == "softmax":
        return Cost(length**2 * (width + v_width), 1, 0)
    inside = sum(2 * size**2 * (width + v_width) for size in _tile_sizes(length, chunk_size))
    return Cost(inside + 4 * length * state, -(-length // chunk_size), state)


def _tile_sizes(length: int, chunk_size: int) -> Iterable[int]:
    """Tokens in each tile."""
    return (min(chunk_size, length - start) for start in range(0, length, chunk_size))


@dataclass(frozen=True)
class Chip:
    """A GPU's ceilings: products a second in bfloat16, bytes a second to memory, and multiprocessors."""

    name: str
    flops: float
    bytes: float
    processors: int


H200 = Chip("H200", 790e12, 4.27e12, 132)
"""Rates that large products and copies reached on one; the data sheet says 990e12 and 4.8e12."""


def launch(
    batch: int, length: int, heads: int, width: int, *, chunk_size: int = 64, value_slice: int = 64, chip: Chip = H200
) -> dict[str, float]:
    """What one forward sweep over [batch, length, heads, width] in bfloat16 asks of a GPU; K = V = width.

    Returns:
        ``programs`` (one a sequence, head and slice of v), ``steps`` one after the other in each, ``GFLOP``, ``MB`` of inputs and
        outputs, ``FLOP/byte``, and the least milliseconds that products (``ms of products``) and memory (``ms of memory``) take.
    """
    for name, size in (("batch", batch), ("length", length), ("heads", heads), ("width", width)):
        checks.at_least(name, size)
    one = cost("tiled", length, width, chunk_size=chunk_size)
    flops = batch * heads * one.flops
    moved = batch * heads * length * 4 * width * 2  # q, k, v and out; 2 bytes a number
    return {
        "programs": batch * heads * -(-width // value_slice),
        "steps": one.steps,
        "GFLOP": flops / 1e9,
        "MB": moved / 1e6,
        "FLOP/byte": flops / moved,
        "ms of products": 1e3 * flops / chip.flops,
        "ms of memory": 1e3 * moved / chip.bytes,
    }


def tiles(length: int, chunk_size: int) -> list[dict[str, int]]:
    """How every token's row of the causal matrix is computed: tokens [0, ``start``) through the state of tile ``tile``, the rest inside.

    Returns:
        One row a token: ``t``, ``tile`` (from 0), ``start`` and the tile's ``end``.

    Raises:
        ValueError: sizes below 1.
    """
    checks.at_least("length", length)
    checks.at_least("chunk_size", chunk_size)
    starts = [t - t % chunk_size for t in range(length)]
    return [
        {"t": t, "tile": start // chunk_size, "start": start, "end": min(start + chunk_size, length)}
        for t, start in enumerate(starts)
    ]


# --------------------------------------------------------------------------------------------- the kernel, in pieces


def kernel_source(name: str, first: str = "", last: str = "") -> Source:
    """A function of the kernel's files, or its lines from the one that starts with ``first`` to the one with ``last``.

    ``decay_sweep.py`` runs on the GPU, ``decay_launch.py`` sends it there, ``decay_function.py`` is what torch differentiates. They are
    read, not imported: Triton exists for Linux alone, and its functions hide their source from ``inspect``.

    Args:
        name: such as ``_grow`` or ``LinearDecay.backward``.
        first, last: how the first and the last line begin, without indentation; left out, the ends of the function.

    Raises:
        ValueError: no such function, or a beginning that none of its lines has: the text would show something else.
    """
    for file in ("decay_sweep.py", "decay_launch.py", "decay_function.py"):
        text = Path(__file__).with_name(file).read_text(encoding="utf-8")
        node = _within(ast.parse(text), name.split("."))
        if node is not None:
            break
    else:
        raise ValueError(f"name={name!r}: decay_sweep.py, decay_launch.py and decay_function.py have no such function")
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    start = _line_that_starts(lines, first, 0, name)
    end = _line_that_starts(lines, last, start, name) if last else len(lines) - 1
    return Source(inspect.cleandoc("\n" + "\n".join(lines[start : end + 1])) + "\n")


def _within(node: ast.AST, parts: list[str]) -> ast.AST | None:
    """What goes by these names, each inside the one before; None if there is none."""
    for part in parts:
        inside = {getattr(child, "name", None): child for child in ast.iter_child_nodes(node)}
        if part not in inside:
            return None
        node = inside[part]
    return node


def _line_that_starts(lines: list[str], beginning: str, after: int, name: str) -> int:
    for number in range(after, len(lines)):
        if lines[number].lstrip().startswith(beginning):
            return number
    raise ValueError(f"no line of {name} starts with {beginning!r}; look there for how it reads now")
