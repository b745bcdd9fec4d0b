"""The record of the chapter ``foundations/pointer-networks``.

``python -m attnlab.foundations.pointer_networks_runs --record records/pointer-networks.json`` trains what the chapter analyses, on a
CPU in some twenty minutes; ``--size paper --device cuda --workers 9`` trains at the paper's sizes, all networks at the same time.
Both go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from attnlab import lab, records
from attnlab.foundations.pointer_networks import Solver
from attnlab.foundations.pointer_tasks import (
    ATTENTION,
    KINDS,
    POINTER,
    SET,
    SOFTMAX,
    Run,
    Setting,
    rows_of,
)
from attnlab.models.sweep import count_parameters

COMMAND = "python -m attnlab.foundations.pointer_networks_runs"
SOURCES = tuple(
    f"foundations/{name}.py"
    for name in ("geometry", "polygons", "pointer_networks", "pointer_decoding", "pointer_tasks")
)
FOLDER = records.FOLDER / "models"


# -------------------------------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class Part:
    """One task at one size: which networks and seeds are trained, and the numbers of points they are tested on."""

    case: str
    setting: Setting
    kinds: tuple[str, ...]
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]


SIZES: dict[str, tuple[Part, ...]] = {
    "cpu": (
        Part("hull", Setting(steps=4000), KINDS, (0,), (5, 8, 10, 15, 20, 50)),
        Part("tour", Setting("tour", steps=3000, pool=10_000), (POINTER, SET), (0,), (5, 10, 12, 15, 20)),
        Part("delaunay", Setting("delaunay", largest=5, steps=3000, pool=50_000), (POINTER,), (0,), (5,)),
        Part("hull", Setting(steps=4000), (SOFTMAX, ATTENTION, POINTER), (1, 2), (5, 8, 10, 15, 20, 50)),
    ),
    "paper": (
        Part(
            "hull 5-50",
            Setting(largest=50, width=256, layers=3, steps=10_000, batch=512),
            (POINTER, SET),
            (0,),
            (5, 10, 50, 100, 200, 500),
        ),
        Part(
            "hull 50",
            Setting(smallest=50, largest=50, width=256, steps=10_000, batch=512),
            (SOFTMAX, ATTENTION, POINTER),
            (0,),
            (50,),
        ),
        Part(
            "tour",
            Setting("tour", width=256, layers=3, steps=10_000, batch=512, pool=100_000),
            (POINTER, SET),
            (0,),
            (5, 10, 12, 15, 20),
        ),
        *(
            Part(
                f"delaunay {n}",
                Setting("delaunay", smallest=n, largest=n, width=256, steps=10_000, batch=512, pool=500_000),
                (POINTER,),
                (0,),
                (n,),
            )
            for n in (5, 10)
        ),
    ),
    "tiny": (
        Part("hull", Setting(width=8, steps=3, batch=4), KINDS, (0, 1, 2), (5, 10)),
        Part("tour", Setting("tour", largest=6, width=8, steps=2, batch=4, pool=8), (POINTER,), (0,), (5,)),
        Part("delaunay", Setting("delaunay", largest=5, width=8, steps=2, batch=4, pool=8), (POINTER,), (0,), (5,)),
    ),
}


def train_row(part: Part, kind: str, seed: int, models: Path | None, device: str) -> dict[str, Any]:
    """Train one network, test it, keep its weights: a row of the record."""
    run = part.setting.train(kind, seed, device)
    row: dict[str, Any] = {
        "case": part.case,
        "operator": "training",
        "impl": kind,
        "seed": seed,
        "points": [part.setting.smallest, part.setting.largest],
        "width": part.setting.width,
        "steps": part.setting.steps,
        "batch": part.setting.batch,
        "lr": part.setting.rates[kind],
        "parameters": count_parameters(run.solver),
        "seconds": run.seconds,
        "curve": thinned(run.loss),
        "scores": [
            {key: value for key, value in row.items() if key not in ("kind", "seed")}
            for n in part.sizes
            for row in rows_of(run, part.setting.task, (n,), 1000 if n <= 100 else 250)  # crossings cost n² memory each
        ],
    }
    if models is not None:
        path = models / file_name(part.case, kind, seed)
        save(path, part.setting, run)
        row |= {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return row


def thinned(loss: Sequence[float], points: int = 40) -> list[list[float]]:
    """(update, mean loss up to it since the last point), at most ``points`` of them."""
    every = max(1, len(loss) // points)
    return [[end, fmean(loss[end - every : end])] for end in range(every, len(loss) + 1, every)]


# --------------------------------------------------------------------------------------------------------- kept networks


def file_name(case: str, kind: str, seed: int) -> str:
    """Such as ``pointer-networks-hull-set-pointer-0.safetensors``."""
    return f"pointer-networks-{case}-{kind}-{seed}.safetensors".replace(" ", "-")


def save(path: Path, setting: Setting, run: Run) -> None:
    """Write a network's weights, with what is needed to build it as metadata."""
    from safetensors.torch import save_file

    facts = {"kind": run.kind, "width": setting.width, "layers": setting.layers, "largest": setting.largest}
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in run.solver.state_dict().items()}
    save_file(state, str(path), metadata={"solver": json.dumps(facts)})


