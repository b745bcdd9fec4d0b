"""SmolLM2 once it answers by letter: do its correct-letter heads need their queries? For the chapter ``circuits/chinchilla-mcq``.

``python -m attnlab.circuits.chinchilla_mcq_taught --record records/chinchilla-mcq-taught.json`` takes the changes that
:mod:`attnlab.circuits.chinchilla_mcq_runs` taught on three seeds, and gives the heads that look at the right letter one query, or
one key, for all prompts. A CPU needs some minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab import claims, records
from attnlab.circuits.chinchilla_mcq import Sheet, gold_matrix, is_right, label_attention
from attnlab.circuits.chinchilla_mcq_runs import MODELS
from attnlab.circuits.lettered import questionnaire, sheets
from attnlab.circuits.lettered_tuning import load_change
from attnlab.circuits.model import HookedLM
from attnlab.circuits.subspaces import Subspace, Subspaces, compress, head_vectors, share_of
from attnlab.circuits.ungroup import ungrouped
from attnlab.data.choices import FACTS
from attnlab.models import smollm2
from attnlab.models.booting import boot, quiet

COMMAND = "python -m attnlab.circuits.chinchilla_mcq_taught"
DRAWS = 3  # of other heads
SOURCES = tuple(
    f"circuits/{name}.py"
    for name in ("chinchilla_mcq_taught", "chinchilla_mcq", "subspaces", "lettered", "lettered_tuning")
)


def load(row: dict[str, Any], folder: Path = MODELS) -> HookedLM:
    """SmolLM2 with the change that a row of ``records/chinchilla-mcq-finetune.json`` names, a key for every head."""
    loaded: tuple[Any, Any] = smollm2.load_model()
    model, tokenizer = loaded
    with quiet():
        return ungrouped(HookedLM(boot(smollm2.NAME, load_change(model, folder / row["file"]), tokenizer)))


@dataclass(frozen=True)
class Means:
    """One query and one key for all prompts: ``q`` and ``k`` [d_head] by head."""

    q: dict[str, Tensor]
    k: dict[str, Tensor]

    def subspaces(self, heads: Sequence[str]) -> Subspaces:
        """Subspaces of which no direction is kept: what is left of a vector is the mean."""

        def point(mean: Tensor) -> Subspace:
            return Subspace(mean, torch.eye(len(mean)), torch.full_like(mean, torch.nan))

        return {head: {"q": point(self.q[head]), "k": point(self.k[head])} for head in heads}


def vectors_of(model: HookedLM, given: Sequence[Sheet], heads: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Of some heads on all prompts: queries at the last token ``[N, d_head]``, keys at the labels ``[N, k, d_head]``, and values."""
    parts = [head_vectors(model, sheet, heads) for sheet in given]
    return {
        head: {part: torch.cat([tables[head][part] for tables in parts]) for part in ("q", "k", "v")} for head in heads
    }


def means_of(vectors: Mapping[str, Mapping[str, Tensor]]) -> Means:
    """Mean query and mean key of each head of :func:`vectors_of`."""
    means = {part: {head: x[part].flatten(0, -2).mean(0) for head, x in vectors.items()} for part in ("q", "k")}
    return Means(**means)


def key_shares(vectors: Mapping[str, Mapping[str, Tensor]], gold: Tensor, heads: Sequence[str]) -> dict[str, float]:
    """Share of the variance of keys at labels that goes with their place, and what each of three facts adds to it; mean over heads.

    ``answer seen``: the right text stands before this label. ``being right``: it stands behind it, in its own line. ``right line``: all
    that can be known about where the right text stands.
    """
    keys = {head: vectors[head]["k"] for head in heads}
    lines = next(iter(keys.values())).shape[1]
    place = torch.arange(lines).expand(len(gold), lines)
    right = gold[:, None].expand_as(place)
    facts = {"answer seen": right < place, "being right": right == place, "right line": right}

    def share(groups: Tensor) -> float:
        return float(np.mean([share_of(k.flatten(0, 1), groups.flatten()) for k in keys.values()]))

    alone = share(place)
    return {"place": alone} | {name: share(place * lines + fact.long()) - alone for name, fact in facts.items()}


