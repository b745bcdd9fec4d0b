"""What the command writes: a circuit chosen by its scores, what it is worth, in the formats of :mod:`~attnlab.circuits.export`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnlab.circuits.edges import EdgeScores
from attnlab.circuits.export import to_dot, to_json
from attnlab.circuits.faithfulness import Faithfulness
from attnlab.circuits.graph import Graph, node_name
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.scores import Scores
from attnlab.circuits.work import Evaluation, head_circuit

FORMATS = ("json", "dot", "csv")
EDGES, HEADS = 200, 20  # how many are kept if nobody says


def format_of(out: Path) -> str:
    """The format by a file's suffix; JSON for one that says nothing."""
    suffix = out.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else "dot" if suffix == "gv" else "json"


def choose(
    model: HookedLM, scores: EdgeScores | Scores, top_n: int | None = None, threshold: float | None = None
) -> Graph:
    """The circuit of the strongest edges, pruned to what connects input and logits, or of the strongest heads.

    Raises:
        ValueError: if there are not that many, or nothing is left.
    """
    if isinstance(scores, Scores):
        n = int((abs(scores.values) >= threshold).sum()) if threshold else top_n or min(HEADS, len(scores.groups))
        if n > len(scores.groups):
            raise ValueError(f"--top-n {n} heads cannot be had; {len(scores.groups)} have a score")
        if n == 0:
            raise ValueError(
                f"--threshold {threshold} leaves no head; the largest score is {abs(scores.values).max():.4g}"
            )
        return head_circuit(model, scores, n)
    if threshold is not None:
        graph = Graph.threshold(scores, threshold).prune()
    else:
        graph = Graph.top_n(scores, top_n or min(EDGES, scores.wiring.n_edges)).prune()
    if not len(graph):
        largest = float(scores.values.abs().max())
        raise ValueError(
            "no edge is left: those chosen do not connect the input to the logits; take more with --top-n or a smaller "
            f"--threshold (the largest score is {largest:.4g})"
        )
    return graph


@dataclass(frozen=True)
class Report:
    """All that one run found."""

    model: HookedLM
    pairs: Pairs
    scores: EdgeScores | Scores
    circuit: Graph
    evaluation: Evaluation | None
    judges: Pairs
    settings: dict[str, Any]

    def text(self, form: str) -> str:
        """The file's content; CSV has one row an edge or head, with all scores and whether it belongs to the circuit."""
        if form == "csv":
            return self.table().to_csv(index=False)
        edges, nodes, made = self._scored()
        if form == "dot":
            return to_dot(self.circuit, edges)
        method = made | {key: self.settings[key] for key in ("batch_size", "device")}
        return to_json(
            self.circuit,
            self.model,
            scores=edges,
            node_scores=nodes,
            pairs=self.pairs,
            method=method,
            evaluation=self.worth(),
        )

    def _scored(self) -> tuple[EdgeScores | None, dict[str, float] | None, dict[str, Any]]:
        """Scores of edges, scores of nodes by name, and how they were made."""
        if isinstance(self.scores, EdgeScores):
            return self.scores, None, dict(self.scores.info)
        pairs = zip(self.scores.groups, self.scores.values, strict=True)
        return None, {node_name(group[0]): float(value) for group, value in pairs}, dict(self.scores.made)

    def table(self) -> pd.DataFrame:
        """One row an edge or head: its score and whether it is ``in`` the circuit."""
        if isinstance(self.scores, Scores):
            nodes = set(self.circuit.nodes())
            frame = self.scores.frame()
            frame["in"] = [node_name(group[0]) in nodes for group in self.scores.groups]
            return frame
        frame = self.scores.to_frame()
        kept = set(self.circuit.edges())
        frame["in"] = [edge in kept for edge in frame.edge]
        return frame

    def worth(self) -> dict[str, Any]:
        """The evaluation as plain numbers; empty without one."""
        if self.evaluation is None:
            return {}
        faithful, completeness, curve, metric, ablation = self.evaluation
        columns = [name for name in ("n_heads", "n_edges", "kept") if name in curve.frame]
        return {
            "pairs": {"name": self.judges.name, "n": len(self.judges), "hash": self.judges.digest},
            "same_pairs": self.judges.digest == self.pairs.digest,
            "metric": metric,
            "ablation": ablation,
            "faithfulness": faithful.ratio_of_means,
            "faithfulness_interval": list(faithful.interval()) if len(self.judges) > 1 else None,
            "completeness": completeness,
            "cpr": curve.cpr,
            "cmd": curve.cmd,
            "curve": [
                {name: int(row[name]) for name in columns} | {"faithfulness": float(row.ratio_of_means)}
                for _, row in curve.frame.iterrows()
            ],
        }

    def summary(self, out: Path) -> str:
        """A few lines for people."""
        nodes = [node for node in self.circuit.nodes() if node.startswith("a")]
        lines = [
            f"{out}: {len(self.circuit)} of {self.circuit.wiring.n_edges} edges, {len(nodes)} heads, "
            f"{len(self.pairs)} pairs, {self.model.spec.name}"
        ]
        if isinstance(self.scores, Scores):
            top = ", ".join(f"{node} {self.scores.of(node):+.3f}" for node in self.scores.top(5))
        else:
            top = ", ".join(f"{edge} {score:+.3f}" for edge, score in self.scores.top(5))
        lines.append(f"strongest: {top}")
        if self.evaluation is not None:
            worth, faithful = self.worth(), self.evaluation.faithfulness
            on = "the same pairs, which flatters" if worth["same_pairs"] else f"other pairs ({len(self.judges)})"
            lines.append(
                f"faithfulness {with_interval(faithful)}, completeness {worth['completeness']:.2f}, "
                f"{self.evaluation.measured}, on {on}"
            )
            unit = "n_heads" if "n_heads" in worth["curve"][0] else "n_edges"
            points = ", ".join(f"{point[unit]}: {point['faithfulness']:.2f}" for point in worth["curve"])
            lines.append(f"faithfulness by number of {unit.removeprefix('n_')}: {points}")
        return "\n".join(lines)


def with_interval(faithful: Faithfulness) -> str:
    """Faithfulness with its 95% interval over pairs, for people; one pair has none."""
    if len(faithful.circuit) < 2:
        return f"{faithful.ratio_of_means:.2f} (one pair, no interval)"
    low, high = faithful.interval()
    return f"{faithful.ratio_of_means:.2f} [{low:.2f}, {high:.2f}]"


def write(out: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    half = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        half.write_bytes(content.encode() if isinstance(content, str) else content)
        half.replace(out)
    finally:
        half.unlink(missing_ok=True)
