"""Exercises of the chapter ``foundations/positional-attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject

# --------------------------------------------------------------------------------------- 1: how fast does softmax harden?


def scale_for_certainty(gap: float, tokens: int, share: float) -> float:
    """The c at which the winning key has at least ``share``, if all scores but its own lie ``gap`` below and grow with c²."""
    return math.sqrt(math.log(share * (tokens - 1) / (1 - share)) / gap)


def _check_scale(answer: Callable[..., Any]) -> Feedback:
    for gap, tokens, share in ((0.5, 5, 0.99), (0.1, 9, 0.9), (2.0, 2, 0.999)):
        found, right = float(answer(gap, tokens, share)), scale_for_certainty(gap, tokens, share)
        if math.isclose(found, right, rel_tol=1e-6):
            continue
        where = f"A gap of {gap} at c = 1, {tokens} keys, a share of {share}: "
        odds = math.log(share / (1 - share))
        mistakes = {
            right**2: "queries *and* keys grow with c, so scores grow with c², not with c.",
            math.sqrt(odds / gap) if odds > 0 else math.nan: "that counts one rival, but there are tokens - 1 of them.",
            math.sqrt(
                math.log(share * tokens / (1 - share)) / gap
            ): "the winner is not its own rival: tokens - 1 remain.",
        }
        for wrong, why in mistakes.items():
            if math.isclose(found, wrong, rel_tol=1e-6):
                return reject(where + why)
        return reject(
            where + f"c = {right:.4g}; you say {found:.4g}. Write the winner's share for a gap g c² and solve."
        )
    return accept(
        "c = sqrt(ln(share (n - 1) / (1 - share)) / gap): even a hair's breadth at c = 1 becomes a certainty, and the mixture "
        "that was learned becomes a choice."
    )


# ---------------------------------------------------------------------------------------- 2: the minimum, both ways round


def everyones_min(length: int) -> list[list[int]]:
    """For every layer the place that each place hears, so that after ``log2(length)`` layers all hold the smallest number."""
    return [[(place + 2**depth) % length for place in range(length)] for depth in range(length.bit_length() - 1)]


def _check_everyone(answer: Callable[..., Any]) -> Feedback:
    for length in (2, 4, 8):
        layers = [list(layer) for layer in answer(length)]
        depth = length.bit_length() - 1
        where = f"For {length} places "
        if len(layers) != depth:
            return reject(
                where
                + f"{depth} layers are wanted, since a layer can only double what a place knows; you use {len(layers)}."
            )
        knows = [{place} for place in range(length)]
        for number, layer in enumerate(layers, start=1):
            if len(layer) != length or not all(0 <= source < length for source in layer):
                return reject(
                    where + f"layer {number} must name one place from 0 to {length - 1} for each; it is {layer}."
                )
            knows = [knows[place] | knows[source] for place, source in enumerate(layer)]
        for place, known in enumerate(knows):
            if len(known) == length:
                continue
            missing = min(set(range(length)) - known)
            if all(knows[other] == set(range(other + 1)) for other in range(length)):
                return reject(
                    where
                    + "every place learns of those before it: that is the running minimum. Here all want the whole list."
                )
            return reject(
                where + f"place {place} never hears of place {missing}: after all layers it knows {sorted(known)}. "
                "Two places that know the same can tell each other nothing."
            )
    return accept(
        "Offsets 1, 2, 4 around the circle: what a place knows doubles with every layer. Partners whose numbers differ in one bit "
        "(place XOR 1, 2, 4) do it as well; on a parallel computer that is the butterfly."
    )


# --------------------------------------------------------------------------- 3: a standard layer that does scale


def scaling_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights [..., N, N] that stay when queries and keys are multiplied by c > 0: norms divided out of both."""
    q, k = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in (q, k))
    return (q @ k.mT * q.shape[-1] ** 0.5).softmax(-1)


def scaling_layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """A layer with ``layer(c x) = c layer(x)`` for c > 0 whose weights look at the data: no bias, ReLU, scores without norms."""
    heard = scaling_weights(x @ wq, x @ wk) @ (x @ wv)
    return torch.cat([heard, x], dim=-1).matmul(w1).relu() @ w2


