"""Distributed attention on this machine or under torchrun, checked against one process.

``python -m attnlab.scale --ranks 2`` starts its own processes; ``torchrun --nproc-per-node 2 -m attnlab.scale`` uses those of
torchrun, with NCCL where every rank has a GPU. Exit codes: 0, or 1 if a result is wrong, a rank failed or memory ran out, 2 for bad
arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnlab.scale import demo, launch
from attnlab.scale.layouts import LAYOUTS, positions

#: largest accepted relative difference to float64 on one process; sums are taken in float32, or in float64 for float64
LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}
LOST = ("closed by peer", "reset by peer", "remote process exited")  # as gloo and NCCL say that another rank has ended
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
            _check(problem, ranks)
    except ValueError as error:
        parser.error(str(error))
    try:
        rows, first = _rows(problem, ranks, chosen.time_limit)
    except (launch.RankError, TimeoutError) as error:
        print(f"error: {error}" + (f"; {REMEDY}" if "out of memory" in str(error) else ""), file=sys.stderr)
        return 1
    if first:
        print(_table(rows))
    limit = LIMITS[chosen.dtype]
    wrong = [row for row in rows if max(row["error"], row["gradient error"]) > limit]
    for row in wrong:
        print(f"error: {row['method']}, {row['layout']}: more than {limit:g} from one process", file=sys.stderr)
    return 1 if wrong else 0


def _rows(problem: demo.Problem, ranks: int, time_limit_s: float) -> tuple[list[dict[str, Any]], bool]:
    """What was found, and whether it is this process that prints it."""
    if "RANK" not in os.environ:
        return launch.processes(demo.every_form, ranks, problem, time_limit_s=time_limit_s)[0], True
    with _one_line(), launch.joined(time_limit_s) as wire, _one_line():  # told before others are waited for
        return demo.every_form(wire, problem), wire.rank == 0


@contextmanager
def _one_line() -> Iterator[None]:
    """End this process with one line instead of a traceback if memory runs out inside, here or on a rank that is waited for."""
    rank = f"rank {os.environ['RANK']} " if "RANK" in os.environ else ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if what := launch.shortage(error):
            print(f"error: {rank}{what}; {REMEDY}", file=sys.stderr)
        elif any(mark in str(error) for mark in LOST):
            print(f"error: {rank}lost the connection to a rank that has ended", file=sys.stderr)
        else:
            raise
        raise SystemExit(1) from None


def _check(problem: demo.Problem, ranks: int) -> None:
    for layout in LAYOUTS:
        positions(problem.length, ranks, layout)
    if problem.heads % problem.kv_heads:
        raise ValueError(f"--kv-heads {problem.kv_heads} does not divide --heads {problem.heads}")
    if problem.kv_heads % ranks:
        raise ValueError(f"--kv-heads {problem.kv_heads} is no multiple of {ranks} ranks, as ulysses needs")


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
