"""Exercises of the chapter ``kernels/flowformer``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.kernels.flowformer import capacities, evenness, flow_steps


def _drawn(sinks: int, sources: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [sinks, 6] and keys [sources, 6] of one head, float64, with logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (sinks, sources))
    return q, k


def _same(got: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> bool:
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=tolerance, atol=tolerance)


def _tensor(answer: object, shape: tuple[int, ...]) -> Tensor | Feedback:
    """The answer as float64, or what is wrong with its shape."""
    got = torch.as_tensor(answer, dtype=torch.float64)
    if tuple(got.shape) != shape:
        return reject(f"Your function returns shape {tuple(got.shape)}; {shape} is wanted.")
    return got


# ------------------------------------------------------------------------------------- 1: what the sources send in all


def conserved_outgoing(a: Tensor) -> Tensor:
    """What each source sends, [M], once every sink of the capacities [N, M] receives 1."""
    return (a / a.sum(1, keepdim=True)).sum(0)  # swap the sums: over sources first, each sink counts 1, so N in all


def _check_conserved(answer: Callable[[Tensor], Tensor]) -> Feedback:
    a = capacities(*_drawn(6, 8))
    got = _tensor(answer(a.clone()), (8,))
    if isinstance(got, Feedback):
        return got
    if _same(got, torch.ones(8, dtype=torch.float64)):
        return reject(
            "Every source sends exactly 1: you fixed the sources (columns). Fix the sinks, which are the rows."
        )
    if _same(got, a.sum(0)):
        return reject("These are the raw outgoing flows. Divide each row by what its sink receives before you sum.")
    if _same(got, a.sum(0) / a.sum()):
        return reject("You divided by the flow of the whole network, so the sum is 1. Each sink is fixed by itself.")
    if not _same(got, conserved_outgoing(a)):
        return reject(
            f"Your flows sum to {float(got.sum()):.4g}; with every sink fixed at 1 they must sum to 6, the sinks."
        )
    return accept(
        f"They sum to {float(got.sum()):.12g}, one for each of 6 sinks, however they are spread: here from "
        f"{float(got.min()):.2f} to {float(got.max()):.2f}. A source can gain only what another loses."
    )


# ----------------------------------------------------------------------------------- 2: compete anew at every token


def contest(flow: Tensor, values: Tensor) -> Tensor:
    """Sum of t softmax(flow[:t]) values[:t] for every t, [T, V], from two running sums: all sources so far compete anew."""
    t = torch.arange(1, len(flow) + 1, dtype=flow.dtype)
    strength = flow.exp()
    return (t / strength.cumsum(0))[:, None] * (strength[:, None] * values).cumsum(0)


def _frozen(flow: Tensor, values: Tensor) -> Tensor:
    """The same with every weight as it was when its source arrived."""
    t = torch.arange(1, len(flow) + 1, dtype=flow.dtype)
    weight = t * flow.exp() / flow.exp().cumsum(0)
    return (weight[:, None] * values).cumsum(0)


def _check_contest(answer: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    flow = torch.tensor([0.1, 0.9, 0.6, 1.0, 0.2, 0.7, 0.4], dtype=torch.float64)
    sources = torch.eye(7, dtype=torch.float64)  # what comes out of one-hot values are the weights themselves
    got = _tensor(answer(flow.clone(), sources.clone()), (7, 7))
    if isinstance(got, Feedback):
        return got
    wanted, frozen, t = contest(flow, sources), _frozen(flow, sources), torch.arange(1, 8, dtype=torch.float64)
    if got.triu(1).abs().max() > 1e-12:
        return reject(
            "Output t contains values that come after t. Let only s <= t take part: sums must run, not be whole."
        )
    if _same(got, frozen):
        return reject(
            "You froze each weight when its source arrived and summed afterwards. That is the causal form of the paper; here the "
            "weight of an early source must fall when stronger ones come."
        )
    if _same(got * t[:, None], wanted):
        return reject(
            "Your weights sum to 1 at every t. They average 1 over the sources so far, so they must sum to t."
        )
    if not _same(got, wanted):
        row = int((got - wanted).abs().amax(1).gt(1e-9).nonzero()[0])
        return reject(
            f"At t = {row + 1} the weights should be {row + 1} softmax(flow[:{row + 1}]) = {_brief(wanted[row, : row + 1])}; "
            f"yours are {_brief(got[row, : row + 1])}."
        )
    return accept(
        f"The first source enters with weight 1 whatever its flow. Frozen, it keeps that; revised, it has {float(wanted[-1, 0]):.2f} "
        "by token 7. And you needed running sums alone: leave the values unnormalised and divide when you read. So this freeze saves "
        "nothing. What one pass cannot revise is the flow of an earlier source, which depends on the sinks that come after it."
    )


# ----------------------------------------------------------------------------------------- 3: one step of Sinkhorn


def sinkhorn(a: Tensor, iterations: int) -> Tensor:
    """Scale rows of [N, M] to sum 1, then columns to sum N / M, ``iterations`` times."""
    n, m = a.shape
    for _ in range(iterations):
        a = a / a.sum(1, keepdim=True)
        a = a / a.sum(0) * n / m
    return a


def _check_sinkhorn(answer: Callable[[Tensor, int], Tensor]) -> Feedback:
    q, k = _drawn(6, 8)
    a = capacities(q, k)
    once, often = _tensor(answer(a.clone(), 1), (6, 8)), _tensor(answer(a.clone(), 200), (6, 8))
    if isinstance(once, Feedback):
        return once
    if isinstance(often, Feedback):
        return often
    rows, columns = often.sum(1), often.sum(0)
    if torch.allclose(columns, torch.ones_like(columns), rtol=1e-6):
        return reject(
            f"Your columns sum to 1, so 8 flows out while 6 rows of 1 take 6 in (row sums now {_brief(rows)}): the two can never "
            "hold at once. Scale columns to N / M."
        )
    if _same(once, a / a.sum(1, keepdim=True)):
        return reject(
            "One iteration has two halves; yours scales the rows alone. Scale the columns to N / M after them."
        )
    if not torch.allclose(rows, torch.ones_like(rows), rtol=1e-6) or not torch.allclose(
        columns, torch.full_like(columns, 6 / 8), rtol=1e-6
    ):
        return reject(
            f"After 200 iterations rows sum to {_brief(rows)} and columns to {_brief(columns)}; 1 and 0.75 are wanted. "
            "Divide by the sums: what has too much must shrink."
        )
    if not _same(once, sinkhorn(a, 1)):
        return reject(
            "It converges, but your first iteration starts with the columns. Rows come first here, as in flow attention."
        )
    steps = flow_steps(q, k)
    even = {
        "rows scaled only (linear attention)": steps["sinks fixed"],
        "Sinkhorn": often,
        "flow attention": steps["competition"],
    }
    found = "; ".join(f"{name} {float(evenness(weights).mean()):.4f}" for name, weights in even.items())
    return accept(
        f"Evenness of the rows: {found}. Both look at the same column sums after the rows are fixed, the conserved outgoing flow. "
        "Sinkhorn divides by it until every source sends alike; flow attention multiplies by its softmax, so that a source which "
        "sends much sends more. One makes peace, the other competition."
    )


def _brief(x: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in x.tolist()) + "]"


EXERCISES = [
    Exercise(
        number=1,
        title="Where do the sums come from?",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_conserved,
        solution=conserved_outgoing,
        wrong={
            "fixes the sources": lambda a: (a / a.sum(0)).sum(0),
            "leaves the flows raw": lambda a: a.sum(0),
            "divides by the whole": lambda a: a.sum(0) / a.sum(),
            "sums over the sources": lambda a: (a / a.sum(1, keepdim=True)).sum(1),
            "divides by a mean": lambda a: (a / a.mean(1, keepdim=True)).sum(0),
        },
        hints=(
            "Rows are sinks. What a sink receives is the sum of its row; after the division each row sums to 1.",
            "What a source sends is the sum of its column. Sum over all sources and swap the two sums.",
        ),
    ),
    Exercise(
        number=2,
        title="Compete anew at every token",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_contest,
        solution=contest,
        wrong={
            "freezes the weights": _frozen,
            "forgets the factor t": lambda flow, values: (
                contest(flow, values) / torch.arange(1, len(flow) + 1)[:, None]
            ),
            "lets the future compete": lambda flow, values: len(flow) * flow.softmax(0).expand(len(flow), -1) @ values,
            "divides by the sum of all": lambda flow, values: len(flow) * (flow.softmax(0)[:, None] * values).cumsum(0),
        },
        hints=(
            "Write the softmax of the first t flows as exp(flow[s]) over a sum. Which of the two changes with t?",
            "Keep two running sums, of exp(flow) values and of exp(flow). Divide at every t, and multiply by t.",
        ),
    ),
    Exercise(
        number=3,
        title="Peace or competition?",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_sinkhorn,
        solution=sinkhorn,
        wrong={
            "columns of 1": lambda a, iterations: _alternate(a, iterations, 1.0),
            "rows alone": lambda a, iterations: a / a.sum(1, keepdim=True),
            "columns first": lambda a, iterations: sinkhorn(a / a.sum(0), iterations),
            "multiplies": lambda a, iterations: a / a.sum(1, keepdim=True) * (a / a.sum(1, keepdim=True)).sum(0),
        },
        hints=(
            "All rows together hold N, all columns together must hold as much: so each of M columns gets N / M.",
            "Two lines in a loop: divide by a.sum(1, keepdim=True), then by a.sum(0) and multiply by N / M.",
        ),
    ),
]


def _alternate(a: Tensor, iterations: int, column: float) -> Tensor:
    for _ in range(iterations):
        a = a / a.sum(1, keepdim=True)
        a = a / a.sum(0) * column
    return a
