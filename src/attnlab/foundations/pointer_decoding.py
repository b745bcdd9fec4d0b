"""From logits to answers, for the chapter ``foundations/pointer-networks``: what may be said next, greedy decoding, beam search."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnlab.data import IGNORE
from attnlab.foundations.pointer_networks import Solver, shifted
from attnlab.models.training import evaluating

Rule = Literal["free", "tour"]  # say anything, or visit every point once and then stop


def forbidden(said: Tensor, symbols: int) -> Tensor:
    """What a tour must not say next after ``said`` [B, M]: points that it has visited, and stop before all are. [B, symbols]."""
    visited = torch.zeros(len(said), symbols, dtype=torch.bool, device=said.device)
    visited.scatter_(1, said, True)
    visited[:, 0] = ~visited[:, 1:].all(1)
    return visited


def forbidden_along(targets: Tensor, symbols: int) -> Tensor:
    """``forbidden`` before every symbol of targets [B, M], [B, M, symbols]."""
    before = shifted(targets)
    visited = torch.nn.functional.one_hot(before, symbols).cumsum(1).bool()
    visited[..., 0] = ~visited[..., 1:].all(-1)
    return visited


def pointer_loss(solver: Solver, batch: Any, rule: Rule = "free") -> Tensor:
    """Cross entropy in nats a symbol over a batch (points, targets); under ``tour`` among the symbols that are allowed."""
    points, targets = batch
    logits = solver(points, targets)
    if rule == "tour":
        logits = logits.masked_fill(forbidden_along(targets, logits.shape[-1]), -torch.inf)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def greedy(solver: Solver, points: Tensor, steps: int, rule: Rule = "free") -> tuple[Tensor, Tensor]:
    """Say the likeliest symbol until stop.

    Args:
        points: [B, n, 2].
        steps: symbols at most.
        rule: ``tour`` forbids what no tour can say.

    Returns:
        symbols [B, steps], 0 after the stop, and the probabilities they were chosen from [B, steps, n + 1].

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one symbol is wanted")
    with evaluating(solver):
        memory = solver.read(points)
        state = solver.start(memory)
        said = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
        ended = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        chances = []
        for _ in range(steps):
            logits, state = solver.step(memory, state, said[:, -1])
            if rule == "tour":
                logits = logits.masked_fill(forbidden(said, logits.shape[-1]), -torch.inf)
            chances.append(logits.softmax(-1))
            now = logits.argmax(-1).masked_fill(ended, 0)
            ended = ended | (now == 0)
            said = torch.cat([said, now[:, None]], dim=1)
    return said[:, 1:], torch.stack(chances, dim=1)


def beam_search(solver: Solver, points: Tensor, steps: int, width: int, rule: Rule = "free") -> tuple[Tensor, Tensor]:
    """The likeliest answer found while keeping the ``width`` likeliest beginnings of each instance.

    Args:
        points: [B, n, 2].
        steps: symbols at most.
        width: beginnings kept; 1 is greedy.
        rule: as in ``greedy``.

    Returns:
        symbols [B, steps], 0 after the stop, and the log-probability of each answer [B].

    Raises:
        ValueError: no step, or a width below 1.
    """
    if steps < 1 or width < 1:
        raise ValueError(f"steps={steps}, width={width}: both must be at least 1")
    batch = len(points)
    rows = torch.arange(batch, device=points.device)[:, None]
    with evaluating(solver):
        one = solver.read(points)
        memory = type(one)(*(_each(part, width) for part in one))
        state = solver.start(memory)
        said = torch.zeros(batch * width, 1, dtype=torch.long, device=points.device)
        score = torch.full((batch, width), -torch.inf, device=points.device, dtype=points.dtype)
        score[:, 0] = 0  # all beginnings are equal at first: only one may grow
        ended = torch.zeros(batch, width, dtype=torch.bool, device=points.device)
        for _ in range(steps):
            logits, state = solver.step(memory, state, said[:, -1])
            if rule == "tour":
                logits = logits.masked_fill(forbidden(said, logits.shape[-1]), -torch.inf)
                logits[:, 0] = logits[:, 0].masked_fill(ended.flatten(), 0.0)
            steps_on = logits.log_softmax(-1).view(batch, width, -1)
            only_stop = torch.full_like(steps_on, -torch.inf)
            only_stop[..., 0] = 0
            total = score[..., None] + torch.where(ended[..., None], only_stop, steps_on)
            score, pick = total.flatten(1).topk(width, dim=1)  # [B, width]
            symbols = logits.shape[-1]
            origin = (rows * width + pick // symbols).flatten()
            now = (pick % symbols).flatten()
            state = tuple(part[origin] for part in state)
            said = torch.cat([said[origin], now[:, None]], dim=1)
            ended = (ended.flatten()[origin] | (now == 0)).view(batch, width)
    best = score.argmax(1)
    return said.view(batch, width, -1)[rows[:, 0], best, 1:], score[rows[:, 0], best]


def _each(part: Any, width: int) -> Any:
    """Every row of a tensor, or of all tensors of a tuple, ``width`` times."""
    if isinstance(part, tuple):
        return tuple(_each(item, width) for item in part)
    return part.repeat_interleave(width, dim=0)
