"""The three tasks of the chapter ``foundations/pointer-networks``, and how a network is trained and judged on one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from attnlab import lab
from attnlab.foundations import geometry, polygons
from attnlab.foundations.pointer_decoding import Rule, beam_search, greedy, pointer_loss
from attnlab.foundations.pointer_networks import BlendingAttention, FixedSoftmax, PointerNet, SetPointer, Solver
from attnlab.models.run import TrainConfig
from attnlab.models.training import fit, seeded, step_generator

Scores = dict[str, np.ndarray]
HELD_OUT = 20_000  # seed of all test instances, apart from those of training
SOLVED = 12  # tours of more points are compared with the nearest neighbour only

SOFTMAX, ATTENTION, POINTER, SET = "fixed softmax", "blending attention", "pointer", "set pointer"
KINDS: tuple[str, ...] = (SOFTMAX, ATTENTION, POINTER, SET)
RATES: Mapping[str, float] = {SOFTMAX: 1e-2, ATTENTION: 1e-2, POINTER: 1e-2, SET: 3e-3}


# -------------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Task:
    """What is asked of points.

    Attributes:
        name: ``hull``, ``delaunay`` or ``tour``.
        targets: from points [B, n, 2] to symbols [B, M].
        score: from points and the symbols said to measures [B] by name.
        longest: symbols of an answer for n points, at most.
        rule: what may be said while decoding.
        fresh: whether solving is so cheap that every batch is a new one.
    """

    name: str
    targets: Callable[[np.ndarray], np.ndarray]
    score: Callable[[np.ndarray, np.ndarray], Scores]
    longest: Callable[[int], int]
    rule: Rule = "free"
    fresh: bool = False


def tour_scores(points: np.ndarray, outputs: np.ndarray) -> Scores:
    """How long tours are.

    Returns:
        ``length``; ``over nearest``, how far that is above the nearest neighbour's, as a share; and where the instance is
        solved, ``excess`` and ``greedy excess``, the shares by which network and nearest neighbour are above the optimum.

    Raises:
        ValueError: outputs that are no tours; decode with the rule ``tour``.
    """
    order = outputs[:, : points.shape[1]] - 1
    if not (np.sort(order, axis=1) == np.arange(points.shape[1])).all():
        raise ValueError("outputs: not every row visits every point once; decode with rule='tour'")
    length = geometry.tour_length(points, order)
    nearest = geometry.tour_length(points, geometry.nearest_neighbour(points))
    scores = {"length": length, "over nearest": length / nearest - 1}
    if points.shape[1] <= SOLVED:
        shortest = geometry.tour_length(points, geometry.tours(points))
        scores |= {"excess": length / shortest - 1, "greedy excess": nearest / shortest - 1}
    return scores


TASKS: dict[str, Task] = {
    "hull": Task("hull", geometry.hull_targets, polygons.hull_scores, lambda n: n + 2, fresh=True),
    "delaunay": Task("delaunay", geometry.delaunay_targets, polygons.delaunay_scores, lambda n: 6 * n - 14),
    "tour": Task("tour", geometry.tour_targets, tour_scores, lambda n: n + 1, "tour"),
}


def instances(n: int, count: int, seed: int = HELD_OUT) -> np.ndarray:
    """Test instances [count, n, 2]; another n gives others."""
    return geometry.uniform_points(np.random.default_rng([seed, n]), count, n)


@lru_cache(maxsize=32)
def pool(task: str, n: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Solved training instances of one size: points [count, n, 2] and symbols [count, M]."""
    points = geometry.uniform_points(np.random.default_rng([HELD_OUT + 1, n]), count, n)
    parts = [TASKS[task].targets(points[i : i + 1000]) for i in range(0, count, 1000)]
    width = max(part.shape[1] for part in parts)
    pad = partial(np.pad, constant_values=geometry.IGNORE)
    return points, np.concatenate([pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])


