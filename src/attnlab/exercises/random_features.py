"""Exercises of the chapter ``foundations/random-features``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.foundations.random_features import (
    Target,
    arc_cosine,
    augment,
    draw_heads,
    draw_tokens,
    scores,
    set_features,
)
from attnlab.models import ridge

# ------------------------------------------------------------------------------------------------ 1: how large a weight is


def weight_variance(query: Tensor, key: Tensor) -> float:
    """Variance of the entries of W [D, D], all independent with mean 0, for which ``<W, q kᵀ>`` has variance 1."""
    return 1 / float(query.square().sum() * key.square().sum())


def _check_variance(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(5)
    unit = augment(draw_tokens(1, 1, 8, generator))[0]
    longer = torch.randn(2, 5, generator=generator, dtype=torch.float64) * 1.7
    for what, (q, k) in {"two tokens of different lengths": longer, "two augmented unit tokens": unit}.items():
        found, right = float(answer(q, k)), weight_variance(q, k)
        if math.isclose(found, right, rel_tol=1e-9):
            continue
        D, qq, kk = len(q), float(q.square().sum()), float(k.square().sum())
        mistakes = {
            right**0.5: "that is the standard deviation; the variance is its square.",
            1
            / (
                qq + kk
            ): "norms of query and key multiply: the variance of a sum of D² terms q_a k_b W_ab is their sum of squares.",
            1 / qq: "you count the query only; each weight is multiplied by an entry of the key too.",
            1 / kk: "you count the key only; each weight is multiplied by an entry of the query too.",
            1
            / D: "1 / D is right for tokens of D entries of size 1 and one factor; here two tokens multiply, and their lengths are given.",
            1 / D**2: "1 / D² counts the weights as if every entry of the tokens were 1.",
            1 / right: "upside down: longer tokens need smaller weights.",
        }
        for wrong, why in mistakes.items():
            if math.isclose(found, wrong, rel_tol=1e-9):
                return reject(f"For {what}: {why}")
        return reject(f"For {what} the variance is {right:.4g}; you say {found:.4g}. Write the score as a double sum.")
    return accept("1 / (|q|² |k|²). A unit token with a 1 appended has squared length 2, twice: that is the 1/4.")


# ------------------------------------------------------------------------------------------- 2: another network's kernel


def set_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel [n, m] a neuron of the averaged network, for unit tokens [n, N + 1, d] and [m, N + 1, d], first layer of variance 1/3."""
    queries = x[:, 0] @ y[:, 0].T
    keys = torch.einsum("nid,mjd->nmij", x[:, 1:], y[:, 1:])
    return arc_cosine((queries[:, :, None, None] + keys + 1) / 3).mean((2, 3))


def _wrong_set_kernel(mistake: str) -> Callable[[Tensor, Tensor], Tensor]:
    def wrong(x: Tensor, y: Tensor) -> Tensor:
        queries = (x[:, 0] @ y[:, 0].T)[:, :, None, None]
        keys = torch.einsum("nid,mjd->nmij", x[:, 1:], y[:, 1:])
        if mistake == "paired":
            return arc_cosine((queries + keys + 1) / 3).diagonal(dim1=2, dim2=3).mean(-1)
        if mistake == "product":
            return arc_cosine(queries * keys / 3).mean((2, 3))
        if mistake == "constant":
            return arc_cosine((queries + keys) / 2).mean((2, 3))
        if mistake == "average first":
            return arc_cosine((queries[..., 0, 0] + keys.mean((2, 3)) + 1) / 3)
        if mistake == "values":
            return (arc_cosine((queries + keys + 1) / 3) * keys).mean((2, 3))
        return arc_cosine((queries + keys + 1) / 3).sum((2, 3))

    return wrong


_SET_MISTAKES = {
    "paired": "you average over i = j only. The order of the keys must not count: every key of x meets every key of y.",
    "product": "this is attention's product of query and key. A neuron of this network adds them before the ReLU.",
    "constant": "the third part of the input is missing: the constant 1 has the product 1 · 1.",
    "average first": "you average before the nonlinearity. The network averages after its ReLU.",
    "values": "there are no value vectors here: the trained weights multiply the neurons themselves.",
    "sum": "the mean over keys divides by N twice, once a side.",
}


