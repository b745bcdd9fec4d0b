"""Exercises of the chapter ``foundations/pointer-networks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.foundations import pointer_networks_runs as runs
from attnlab.foundations import polygons
from attnlab.foundations.pointer_tasks import POINTER, instances
from attnlab.models.training import evaluating

# ---------------------------------------------------------------------------------------------- 1: what grows with the input


def output_parameters(width: int, points: int) -> tuple[int, int, int]:
    """Learned numbers between decoder state and output, without biases: fixed softmax, blending attention, pointer."""
    score = 2 * width**2 + width
    return width * (points + 1), score + 2 * width * (points + 1), score


def _check_parameters(answer: Callable[..., Any]) -> Feedback:
    names = ("the fixed softmax", "blending attention", "the pointer")
    for width, points in ((64, 10), (64, 50), (256, 500)):
        found, right = answer(width, points), output_parameters(width, points)
        if not isinstance(found, tuple | list) or len(found) != 3:
            return reject("Return three numbers: fixed softmax, blending attention, pointer.")
        for name, mine, wanted in zip(names, (int(x) for x in found), right, strict=True):
            if mine == wanted:
                continue
            where = f"Width {width}, {points} points, {name}: "
            score = 2 * width**2 + width
            mistakes = {
                wanted
                - width: "v has a number for each of the hidden units of the score; or the stop symbol is missing.",
                wanted - 2 * width: "the stop symbol is a class too: points + 1 classes.",
                score + width * (points + 1): "the softmax reads [d; d'], which is twice as wide as d.",
                2 * width * (points + 1): "the attention that makes d' has W1, W2 and v of its own.",
                score + 2 * width * (points + 1): "a pointer has no output matrix: its scores are the logits.",
                wanted - width**2: "the score has two matrices, W1 for the inputs and W2 for the decoder's state.",
            }
            return reject(
                where + mistakes.get(mine, f"{wanted} numbers; you say {mine}. List the matrices and their shapes.")
            )
    return accept(
        "The pointer's count does not know how many points there are. That, and not the count itself, is why it can be "
        "asked about more points than it was trained on."
    )


# ---------------------------------------------------------------------------------------------------------- 2: one pointing


def point(e: Tensor, d: Tensor, w1: Tensor, w2: Tensor, v: Tensor, visited: Tensor) -> Tensor:
    """Probabilities [n] of the next point: additive scores of encodings e [n, D] for a state d [D], visited [n] left out."""
    u = torch.tanh(e @ w1.T + w2 @ d) @ v
    return u.masked_fill(visited, -torch.inf).softmax(-1)


def _check_point(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for n, width in ((7, 5), (12, 4), (4, 6)):
        e, d, w1, w2, v = draw(n, width), draw(width), draw(width, width), draw(width, width), 3 * draw(width)
        for visited in (torch.zeros(n, dtype=torch.bool), torch.arange(n) % 3 == 0, torch.arange(n) != 2):
            given = (e.clone(), d.clone(), w1, w2, v, visited.clone())
            found = torch.as_tensor(answer(*given))
            if found.shape != (n,):
                return reject(
                    f"For {n} points a probability each is wanted, shape [{n}]; yours is {list(found.shape)}. "
                    "A blended vector is what the pointer network leaves out."
                )
            if bool(torch.isnan(found).any()):
                return reject("There is NaN among your probabilities; mask the scores with -inf before the softmax.")
            right = point(e, d, w1, w2, v, visited)
            if torch.allclose(found, right, atol=1e-9):
                continue
            if float(found[visited].sum()) > 1e-9:
                return reject(
                    f"Visited points still get {float(found[visited].sum()):.2f} of the probability: a score of 0 is "
                    "not impossible, only exp(-inf) is."
                )
            if abs(float(found.sum()) - 1) > 1e-9:
                return reject(
                    f"Your probabilities sum to {float(found.sum()):.3f}: mask before the softmax, so that the others share all."
                )
            if torch.allclose(found, point(e, d, w2, w1, v, visited), atol=1e-9):
                return reject("W1 and W2 are swapped: W1 meets the encodings, W2 the decoder's state.")
            if torch.allclose(found, point(e, d, w1.T, w2.T, v, visited), atol=1e-9):
                return reject("Your matrices are transposed: u_j = v . tanh(W1 e_j + W2 d), and e holds e_j as rows.")
            if torch.allclose(found, ((e @ w1.T + w2 @ d) @ v).masked_fill(visited, -torch.inf).softmax(-1), atol=1e-9):
                return reject("The tanh is missing: without it W2 d adds the same to all scores, and d has no say.")
            return reject(
                "Your probabilities differ from softmax_j(v . tanh(W1 e_j + W2 d)) over the unvisited points."
            )
    return accept("That is the whole output layer: the softmax over the inputs is returned, and nothing is blended.")


# ------------------------------------------------------------------------------------------------- 3: only sensible answers


def hull_mask(said: list[int], n: int) -> list[bool]:
    """Which symbols 0 .. n must not follow ``said``: points twice, a close before three corners, a stop before the close."""
    if len(said) > 1 and said[-1] == said[0]:
        return [symbol != 0 for symbol in range(n + 1)]
    may_close = len(said) >= 3
    return [symbol == 0 or (symbol in said and not (may_close and symbol == said[0])) for symbol in range(n + 1)]


def decode_with(mask: Callable[[list[int], int], Any], count: int = 100, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Test instances [count, n, 2] and what the recorded pointer says of them under a mask, symbols [count, n + 2]."""
    points = instances(n, count)
    solver = runs.load("hull", POINTER)
    said: list[list[int]] = [[] for _ in range(count)]
    with evaluating(solver):
        memory = solver.read(torch.as_tensor(points, dtype=torch.float32))
        state, previous = solver.start(memory), torch.zeros(count, dtype=torch.long)
        for _ in range(n + 2):
            logits, state = solver.step(memory, state, previous)
            forbidden = torch.tensor([list(mask(row, n)) if 0 not in row else [False] + [True] * n for row in said])
            previous = logits.masked_fill(forbidden, -torch.inf).argmax(-1)
            for row, symbol in zip(said, previous.tolist(), strict=True):
                row.append(symbol)
    return points, np.array(said)