def evaluate(solver: Solver, task: str, points: np.ndarray, beam: int = 1) -> Scores:
    """Let a network answer points [B, n, 2] and measure every answer; ``beam`` above 1 searches."""
    like = next(solver.parameters())
    given, steps = torch.as_tensor(points).to(like), TASKS[task].longest(points.shape[1])
    rule = TASKS[task].rule
    said = greedy(solver, given, steps, rule) if beam == 1 else beam_search(solver, given, steps, beam, rule)
    return TASKS[task].score(points, said[0].cpu().numpy())


def means(scores: Scores) -> dict[str, float]:
    """Mean of every measure; that of an area over simple polygons only, 0 if there is none."""
    return {name: float(np.nanmean(x)) if not np.isnan(x.astype(float)).all() else 0.0 for name, x in scores.items()}


# ---------------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Setting:
    """Sizes of a training run.

    Attributes:
        task: of ``TASKS``.
        smallest, largest: points an instance, drawn anew for every batch.
        width: of the networks.
        layers: of the set pointer's encoder.
        rates: highest learning rate by network.
        pool: solved instances of each size, where the task is not ``fresh``.
    """

    task: str = "hull"
    smallest: int = 5
    largest: int = 10
    width: int = 64
    layers: int = 2
    steps: int = 400
    batch: int = 64
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    pool: int = 10_000

    def build(self, kind: str) -> Solver:
        """A network with torch's present randomness.

        Raises:
            ValueError: an unknown kind.
        """
        made: dict[str, Callable[[], Solver]] = {
            SOFTMAX: lambda: FixedSoftmax(self.width, self.largest),
            ATTENTION: lambda: BlendingAttention(self.width, self.largest),
            POINTER: lambda: PointerNet(self.width),
            SET: lambda: SetPointer(self.width, self.layers),
        }
        if kind not in made:
            raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(made)}")
        return made[kind]()

    def batch_of(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Points [batch, n, 2] and their targets for one n."""
        n = int(rng.integers(self.smallest, self.largest + 1))
        if TASKS[self.task].fresh:
            points = geometry.uniform_points(rng, self.batch, n)
            return points, TASKS[self.task].targets(points)
        points, targets = pool(self.task, n, self.pool)
        some = rng.integers(len(points), size=self.batch)
        return points[some], targets[some]

    def train(self, kind: str, seed: int, device: str | torch.device = "cpu") -> Run:
        """Train one network; only tours are trained under their rule, as the set pointer needs it and the others gain."""
        rule = TASKS[self.task].rule
        solver = seeded(lambda: self.build(kind), seed).to(device)
        config = TrainConfig(
            self.steps, lr=self.rates[kind], warmup=self.steps // 10, weight_decay=0.0, clip=2.0, seed=seed
        )
        history = fit(solver, self.batch_of, partial(pointer_loss, rule=rule), config, progress=False)
        return Run(kind, seed, solver, history.loss, history.seconds)

    def first_batch(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The batch of the first update of a run."""
        return self.batch_of(step_generator(seed, 1))


@dataclass(frozen=True)
class Run:
    """A trained network: ``kind``, ``seed``, the ``solver`` itself, the ``loss`` of every update in nats a symbol, ``seconds``."""

    kind: str
    seed: int
    solver: Solver
    loss: list[float]
    seconds: float


def train_all(setting: Setting, kinds: tuple[str, ...], seeds: tuple[int, ...]) -> list[Run]:
    """Every kind on every seed, on one thread: matrices this small gain nothing from a second."""
    todo = [(kind, seed) for seed in seeds for kind in kinds]
    with lab.one_thread():
        return [setting.train(kind, seed) for kind, seed in lab.progress(todo, "networks x seeds")]


def rows_of(run: Run, task: str, sizes: tuple[int, ...], count: int = 1000) -> list[dict[str, Any]]:
    """One row a test size: ``kind, seed, n`` and the mean of every measure."""
    return [
        {"kind": run.kind, "seed": run.seed, "n": n, **means(evaluate(run.solver, task, instances(n, count)))}
        for n in sizes
    ]
