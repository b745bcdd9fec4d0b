"""SmolLM2 once it answers by letter: what its correct-letter heads write, in how few directions they work, and whether they need their
queries. For the chapter ``circuits/chinchilla-mcq``.

``python -m attnlab.circuits.chinchilla_mcq_taught --record records/chinchilla-mcq-taught.json`` takes the changes that
:mod:`attnlab.circuits.chinchilla_mcq_runs` taught on three seeds. The heads that look at the right letter keep three directions of
their queries, keys and values, fitted on A to D in order, or get one query, or one key, for all prompts; then labels are shuffled and
drawn at random. A CPU needs some twenty minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab import claims, records
from attnlab.circuits.chinchilla_mcq import (
    DirectEffects,
    Sheet,
    direct_effects,
    gold_matrix,
    is_right,
    label_attention,
)
from attnlab.circuits.chinchilla_mcq_runs import MODELS
from attnlab.circuits.lettered import questionnaire, sheets
from attnlab.circuits.lettered_tuning import load_change
from attnlab.circuits.model import HookedLM
from attnlab.circuits.subspaces import (
    Subspace,
    Subspaces,
    compress,
    fit_subspace,
    head_vectors,
    random_subspace,
    share_of,
)
from attnlab.circuits.ungroup import ungrouped
from attnlab.data.choices import FACTS
from attnlab.models import smollm2
from attnlab.models.booting import boot, quiet

COMMAND = "python -m attnlab.circuits.chinchilla_mcq_taught"
DRAWS = 3  # of other heads
RANK = 3  # directions that are kept, as in the paper
RANDOM = 2  # draws of random directions
FIT = (1, 2)  # seeds of the questionnaires on which directions are fitted; 0 is measured on
SOURCES = tuple(
    f"circuits/{name}.py"
    for name in ("chinchilla_mcq_taught", "chinchilla_mcq", "subspaces", "lettered", "lettered_tuning")
)

Facts = Sequence[tuple[str, str]]
Vectors = Mapping[str, Mapping[str, Tensor]]  # by head and part


def load(row: dict[str, Any], folder: Path = MODELS) -> HookedLM:
    """SmolLM2 with the change that a row of ``records/chinchilla-mcq-finetune.json`` names, a key for every head."""
    loaded: tuple[Any, Any] = smollm2.load_model()
    model, tokenizer = loaded
    with quiet():
        return ungrouped(HookedLM(boot(smollm2.NAME, load_change(model, folder / row["file"]), tokenizer)))


def vectors_of(model: HookedLM, given: Sequence[Sheet], heads: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Of some heads on all prompts: queries at the last token ``[N, d_head]``, keys at the labels ``[N, k, d_head]``, and values."""
    parts = [head_vectors(model, sheet, heads) for sheet in given]
    return {
        head: {part: torch.cat([tables[head][part] for tables in parts]) for part in ("q", "k", "v")} for head in heads
    }


def points(vectors: Vectors) -> Subspaces:
    """The mean of each part over all prompts, as a subspace of which no direction is to be kept."""

    def point(mean: Tensor) -> Subspace:
        return Subspace(mean, torch.eye(len(mean)), torch.full_like(mean, torch.nan))

    return {
        head: {part: point(x.flatten(0, -2).mean(0)) for part, x in parts.items()} for head, parts in vectors.items()
    }


def fitted(vectors: Vectors) -> Subspaces:
    """The directions in which each part varies."""
    return {
        head: {part: fit_subspace(x.flatten(0, -2)) for part, x in parts.items()} for head, parts in vectors.items()
    }


def at_random(spaces: Subspaces, draw: int) -> Subspaces:
    """Random directions around the same means, others for every head and part."""
    return {
        head: {
            part: random_subspace(space, 10_000 * draw + 10 * i + j) for j, (part, space) in enumerate(parts.items())
        }
        for i, (head, parts) in enumerate(spaces.items())
    }


def some(spaces: Subspaces, heads: Sequence[str]) -> Subspaces:
    """Those of some heads."""
    return {head: spaces[head] for head in heads}


def key_shares(vectors: Vectors, gold: Tensor, heads: Sequence[str]) -> dict[str, float]:
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


#: subspaces by head, and how many directions of each part are kept
Trial = tuple[Subspaces, Mapping[str, int]]


def right_answers(model: HookedLM, given: Sequence[Sheet], trials: Mapping[str, Trial]) -> dict[str, float]:
    """Percent of the prompts that are answered right: untouched, and with heads compressed as each trial says."""
    found: dict[str, list[np.ndarray]] = {}
    for sheet in given:
        with torch.no_grad():
            base = model.run(sheet.tokens)
            ends = {"untouched": base}
            for name, (spaces, ranks) in trials.items():
                edits = compress(model, sheet, spaces, ranks)
                ends[name] = model.resume(base, [min(edit.layer for edit in edits)], edits=edits)
            for name, run in ends.items():
                logits = model.logits(model.readout(run.resid[model.spec.n_layers]), sheet.labels)
                found.setdefault(name, []).append(is_right(logits, sheet.gold))
    return {name: 100 * float(np.concatenate(parts).mean()) for name, parts in found.items()}


