"""Exercises of the chapter ``kernels/lightning-attention-2``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.kernels.lightning_attention_2 import gradients, relative_error, tile_decay

# ------------------------------------------------------------------------------------ 1: what a key weighs in the state


def key_weights(log_decay: float, size: int) -> Tensor:
    """Weights [size] with which the keys r = 1..size of a tile enter the state that the tile leaves."""
    r = torch.arange(1, size + 1)
    return torch.exp(log_decay * (size - r))  # key r still decays on the way to the tile's end


def _check_weights(answer: Callable[[float, int], Any]) -> Feedback:
    found = torch.as_tensor(answer(-0.5, 4)).double().flatten()
    if len(found) != 4:
        return reject(f"A tile of 4 tokens has 4 keys, so 4 weights are wanted; yours are {len(found)}.")
    steps = torch.arange(1, 5).double()
    mistakes = {
        "Your weights fall towards the tile's end. The last key was written last, so it has decayed least.": -0.5
        * (steps - 1),
        "You count steps from the tile's start, lambda^r: that is how a query reads, not how a key is written.": -0.5
        * steps,
        "You are one step off: the last key is written at the tile's end and does not decay any more, so its weight is 1.": -0.5
        * (5 - steps),
        "Your exponents are positive: a past that grows. The log decay is negative already; do not change its sign.": 0.5
        * (4 - steps),
    }
    for text, exponent in mistakes.items():
        if torch.allclose(found, exponent.exp(), rtol=1e-4):
            return reject(text)
    for decay, size in ((-0.5, 4), (-0.5, 3), (0.0, 5), (-8.0, 64), (-0.01, 1)):
        got = torch.as_tensor(answer(decay, size)).double().flatten()
        wanted = key_weights(decay, size).double()
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-30):
            return reject(
                f"With log_decay={decay} and a tile of {size} tokens the weights should be {_show(wanted)}, yours are {_show(got)}."
            )
    return accept(
        "lambda^(size - r): the steps from key r to the tile's end. In a ragged last tile `size` is what the tile holds; with the full "
        "chunk size instead, the final state would be decayed for tokens that never came."
    )


def _show(x: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in x[:4].tolist()) + (", ...]" if len(x) > 4 else "]")


# ---------------------------------------------------------------------------- 2: one pass from the right for dk and dv


def key_value_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, d_out: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """dk [B, H, T, K] and dv [B, H, T, V] in one walk over the tiles, from the last to the first.

    Inputs are [B, H, T, D], the log decay [H]. D [B, H, K, V] is the gradient that arrives from later tiles.
    """
    D = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for start in reversed(range(0, q.shape[2], chunk_size)):
        tile = slice(start, start + chunk_size)
        q_i, k_i, v_i, do_i = (x[:, :, tile] for x in (q, k, v, d_out))
        mask, read, write, total = tile_decay(log_decay, q_i.shape[2])
        dk[:, :, tile] = (do_i @ v_i.mT * mask).mT @ q_i + (write * v_i) @ D.mT
        dv[:, :, tile] = (q_i @ k_i.mT * mask).mT @ do_i + (write * k_i) @ D
        D = total * D + (read * q_i).mT @ do_i  # after it was used: D holds later tiles only
    return dk, dv


def _walk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, d_out: Tensor, chunk_size: int, mistake: str = ""
) -> tuple[Tensor, Tensor]:
    """:func:`key_value_gradients` with one mistake in it."""
    D = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    starts = range(0, q.shape[2], chunk_size)
    for start in starts if mistake == "from the left" else reversed(starts):
        tile = slice(start, start + chunk_size)
        q_i, k_i, v_i, do_i = (x[:, :, tile] for x in (q, k, v, d_out))
        mask, read, write, total = tile_decay(log_decay, q_i.shape[2])
        mask = mask.mT if mistake == "mask" else mask
        if mistake == "no decay between tiles":
            total = torch.ones_like(total)
        if mistake == "weights":
            read, write = write, read
        after = total * D + (read * q_i).mT @ do_i
        if mistake == "own tile twice":
            D = after
        if mistake == "inside only":
            D = torch.zeros_like(D)
        dk[:, :, tile] = (do_i @ v_i.mT * mask).mT @ q_i + (write * v_i) @ D.mT
        dv[:, :, tile] = (q_i @ k_i.mT * mask).mT @ do_i + (write * k_i) @ D
        D = after
    return dk, dv


_MISTAKES = {
    "own tile twice": "You update D before you use it, so a tile meets its own queries twice: once in the tile, once in D.",
    "no decay between tiles": "D does not decay from tile to tile: multiply it by lambda^c before you add the tile's own part.",
    "weights": "The weights of reading and writing have changed places: queries enter D with lambda^r, keys and values leave it with "
    "lambda^(c - r).",
    "mask": "Your mask lies on the wrong side of the diagonal. Mask the scores as in the forward pass, then transpose the product.",
    "from the left": "You walk from the first tile to the last. A key is read by later queries, so their part must be there already: "
    "start at the last tile.",
    "inside only": "What later tiles do to a key is missing: D is never used, or stays zero.",
}


def _key_value_case(length: int = 37, chunk_size: int = 8) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(2, 3, length, width, generator=generator, dtype=torch.float64) for width in (5, 5, 7, 7)
    )
    return q, k, v, -torch.tensor([0.0, 0.05, 0.7], dtype=torch.float64), d_out, chunk_size


def _check_key_value(answer: Callable[..., Any]) -> Feedback:
    case = _key_value_case()
    q, k, v, log_decay, d_out, _ = case
    found = answer(*case)
    if not isinstance(found, tuple | list) or len(found) != 2:
        return reject("Return the pair (dk, dv).")
    by_token = [x.transpose(1, 2) for x in (q, k, v, d_out)]  # [B, T, H, D]
    _, *wanted = gradients(by_token[0], by_token[1], by_token[2], log_decay, by_token[3])
    wanted = [x.transpose(1, 2) for x in wanted]
    for name, got, right in zip(("dk", "dv"), found, wanted, strict=True):
        if tuple(got.shape) != tuple(right.shape):
            return reject(
                f"{name} has shape {tuple(got.shape)}; the gradient of [B, H, T, D] inputs here is {tuple(right.shape)}."
            )
    errors = [relative_error(got, right) for got, right in zip(found, wanted, strict=True)]
    if max(errors) < 1e-10:
        return _accept_walk(answer, found, k, v)
    for mistake, text in _MISTAKES.items():
        same = zip(found, partial(_walk, mistake=mistake)(*case), strict=True)
        if max(relative_error(got, wrong) for got, wrong in same) < 1e-10:
            return reject(text)
    if errors[0] < 1e-10 or errors[1] < 1e-10:
        name = "dv" if errors[0] < 1e-10 else "dk"
        return reject(f"One of the two is right; {name} is off by {max(errors):.1e} (relative).")
    euler = [float((x * dx).sum()) for x, dx in ((k, found[0]), (v, found[1]))]
    return reject(
        f"dk and dv are off by {errors[0]:.1e} and {errors[1]:.1e} (relative). By Euler's identity <k, dk> and <v, dv> are equal; yours are "
        f"{euler[0]:.4g} and {euler[1]:.4g}. Try one tile first (chunk_size = T), then two."
    )


def _accept_walk(answer: Callable[..., Any], found: Any, k: Tensor, v: Tensor) -> Feedback:
    """Right on the first case; the sizes that break an off-by-one come last."""
    for length, size in ((37, 37), (37, 1), (5, 64)):
        case = _key_value_case(length, size)
        if max(relative_error(a, b) for a, b in zip(answer(*case), key_value_gradients(*case), strict=True)) > 1e-10:
            return reject(f"Right for T=37 in tiles of 8, but not for T={length} in tiles of {size}.")
    euler = [float((x * dx).sum()) for x, dx in ((k, found[0]), (v, found[1]))]
    return accept(
        f"Equal to the gradient in float64, also for tiles of 1 and of everything. <k, dk> = {euler[0]:.6f} and <v, dv> = {euler[1]:.6f}: "
        "one state serves both. The kernel takes two sweeps instead: a program that owns a slice of V has its slice of dv, but of dk only a "
        "part of the sum over V."
    )


# ------------------------------------------------------------------------------- 3: the states of all tiles in log steps

Pair = tuple[Tensor, Tensor]
Combine = Callable[[Pair, Pair], Pair]


def states_before(combine: Combine, decay: Tensor, update: Tensor) -> Tensor:
    """The state before each of N tiles, [N, K, V], from the tiles' decays [N, 1, 1] and updates [N, K, V], in log2 N rounds.

    ``combine((a1, S1), (a2, S2))`` joins earlier pieces with later ones, many at once: ``(a1 a2, a2 S1 + S2)``.
    """
    reach = 1
    while reach < len(decay):  # entry n now sums up the `reach` tiles that end at n
        earlier, later = (decay[:-reach], update[:-reach]), (decay[reach:], update[reach:])
        joined = combine(earlier, later)
        decay = torch.cat([decay[:reach], joined[0]])
        update = torch.cat([update[:reach], joined[1]])
        reach *= 2
    return torch.cat([torch.zeros_like(update[:1]), update[:-1]])  # before tile n: everything up to tile n - 1


def _sequential_states(combine: Combine, decay: Tensor, update: Tensor) -> Tensor:
    """What the sequential sweep does: right, in N - 1 rounds."""
    total, states = (decay[:1], update[:1]), [torch.zeros_like(update[:1])]
    for n in range(1, len(decay)):
        states.append(total[1])
        total = combine(total, (decay[n : n + 1], update[n : n + 1]))
    return torch.cat(states)


def _inclusive_states(combine: Combine, decay: Tensor, update: Tensor) -> Tensor:
    """The state after each tile."""
    before = states_before(combine, decay, update)
    return decay * before + update


def _swapped_states(combine: Combine, decay: Tensor, update: Tensor) -> Tensor:
    """Later pieces given as the earlier ones."""
    return states_before(lambda left, right: combine(right, left), decay, update)


def _check_states(answer: Callable[[Combine, Tensor, Tensor], Any]) -> Feedback:
    seen: list[int] = []
    for number, tiles in enumerate((2, 13, 64, 1)):
        decay, update = _tile_case(tiles, seed=number)
        counted = _Counter()
        found = answer(counted, decay, update)
        if not isinstance(found, Tensor) or found.shape != update.shape:
            return reject(
                f"One state a tile is wanted, {tuple(update.shape)} for {tiles} tiles; you returned {_shape(found)}."
            )
        if (mistake := _wrong_states(found, decay, update)) is not None:
            return reject(f"{mistake} (Seen with {tiles} tiles.)")
        most = 2 * math.ceil(math.log2(tiles)) if tiles > 1 else 0
        if counted.rounds > most:
            return reject(
                f"The states are right, but {tiles} tiles took {counted.rounds} rounds of combine, one after the other; "
                f"{most} are enough. Join many pairs in one call."
            )
        seen.append(counted.rounds)
    return accept(
        f"{seen[1]} rounds for 13 tiles and {seen[2]} for 64, where the sequential sweep waits 12 and 63 times. The price: every tile's update "
        "goes through memory and more products are formed. It pays when batch x heads x slices of v are fewer than the multiprocessors "
        "and the sequence is long; a few long pieces, as in the kernel, get most of it with one round."
    )


class _Counter:
    """``combine``, and how often it was called."""

    def __init__(self) -> None:
        self.rounds = 0

    def __call__(self, earlier: Pair, later: Pair) -> Pair:
        self.rounds += 1
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _tile_case(tiles: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    decay = 0.2 + 0.7 * torch.rand(tiles, 1, 1, generator=generator, dtype=torch.float64)
    return decay, torch.randn(tiles, 3, 4, generator=generator, dtype=torch.float64)


def _wrong_states(found: Tensor, decay: Tensor, update: Tensor) -> str | None:
    """What is wrong with the states, or None."""
    right = _sequential_states(_Counter(), decay, update)
    if torch.allclose(found, right, atol=1e-10):
        return None
    if torch.allclose(found, decay * right + update, atol=1e-10):
        return "These are the states after each tile. A tile reads the state before it, so shift by one; the first is zero."
    if torch.allclose(found, _swapped_states(_Counter(), decay, update), atol=1e-10):
        return "The order is swapped: combine takes the earlier piece first. What is older decays by what is younger, not the reverse."
    if not torch.allclose(found[0], torch.zeros_like(found[0])):
        return "Before the first tile nothing was read: its state must be zero."
    worst = int((found - right).abs().amax((1, 2)).gt(1e-10).int().argmax())
    return f"The states agree up to tile {worst - 1}; the one before tile {worst} does not."


def _shape(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"


EXERCISES = [
    Exercise(
        number=1,
        title="What does key r weigh when its tile ends?",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_weights,
        solution=key_weights,
        wrong={
            "weights of a query": lambda log_decay, size: torch.exp(log_decay * torch.arange(1, size + 1)),
            "decays one step too many": lambda log_decay, size: torch.exp(log_decay * torch.arange(size, 0, -1)),
            "falls towards the end": lambda log_decay, size: torch.exp(log_decay * torch.arange(size)),
            "grows": lambda log_decay, size: torch.exp(-log_decay * torch.arange(size - 1, -1, -1)),
        },
        hints=(
            "Take a tile of two tokens and write the recurrence twice: what stands before k_1 v_1, what before k_2 v_2?",
            "Key r is followed by size - r more tokens of the tile, and each of them decays the state once.",
        ),
    ),
    Exercise(
        number=2,
        title="One walk from the right",
        difficulty="medium",
        minutes=20,
        answer_is="function",
        checker=_check_key_value,
        solution=key_value_gradients,
        wrong={mistake: partial(_walk, mistake=mistake) for mistake in _MISTAKES},
        hints=(
            "Start at the last tile with D = 0. D is to later queries what S is to earlier keys: a sum of decayed outer products.",
            "Inside a tile, dv = (scores * mask)^T do and dk = (do v^T * mask)^T q. From later tiles, dv gets (write * k) D and dk gets "
            "(write * v) D^T.",
            "Then D = total * D + (read * q)^T do. tile_decay(log_decay, c) returns mask, read, write and total.",
        ),
    ),
    Exercise(
        number=3,
        title="All states in a logarithm of steps",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_states,
        solution=states_before,
        wrong={
            "one tile after the other": _sequential_states,
            "the states after each tile": _inclusive_states,
            "later piece first": _swapped_states,
            "the bare updates": lambda combine, decay, update: torch.cat([torch.zeros_like(update[:1]), update[:-1]]),
        },
        hints=(
            "First let entry n sum up two tiles, n - 1 and n. How do you get sums of four from sums of two?",
            "combine((decay[:-reach], update[:-reach]), (decay[reach:], update[reach:])) doubles the reach of all entries but the first.",
            "The scan gives the state after each tile; the state before tile n is the one after tile n - 1.",
        ),
    ),
]