def load(case: str, kind: str, seed: int = 0, folder: Path = FOLDER) -> Solver:
    """A recorded network, on the CPU, in evaluation mode.

    Raises:
        ValueError: there is none; the message names the command that makes it.
    """
    from safetensors import safe_open

    path = folder / file_name(case, kind, seed)
    if not path.is_file():
        raise ValueError(f"{path.name} is not there; make it with {COMMAND} --record records/pointer-networks.json")
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["solver"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    kept = facts.pop("kind")
    solver = Setting(**facts).build(kept)
    solver.load_state_dict(state)
    return solver.eval()


# ------------------------------------------------------------------------------------------------------------ the command


def make_record(
    path: Path,
    parts: Sequence[Part],
    *,
    models: Path | None,
    device: str,
    commit: str,
    command: str,
    limit_s: float = float("inf"),
    workers: int = 1,
) -> bool:
    """Train what the record does not have yet; it is written after every network. Returns whether all is there.

    Args:
        limit_s: no network is begun after so many seconds.
        workers: networks that are trained at the same time, each in a process of its own; 1 trains in this one.
    """
    before = records.load(path.stem, path.parent)
    rows = [] if before is None else before.rows
    plan = [(part, kind, seed) for part in parts for seed in part.seeds for kind in part.kinds]
    place = {(part.case, kind, seed): at for at, (part, kind, seed) in enumerate(plan)}
    done = {(row["case"], row["impl"], row["seed"]) for row in rows}
    todo = [(part, kind, seed, models, device) for part, kind, seed in plan if (part.case, kind, seed) not in done]
    finished = 0
    for row in trained(todo, limit_s, workers):
        finished += 1
        rows.append(row)
        rows.sort(key=lambda row: place.get((row["case"], row["impl"], row["seed"]), len(place)))
        records.write(path, rows, sources=SOURCES, command=command, commit=commit)
        last = {name: round(value, 3) for name, value in row["scores"][-1].items()}
        print(f"{row['case']}, {row['impl']}, seed {row['seed']}: {row['seconds']:.0f} s, {last}", flush=True)
    if finished < len(todo):
        print(f"stopped after {limit_s:g} s; the same command goes on from here", flush=True)
    return finished == len(todo)


def trained(todo: Sequence[tuple[Any, ...]], limit_s: float, workers: int) -> Iterator[dict[str, Any]]:
    """The rows of :func:`train_row`, in the order in which they are finished; none is begun after ``limit_s`` seconds."""
    start = time.perf_counter()
    if workers == 1:
        for arguments in todo:
            if time.perf_counter() - start > limit_s:
                return
            yield train_row(*arguments)
        return
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(train_row, *arguments) for arguments in todo]
        for one in as_completed(running):
            if not one.cancelled():
                yield one.result()
            if time.perf_counter() - start > limit_s:
                for waiting in running:
                    waiting.cancel()  # those that run go on to their end


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Train what the chapter foundations/pointer-networks keeps."
    )
    parser.add_argument(
        "--record", type=Path, required=True, help="the JSON to write, such as records/pointer-networks.json"
    )
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="cpu: the chapter's; paper: needs a GPU")
    parser.add_argument("--device", default="cpu", help="where the networks are trained: cpu or cuda")
    parser.add_argument("--models", type=Path, help="folder for the trained networks, such as records/models")
    parser.add_argument("--workers", type=int, default=1, help="networks trained at the same time")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no network after so many seconds")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no such device here; leave it out to train on the CPU")
    command = f"{COMMAND} --record records/{options.record.name}"
    command += "".join(
        f" --{name} {value}"
        for name, value in (("size", options.size), ("device", options.device), ("workers", options.workers))
        if value != parser.get_default(name)
    )
    command += " --models records/models" if options.models else ""
    with lab.one_thread():
        make_record(
            options.record,
            SIZES[options.size],
            models=options.models,
            device=options.device,
            commit=options.commit,
            command=command,
            limit_s=options.limit,
            workers=options.workers,
        )


if __name__ == "__main__":
    main()
