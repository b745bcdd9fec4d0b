"""The experiments of the chapter ``circuits/sae-circuits``, and what it keeps of those too long for a notebook.

``python -m attnlab.circuits.sae_circuits_runs --train`` trains the models of :mod:`attnlab.circuits.repeats` (a CPU, about
two minutes a model) and writes ``records/sae-circuits-models.json`` beside them. ``--record`` runs the study of training prompts
and three tasks of SmolLM2 (a CPU, about twenty minutes, or a GPU) and writes ``records/sae-circuits.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlab import claims, lab
from attnlab.circuits import repeats, tasks
from attnlab.circuits import sae_circuits as sae
from attnlab.circuits.attribution import attribution_patch
from attnlab.circuits.metrics import log_odds, logit_diff
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.patching import activation_patch
from attnlab.circuits.reference import roc
from attnlab.circuits.sae_circuits import HeadWrites
from attnlab.circuits.scores import Scores
from attnlab.kernels import records

if TYPE_CHECKING:
    import pandas as pd

COMMAND = "python -m attnlab.circuits.sae_circuits_runs"
SOURCES = tuple(f"circuits/{name}.py" for name in ("sae", "sae_circuits", "sae_circuits_runs", "repeats", "tasks"))
FITS = (0, 1, 2)
SHARE = 0.1  # of the gap: what makes a head of a small model a member of its circuit
COUNT = 14  # strongest heads of SmolLM2 that count as its circuit, one in twenty
SMALL_M, REAL_M, N = 50, 200, 10  # features for 24 heads, features for 270, training prompts
TRAINING_PROMPTS = (4, 10, 30, 100)
SCORED_PAIRS = (5, 10, 25, 50)

# ------------------------------------------------------------------------------------------------------ small models


def small_truth(model: HookedLM, pairs: Pairs) -> tuple[Scores, np.ndarray]:
    """Exact resample ablation of every head at every position, and the heads above 10% of the gap."""
    exact = activation_patch(model, pairs, metric=logit_diff, positions="all")
    return exact, sae.members(exact.values, share=SHARE)


def compare(
    writes: HeadWrites,
    truth: np.ndarray,
    encoders: Sequence[str] = tuple(sae.ENCODERS),
    statistics: Sequence[str] = tuple(sae.STATISTICS),
    *,
    m: int = SMALL_M,
    n: int = N,
    fits: Sequence[int] = FITS,
    **also: Any,
) -> list[dict[str, Any]]:
    """One row an encoder, fit and statistic: ``impl, statistic, fit, auc, dead, seconds`` (CPU seconds of fit, codes and score)."""
    rows = []
    for name in encoders:
        for fit in fits:
            start = time.process_time()
            codes = sae.ENCODERS[name](writes, m, n, fit)
            coded = time.process_time() - start
            for statistic in statistics:
                start = time.process_time()
                scores = sae.STATISTICS[statistic](codes.values, writes.positive)
                made = {"impl": name, "statistic": statistic, "fit": fit, "m": m, "n": n, "dead": codes.dead}
                seconds = coded + time.process_time() - start
                rows.append({**made, "auc": roc(scores, truth).auc, "seconds": seconds, **also})
    return rows


def difference_row(writes: HeadWrites, truth: np.ndarray, **also: Any) -> dict[str, Any]:
    """The mean difference as a row of :func:`compare`; it needs no fit."""
    start = time.process_time()
    scores = sae.mean_difference(writes)
    seconds = time.process_time() - start
    made = {"impl": "mean difference", "statistic": "distance", "fit": 0}
    return {**made, "auc": roc(scores, truth).auc, "seconds": seconds, **also}


def attribution_row(lm: HookedLM, pairs: Pairs, truth: np.ndarray, **also: Any) -> dict[str, Any]:
    """The gradient's answer, two forwards and a backward for all heads, as a row of :func:`compare`."""
    start = time.process_time()
    scores = attribution_patch(lm, pairs, metric=log_odds)
    seconds = time.process_time() - start
    made = {"impl": "attribution patching", "statistic": "gradient", "fit": 0}
    return {**made, "auc": roc(np.abs(scores.values), truth).auc, "seconds": seconds, **also}


def scored_prompts(
    writes: HeadWrites, truth: np.ndarray, pairs: Sequence[int] = SCORED_PAIRS, fits: Sequence[int] = FITS, **also: Any
) -> list[dict[str, Any]]:
    """AUC of both statistics of the same codes when only the first pairs are scored: ``statistic, fit, pairs, auc``."""
    rows = []
    for fit in fits:
        codes = sae.sae_codes(writes, SMALL_M, N, fit).values
        for count in pairs:
            kept = np.concatenate([np.flatnonzero(side)[:count] for side in (writes.positive, ~writes.positive)])
            few, side = codes[kept], writes.positive[kept]
            for statistic in ("new codes", "information"):
                auc = roc(sae.STATISTICS[statistic](few, side), truth).auc
                rows.append({"statistic": statistic, "fit": fit, "pairs": count, "auc": auc, **also})
    return rows


