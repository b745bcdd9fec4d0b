"""Exercises of the chapter ``circuits/chinchilla-mcq``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.subspaces import two_factor_shares
from attnlab.exercises.core import Exercise, Feedback, accept, reject

# ------------------------------------------------------------------------------------------ 1: what three dimensions prove


def most_dimensions(classes: int, d_head: int) -> int:
    """The most directions in which ``classes`` class means of width ``d_head`` can vary once their common mean is taken off."""
    return min(classes - 1, d_head)  # centred means sum to zero: the last one is minus the sum of the others


def _check_dimensions(answer: Callable[[int, int], int]) -> Feedback:
    cases = [(4, 64), (8, 64), (2, 64), (1, 64), (4, 3), (8, 3), (26, 16)]
    got = {case: int(answer(*case)) for case in cases}
    if all(got[case] == most_dimensions(*case) for case in cases):
        return accept(
            "Four classes never need more than three directions, whatever they stand for: rank 3 on A to D was to be expected. "
            "With eight options the same code would need seven."
        )
    if all(got[k, d] == min(k, d) for k, d in cases):
        return reject(
            "You counted the means before centring. After it they sum to zero, so one of them follows from the rest."
        )
    if all(got[k, d] == k - 1 for k, d in cases):
        return reject("Right for a wide head, but 26 means in 16 dimensions span at most 16: the width is a limit too.")
    if got[1, 64] != 0:
        return reject(f"One class does not vary at all, so (1, 64) must give 0; yours gives {got[1, 64]}.")
    wrong = next(case for case in cases if got[case] != most_dimensions(*case))
    return reject(
        f"{wrong[0]} class means in {wrong[1]} dimensions vary in at most {most_dimensions(*wrong)} directions; you say {got[wrong]}."
    )


# ------------------------------------------------------------------------------------------------- 2: place or letter?


def shares(vectors: Tensor, place: Tensor, letter: Tensor) -> tuple[float, float]:
    """Shares of the variance of ``vectors`` [n, d] that go with the place and with the letter, in a balanced design."""
    x = vectors - vectors.mean(0)
    total = x.square().sum()

    def between(groups: Tensor) -> float:
        chosen = [x[groups == value] for value in groups.unique()]
        return float(sum(len(rows) * rows.mean(0).square().sum() for rows in chosen) / total)

    return between(place), between(letter)


def _design(levels: int, copies: int, noise: float, seed: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors with an effect of place, twice as long a one of letter, a mean far from zero, and noise."""
    rng = torch.Generator().manual_seed(seed)
    place, letter = (
        axis.flatten().repeat(copies)
        for axis in torch.meshgrid(torch.arange(levels), torch.arange(levels), indexing="ij")
    )
    a, b = torch.randn(levels, width, generator=rng).double(), 2 * torch.randn(levels, width, generator=rng).double()
    spread = noise * torch.randn(len(place), width, generator=rng).double()
    return 5 + a[place] + b[letter] + spread, place, letter


def _check_shares(answer: Callable[[Tensor, Tensor, Tensor], Any]) -> Feedback:
    vectors, place, letter = _design(levels=4, copies=5, noise=0.7, seed=1)
    exact = two_factor_shares(vectors, place, letter)
    try:
        mine = tuple(float(x) for x in answer(vectors, place, letter))
        first, second = mine
    except (TypeError, ValueError):
        return reject(
            "Return two numbers: the share that goes with the place, then the share that goes with the letter."
        )
    wanted = (exact["place"], exact["letter"])
    if np.allclose(mine, wanted, atol=1e-6):
        clean = answer(*_design(levels=3, copies=2, noise=0.0, seed=2))
        if not np.isclose(sum(float(x) for x in clean), 1.0, atol=1e-6):
            return reject("Without noise the two shares must add up to 1, for three places as well as for four.")
        return accept(
            f"Place {first:.2f}, letter {second:.2f}, rest {1 - first - second:.2f}. On A to D in order this cannot be asked: "
            "place and letter are one thing there, and any split of the variance would be a choice."
        )
    if np.allclose(mine[::-1], wanted, atol=1e-6):
        return reject("The two numbers are right and in the wrong order: first the place, then the letter.")
    squares = float(vectors.square().sum())
    around = float((vectors - vectors.mean(0)).square().sum())
    if np.allclose(mine, [w * around / squares for w in wanted], atol=1e-6):
        return reject(
            "Your total is the sum of squares around zero; variance is around the mean, so centre the vectors first."
        )
    if np.allclose(mine, [1 - wanted[0], 1 - wanted[1]], atol=1e-6):
        return reject("That is what is left within the groups; the share that goes with a factor is between them.")
    if first + second > 1.0 + 1e-6:
        return reject(
            f"Your shares add up to {first + second:.2f}. In a balanced design the two sums of squares do not overlap, so 1 is the most."
        )
    if np.allclose(mine, [w / 20 for w in wanted], rtol=1e-4):
        return reject("A group's mean stands for all its vectors: count its square once a vector, not once a group.")
    return reject(
        f"Place should be {wanted[0]:.3f} and letter {wanted[1]:.3f}; yours are {first:.3f} and {second:.3f}."
    )


