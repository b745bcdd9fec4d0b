"""The experiments of the chapter ``foundations/positional-attention``: six kinds of attention on lists, beyond their values.

All seeds of a model train at once, stacked. ``python -m attnlab.foundations.positional_attention_runs --record
records/positional-attention.json`` repeats everything with more tasks and updates; with ``--device cuda`` at the paper's size.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attnlab import claims, lab, records
from attnlab.data import list_tasks
from attnlab.foundations import positional_attention as chapter
from attnlab.models.losses import squared_error
from attnlab.models.stacked import Stacked
from attnlab.models.training import TrainConfig, fit, seeded

SCALES = (1, 2, 3, 5, 10)  # c: test values reach c times as far as those of training
LIMIT = 2.0  # of the values in training
SEEDS = (0, 1, 2)
TEST_SEED = 0x6C69_7374
LOOKUP = "lookup"
SOURCES = tuple(
    f"{name}.py"
    for name in (
        "data/list_tasks",
        "models/stacked",
        "foundations/positional_attention",
        "foundations/positional_attention_runs",
    )
)


@dataclass(frozen=True)
class Setting:
    """Size of the task, the model and its training.

    Attributes:
        length: n.
        layers: L.
        width: D, also inside the MLPs.
        heads: H.
        steps, batch, lr, warmup: of training with AdamW without decay of weights; the rate falls along a cosine. The rate is the
            one at which both models had the lowest error within the range of training, on seeds that do not count (100 to 102).
        samples: lists to train on, drawn once a seed.
        tests: lists to test on at each scale, the same for all.
    """

    length: int = 4
    layers: int = 3
    width: int = 32
    heads: int = 2
    steps: int = 1200
    batch: int = 64
    lr: float = 1e-2
    warmup: int = 100
    samples: int = 30_000
    tests: int = 1000

    def draw(self, task: str, rng: np.random.Generator, size: int, scale: float = 1) -> list_tasks.Lists:
        """Lists of a task whose values reach ``scale`` times as far as in training, and never all within its range if further."""
        beyond = LIMIT if scale > 1 else None
        if task == LOOKUP:
            return list_tasks.lookup(rng, size, self.length, scale * LIMIT, beyond)
        return list_tasks.draw(rng, task, size, self.length, scale * LIMIT, beyond)

    def test(self, task: str, scale: float) -> list_tasks.Lists:
        """The lists that every model is tested on at a scale."""
        return self.draw(task, np.random.default_rng([TEST_SEED, round(100 * scale)]), self.tests, scale)

    def build(self, task: str, model: str) -> nn.Module:
        """A model of :data:`~attnlab.foundations.positional_attention.MODELS`, new."""
        features = 1 + self.length if task == LOOKUP else 1
        sizes = {"width": self.width, "hidden": self.width, "heads": self.heads, "layers": self.layers}
        return chapter.build(model, self.length, features, **sizes)

    def train(self, task: str, model: str, seeds: Sequence[int] = SEEDS, device: str | None = None) -> Trained:
        """All seeds at once. A seed decides the initial weights and the lists; all share the order in which lists are drawn."""
        stack = Stacked([seeded(lambda: self.build(task, model), seed) for seed in seeds])
        stack.to(lab.device() if device is None else device)
        pools = [self.draw(task, np.random.default_rng(seed), self.samples) for seed in seeds]
        like = next(stack.parameters())
        inputs, targets = (
            torch.as_tensor(np.stack(part), dtype=like.dtype, device=like.device) for part in zip(*pools, strict=True)
        )  # [R, samples, n, ...], resident where the model is

        def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
            picks = torch.as_tensor(rng.integers(self.samples, size=self.batch), device=like.device)
            return inputs[:, picks], targets[:, picks]

        config = TrainConfig(
            self.steps, lr=self.lr, warmup=self.warmup, weight_decay=0.0, betas=(0.9, 0.999), clip=None, seed=seeds[0]
        )
        history = fit(stack, batch, squared_error, config, progress=False)
        return Trained(task, model, tuple(seeds), [one.cpu() for one in stack.unstack()], history.seconds)


LOCAL = Setting(steps=3000)
PAPER = Setting(8, 4, 64, 2, steps=20_000, batch=1000, lr=2e-3, warmup=500)
TINY = Setting(steps=3, batch=4, width=8, warmup=1, samples=16, tests=8)


@dataclass(frozen=True)
class Trained:
    """The networks of one task and kind of attention, one a seed, on the CPU."""

    task: str
    model: str
    seeds: tuple[int, ...]
    networks: list[nn.Module] = field(repr=False)
    seconds: float

    def rows(self, setting: Setting, scales: Iterable[float] = SCALES) -> list[dict[str, Any]]:
        """One row a seed and scale: ``task, model, seed, scale, mse, relative`` (mse by the square of the scale)."""
        found = []
        for scale in scales:
            test = setting.test(self.task, scale)
            for seed, network in zip(self.seeds, self.networks, strict=True):
                mse = error(network, test)
                row = {"task": self.task, "model": self.model, "seed": seed, "scale": scale}
                found.append(row | {"mse": mse, "relative": mse / scale**2})
        return found


def error(network: nn.Module, test: list_tasks.Lists) -> float:
    """Mean squared error of a network on a batch, in float32."""
    with torch.no_grad():
        outputs = network(torch.as_tensor(test.inputs, dtype=torch.float32))
    return float((outputs.double() - torch.as_tensor(test.targets)).square().mean())


def transplanted_error(network: chapter.Network, test: list_tasks.Lists, shift: int = 0) -> float:
    """The error if the weights are those of the same list made small: divided so that it fits into the range of training.

    Everything else, values and MLPs, works with the list as it is. What is gained is what the weights spoil by moving. A ``shift``
    takes the weights of a list further on in the batch instead: weights that do not move either, but belong to other numbers.
    """
    x = torch.as_tensor(test.inputs, dtype=torch.float32)
    size = x.abs().amax(dim=(1, 2), keepdim=True)
    with torch.no_grad():
        _, weights = network.run((x * (LIMIT / size).clamp(max=1)).roll(shift, 0))
        outputs, _ = network.run(x, given=weights)
    return float((outputs.double() - torch.as_tensor(test.targets)).square().mean())


# ------------------------------------------------------------------------------------------------------------ verdicts

Measured = tuple[float, tuple[float, float]]


def table(rows: Iterable[dict[str, Any]], column: str = "mse") -> pd.DataFrame:
    """Geometric mean over the seeds by model and scale: errors spread over decades, and one bad seed is not the mean."""
    frame = pd.DataFrame(rows)
    logs = np.log(frame[column]).groupby([frame["model"], frame["scale"]], sort=False).mean()
    return np.exp(logs).unstack("scale").rename_axis(index=None, columns="c")


def ratio(rows: Iterable[dict[str, Any]], above: str, below: str, scale: float) -> Measured:
    """How many times as large one model's error is as another's of the same seed: geometric mean and range of the seeds."""
    found = {(row["model"], row["seed"]): row["mse"] for row in rows if row["scale"] == scale}
    seeds = sorted({seed for model, seed in found if model == above})
    return spread([found[above, seed] / found[below, seed] for seed in seeds])


def spread(values: Sequence[float]) -> Measured:
    """Geometric mean and range."""
    return math.exp(fmean(math.log(value) for value in values)), (min(values), max(values))


def extrapolates(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``extrapolates`` and ``extrapolates-sum``, from the rows of one task."""
    (value, interval), (at5, _), (at3, _) = (ratio(rows, "standard", "positional", scale) for scale in (10, 5, 3))
    in_range, _ = spread([row["mse"] for row in rows if row["model"] == "positional" and row["scale"] == 1])
    return {"value": value, "interval": interval, "controls": {"at5": at5, "at3": at3, "in_range": in_range}}