def training_prompts(
    writes: HeadWrites,
    truth: np.ndarray,
    counts: Sequence[int] = TRAINING_PROMPTS,
    fits: Sequence[int] = FITS,
    **also: Any,
) -> list[dict[str, Any]]:
    """AUC of both statistics by how many prompts the autoencoder was trained on; all prompts are scored."""
    both = ("new codes", "information")
    return [row for n in counts for row in compare(writes, truth, ("SAE (paper)",), both, n=n, fits=fits, **also)]


# ---------------------------------------------------------------------------------------------------------- verdicts


def mean_auc(rows: Iterable[Mapping[str, Any]], group: str = "model") -> dict[Any, float]:
    """Mean AUC over the fits of each model (or task)."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(row[group], []).append(row["auc"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def spread(rows: Iterable[Mapping[str, Any]], group: str = "model") -> float:
    """Standard deviation of the AUC over the fits, mean over the models (or tasks)."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(row[group], []).append(row["auc"])
    return float(np.mean([np.std(values, ddof=1) for values in found.values()]))


def gain(more: Mapping[Any, float], less: Mapping[Any, float]) -> dict[str, Any]:
    """``value`` and ``interval`` for a claim: mean and range over the models of the difference within each."""
    differences = [more[key] - less[key] for key in more]
    return {"value": float(np.mean(differences)), "interval": (min(differences), max(differences))}