def _check_mask(answer: Callable[..., Any]) -> Feedback:
    for said, n in (
        ([], 5),
        ([2], 5),
        ([2, 4], 5),
        ([2, 4, 5], 5),
        ([2, 4, 5, 1], 6),
        ([2, 4, 5, 2], 5),
        ([3, 1, 2, 3], 3),
    ):
        found, right = [bool(x) for x in answer(list(said), n)], hull_mask(said, n)
        if len(found) != n + 1:
            return reject(f"{n} points have {n + 1} symbols, with stop; your mask has {len(found)}.")
        wrong = [symbol for symbol in range(n + 1) if found[symbol] != right[symbol]]
        if not wrong:
            continue
        symbol, where = wrong[0], f"After {said} of {n} points "
        closed = len(said) > 1 and said[-1] == said[0]
        if closed:
            return reject(where + "the hull is closed: all that may follow is stop.")
        if symbol == 0:
            return reject(where + "stop is allowed by your mask, though the polygon is still open.")
        if said and symbol == said[0] and len(said) >= 3:
            return reject(where + f"point {symbol} must be allowed: repeating the first point closes the hull.")
        if said and symbol == said[0]:
            return reject(where + f"closing with point {symbol} would leave fewer than three corners.")
        if symbol in said:
            return reject(where + f"point {symbol} is allowed by your mask, but no corner comes twice.")
        return reject(where + f"point {symbol} is forbidden by your mask, and nothing speaks against it.")
    before, after = (polygons.hull_scores(*decode_with(mask)) for mask in (lambda said, n: [False] * (n + 1), answer))
    told = ", ".join(
        f"{name} {100 * before[key].mean():.0f} % before and {100 * after[key].mean():.0f} % with your mask"
        for name, key in (("simple polygons", "simple"), ("exact hulls", "exact"))
    )
    return accept(
        f"On 100 inputs of 20 points: {told}. What is left are corners in the wrong place, which no mask sees."
    )


