"""Exercises of the chapter ``foundations/unified-long-sequence``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.scale import bytes_sent

# ------------------------------------------------------------------------------------- 1: from where on sending is hidden


def tokens_to_hide(flops: float, bandwidth: float, element: int, width: int, kv_width: int) -> float:
    """Fewest tokens a rank at which a ring step computes (4 n² d / F) at least as long as it sends (2 n d_kv e / β)."""
    return element * flops / (2 * bandwidth) * kv_width / width


def _check_tokens(answer: Callable[..., Any]) -> Feedback:
    for case in ((400e12, 50e9, 2, 1024, 1024), (900e12, 450e9, 2, 4096, 1024), (10e9, 1e9, 4, 64, 64)):
        found, right = float(answer(*case)), tokens_to_hide(*case)
        if math.isclose(found, right, rel_tol=1e-6):
            continue
        flops, bandwidth, element, width, kv_width = case
        where = f"With F = {flops:g}, β = {bandwidth:g}, e = {element}, d = {width}, d_kv = {kv_width}: "
        mistakes = {
            right / element: "you count numbers, but a link carries bytes: each number has e of them.",
            right * 2: "a step multiplies queries with keys and weights with values: 4 n² d, not 2 n² d.",
            right / 2: "keys and values both travel: 2 n d_kv numbers, not n d_kv.",
            right * width / kv_width: "with grouped heads only d_kv numbers a token travel, while all d compute.",
            1 / right if right else 0: "that is the inverse: more FLOP/s need more tokens to stay busy.",
        }
        for wrong, why in mistakes.items():
            if math.isclose(found, wrong, rel_tol=1e-6):
                return reject(where + why)
        return reject(where + f"from {right:g} tokens on; you say {found:g}. Set 4 n² d / F equal to 2 n d_kv e / β.")
    return accept("n = e F d_kv / (2 β d). The head size is gone: only the ratio of computing to sending counts.")


# ------------------------------------------------------------------------------------------------- 2: windows on a ring


def ring_steps(window: int, tokens: int, ranks: int) -> int:
    """Ring steps that some rank needs, contiguous shards of ``tokens``, each token seeing the last ``window`` ones."""
    return min(ranks, math.ceil((window - 1) / tokens) + 1)


def _steps_by_counting(window: int, tokens: int, ranks: int) -> int:
    far = 0
    for query in range(ranks * tokens):
        oldest = max(0, query - window + 1)
        far = max(far, query // tokens - oldest // tokens)
    return far + 1


def _check_steps(answer: Callable[..., Any]) -> Feedback:
    for case in ((1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 4), (10, 8, 4), (17, 8, 4), (18, 8, 4), (1000, 8, 4)):
        window, tokens, ranks = case
        found, right = int(answer(*case)), _steps_by_counting(*case)
        if found == right:
            continue
        where = f"With a window of {window}, shards of {tokens} and {ranks} ranks "
        if window == 1:
            return reject(where + f"every token sees itself alone, so 1 step is enough; you say {found}.")
        if found > ranks:
            return reject(where + f"there are {ranks} shards, so at most {ranks} steps; you say {found}.")
        if found == right - 1:
            return reject(
                where + f"{right} steps are needed, one more than you say: the *first* token of a shard looks "
                f"{window - 1} tokens back, and none of them is its own."
            )
        if found == right + 1:
            return reject(
                where + f"{right} steps are enough: a token sees itself, so it looks {window - 1} tokens back."
            )
        return reject(
            where + f"{right} steps are needed; you say {found}. Ask how far the first token of a shard looks."
        )
    return accept("⌈(W − 1) / n⌉ + 1, at most w. All later steps can be skipped: the ring becomes a neighbourhood.")


# --------------------------------------------------------------------------------------------------- 3: two ways at once


def cheapest_split(ranks: int, tokens: int, heads: int, kv_heads: int, width: int) -> tuple[int, int]:
    """(ranks of Ulysses, bytes sent a rank forward) of the best split of ``ranks`` = Ulysses x ring, two bytes a number.

    After the exchange over ``inner`` ranks a rank has ``inner`` times the tokens and 1 / ``inner`` of the heads, and that is
    what the ring of the others carries. Of equals the one with fewer ranks for Ulysses.
    """
    found = []
    for inner in range(1, ranks + 1):
        if ranks % inner or kv_heads % inner:
            continue
        exchange = bytes_sent("ulysses", inner, tokens, heads=heads, kv_heads=kv_heads, width=width)
        fewer, kv_fewer = heads // inner, kv_heads // inner
        ring = bytes_sent("ring", ranks // inner, inner * tokens, heads=fewer, kv_heads=kv_fewer, width=width)
        found.append((exchange + ring, inner))
    sent, inner = min(found)
    return inner, sent


def _divisors(ranks: int, kv_heads: int) -> list[int]:
    return [inner for inner in range(1, ranks + 1) if ranks % inner == 0 and kv_heads % inner == 0]


def _check_split(answer: Callable[..., Any]) -> Feedback:
    for case in (
        (8, 1024, 32, 8, 128),
        (8, 1024, 32, 2, 128),
        (8, 1024, 32, 1, 128),
        (16, 512, 16, 16, 64),
        (2, 64, 4, 4, 8),
    ):
        found = answer(*case)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return reject("Return a pair: the ranks that Ulysses takes, and the bytes that one rank sends.")
        inner, sent = (int(x) for x in found)
        ranks, _, heads, kv_heads, _ = case
        where = f"{ranks} ranks, {heads} query heads, {kv_heads} key heads: "
        right = cheapest_split(*case)
        if (inner, sent) == right:
            continue
        if inner not in _divisors(ranks, kv_heads):
            return reject(
                where
                + f"Ulysses over {inner} ranks would have to cut heads; {inner} must divide {ranks} and {kv_heads}."
            )
        if inner == right[0]:
            return reject(where + f"the split is right, but a rank sends {right[1]} bytes; you say {sent}.")
        return reject(
            where + f"Ulysses over {right[0]} sends {right[1]} bytes, fewer than over {inner}. Try all divisors."
        )
    return accept(
        "With many key heads Ulysses takes all ranks. With few it must stop at their number and a ring does the rest; "
        "with one key head the ring alone is left, and it is cheap, since there is little to carry."
    )


EXERCISES = [
    Exercise(
        number=1,
        title="From how many tokens on is sending hidden?",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_tokens,
        solution=tokens_to_hide,
        wrong={
            "numbers instead of bytes": lambda f, b, e, d, g: f / (2 * b) * g / d,
            "one product instead of two": lambda f, b, e, d, g: e * f / b * g / d,
            "keys without values": lambda f, b, e, d, g: e * f / (4 * b) * g / d,
            "grouped heads forgotten": lambda f, b, e, d, g: e * f / (2 * b),
            "upside down": lambda f, b, e, d, g: 2 * b * d / (e * f * g),
        },
        hints=(
            "Write the seconds of computing and of sending, both as functions of n.",
            "One grows with n², the other with n: divide both by n.",
        ),
    ),
    Exercise(
        number=2,
        title="Windows on a ring",
        difficulty="medium",
        minutes=12,
        answer_is="function",
        checker=_check_steps,
        solution=ring_steps,
        wrong={
            "itself counted twice": lambda window, tokens, ranks: min(ranks, math.ceil(window / tokens) + 1),
            "rounded down": lambda window, tokens, ranks: min(ranks, (window - 1) // tokens + 1),
            "all steps": lambda window, tokens, ranks: ranks,
            "more steps than shards": lambda window, tokens, ranks: math.ceil((window - 1) / tokens) + 1,
        },
        hints=(
            "The token that looks farthest across the border is the first of a shard.",
            "It sees itself and W - 1 tokens before it. How many shards do those touch, and how many are there at all?",
        ),
    ),
    Exercise(
        number=3,
        title="Two ways at once",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_split,
        solution=cheapest_split,
        wrong={
            "all ranks for Ulysses": lambda ranks, tokens, heads, kv_heads, width: (
                ranks,
                bytes_sent("ulysses", ranks, tokens, heads=heads, kv_heads=kv_heads, width=width),
            ),
            "the ring alone": lambda ranks, tokens, heads, kv_heads, width: (
                1,
                bytes_sent("ring", ranks, tokens, heads=heads, kv_heads=kv_heads, width=width),
            ),
            "the exchange alone, whatever the split": lambda ranks, tokens, heads, kv_heads, width: (
                cheapest_split(ranks, tokens, heads, kv_heads, width)[0],
                bytes_sent("ulysses", ranks, tokens, heads=heads, kv_heads=kv_heads, width=width),
            ),
        },
        hints=(
            "attnlab.scale.bytes_sent counts either part; enumerate the divisors of the ranks that divide the key heads too.",
            "After the exchange a rank has inner times as many tokens and 1 / inner of the heads: what a ring step carries stays.",
            "Few key heads limit Ulysses, since it deals out whole heads.",
        ),
    ),
]