def chosen(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a method: mean AUC, lowest and highest mean of a model (or task), standard deviation over fits, CPU seconds."""
    import pandas as pd

    out = {}
    for impl, statistic in dict.fromkeys((row["impl"], row["statistic"]) for row in rows):
        mine = chosen(rows, impl=impl, statistic=statistic)
        means = list(mean_auc(mine).values())
        out[f"{impl}, {statistic}"] = {
            "mean AUC": np.mean(means),
            "lowest": min(means),
            "highest": max(means),
            "sd over fits": spread(mine) if len({row["fit"] for row in mine}) > 1 else np.nan,
            "CPU seconds": np.mean([row["seconds"] for row in mine]),
        }
    return pd.DataFrame.from_dict(out, orient="index")


# -------------------------------------------------------------------------------------------------------- real model


def real_tasks(tokenizer: Any, n: int = 24, seed: int = 0) -> dict[str, Pairs]:
    """The three tasks of the paper for a tokenizer with one token a digit."""
    return {
        "IOI": tasks.ioi(tokenizer, n, seed, corruption="abc"),
        "greater-than": tasks.greater_than(tokenizer, n, seed),
        "docstring": tasks.docstring(tokenizer, n, seed),
    }


def real_rows(
    model: HookedLM, task: str, pairs: Pairs, m: int = REAL_M, fits: Sequence[int] = FITS
) -> list[dict[str, Any]]:
    """Everything measured on one task: behaviour, exact scores, all methods with mean pooling, three of them with the others."""
    start = time.process_time()
    exact = activation_patch(model, pairs, metric=log_odds)
    exact_seconds = time.process_time() - start
    truth = sae.members(exact.values, count=COUNT)
    start = time.process_time()
    writes = sae.head_writes(model, pairs, ("mean",))["mean"].normalised()
    writes_seconds = time.process_time() - start
    others = sae.head_writes(model, pairs, ("last", "mean_without_first"))
    behaviour = {
        "case": "behaviour",
        "model": task,
        "pairs": len(pairs),
        "log odds clean": float(exact.base.mean()),
        "log odds corrupt": float((exact.base + exact.gap).mean()),
        "above zero": float((exact.base > 0).mean()),
        "heads": {str(node): exact.of(node) for node in exact.top(2 * COUNT)},
        "exact seconds": exact_seconds,
        "writes seconds": writes_seconds,
    }
    also: dict[str, Any] = {"case": "real", "model": task}
    rows = [behaviour, *compare(writes, truth, m=m, fits=fits, pool="mean", **also)]
    rows += [
        difference_row(writes, truth, pool="mean", **also),
        attribution_row(model, pairs, truth, pool="mean", **also),
    ]
    for pool, other in others.items():
        scaled = other.normalised()
        few = ("SAE (paper)", "untrained encoder")
        rows += compare(scaled, truth, few, m=m, fits=fits[:1], pool=pool, **also)
        rows.append(difference_row(scaled, truth, pool=pool, **also))
    return rows


def real_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the ledger for the real model: how well, and how fast."""
    mean = chosen(rows, case="real", pool="mean")
    ours = chosen(mean, impl="SAE (paper)", statistic="new codes")
    untrained = mean_auc(chosen(mean, impl="untrained encoder", statistic="new codes"))
    plain = mean_auc(chosen(mean, impl="mean difference"))
    best = {task: max(untrained[task], plain[task]) for task in untrained}
    quality = gain(mean_auc(ours), best)
    judged = claims.measure("sae-circuits/real-model", **quality, controls={"spread": spread(ours)}, origin="record")
    ioi = chosen(rows, case="behaviour", model="IOI")[0]
    ratios = [(ioi["writes seconds"] + row["seconds"]) / ioi["exact seconds"] for row in ours if row["model"] == "IOI"]
    value, interval = float(np.median(ratios)), (min(ratios), max(ratios))
    return [dict(judged), dict(claims.measure("sae-circuits/seconds", value, interval=interval, origin="record"))]


def small_rows(fits: Sequence[int] = FITS, folder: Path | None = None) -> list[dict[str, Any]]:
    """The study of training prompts on every small model, and its row of the ledger."""
    rows: list[dict[str, Any]] = []
    for seed, model in zip(repeats.SEEDS, repeats.all_models(folder), strict=True):
        pairs = repeats.pairs(model.tokenizer)
        _, truth = small_truth(model, pairs)
        writes = sae.head_writes(model, pairs)["mean"].normalised()
        rows += training_prompts(writes, truth, fits=fits, case="training prompts", model=seed)
    ours = chosen(rows, statistic="new codes")
    few, many = (chosen(ours, n=n) for n in (TRAINING_PROMPTS[0], TRAINING_PROMPTS[-1]))
    judged = claims.measure(
        "sae-circuits/more-training-prompts",
        **gain(mean_auc(many), mean_auc(few)),
        controls={"spread": spread([*few]) / 2 + spread([*many]) / 2},
        origin="record",
    )
    return [*rows, dict(judged)]


# ------------------------------------------------------------------------------------------------------- the command


def train_models(folder: Path, seeds: Sequence[int], steps: int = 1500, **sizes: int) -> list[dict[str, Any]]:
    """Train the models of these seeds and write one file each; one row a model, with its hash and its losses in nats."""
    rows = []
    for seed in seeds:
        start = time.perf_counter()
        model, _ = repeats.train(seed, steps, **sizes)
        path = repeats.path_of(seed, folder)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(path)
        losses = repeats.losses_by_position(model, np.random.default_rng(10_000 + seed))
        rows.append(
            {
                "case": "training",
                "operator": "repeats",
                "seed": seed,
                "file": path.name,
                "sha256": repeats.file_hash(path),
                "steps": steps,
                "loss in the first period": float(losses[: repeats.SHORTEST - 1].mean()),
                "loss after the longest period": float(losses[repeats.LONGEST :].mean()),
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], flush=True)
    return rows


def write_record(path: Path, commit: str, device: str = "cpu") -> None:
    """Run both experiments; the record is written anew after each part, so that an interruption costs one part."""
    from attnlab.models import pretrained

    model = HookedLM(pretrained.load("smollm2-135m-instruct", device=device))
    rows: list[dict[str, Any]] = []
    command = f"{COMMAND} --record records/{path.name}" + ("" if device == "cpu" else f" --device {device}")

    def keep() -> None:
        records.write(path, rows, sources=SOURCES, command=command, commit=commit)

    for task, pairs in real_tasks(model.tokenizer).items():
        rows += real_rows(model, task, pairs)
        keep()
        print(task, table(chosen(rows, model=task, pool="mean")).to_string(), flush=True)
    rows += real_claims(rows)
    keep()
    rows += small_rows()
    keep()
    print(*(f"{row['claim']}: {row['verdict']} ({row['value']:.3f})" for row in rows if "claim" in row), sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Make what the chapter circuits/sae-circuits keeps.")
    parser.add_argument("--train", action="store_true", help="train the small models into --folder")
    parser.add_argument("--folder", type=Path, default=repeats.FOLDER.parent, help="the folder of the records")
    parser.add_argument("--record", type=Path, help="the JSON to write, such as records/sae-circuits.json")
    parser.add_argument("--device", default="cpu", help="where SmolLM2 runs: cpu or cuda")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    options = parser.parse_args(arguments)
    if not (options.train or options.record):
        parser.error("give --train, --record FILE, or both")
    if options.train:
        with lab.one_thread():
            rows = train_models(options.folder / "models", repeats.SEEDS)
        records.write(
            options.folder / "sae-circuits-models.json",
            rows,
            sources=["circuits/repeats.py", "models/word_model.py", "models/training.py"],
            command=f"{COMMAND} --train",
            commit=options.commit,
        )
    if options.record:
        with lab.one_thread():
            write_record(options.record, options.commit, options.device)


if __name__ == "__main__":
    main()
