"""The experiments of the chapter ``kernels/aaren``: four token mixers on forecasting, and on recall, where a fixed query loses.

``python -m attnlab.kernels.aaren_runs --record records/aaren.json`` repeats them on a GPU: longer windows, larger models, more
updates, and for each mixer the learning rate that suits it best.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnlab import claims, lab
from attnlab.kernels import records
from attnlab.kernels.aaren import Cost
from attnlab.kernels.aaren_tasks import MIXERS, Forecasting, Recall, Run, Task
from attnlab.models.training import Diverged

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2)
RATE_SEED = 100  # on which learning rates are chosen, so that no seed that counts has had a say

# ------------------------------------------------------------------------------------------------------------ verdicts

Interval = tuple[float, float]


def spread(scores: Sequence[float]) -> tuple[float, Interval]:
    """Mean and range over the seeds: with three there is no better interval."""
    return fmean(scores), (min(scores), max(scores))


def excess(scores: Sequence[float], reference: Sequence[float]) -> tuple[float, Interval]:
    """How much larger each score is than the reference of its own seed, in percent: mean and range."""
    return spread([100 * (x / y - 1) for x, y in zip(scores, reference, strict=True)])


def verdict(name: str, rows: Iterable[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Arguments for :func:`attnlab.claims.check` from the rows of a task, one row a mixer and seed.

    Args:
        name: ``comparable-forecasting`` or ``recall``.
        rows: of :meth:`Run.row`.
        options: ``blind`` for recall.
    """
    scores: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        scores.setdefault(row["impl"], []).append(row["score"])
    if name == "recall":
        value, interval = spread(scores["Aaren"])
        return {
            "value": value,
            "interval": interval,
            "controls": {"transformer": spread(scores["Transformer"]), "blind": options["blind"]},
        }
    value, interval = excess(scores["Aaren"], scores["Transformer"])
    return {
        "value": value,
        "interval": interval,
        "controls": {"mean": excess(scores["Mean"], scores["Transformer"])},
    }


def growth(rows: Iterable[Cost], layer: str, *, short: int, long: int) -> tuple[float, Interval]:
    """Time of a token after ``long`` tokens over that after ``short``: ratio of the medians, bootstrapped over the repeats."""
    ms = {row.context: row.ms for row in rows if row.layer == layer}

    def ratio(picks: np.ndarray) -> np.ndarray:
        slow, fast = (np.median(ms[context][picks], axis=1) for context in (long, short))
        return np.asarray(slow / fast)

    return float(np.median(ms[long]) / np.median(ms[short])), claims.bootstrap(len(ms[long]), ratio)


# ------------------------------------------------------------------------------------------------------- the comparison


