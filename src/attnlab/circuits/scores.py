"""Scores of nodes or groups of nodes, pair by pair, with everything that says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from attnlab.circuits.model import Node, Spec
from attnlab.claims import bootstrap

Group = tuple[Node, ...]


class NoEffectError(ValueError):
    """The clean and the corrupt run have the same metric, so a fraction of their difference means nothing."""


@dataclass(frozen=True)
class Scores:
    """How much of the clean-corrupt gap each group of nodes carries.

    ``effect[g, n]`` is metric(patched) - metric(base) on pair ``n`` for group ``g``; ``gap[n]`` is metric(source) -
    metric(base). A score is the ratio of the means: 0 = no effect, 1 = as if the whole source run had been patched in.
    (The mean of the ratios, the other convention, explodes on pairs with a small gap.)

    ``made`` records model, data hash, metric, direction, positions and method.
    """

    spec: Spec
    groups: Sequence[Group]
    effect: np.ndarray  # [G, N]
    gap: np.ndarray  # [N]
    base: np.ndarray  # [N]
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gap = abs(self.gap.mean())
        if not gap > 1e-9:  # also true for NaN
            raise NoEffectError(
                f"{self.made.get('data', 'the data')}: the mean metric is {self.base.mean():.4g} on the base and on the source "
                "prompts alike, so there is no effect to attribute; choose a counterfactual that changes the answer"
            )

    @property
    def values(self) -> np.ndarray:
        """One score a group, ``[G]``."""
        return self.effect.mean(1) / self.gap.mean()

    def of(self, *nodes: str | Node) -> float:
        """The score of one group, named by its nodes: ``scores.of("9.6")`` or ``scores.of("23.3", "20.0")``.

        Raises:
            ValueError: if that group was not measured.
        """
        return float(self.values[self._row(nodes)])

    def grid(self) -> np.ndarray:
        """Scores of single heads as a ``[n_layers, n_heads]`` map, NaN where a head was not measured."""
        table = np.full((self.spec.n_layers, self.spec.n_heads), np.nan)
        for group, value in zip(self.groups, self.values, strict=True):
            if len(group) == 1 and group[0].head is not None:
                table[group[0].layer, group[0].head] = value
        return table

    def top(self, k: int) -> list[Node]:
        """The ``k`` single nodes with the largest absolute score, largest first (ties go to the lower layer)."""
        single = [(group[0], value) for group, value in zip(self.groups, self.values, strict=True) if len(group) == 1]
        # an MLP has no head number; -1 puts it before the heads of its layer
        order = sorted(
            single, key=lambda item: (-abs(item[1]), item[0].layer, -1 if item[0].head is None else item[0].head)
        )
        return [node for node, _ in order[:k]]

    def interval(
        self, *nodes: str | Node, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of a group's score over the pairs (percentile method)."""
        effect, gap = self.effect[self._row(nodes)], self.gap
        return bootstrap(len(gap), lambda picks: effect[picks].mean(1) / gap[picks].mean(1), level=level, seed=seed)

    def frame(self) -> pd.DataFrame:
        """One row a group: ``node``, ``score`` and, for single heads, ``layer`` and ``head``."""
        rows = [
            {
                "node": " + ".join(map(str, group)),
                "score": value,
                "layer": group[0].layer if len(group) == 1 else None,
                "head": group[0].head if len(group) == 1 else None,
            }
            for group, value in zip(self.groups, self.values, strict=True)
        ]
        return pd.DataFrame(rows)

    def _row(self, nodes: Sequence[str | Node]) -> int:
        wanted = {self.spec.check(node) for node in nodes}
        for row, group in enumerate(self.groups):
            if set(group) == wanted:
                return row
        raise ValueError(f"group {' + '.join(map(str, nodes))} was not measured; there are {len(self.groups)} groups")
