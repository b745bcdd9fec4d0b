"""Time kernels against their peers and write one record.

``python -m attnlab.kernels.bench --operators linear_decay scalar_gated --out records/linear-kernels-h200.json``: a page reads a
record of its own operators, which is as old as their code alone.

On a GPU: 65,536 tokens in bfloat16 (the Aaren scan also half a million), sequences of 1k to 64k tokens, three sets of
heads, forward alone and with backward. Without a GPU tiny shapes run through the torch forms, to try out the machinery.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from attnlab import lab
from attnlab.kernels.bench import report
from attnlab.kernels.bench.measure import Row, copy_bandwidth, exact_results, measure
from attnlab.kernels.bench.peers import Implementation
from attnlab.kernels.bench.problems import Shape
from attnlab.kernels.bench.registry import CASES, OPERATORS, Case


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    started = time.monotonic()
    os.environ |= report.SETTINGS  # before anybody imports flash-linear-attention
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # for peers that calculate in float32
    bandwidth = copy_bandwidth(device)
    record = report.provenance(arguments, options.commit, bandwidth, options.operators)
    rows: list[Row] = report.resumed(options.resume, record, options.operators) if options.resume else []
    done = {_problem(row) for row in rows}
    for case, shape, implementations in _plan(options.operators, device.type, options.quick):
        seconds = time.monotonic() - started
        if seconds > options.budget:
            record["stopped"] = f"after {seconds:.0f} s, before {case.operator}, {case.name}, {shape}"
            break
        missing = [x for x in implementations if (case.operator, case.name, str(shape), x.name) not in done]
        for row in _rows(case, shape, missing, device, bandwidth):
            rows.append({"commit": record["commit"]} | row)
            print(f"{time.monotonic() - started:5.0f} s  {_progress(row)}", flush=True)
        _write(options, record, rows, started, device.type)
    lacks = _write(options, record, rows, started, device.type)
    print(
        f"\n{report.tables(rows)}\n\n{len(rows)} rows in {options.out}; {record.get('stopped', 'no budget in the way')}"
    )
    print("complete" if not lacks else "\n  ".join(["the record lacks", *lacks]))
    return 0


def _write(options: argparse.Namespace, record: Row, rows: list[Row], started: float, device: str) -> list[str]:
    """The record so far, with what it still lacks."""
    lacks = lacking(rows, device, options.operators)
    lab.write_json(options.out, record | {"lacks": lacks, "seconds": time.monotonic() - started, "rows": rows})
    return lacks


def lacking(rows: Sequence[Row], device: str, operators: Sequence[str] = OPERATORS) -> list[str]:
    """What the registry wants of these operators and no row tells of."""
    done = {_problem(row) for row in rows}
    wanted = [
        ((case.operator, case.name, x.name), str(shape))
        for case, shape, implementations in _plan(operators, device, quick=False)
        for x in implementations
    ]
    whole = Counter(who for who, _ in wanted)
    short = Counter(who for who, shape in wanted if (*who[:2], shape, who[2]) not in done)
    return [f"{', '.join(who)}: {count} of {whole[who]} shapes" for who, count in short.items()]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m attnlab.kernels.bench", description=__doc__)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="OPERATOR",
                        help=f"some of {', '.join(OPERATORS)}; by default all")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="16 heads of 128 channels at 1k and 64k tokens only")
    parser.add_argument("--budget", type=float, default=280.0, metavar="SECONDS", help="start nothing new after that")
    parser.add_argument("--resume", type=Path, metavar="RECORD", help="go on with a record that a budget stopped, of the same "
                        "machine and versions; operators whose code changed since are measured anew")  # fmt: skip
    parser.add_argument("--commit", help="what the code is, where there is no repository to ask")
    parser.add_argument(
        "--out", type=Path, default=Path("records/linear-kernels-h200.json"), help="default: %(default)s"
    )
    return parser.parse_args(arguments)


def _plan(operators: Sequence[str], device: str, quick: bool) -> Iterator[tuple[Case, Shape, list[Implementation]]]:
    """Who is measured on what, in this order; those that must compile come last, so that a budget cuts them first."""
    for compiles in (False, True):
        for case in CASES:
            if case.operator in operators:
                for shape in case.shapes(device, quick=quick):
                    standing = case.standing(shape, device, compiles=compiles)
                    if standing:
                        yield case, shape, standing


def _rows(
    case: Case, shape: Shape, implementations: list[Implementation], device: torch.device, bandwidth: float
) -> Iterator[Row]:
    """Every implementation on one problem, and the memory given back after each."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = case.draw(shape, torch.Generator(device).manual_seed(0), dtype)
    exact = functools.cache(lambda: exact_results(case, problem))
    for implementation in implementations:
        if implementation.compiles:
            torch.compiler.reset()  # each shape is compiled anew; the compiler stops after eight of the same function
        yield from measure(case, problem, implementation, exact, bandwidth)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _problem(row: Row) -> tuple[str, str, str, str]:
    """What a row measured, apart from the pass."""
    return row["operator"], row["case"], str(Shape(**row["shape"])), row["impl"]


def _progress(row: Row) -> str:
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    result = f"{row['ms']:.3f} ms" if "ms" in row else row.get("failed") or f"skipped: {row['skipped']}"
    return f"{row['operator']}, {row['case']}, {shape}, {row['impl']}, {row['pass']}: {result}"


if __name__ == "__main__":
    sys.exit(main())