def written(model: HookedLM, given: Sequence[Sheet], heads: Sequence[str], top: int = 12) -> dict[str, Any]:
    """What nodes write to the centred logit of the right label, mean over prompts.

    ``share`` is the percentage that ``heads`` write, ``any`` the percentage that as many would write if all heads wrote alike, and
    ``nodes`` the ``top`` strongest writers in logits.
    """
    parts = [direct_effects(model, sheet) for sheet in given]
    effects = DirectEffects(
        parts[0].nodes,
        np.concatenate([part.values for part in parts], axis=1),
        np.concatenate([part.total for part in parts]),
    )
    every = [str(node) for node in model.spec.heads]
    nodes = sorted(effects.mean().items(), key=lambda item: -abs(item[1]))[:top]
    return {
        "share": 100 * effects.share(heads),
        "any": 100 * effects.share(every) * len(heads) / len(every),
        "total": float(effects.total.mean()),
        "nodes": {name: round(value, 4) for name, value in nodes},
    }


def prompts(model: HookedLM, facts: Facts, condition: str = "ABCD", seed: int = 0) -> list[Sheet]:
    """The questionnaire as sheets; another ``seed`` draws other wrong options and letters."""
    return [sheet for _, sheet in sheets(model.tokenizer, questionnaire(facts, condition=condition, seed=seed))]


def measured(row: dict[str, Any], model: HookedLM, facts: Facts = FACTS) -> dict[str, Any]:
    """One taught model, as a row of the record.

    ``accuracy`` by kind of labels and trial is percent right; trials are named as in :func:`right_answers` and below. ``looks`` is where
    the correct-letter heads look by right line, their mean, ``[k, k]``; ``key shares`` are those of :func:`key_shares`, ``written`` is
    that of :func:`written`.
    """
    start = time.perf_counter()
    heads, given = row["heads"], prompts(model, facts)
    drawn = [others(model, heads, draw) for draw in range(DRAWS)]
    vectors = vectors_of(model, given, sorted({*heads, *(head for group in drawn for head in group)}))
    means, gold = points(vectors), torch.cat([sheet.gold for sheet in given])
    spaces = fitted(vectors_of(model, [sheet for seed in FIT for sheet in prompts(model, facts, seed=seed)], heads))
    trials: dict[str, Trial] = {
        "one query": (some(means, heads), {"q": 0}),
        "one key": (some(means, heads), {"k": 0}),
        "queries and keys": (spaces, {"q": RANK, "k": RANK}),
        "values": (spaces, {"v": RANK}),
    }
    for draw in range(RANDOM):
        trials[f"random queries and keys {draw}"] = (at_random(spaces, draw), {"q": RANK, "k": RANK})
    trials["random values"] = (at_random(spaces, 0), {"v": RANK})
    few = {f"others {draw}": (some(means, group), {"q": 0}) for draw, group in enumerate(drawn)}
    accuracy = {"ABCD": right_answers(model, given, trials | few)}
    accuracy |= {kind: right_answers(model, prompts(model, facts, kind), trials) for kind in ("shuffled", "random")}
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
        "written": written(model, given, heads),
        "seconds": time.perf_counter() - start,
    }


def lost(row: dict[str, Any], trial: str, labels: str = "ABCD") -> float:
    """Points of accuracy that a trial costs; the mean of all whose name begins so."""
    percent = row["accuracy"][labels]
    costs = [percent["untouched"] - x for name, x in percent.items() if name.startswith(trial)]
    return sum(costs) / len(costs)


Rows = Sequence[dict[str, Any]]
Value = Callable[[dict[str, Any]], float]

#: by claim, what is measured of a row, and its control
CLAIMS: dict[str, tuple[Value, str, Value]] = {
    "taught-query": (partial(lost, trial="one query"), "others", partial(lost, trial="others")),
    "taught-heads-write": (lambda row: row["written"]["share"], "anyhead", lambda row: row["written"]["any"]),
    "taught-low-rank": (partial(lost, trial="queries"), "random", partial(lost, trial="random queries")),
    "taught-random-labels": (
        partial(lost, trial="queries", labels="random"),
        "ordered",
        partial(lost, trial="queries"),
    ),
    "taught-shuffled-labels": (
        partial(lost, trial="queries", labels="shuffled"),
        "ordered",
        partial(lost, trial="queries"),
    ),
    "taught-values-carry-the-token": (
        partial(lost, trial="values", labels="random"),
        "queries",
        partial(lost, trial="queries", labels="random"),
    ),
}


def judged(rows: Rows) -> Iterator[dict[str, Any]]:
    """The ledger's rows of the claims: mean, lowest and highest seed."""
    for name, (value, control, other) in CLAIMS.items():
        mean, interval = claims.mean_and_range(value(row) for row in rows)
        yield dict(
            claims.measure(
                f"chinchilla-mcq/{name}",
                mean,
                interval=interval,
                controls={control: claims.mean_and_range(other(row) for row in rows)},
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
    records.write(chosen.record, [*rows, *judged(rows)], sources=SOURCES, command=command, commit=chosen.commit)


if __name__ == "__main__":
    main()