def _check_set_kernel(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(11)
    x, y = (draw_tokens(n, 3, 5, generator) for n in (4, 3))
    found = torch.as_tensor(answer(x, y))
    if found.shape != (4, 3):
        return reject(f"For 4 and 3 inputs the kernel is [4, 3]; yours is {list(found.shape)}.")
    if torch.allclose(found.double(), set_kernel(x, y), atol=1e-9):
        neurons = torch.randn(4000, 11, generator=generator, dtype=torch.float64) * 3**-0.5
        sampled = set_features(x, neurons) @ set_features(y, neurons).T / 4000
        off = float((sampled - found).norm() / found.norm())
        return accept(
            f"4,000 neurons agree to {off:.1%}. Query and key only ever add up inside κ: no product of the two."
        )
    for mistake, why in _SET_MISTAKES.items():
        if torch.allclose(found.double(), _wrong_set_kernel(mistake)(x, y), atol=1e-9):
            return reject(why[0].upper() + why[1:])
    off = float((found.double() - set_kernel(x, y)).abs().max())
    return reject(
        f"Your kernel is off by up to {off:.3g}. What is the correlation of two neurons' inputs, [x₀; x_i; 1] and [y₀; y_j; 1]?"
    )


# ------------------------------------------------------------------------------------ 3: what softmax forgets of the query

LABELS, HELD_OUT, HEADS = 400, 500, 120
QUERY_BELOW, OTHERS_BELOW = 0.75, 1.35


def last_number(tokens: Tensor, W: Tensor) -> Tensor:
    """One ReLU neuron of the query a head, from the last column of its frozen weights: [n, M]."""
    return F.relu(tokens[:, 0] @ W[:, :, -1].T)


def softmax_errors(last: Callable[[Tensor, Tensor], Tensor] | None, seed: int) -> dict[str, float]:
    """Test errors of frozen softmax heads whose last number is replaced, on three targets with 400 labels."""
    generator = torch.Generator().manual_seed(seed)
    plain = draw_tokens(LABELS + HELD_OUT, 8, 8, generator)
    beta = F.normalize(torch.randn(8, generator=generator, dtype=torch.float64), dim=0)
    targets = [Target("query", 2), Target("keys", 2), Target("correlation", 1)]
    y = torch.stack([target(plain, beta) for target in targets], 1)
    tokens, W = augment(plain), draw_heads(HEADS, 9, generator)
    out = scores(tokens, W).softmax(-1) @ tokens[:, 1:]  # [n, M, 9]
    if last is not None:
        out[..., -1] = last(tokens, W)
    x, fitted = out.flatten(1), LABELS * 4 // 5
    best = ridge.fit(x[:fitted], y[:fitted], x[fitted:LABELS], y[fitted:LABELS])
    errors = ridge.relative_error(best.predict(x[LABELS:]), y[LABELS:]).tolist()
    return {target.name: error for target, error in zip(targets, errors, strict=True)}


def _check_last(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(3)
    tokens, W = augment(draw_tokens(6, 8, 8, generator)), draw_heads(HEADS, 9, generator)
    found = torch.as_tensor(answer(tokens, W))
    if found.shape != (6, HEADS):
        return reject(
            f"One number a head: for 6 inputs and {HEADS} heads [6, {HEADS}] is wanted, yours is {list(found.shape)}."
        )
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], 1)
    if not torch.allclose(torch.as_tensor(answer(shuffled, W)), found, atol=1e-9):
        return reject("Your number changes when the keys change places, so the layer no longer ignores their order.")
    if torch.allclose(found, found[:1].expand_as(found)):
        return reject("Your number is the same for every input, as the constant that it replaces: nothing is won.")
    runs = [(softmax_errors(None, seed), softmax_errors(answer, seed)) for seed in (21, 22)]
    before, after = ({name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(*runs, strict=True))
    told = ", ".join(f"{name} {before[name]:.2f} to {after[name]:.2f}" for name in after)
    if after["query 2"] > QUERY_BELOW:
        return reject(
            f"The query is still lost (errors: {told}). A number that is linear in the query, or nearly constant over queries, "
            "cannot carry its square."
        )
    if worse := [name for name in after if name != "query 2" and after[name] > OTHERS_BELOW * before[name]]:
        return reject(
            f"The query is back, but {' and '.join(worse)} became much worse ({told}): your number also carries a lot that "
            "these targets do not need."
        )
    return accept(
        f"The query is back at no extra weight: {told}. In a Transformer the residual stream and the MLP can do this."
    )


EXERCISES: list[Exercise] = [
    Exercise(
        number=1,
        title="How large is a random weight?",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_variance,
        solution=weight_variance,
        wrong={
            "standard deviation": lambda q, k: weight_variance(q, k) ** 0.5,
            "the query only": lambda q, k: 1 / q.square().sum(),
            "usual initialisation": lambda q, k: 1 / len(q),
            "number of weights": lambda q, k: 1 / len(q) ** 2,
            "upside down": lambda q, k: q.square().sum() * k.square().sum(),
            "always a quarter": lambda q, k: 0.25,
        },
        hints=(
            "The score is the double sum of q_a W_ab k_b.",
            "Independent terms: the variances q_a² k_b² s² add up. The double sum of q_a² k_b² factors.",
        ),
    ),
    Exercise(
        number=2,
        title="The kernel of the averaged network",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_set_kernel,
        solution=set_kernel,
        wrong={mistake: _wrong_set_kernel(mistake) for mistake in _SET_MISTAKES},
        hints=(
            "A neuron's input is <w, [x₀; x_i; 1]> with variance 3 · 1/3 = 1, so arc_cosine applies to a correlation.",
            "The correlation of two such inputs is the product of the two vectors over 3, and that is a sum of three products.",
            "The mean over keys stands on both sides: average over all pairs (i, j).",
        ),
    ),
    Exercise(
        number=3,
        title="Give softmax its query back",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_last,
        solution=last_number,
        wrong={
            "the constant": lambda tokens, W: torch.ones(len(tokens), len(W), dtype=tokens.dtype),
            "depends on order": lambda tokens, W: scores(tokens, W)[..., 0],
            "linear in the query": lambda tokens, W: tokens[:, 0] @ W[:, :, -1].T,
            "the log normaliser": lambda tokens, W: scores(tokens, W).logsumexp(-1),
            "one number for all heads": lambda tokens, W: tokens[:, :1, 0],
        },
        hints=(
            "The last number of every head is the softmax-weighted mean of the constant 1, so it is always 1: a wasted feature.",
            "Which function of the query alone has an even part? The layer's own ReLU did that job before softmax replaced it.",
            "W[:, :, -1] holds one random vector a head, which has seen neither data nor labels.",
        ),
    ),
]
