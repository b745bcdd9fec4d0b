"""Distributed attention on this machine or under torchrun, checked against one process.

``python -m attnlab.scale --ranks 2`` starts its own processes; ``torchrun --nproc-per-node 2 -m attnlab.scale`` uses those of
torchrun, with NCCL where every rank has a GPU. Exit codes: 0, or 1 if a result is wrong, a rank failed or hung, or memory ran out, 2
for bad arguments. ``--record FILE`` keeps the table of rank 0 in the format of :mod:`attnlab.records`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnlab import records
from attnlab.scale import demo, launch
from attnlab.scale.layouts import LAYOUTS, positions

#: largest accepted relative difference to float64 on one process; sums are taken in float32, or in float64 for float64
LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}
LOST = ("closed by peer", "reset by peer", "remote process exited")  # as gloo and NCCL say that another rank has ended
LATE = ("timed out", "timeout")  # as gloo and the store of torchrun say that another rank did not come
SOURCES = (
    *(f"scale/{name}.py" for name in ("attention", "blocks", "demo", "layouts", "wire")),
    "mixers/softmax_merge.py",
)
REMEDY = "try a smaller --length, --heads or --batch"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnlab.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start; under torchrun it decides")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the whole sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="by default as many as --heads")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="float64")
    parser.add_argument("--full", action="store_true", help="attention without a causal mask")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds after which a hanging job is ended")
    parser.add_argument("--record", type=Path, help="JSON to write the table to, with machine, versions and date")
    parser.add_argument("--commit", default="unknown", help="of the code that runs, for --record")
    chosen = parser.parse_args(arguments)
    problem = demo.Problem(
        length=chosen.length,
        heads=chosen.heads,
        kv_heads=chosen.kv_heads or chosen.heads,
        width=chosen.width,
        batch=chosen.batch,
        causal=not chosen.full,
        dtype=getattr(torch, chosen.dtype),
    )
    ranks = int(os.environ.get("WORLD_SIZE", chosen.ranks))
    try:
        with _one_line():
            _check(problem, ranks, chosen.time_limit, chosen.record)
    except ValueError as error:
        parser.error(str(error))
    try:
        rows, first = _rows(problem, ranks, chosen.time_limit)
    except (launch.RankError, TimeoutError) as error:
        print(f"error: {error}" + (f"; {REMEDY}" if "out of memory" in str(error) else ""), file=sys.stderr)
        return 1
    if first:
        print(_table(rows))
        if chosen.record:
            command = _command(sys.argv[1:] if arguments is None else arguments)
            records.write(
                chosen.record,
                [_measured(row, problem, ranks) for row in rows],
                sources=SOURCES,
                command=command,
                commit=chosen.commit,
            )
    limit = LIMITS[chosen.dtype]
    wrong = [row for row in rows if max(row["error"], row["gradient error"]) > limit]
    for row in wrong:
        print(f"error: {row['method']}, {row['layout']}: more than {limit:g} from one process", file=sys.stderr)
    return 1 if wrong else 0


def _rows(problem: demo.Problem, ranks: int, time_limit_s: float) -> tuple[list[dict[str, Any]], bool]:
    """What was found, and whether it is this process that prints it."""
    if "RANK" not in os.environ:
        return launch.processes(demo.every_form, ranks, problem, time_limit_s=time_limit_s)[0], True
    late = f"error: rank {os.environ['RANK']} was not done within {time_limit_s:g} s; the job is ended"
    in_time = launch.ended_after(time_limit_s, late)
    with in_time, _one_line(), launch.joined(time_limit_s) as wire, _one_line():  # told before others are waited for
        rows = demo.every_form(wire, problem)
    return rows, wire.rank == 0


@contextmanager
def _one_line() -> Iterator[None]:
    """End this process with one line instead of a traceback if memory runs out inside, or another rank is lost or does not come."""
    rank = f"rank {os.environ['RANK']} " if "RANK" in os.environ else ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if what := launch.shortage(error):
            print(f"error: {rank}{what}; {REMEDY}", file=sys.stderr)
        elif any(mark in str(error) for mark in LOST):
            print(f"error: {rank}lost the connection to a rank that has ended", file=sys.stderr)
        elif any(mark in str(error).lower() for mark in LATE):
            print(
                f"error: {rank}waited for another rank until the time limit; did all start, and does one hang?",
                file=sys.stderr,
            )
        else:
            raise
        raise SystemExit(1) from None


def _check(problem: demo.Problem, ranks: int, time_limit_s: float, record: Path | None) -> None:
    if not time_limit_s > 0:
        raise ValueError(f"--time-limit {time_limit_s:g} must be positive")
    if record and not record.absolute().parent.is_dir():
        raise ValueError(f"--record {record}: there is no folder {record.parent}")
    for layout in LAYOUTS:
        positions(problem.length, ranks, layout)
    if problem.heads % problem.kv_heads:
        raise ValueError(f"--kv-heads {problem.kv_heads} does not divide --heads {problem.heads}")
    if problem.kv_heads % ranks:
        raise ValueError(f"--kv-heads {problem.kv_heads} is no multiple of {ranks} ranks, as ulysses needs")


def _command(arguments: list[str]) -> str:
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc-per-node {ranks}" if "RANK" in os.environ and ranks else "python"
    return " ".join([start, "-m attnlab.scale", *arguments])


def _measured(row: dict[str, Any], problem: demo.Problem, ranks: int) -> dict[str, Any]:
    """What rank 0 found, as a row of a record: milliseconds are the best of the repeats, errors relative to the largest number."""
    return {
        **{name: row[name] for name in ("method", "layout", "device", "error", "gradient error")},
        **{f"{name} ms": 1e3 * row[f"{name} s"] for name in ("forward", "backward")},
        **{f"{name} bytes": row[f"{name} bytes"] for name in ("forward", "backward")},
        "ranks": ranks,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "causal": problem.causal,
        "shape": {
            "B": problem.batch,
            "T": problem.length,
            "H": problem.heads,
            "G": problem.kv_heads,
            "K": problem.width,
        },
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'method':10}{'layout':12}{'error':>10}{'gradients':>11}{'forward':>12}{'backward':>12}{'MB sent':>16}"]
    for row in rows:
        sent = f"{row['forward bytes'] / 1e6:.2f} + {row['backward bytes'] / 1e6:.2f}"
        lines.append(
            f"{row['method']:10}{row['layout']:12}{row['error']:10.1e}{row['gradient error']:11.1e}"
            f"{1e3 * row['forward s']:9.1f} ms{1e3 * row['backward s']:9.1f} ms{sent:>16}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