def _mask_for_tours(said: list[int], n: int) -> list[bool]:
    return [symbol in said if symbol else len(said) < n for symbol in range(n + 1)]


def _mask_closing_early(said: list[int], n: int) -> list[bool]:
    closed = len(said) > 1 and said[-1] == said[0]
    return [symbol != 0 if closed else symbol == 0 or (symbol in said and symbol != said[0]) for symbol in range(n + 1)]


def _mask_stopping_early(said: list[int], n: int) -> list[bool]:
    return [hull_mask(said, n)[symbol] and symbol != 0 for symbol in range(n + 1)]


EXERCISES = [
    Exercise(
        number=1,
        title="What grows with the input?",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_parameters,
        solution=output_parameters,
        wrong={
            "no stop symbol": lambda width, points: (
                width * points,
                2 * width**2 + width + 2 * width * points,
                2 * width**2 + width,
            ),
            "the softmax reads d' alone": lambda width, points: (
                width * (points + 1),
                2 * width**2 + width + width * (points + 1),
                2 * width**2 + width,
            ),
            "a pointer with an output matrix": lambda width, points: (
                width * (points + 1),
                2 * width**2 + width + 2 * width * (points + 1),
                2 * width**2 + width + 2 * width * (points + 1),
            ),
            "one number": lambda width, points: width * (points + 1),
        },
        hints=(
            "The pointer learns W1 and W2 [D, D] and v [D]; with stop there are points + 1 classes.",
            "Blending needs the same score, and then a softmax over [d; d'], 2 D numbers.",
        ),
    ),
    Exercise(
        number=2,
        title="Point once",
        difficulty="medium",
        minutes=12,
        answer_is="function",
        checker=_check_point,
        solution=point,
        wrong={
            "masked after the softmax": lambda e, d, w1, w2, v, visited: (
                (torch.tanh(e @ w1.T + w2 @ d) @ v).softmax(-1).masked_fill(visited, 0)
            ),
            "masked by a score of 0": lambda e, d, w1, w2, v, visited: (
                (torch.tanh(e @ w1.T + w2 @ d) @ v).masked_fill(visited, 0).softmax(-1)
            ),
            "no tanh": lambda e, d, w1, w2, v, visited: (
                ((e @ w1.T + w2 @ d) @ v).masked_fill(visited, -torch.inf).softmax(-1)
            ),
            "matrices swapped": lambda e, d, w1, w2, v, visited: point(e, d, w2, w1, v, visited),
            "matrices transposed": lambda e, d, w1, w2, v, visited: point(e, d, w1.T, w2.T, v, visited),
            "a blend": lambda e, d, w1, w2, v, visited: point(e, d, w1, w2, v, visited) @ e,
        },
        hints=(
            "All scores at once: e @ w1.T is [n, D], and w2 @ d joins every row.",
            "masked_fill(visited, -torch.inf) comes between scores and softmax.",
        ),
    ),
    Exercise(
        number=3,
        title="Only sensible hulls",
        difficulty="hard",
        minutes=20,
        answer_is="function",
        checker=_check_mask,
        solution=hull_mask,
        wrong={
            "the mask of tours": _mask_for_tours,
            "closing with two corners": _mask_closing_early,
            "stopping while open": _mask_stopping_early,
            "a symbol too few": lambda said, n: [symbol + 1 in said for symbol in range(n)],
        },
        hints=(
            "Three states: open with fewer than three corners, open with three or more, closed.",
            "The first point is special: forbidden, then allowed, and after it only stop.",
        ),
    ),
]
