"""What the chapter ``circuits/circuit-reuse`` keeps: exact paths from every head of SmolLM2 in two stages, exact patching, and EAP-IG.

``python -m attnlab.circuits.circuit_reuse_runs --record records/circuit-reuse.json`` takes three tasks through three measurements:
every head's direct path into the logits, every head's path into the queries of the strongest of those, and exact patching of every
head at every position beside EAP-IG on the same pairs. A GPU does a thousand pairs; on a CPU core 24 pairs take about fifteen minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from attnlab import lab, records
from attnlab.circuits import tasks
from attnlab.circuits.circuit_reuse import pooled
from attnlab.circuits.eap import PAIRS_AT_ONCE, eap
from attnlab.circuits.metrics import log_odds
from attnlab.circuits.model import HookedLM
from attnlab.circuits.overlap import count
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.patching import Receiver, activation_patch, path_patch
from attnlab.circuits.scores import Scores
from attnlab.circuits.ungroup import ungrouped

TASKS: dict[str, Callable[..., Pairs]] = {
    "IOI": tasks.ioi,
    "Colored Objects": tasks.colored_objects,
    "Greater-than": partial(tasks.greater_than, form="digit"),  # the control
}
SEEDS = (0, 1, 2)
STAGE = 6  # heads whose queries are the receivers of the second stage: about 2 percent of 270, as in the paper
STEPS = 5  # of EAP-IG
GPU_PAIRS_AT_ONCE = 64  # for EAP-IG; eight at a time leave a GPU waiting
SOURCES = [f"circuits/{name}.py" for name in ("patching", "eap", "edges", "model", "metrics", "tasks", "ungroup")]


def measure(
    model: HookedLM, name: str, pairs: Pairs, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """One row a measurement of a task; ``scores`` gives the share of the clean-corrupt gap by head, MLPs left out.

    Args:
        known: rows by case that are there already; they are given back as they are.
    """

    def row(case: str, scores: Callable[[], dict[str, float]], **more: Any) -> dict[str, Any]:
        if case in known:
            return known[case]
        start = time.perf_counter()
        found = scores()
        seconds = time.perf_counter() - start
        return {"case": case, "task": name, "pairs": len(pairs), "seconds": seconds, "scores": found, **more}

    def into_queries() -> dict[str, float]:
        receivers = [Receiver(int(layer), int(head)) for layer, head in (head.split(".") for head in strongest)]
        return by_head(path_patch(model, pairs, None, receivers, metric=log_odds))

    def by_attribution() -> dict[str, float]:
        at_once = PAIRS_AT_ONCE if model.device.type == "cpu" else GPU_PAIRS_AT_ONCE
        edges = eap(ungrouped(model), pairs, steps=STEPS, metric=log_odds, batch_size=at_once)
        nodes = edges.node_scores()
        return {
            str(head): float(nodes[edges.wiring.source(f"a{head.layer}.h{head.head}")]) for head in model.spec.heads
        }

    direct = row("paths into the logits", lambda: by_head(path_patch(model, pairs, metric=log_odds)))
    yield direct
    strongest = sorted(direct["scores"], key=lambda head: -abs(direct["scores"][head]))[:STAGE]
    yield row("paths into queries", into_queries, receivers=strongest)
    yield row(
        "exact patching, all positions",
        lambda: by_head(activation_patch(model, pairs, metric=log_odds, positions="all")),
    )
    yield row("EAP-IG", by_attribution, steps=STEPS)


def by_head(scores: Scores) -> dict[str, float]:
    """Score of every single head by its name."""
    return {str(group[0]): float(value) for group, value in zip(scores.groups, scores.values, strict=True)}


def agreement(exact: dict[str, float], estimate: dict[str, float], share: float = 0.10) -> dict[str, float]:
    """How an estimate ranks heads: Spearman correlation with the exact scores, and of the strongest ``share`` how many it finds."""
    table = pd.DataFrame({"exact": exact, "estimate": estimate})
    k = count(len(table), share)
    tops = [set(table[column].abs().nlargest(k).index) for column in table]
    return {
        "rank correlation": float(table.exact.corr(table.estimate, method="spearman")),
        "heads": k,
        "found": len(tops[0] & tops[1]),
    }


def shared(record: records.Record, a: str, b: str, case: str, share: float = 0.10) -> int:
    """Heads among the strongest ``share`` of both tasks in one measurement of a record."""
    scores = {row["task"]: pd.Series(row["scores"]) for row in record.rows if row["case"] == case}
    k = count(len(scores[a]), share)
    return len(set(scores[a].abs().nlargest(k).index) & set(scores[b].abs().nlargest(k).index))


def write_record(path: Path, model: HookedLM, pairs: int, *, command: str, commit: str, resume: bool = False) -> None:
    """Measure the tasks on ``pairs`` pairs, an equal part from each of ``SEEDS``; the record is written after each measurement.

    With ``resume`` the measurements stay that the file holds, if code and number of pairs were the same.
    """
    before = records.load(path.stem, path.parent) if resume else None
    kept = [] if before is None or before.changed() else [row for row in before.rows if row["pairs"] == pairs]
    rows: list[dict[str, Any]] = []
    for name, make in TASKS.items():
        known = {row["case"]: row for row in kept if row["task"] == name}
        data = pooled(make, model.tokenizer, pairs // len(SEEDS), SEEDS)
        for row in measure(model, name, data, known):
            rows.append(row)
            if row["case"] not in known:
                print(f"{name}, {row['case']}: {row['seconds']:.0f} s", flush=True)
                later = [
                    old for old in kept if (old["task"], old["case"]) not in {(x["task"], x["case"]) for x in rows}
                ]
                records.write(path, [*rows, *later], sources=SOURCES, command=command, commit=commit)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="file to write")
    parser.add_argument("--pairs", type=int, default=24, help="a task; a multiple of 3 (default 24)")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that the file already holds")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    chosen = parser.parse_args(arguments)
    if chosen.pairs < len(SEEDS) or chosen.pairs % len(SEEDS):
        parser.error(f"--pairs {chosen.pairs} is no multiple of {len(SEEDS)}, the number of seeds")
    from attnlab.models import pretrained

    model = HookedLM(pretrained.load("smollm2-135m-instruct", lab.device()))
    command = (
        f"python -m attnlab.circuits.circuit_reuse_runs --record records/{chosen.record.name} --pairs {chosen.pairs}"
    )
    write_record(chosen.record, model, chosen.pairs, command=command, commit=chosen.commit, resume=chosen.resume)


if __name__ == "__main__":
    main()