# ---------------------------------------------------------------------------- 3: eight places in fewer than seven dimensions


def circle_code(places: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[places, 2]``: place ``i`` sits at an angle of its own, and a query points at its key."""
    angle = 2 * torch.pi * torch.arange(places, dtype=torch.float64) / places
    keys = torch.stack([angle.cos(), angle.sin()], dim=1)
    return keys * 4 / (
        1 - torch.cos(torch.tensor(2 * torch.pi / places, dtype=torch.float64))
    ), keys  # neighbours 4 apart


def _check_code(answer: Callable[[int], tuple[Tensor, Tensor]]) -> Feedback:
    for places in (4, 8, 12):
        try:
            queries, keys = (torch.as_tensor(x, dtype=torch.float64) for x in answer(places))
        except (TypeError, ValueError):
            return reject("Return a pair: queries [places, d] and keys [places, d].")
        if queries.ndim != 2 or queries.shape != keys.shape or len(queries) != places:
            return reject(
                f"For {places} places queries and keys must both be [{places}, d]; yours are {list(queries.shape)} and {list(keys.shape)}."
            )
        rank = {name: _rank(x) for name, x in (("queries", queries), ("keys", keys))}
        pattern = (queries @ keys.T).softmax(1)
        own = pattern.diagonal()
        if bool((pattern.argmax(1) != torch.arange(places)).any()):
            lost = int((pattern.argmax(1) != torch.arange(places)).nonzero()[0])
            if rank["keys"] <= 1:
                return reject(
                    f"Your keys lie on a line, and a product with a query is then highest at one of its ends: place {lost} of {places} "
                    "can never win. Bend the line."
                )
            return reject(
                f"The query of place {lost} looks at place {int(pattern[lost].argmax())} when there are {places}."
            )
        if float(own.min()) < 0.5:
            return reject(
                f"Every query prefers its own place, but pays it only {float(own.min()):.2f} with {places} places; scale the queries."
            )
        if max(rank.values()) > 2:
            worst = max(rank, key=lambda name: rank[name])
            return reject(
                f"The centred {worst} span {rank[worst]} directions for {places} places. A direction a place is what a class code needs; "
                "two are enough for any number."
            )
    return accept(
        "Two directions address any number of places. So a rank below the number of classes minus one is possible, and when a trained "
        "head needs more, it is because nothing pushed it into the plane."
    )


def _rank(x: Tensor) -> int:
    values = torch.linalg.svdvals(x - x.mean(0))
    return int((values > 1e-6 * values.max().clamp(min=1e-12)).sum())


def _line_code(places: int) -> tuple[Tensor, Tensor]:
    at = torch.linspace(-1, 1, places, dtype=torch.float64)[:, None]
    return 20 * at, at


def _class_code(places: int) -> tuple[Tensor, Tensor]:
    return 10 * torch.eye(places, dtype=torch.float64), torch.eye(places, dtype=torch.float64)


def _weak_circle(places: int) -> tuple[Tensor, Tensor]:
    _, keys = circle_code(places)
    return keys, keys


EXERCISES: list[Exercise] = [
    Exercise(
        number=1,
        title="What three dimensions prove",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_dimensions,
        solution=most_dimensions,
        wrong={
            "forgets the centring": lambda classes, d_head: min(classes, d_head),
            "forgets the width": lambda classes, d_head: classes - 1,
            "one class varies": lambda classes, d_head: max(1, min(classes - 1, d_head)),
            "counts pairs": lambda classes, d_head: min(classes * (classes - 1) // 2, d_head),
        },
        hints=(
            "What is the sum of the class means after their mean is taken off?",
            "And what if the head is narrower than that?",
        ),
    ),
    Exercise(
        number=2,
        title="Place or letter?",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_shares,
        solution=shares,
        wrong={
            "wrong order": lambda v, p, c: shares(v, c, p),
            "around zero": lambda v, p, c: tuple(
                s * float((v - v.mean(0)).square().sum() / v.square().sum()) for s in shares(v, p, c)
            ),
            "within the groups": lambda v, p, c: tuple(1 - s for s in shares(v, p, c)),
            "a group counts once": lambda v, p, c: tuple(s / 20 for s in shares(v, p, c)),
            "one number": lambda v, p, c: shares(v, p, c)[0],
        },
        hints=(
            "Take the mean off, then the mean of each place: how long are those means?",
            "Each vector of a group counts its group's mean once; divide by the sum of all squares.",
        ),
    ),
    Exercise(
        number=3,
        title="Eight places in a plane",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_code,
        solution=circle_code,
        wrong={
            "a line": _line_code,
            "a direction a class": _class_code,
            "too short": _weak_circle,
            "keys only": lambda places: _class_code(places)[1],
        },
        hints=(
            "On a line, which keys can have the largest product with a query?",
            "Put the keys where none lies between others: on a circle, or on a parabola.",
            "Neighbours on a circle of twelve differ by 1 - cos(30 degrees) = 0.13; the length of the query multiplies that.",
        ),
    ),
]