def not_repeated_positions(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``not-repeated-positions``."""
    value, interval = ratio(rows, "standard, P in every layer", "positional", 10)
    return {"value": value, "interval": interval, "controls": {"uniform": ratio(rows, "uniform", "positional", 10)}}


def positions_at_input(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``positions-at-input``."""
    value, interval = ratio(rows, "standard", "positional, P at the input", 10)
    return {"value": value, "interval": interval}


def rescaling(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``rescaling``: powers of ten, since the seeds may lie far apart."""
    value, plain = (ratio(rows, model, "positional", 10) for model in ("standard, rescaled", "standard"))
    return {**_named(_powers(value)), "controls": {"plain": _powers(plain)}}


def _powers(measured: Measured) -> Measured:
    """A ratio and its range as powers of ten."""
    value, (low, high) = measured
    return math.log10(value), (math.log10(low), math.log10(high))


def _named(measured: Measured) -> dict[str, Any]:
    return {"value": measured[0], "interval": measured[1]}


def data_routing(rows: Sequence[dict[str, Any]], minimum: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``data-routing``: the rows of following pointers and of the running minimum."""
    value, interval = ratio(rows, "positional", "standard", 1)
    return {"value": value, "interval": interval, "controls": {"minimum": ratio(minimum, "positional", "standard", 1)}}


def beyond_scaling(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``beyond-scaling``."""
    found = {(row["seed"], row["scale"]): row["relative"] for row in rows if row["model"] == "positional"}
    value, interval = spread([found[seed, 10] / found[seed, 1] for seed in sorted({seed for seed, _ in found})])
    return {"value": value, "interval": interval}


def surgery(standard: Trained, setting: Setting, scales: Iterable[float] = SCALES) -> pd.DataFrame:
    """The error of a standard model with other weights, a row a seed and scale: ``own`` weights, ``small``, ``other``.

    ``small`` are the weights of the list made small, ``other`` those of another list made small.
    """
    rows = []
    for scale, (seed, network) in product(scales, zip(standard.seeds, standard.networks, strict=True)):
        test = setting.test(standard.task, scale)
        assert isinstance(network, chapter.Network)
        found = {"own": error(network, test)}
        found |= {name: transplanted_error(network, test, shift) for name, shift in (("small", 0), ("other", 1))}
        rows.append({"seed": seed, "scale": scale, **found})
    return pd.DataFrame(rows)


def weights_drift(found: pd.DataFrame) -> dict[str, Any]:
    """For ``weights-drift``, from the frame of :func:`surgery`."""
    last = found[found.scale == 10]
    value, interval = spread((last.small / last.own).tolist())
    return {"value": value, "interval": interval, "controls": {"other": spread((last.other / last.own).tolist())}}


def compare(
    setting: Setting, task: str, models: Iterable[str], seeds: Sequence[int] = SEEDS
) -> tuple[dict[str, Trained], list[dict[str, Any]]]:
    """Train several kinds of attention on a task, on one thread: the trained networks by name, and their rows."""
    with lab.one_thread():
        trained = {model: setting.train(task, model, seeds) for model in lab.progress(list(models), task)}
        return trained, [row for one in trained.values() for row in one.rows(setting)]


# -------------------------------------------------------------------------------------------------------------- the record


def jobs(device: str) -> list[tuple[str, str]]:
    """(task, model) of a record, the ones that claims need first. On a GPU all models on all tasks."""
    first = [("cumulative min", model) for model in chapter.MODELS]
    pointers = [(LOOKUP, model) for model in ("positional", "standard")]
    rest = [task for task in list_tasks.TASKS if task != "cumulative min"]
    models = chapter.MODELS if device == "cuda" else ("positional", "standard")
    return first + pointers + list(product(rest, models))


def judged(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every claim whose rows are all there."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    least, total, pointers = (by_task.get(task, []) for task in ("cumulative min", "cumulative sum", LOOKUP))
    found = {}
    if {row["model"] for row in least} >= set(chapter.MODELS):
        found["extrapolates"] = extrapolates(least)
        found["not-repeated-positions"] = not_repeated_positions(least)
        found["positions-at-input"] = positions_at_input(least)
        found["rescaling"] = rescaling(least)
        found["beyond-scaling"] = beyond_scaling(least)
        drift = pd.DataFrame([row for row in least if "small" in row])
        found["weights-drift"] = weights_drift(drift.rename(columns={"mse": "own"}))
    if {row["model"] for row in pointers} >= {"positional", "standard"}:
        found["data-routing"] = data_routing(pointers, least)
    if {row["model"] for row in total} >= {"positional", "standard"}:
        found["extrapolates-sum"] = extrapolates(total)
    return [
        dict(claims.measure(f"positional-attention/{name}", **numbers, seeds=seeds, origin="record"))
        for name, numbers in found.items()
    ]


def job_rows(setting: Setting, task: str, model: str, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """The rows of a record for one task and model; those of the standard model carry the surgery's error too."""
    trained = setting.train(task, model, seeds, device)
    rows = trained.rows(setting)
    if model == "standard":
        found = surgery(trained, setting).set_index(["seed", "scale"])[["small", "other"]]
        rows = [row | found.loc[(row["seed"], row["scale"])].astype(float).to_dict() for row in rows]
    size = {"n": setting.length, "layers": setting.layers, "width": setting.width, "steps": setting.steps}
    return [size | row | {"seconds": trained.seconds / len(seeds)} for row in rows]


def write_record(
    path: Path,
    setting: Setting,
    todo: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    *,
    device: str,
    command: str,
    commit: str,
    resume: bool = False,
) -> None:
    """Train and write the record, anew after each model, so that an interruption costs one of them.

    Args:
        resume: keep what a record of the same sources and size already holds.
    """
    before = records.load(path.stem, path.parent) if resume else None
    rows: list[dict[str, Any]] = []
    if before is not None and not before.changed():
        rows = [row for row in before.rows if "claim" not in row and row["steps"] == setting.steps]
    done = {(row["task"], row["model"]) for row in rows}
    for task, model in todo:
        if (task, model) in done:
            continue
        start = time.perf_counter()
        with lab.one_thread():
            rows += job_rows(setting, task, model, seeds, device)
        records.write(path, rows + judged(rows, seeds), sources=SOURCES, command=command, commit=commit)
        print(f"{task}, {model}: {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    name = "python -m attnlab.foundations.positional_attention_runs"
    parser = argparse.ArgumentParser(prog=name, description="Train the models of the chapter positional-attention.")
    parser.add_argument(
        "--record", type=Path, required=True, help="the JSON to write, records/positional-attention.json"
    )
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the paper's size, 10 seeds")
    parser.add_argument("--resume", action="store_true", help="keep the models that the record holds already")
    parser.add_argument("--tiny", action="store_true", help="a few updates, to see that all of it works")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    setting, seeds = (PAPER, tuple(range(10))) if gpu else (LOCAL, SEEDS)
    command = f"{name} --record records/{options.record.name}" + " --device cuda" * gpu + " --tiny" * options.tiny
    write_record(
        options.record,
        TINY if options.tiny else setting,
        jobs(options.device),
        SEEDS if options.tiny else seeds,
        device=options.device,
        command=command,
        commit=options.commit,
        resume=options.resume,
    )


if __name__ == "__main__":
    main()