def _check_layer(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, hidden = 6, 12
    x, weights = draw(3, 5, d), [draw(d, d) for _ in range(3)] + [draw(2 * d, hidden), draw(hidden, d)]
    once = answer(x, *weights)
    if not isinstance(once, Tensor) or once.shape != x.shape:
        return reject(f"Return a tensor like x, {list(x.shape)}; yours is {list(getattr(once, 'shape', ()))}.")
    if once.abs().max() == 0:
        return reject("Your layer returns zeros. That scales, but it says nothing.")
    for c in (0.01, 7.0, 1000.0):
        again = answer(c * x, *weights)
        if not torch.allclose(again, c * once, rtol=1e-8, atol=0):
            off = float(((again - c * once).norm() / (c * once).norm()).item())
            flat = [0.05 * weights[0], 0.05 * weights[1]]
            near, far = (_recovered(answer, size * x[0], flat) for size in (3, 30))
            why = (
                "the scores grow with the numbers, so the weights harden"
                if (near - far).abs().max() > 0.3
                else "something is added that does not grow and shrink with the numbers: a bias, or a norm with a large epsilon"
            )
            return reject(f"At c = {c:g} your layer is off by {off:.0%}: {why}.")
    one, two = (_recovered(answer, draw(5, d), weights) for _ in range(2))
    if torch.allclose(one, torch.eye(5, dtype=one.dtype), atol=1e-6):
        return reject("What is heard never reaches the output: the MLP reads cat([heard, x]), what was heard first.")
    if not torch.allclose(one.sum(-1), torch.ones(5, dtype=one.dtype), atol=1e-6):
        return reject("Your weights do not sum to 1 in every row; take a softmax over the keys.")
    if torch.allclose(one, two, atol=1e-6):
        return reject("Your weights do not look at the data at all. That scales, but it is positional attention again.")
    return accept(
        "Normalised queries and keys, and an MLP without bias: the layer looks at the data and still scales, by construction. "
        "So scaling alone is no reason to stop looking; what remains is whether training finds the right rule."
    )


def _recovered(answer: Callable[..., Any], x: Tensor, weights: list[Tensor]) -> Tensor:
    """The weights [N, N] for one list x [N, D], N <= D, read off an MLP that passes on what was heard, and values that are x."""
    d = x.shape[-1]
    one, none = torch.eye(d, dtype=x.dtype), torch.zeros(d, d, dtype=x.dtype)
    w1 = torch.cat([torch.cat([one, -one], dim=1), torch.cat([none, none], dim=1)])  # [2 D, 2 D]: heard and -heard
    heard = answer(x[None], *weights[:2], one, w1, torch.cat([one, -one]))[0]
    return torch.linalg.lstsq(x.T, heard.T).solution.T


# ------------------------------------------------------------------------------------------------------- wrong answers


def _hardening_layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    weights = ((x @ wq) @ (x @ wk).mT * x.shape[-1] ** -0.5).softmax(-1)
    return torch.cat([weights @ (x @ wv), x], dim=-1).matmul(w1).relu() @ w2


def _biased_layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    heard = scaling_weights(x @ wq, x @ wk) @ (x @ wv)
    return (torch.cat([heard, x], dim=-1).matmul(w1) + 0.1).relu() @ w2


def _blind_layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    heard = (x @ wv).mean(-2, keepdim=True).expand_as(x)
    return torch.cat([heard, x], dim=-1).matmul(w1).relu() @ w2


def _deaf_layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1).matmul(w1).relu() @ w2


EXERCISES = [
    Exercise(
        number=1,
        title="How soon is softmax certain?",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_scale,
        solution=scale_for_certainty,
        wrong={
            "scores that grow with c": lambda gap, tokens, share: math.log(share * (tokens - 1) / (1 - share)) / gap,
            "one rival": lambda gap, tokens, share: math.sqrt(math.log(share / (1 - share)) / gap),
            "its own rival": lambda gap, tokens, share: math.sqrt(math.log(share * tokens / (1 - share)) / gap),
        },
        hints=(
            "At scale c the winner leads by g c², so its share is 1 / (1 + (n - 1) exp(-g c²)).",
            "Set that equal to the share and take a logarithm; then a root.",
        ),
    ),
    Exercise(
        number=2,
        title="The smallest number, for everybody",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_everyone,
        solution=everyones_min,
        wrong={
            "running minimum": lambda n: [
                [max(p - 2**d, 0) if p >= 2**d else p for p in range(n)] for d in range(n.bit_length() - 1)
            ],
            "one layer a place": lambda n: [[(p + 1) % n for p in range(n)] for _ in range(n - 1)],
            "the neighbour every time": lambda n: [[(p + 1) % n for p in range(n)] for _ in range(n.bit_length() - 1)],
            "places from 1": lambda n: [[p + 2**d for p in range(n)] for d in range(n.bit_length() - 1)],
        },
        hints=(
            "After a layer a place knows what it knew and what its source knew: at best twice as much.",
            "For that, the two must know different places. Try offsets 1, 2, 4 on a circle.",
        ),
    ),
    Exercise(
        number=3,
        title="Look at the data, and scale all the same",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_layer,
        solution=scaling_layer,
        wrong={
            "ordinary scores": _hardening_layer,
            "a bias in the MLP": _biased_layer,
            "weights that do not look": _blind_layer,
            "nothing heard": _deaf_layer,
        },
        hints=(
            "Which parts of a layer keep c x → c y? Linear maps without bias do, and so does ReLU.",
            "Scores are products of two things that grow. Divide each query and each key by its own length first.",
        ),
    ),
]