def others(model: HookedLM, heads: Sequence[str], draw: int) -> list[str]:
    """As many other heads of the layers that hold ``heads``, drawn at random."""
    layers = {head.partition(".")[0] for head in heads}
    free = [str(node) for node in model.spec.heads if str(node.layer) in layers and str(node) not in heads]
    chosen = np.random.default_rng(draw).permutation(len(free))[: len(heads)]
    return [free[i] for i in sorted(chosen)]


def right_answers(
    model: HookedLM, given: Sequence[Sheet], trials: dict[str, tuple[Subspaces, str]]
) -> dict[str, np.ndarray]:
    """Whether each prompt is answered right: untouched, and with one query or one key (``"q"``, ``"k"``) for all in each trial."""
    found: dict[str, list[np.ndarray]] = {}
    for sheet in given:
        with torch.no_grad():
            base = model.run(sheet.tokens)
            ends = {"untouched": base}
            for name, (spaces, part) in trials.items():
                edits = compress(model, sheet, spaces, {part: 0})
                ends[name] = model.resume(base, [min(edit.layer for edit in edits)], edits=edits)
            for name, run in ends.items():
                logits = model.logits(model.readout(run.resid[model.spec.n_layers]), sheet.labels)
                found.setdefault(name, []).append(is_right(logits, sheet.gold))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def measured(row: dict[str, Any], model: HookedLM, facts: Sequence[tuple[str, str]] = FACTS) -> dict[str, Any]:
    """One taught model: percent right untouched, with one query or one key for its correct-letter heads, with one query for others.

    ``looks`` is where these heads look by right line, their mean, ``[k, k]``; ``key shares`` are those of :func:`key_shares`.
    """
    start = time.perf_counter()
    heads, given = row["heads"], [sheet for _, sheet in sheets(model.tokenizer, questionnaire(facts))]
    drawn = [others(model, heads, draw) for draw in range(DRAWS)]
    vectors = vectors_of(model, given, sorted({*heads, *(head for some in drawn for head in some)}))
    means, gold = means_of(vectors), torch.cat([sheet.gold for sheet in given])
    trials = {"one query": (means.subspaces(heads), "q"), "one key": (means.subspaces(heads), "k")}
    trials |= {f"others {draw}": (means.subspaces(some), "q") for draw, some in enumerate(drawn)}
    accuracy = {name: 100 * float(right.mean()) for name, right in right_answers(model, given, trials).items()}
    looks = gold_matrix(np.concatenate([label_attention(model, sheet) for sheet in given], axis=2), gold)
    return {
        "case": "taught",
        "seed": row["seed"],
        "heads": heads,
        "others": drawn,
        "prompts": len(gold),
        "accuracy": accuracy,
        "looks": np.mean([looks[tuple(map(int, head.split(".")))] for head in heads], axis=0).round(4).tolist(),
        "key shares": key_shares(vectors, gold, heads),
        "seconds": time.perf_counter() - start,
    }


def lost(row: dict[str, Any], trial: str) -> float:
    """Points of accuracy that a trial costs; the mean of all draws for ``"others"``."""
    costs = [row["accuracy"]["untouched"] - x for name, x in row["accuracy"].items() if name.startswith(trial)]
    return sum(costs) / len(costs)


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ledger's row of the claim ``taught-query``."""
    value, interval = claims.mean_and_range(lost(row, "one query") for row in rows)
    return dict(
        claims.measure(
            "chinchilla-mcq/taught-query",
            value,
            interval=interval,
            controls={"others": claims.mean_and_range(lost(row, "others") for row in rows)},
            seeds=[row["seed"] for row in rows],
            seconds=sum(row["seconds"] for row in rows),
            origin="record",
        )
    )


def taught_rows() -> Iterator[dict[str, Any]]:
    """The rows of the record of the lessons.

    Raises:
        ValueError: there is none.
    """
    record = records.load("chinchilla-mcq-finetune")
    if record is None:
        raise ValueError(
            "records/chinchilla-mcq-finetune.json is not there; make it with --finetune of chinchilla_mcq_runs"
        )
    yield from record.rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="such as records/chinchilla-mcq-taught.json")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    chosen = parser.parse_args(arguments)
    rows = []
    for lesson in taught_rows():
        rows.append(measured(lesson, load(lesson)))
        print(rows[-1], flush=True)
    command = f"{COMMAND} --record records/{chosen.record.name}"
    records.write(chosen.record, [*rows, judged(rows)], sources=SOURCES, command=command, commit=chosen.commit)


if __name__ == "__main__":
    main()
