"""Exercises of the chapter ``foundations/pavlovian``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.foundations import pavlovian as lab

# -------------------------------------------------------------------------------------------- 1: how many pairs, on average


def most_pairs(d_k: int, delta: float) -> int:
    """Largest n whose mean noise power (n - 1) / d_k is below delta."""
    return math.ceil(delta * d_k)  # n - 1 < delta d_k


def _check_pairs(answer: Callable[..., Any]) -> Feedback:
    for d_k, delta in ((64, 0.5), (10, 0.25), (128, 0.1), (512, 1.0)):
        found, right = int(answer(d_k, delta)), most_pairs(d_k, delta)
        if found == right:
            continue
        where = f"With d_k = {d_k} and δ = {delta}: "
        if found == right + 1:
            return reject(
                where + f"at n = {found} the noise power is {(found - 1) / d_k:g}, and that is not below {delta}."
            )
        if found == right - 1:
            return reject(
                where + f"n = {right} still fits: a cue is not disturbed by itself, so n - 1 pairs make the noise."
            )
        if math.isclose(found, math.sqrt(0.1 * delta * d_k), abs_tol=1):
            return reject(where + "that is the guarantee of Theorem 6.2 for all n at once; here only the mean counts.")
        if math.isclose(found, 1 + d_k / delta, abs_tol=1):
            return reject(where + "δ bounds the noise, not the ratio of signal to noise: multiply by it.")
        return reject(where + f"the largest n is {right}; you say {found}. Each other pair adds 1 / d_k.")
    return accept("n - 1 < δ d_k. On average the store is linear in its width; nothing here knows a square root.")


# ------------------------------------------------------------------------------------------------ 2: two rules, two orders


def opposite_orders() -> list[tuple[str, float, int]]:
    """B is reinforced more often, but always beside a C that already says everything; A is reinforced alone."""
    return [("C", 1.0, 10), ("BC", 1.0, 10), ("A", 1.0, 5)]


def _check_orders(answer: Sequence[Any]) -> Feedback:
    if any(len(phase) != 3 for phase in answer):
        return reject('Every phase is (cues, reinforcer, trials), such as ("AB", 1.0, 10).')
    phases = [lab.Phase(str(cues), float(us), int(trials)) for cues, us, trials in answer]
    cues = lab.cue_vectors(None)
    hebb, delta = (lab.responses(lab.RULES[rule], phases, cues).iloc[-1] for rule in ("Hebb", "delta"))
    told = f"Hebb answers A {hebb.A:.2f}, B {hebb.B:.2f}; delta answers A {delta.A:.2f}, B {delta.B:.2f}."
    if hebb.B - hebb.A < 0.5:
        return reject(
            f"{told} Hebb must prefer B by 0.5 or more: it counts reinforced trials, so B needs more of them than A."
        )
    if delta.A - delta.B < 0.5:
        return reject(
            f"{told} Delta must prefer A by 0.5 or more: let B earn nothing, because something beside it predicts the reinforcer, "
            "or let it lose what it earned."
        )
    if any(phase.us == 0 for phase in phases):
        return accept(
            f"{told} Extinction: Hebb ignores what fails to come. Can you do it with reinforced trials alone?"
        )
    return accept(f"{told} Blocking: what is predicted already teaches the delta rule nothing.")


# ---------------------------------------------------------------------------------------- 3: heads that rescue a long chain


def heads_needed(n: int, d_k: int, d_model: int, depth: int, delta: float) -> int | None:
    """Fewest averaged heads whose chain of ``depth`` stores keeps its mean noise power below delta; None: no number is enough.

    A layer adds x = (n - 1) (1 / d_model + 1 / (H d_k)), a chain (1 + x)^L - 1.
    """
    allowed = (1 + delta) ** (1 / depth) - 1
    left = allowed - (n - 1) / d_model
    if left <= 0:
        return None
    return math.floor((n - 1) / (d_k * left)) + 1  # strictly below


def _check_heads(answer: Callable[..., Any]) -> Feedback:
    for case in (
        (8, 64, 128, 2, 0.5),
        (8, 64, 512, 4, 0.5),
        (16, 64, 128, 4, 0.5),
        (32, 64, 1024, 4, 0.5),
        (2, 64, 64, 1, 0.5),
    ):
        found, right = answer(*case), heads_needed(*case)
        if (found is None) == (right is None) and (right is None or int(found) == right):
            continue
        n, d_k, d_model, depth, delta = case
        where = f"n = {n}, d_k = {d_k}, d_model = {d_model}, L = {depth}, δ = {delta}: "
        if right is None:
            floor = (n - 1) / d_model
            return reject(
                where
                + f"no number of heads is enough, since every layer keeps the noise {floor:.3g} that all heads share; "
                f"return None. You say {found}."
            )
        if found is None:
            return reject(
                where + f"{right} heads are enough: the shared noise alone stays within what a layer may add."
            )
        unshared = (n - 1) / d_k / ((1 + delta) ** (1 / depth) - 1)
        if int(found) == math.floor(unshared) + 1:
            return reject(
                where + f"{right} are needed, not {found}: heads project the same tokens, so 1 / d_model stays."
            )
        linear = delta / depth - (n - 1) / d_model
        if linear > 0 and int(found) == math.floor((n - 1) / (d_k * linear)) + 1:
            return reject(
                where + f"{right} are enough: noise compounds, (1 + x)^L - 1 < δ, instead of adding up to L x."
            )
        return reject(where + f"{right} are needed; you say {found}. First ask how much one layer may add.")
    return accept(
        "Heads remove the noise that they do not share. What their common input confuses, all of them confuse."
    )


EXERCISES: list[Exercise] = [
    Exercise(
        number=1,
        title="How many pairs on average?",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_pairs,
        solution=most_pairs,
        wrong={
            "the pair itself counted as noise": lambda d_k, delta: math.ceil(delta * d_k) - 1,
            "not strictly below": lambda d_k, delta: math.floor(1 + delta * d_k),
            "the guarantee instead": lambda d_k, delta: math.floor(math.sqrt(0.1 * delta * d_k)),
            "divided by the threshold": lambda d_k, delta: math.floor(1 + d_k / delta),
        },
        hints=(
            "The mean of (k_i · k_j)² is 1 / d_k for random unit keys. How many terms does the cross-talk have?",
            "(n - 1) / d_k < δ, and n is a whole number.",
        ),
    ),
    Exercise(
        number=2,
        title="Two rules, two orders",
        difficulty="medium",
        minutes=12,
        answer_is="value",
        checker=_check_orders,
        solution=opposite_orders,
        wrong={
            "blocking of B by A itself": [("A", 1.0, 10), ("AB", 1.0, 10)],
            "only more trials": [("B", 1.0, 10), ("A", 1.0, 5)],
            "shared, not blocked": [("BC", 1.0, 10), ("A", 1.0, 5)],
        },
        hints=(
            "Hebb counts reinforced trials. Give B ten of them and A five.",
            "The delta rule gives B nothing while another cue of the compound predicts the reinforcer. There is a third cue, C.",
        ),
    ),
    Exercise(
        number=3,
        title="Heads that rescue a chain",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_heads,
        solution=heads_needed,
        wrong={
            "heads that share nothing": lambda n, d_k, d_model, depth, delta: (
                math.floor((n - 1) / d_k / ((1 + delta) ** (1 / depth) - 1)) + 1
            ),
            "noise that adds up": lambda n, d_k, d_model, depth, delta: (
                math.floor((n - 1) / (d_k * (delta / depth - (n - 1) / d_model))) + 1
                if delta / depth > (n - 1) / d_model
                else None
            ),
            "always possible": lambda n, d_k, d_model, depth, delta: (
                heads_needed(n, d_k, d_model, depth, delta) or 1000
            ),
        },
        hints=(
            "Let one layer add the noise x. After L layers it is (1 + x)^L - 1: solve for the x that a layer may add.",
            "Averaged heads add x = (n - 1) (1 / d_model + 1 / (H d_k)). Which part does H change?",
            "If (n - 1) / d_model alone is too much, no number of heads helps.",
        ),
    ),
]