def compare(task: Task, mixers: Iterable[str] = tuple(MIXERS), seeds: Iterable[int] = SEEDS) -> list[Run]:
    """Train every mixer on every seed, on one thread: a second would wait longer than it works on matrices this small."""
    with lab.one_thread():
        return [task.train(mixer, seed) for mixer, seed in lab.progress(list(product(mixers, seeds)), task.name)]


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Mean, lowest and highest score over the seeds by mixer, in the order of the rows, with parameters and seconds a run."""
    import pandas as pd

    by_mixer = pd.DataFrame(rows).groupby("impl", sort=False)
    scores = by_mixer.score
    columns = {"mean": scores.mean(), "lowest": scores.min(), "highest": scores.max()}
    sizes = {"parameters": by_mixer.parameters.first(), "seconds a run": by_mixer.seconds.mean()}
    return pd.DataFrame({**columns, **sizes}).rename_axis(None)


def gap(rows: Iterable[dict[str, Any]], mixer: str = "Aaren", reference: str = "Transformer") -> pd.DataFrame:
    """How far the mean error of ``mixer`` is above that of ``reference``, in percent, by the number of updates done so far."""
    import pandas as pd

    scores = pd.DataFrame(
        [{"impl": row["impl"], "updates": step, "score": score} for row in rows for step, score in row["curve"]]
    ).pivot_table(index="updates", columns="impl", values="score")
    return pd.DataFrame({"percent above": 100 * (scores[mixer] / scores[reference] - 1)})


def shortcut_errors(found: dict[str, Tensor], exact: Tensor) -> pd.DataFrame:
    """What is wrong with outputs [T, ...] computed in several ways: how many are no numbers, where that begins, the error of the rest."""
    import pandas as pd

    rows = {}
    for name, outputs in found.items():
        kept = torch.isfinite(outputs).flatten(1).all(1)  # [T]
        rows[name] = {
            "lost outputs": int((~kept).sum()),
            "first lost": int(kept.int().argmin()) + 1 if not bool(kept.all()) else None,
            "error of the rest": float((outputs.double() - exact)[kept].abs().max()) if bool(kept.any()) else None,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# ------------------------------------------------------------------------------------------------------- on a GPU

#: the larger tasks
LARGE: tuple[Task, ...] = (
    Forecasting(width=64, layers=3, hidden=128, init_std=0.125, batch=64, steps=600, length=192),
    Recall(width=64, layers=3, hidden=128, batch=64, steps=600, pairs=6, keys=32),
)
TINY: tuple[Task, ...] = (
    Forecasting(width=8, layers=1, heads=2, hidden=16, batch=4, steps=4, length=8),
    Recall(width=8, layers=1, heads=2, hidden=16, batch=4, steps=4, pairs=2, keys=4, values=4),
)
RATES = (4e-3, 1e-2, 2.5e-2)
CLAIMS = {"forecasting": "comparable-forecasting", "recall": "recall"}
SOURCES = tuple(f"kernels/{name}.py" for name in ("aaren", "aaren_tasks", "aaren_runs", "packed", "prefix_softmax"))

Job = tuple[Task, str, int, float]


def train_row(job: Job) -> dict[str, Any]:
    """Train a (task, mixer, seed, learning rate): :meth:`Run.row`. The score of a run that diverged is None."""
    task, mixer, seed, lr = job
    try:
        return task.train(mixer, seed, lr).row()
    except Diverged:
        return {"case": task.name, "impl": mixer, "seed": seed, "lr": lr, "score": None}


def best_rate(task: Task, rows: Iterable[dict[str, Any]]) -> float:
    """The learning rate of the best of these rows: lowest error, highest accuracy.

    Raises:
        ValueError: all of them diverged.
    """
    found = {row["lr"]: row["score"] for row in rows if row["score"] is not None}
    if not found:
        raise ValueError(f"rows: every run of {task.name} diverged; try lower rates")
    return min(found, key=lambda lr: task.sign * found[lr])


def large_rows(
    task: Task, run: Callable[[list[Job]], Iterable[dict[str, Any]]], rates: Sequence[float] = RATES
) -> list[dict[str, Any]]:
    """The rows of a record for one task: all rates on :data:`RATE_SEED`, then the best on :data:`SEEDS`, and the verdict.

    Args:
        run: from jobs to the rows of :func:`train_row`, in their order; a pool's ``map`` or a plain one.
        rates: learning rates to choose from.
    """
    start = time.perf_counter()
    searched = list(run([(task, mixer, RATE_SEED, lr) for mixer in MIXERS for lr in rates]))
    chosen = {mixer: best_rate(task, [row for row in searched if row["impl"] == mixer]) for mixer in MIXERS}
    final = list(run([(task, mixer, seed, chosen[mixer]) for mixer in MIXERS for seed in SEEDS]))
    options = {"blind": task.blind()} if isinstance(task, Recall) else {}
    claim = CLAIMS[task.name]
    judged = claims.measure(
        f"aaren/{claim}", **verdict(claim, final, **options), seconds=time.perf_counter() - start, origin="record"
    )
    size = {"operator": "training", "width": task.width, "layers": task.layers, "steps": task.steps}
    rows = [{**size, **row, "counts": row["seed"] != RATE_SEED} for row in (*searched, *final)]
    return [*rows, dict(judged)]


def write_record(path: Path, tasks: Iterable[Task], *, commit: str, command: str, workers: int) -> None:
    """Train and write the record, anew after each task, so that an interruption costs one task.

    Args:
        workers: processes that train at the same time; 1 trains in this one.
    """
    rows: list[dict[str, Any]] = []
    with _workers(workers) as run:
        for task in tasks:
            start = time.perf_counter()
            rows += large_rows(task, run)
            records.write(path, rows, sources=SOURCES, command=command, commit=commit)
            print(f"{task.name}: {rows[-1]['verdict']}, {time.perf_counter() - start:.0f} s", flush=True)


@contextmanager
def _workers(number: int) -> Iterator[Callable[[list[Job]], Iterable[dict[str, Any]]]]:
    """A map of :func:`train_row` over jobs. A process that has used CUDA cannot be forked, so new ones are spawned."""
    if number == 1:
        yield partial(map, train_row)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield partial(pool.map, train_row)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    name = "python -m attnlab.kernels.aaren_runs"
    parser = argparse.ArgumentParser(prog=name, description="Train the larger models of the chapter kernels/aaren.")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write, such as records/aaren.json")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--workers", type=int, default=8, help="processes that train at the same time")
    parser.add_argument("--tiny", action="store_true", help="a few updates, to see that all of it works; needs no GPU")
    options = parser.parse_args(arguments)
    if not options.tiny and lab.device().type != "cuda":
        parser.error("this takes a minute on a GPU and hours without one; --tiny works anywhere")
    command = f"{name} --record records/{options.record.name}" + (" --tiny" if options.tiny else "")
    tasks = TINY if options.tiny else LARGE
    write_record(options.record, tasks, commit=options.commit, command=command, workers=options.workers)


if __name__ == "__main__":
    main()
