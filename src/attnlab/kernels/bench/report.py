"""The record that a run leaves, and the table that it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnlab import lab
from attnlab.kernels import records
from attnlab.kernels.bench.measure import GRAPH_MS, MEASURE_MS, WARMUP_MS, Row
from attnlab.kernels.bench.peers import OURS

SETTINGS = {
    "FLA_DISABLE_BACKEND_DISPATCH": "1",
    "FLA_TILELANG": "0",
}  # hold flash-linear-attention to its Triton kernels
_ALL = ("arguments", "dispatch", "launch")
_SWEEPS = ("decay_gradient", "decay_launch", "decay_sweep", "packed")
#: what an operator's rows depend on
SOURCES_OF = {
    operator: tuple(f"kernels/{name}.py" for name in (*_ALL, *names))
    for operator, names in {
        "linear_decay": (*_SWEEPS, "decay_function", "linear_decay"),
        "scalar_gated": (*_SWEEPS, "decay_function", "linear_decay"),
        "aaren_scan": ("aaren_scan", "packed", "prefix_softmax"),
        "causal_flow": (*_SWEEPS, "causal_flow", "flow_gates", "flow_gradients", "flow_sweep", "flow_walks"),
    }.items()
}


def sources_of(operators: Sequence[str]) -> list[str]:
    """The files that the rows of these operators depend on."""
    return sorted({name for operator in operators for name in SOURCES_OF[operator]})


def _in_records(arguments: Sequence[str]) -> list[str]:
    """The arguments with the folders of --out and --resume as in a checkout: where a GPU machine keeps its files is nobody's business."""
    before = ["", *arguments]
    return [
        f"records/{Path(x).name}" if option in ("--out", "--resume") else x
        for option, x in zip(before, arguments, strict=False)
    ]


def provenance(
    arguments: Sequence[str], commit: str | None, bandwidth: float, operators: Sequence[str]
) -> dict[str, Any]:
    """Everything of the record but its rows: what was run, when, where, and with which versions.

    Args:
        commit: of the code, where there is no repository to ask; none: ask.
        bandwidth: bytes a second that the memory copies.
        operators: what is measured; the record is as old as the code of these, whatever becomes of the others.
    """
    others = {name: _version(name) for name in ("triton", "flash-linear-attention")}
    return {
        "schema": records.SCHEMA,
        "command": shlex.join(["python", "-m", "attnlab.kernels.bench", *_in_records(arguments)]),
        "commit": commit or _commit(),
        "date": lab.now(),
        "machine": lab.machine() | {"copy_gbps": bandwidth * 1e-9},
        "versions": lab.versions() | {name: version for name, version in others.items() if version is not None},
        "settings": {name: os.environ.get(name) for name in SETTINGS}
        | {
            "warmup_ms": WARMUP_MS,
            "measure_ms": MEASURE_MS,
            "graph_ms": GRAPH_MS,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "sources": records.digests(sources_of(operators)),
    }


def resumed(path: Path, record: dict[str, Any], operators: Sequence[str]) -> list[Row]:
    """The rows of an earlier record that still hold, each with its commit; `record` then names the earlier command too.

    Of an operator whose code has changed our rows are left out, to be measured anew; what peers took is as it was.

    Raises:
        ValueError: a record of another GPU, other versions, settings or operators: its rows do not belong beside new ones.
    """
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name in ("versions", "settings"):
        if earlier[name] != record[name]:
            raise ValueError(f"--resume: {path.name} has other {name}; measure everything again")
    if earlier["machine"]["gpu"] != record["machine"]["gpu"]:
        raise ValueError(f"--resume: {path.name} was made on {earlier['machine']['gpu']}; measure everything again")
    if others := {row["operator"] for row in earlier["rows"]} - set(operators):
        raise ValueError(f"--resume: {path.name} has rows of {', '.join(sorted(others))}; name all its --operators")
    kept = [operator for operator in operators if _same(SOURCES_OF[operator], earlier["sources"], record["sources"])]
    record["command"] = f"{earlier['command']}; {record['command']}"
    return [
        {"commit": earlier["commit"]} | row for row in earlier["rows"] if row["operator"] in kept or row["impl"] != OURS
    ]


def _same(files: Sequence[str], earlier: dict[str, str], now: dict[str, str]) -> bool:
    return all(earlier.get(name) == now[name] for name in files)


def tables(rows: Sequence[Row]) -> str:
    """One table a case: ours beside the fastest peer of the same function and the fastest of another."""
    cases = dict.fromkeys((row["operator"], row["case"]) for row in rows)
    return "\n\n".join(_table([row for row in rows if (row["operator"], row["case"]) == case]) for case in cases)


def _table(rows: list[Row]) -> str:
    """One line a shape and pass, and below it who is missing and why."""
    lines = [
        f"{rows[0]['operator']}, {rows[0]['case']}, {rows[0]['dtype']}",
        f"{'shape':30} {'pass':17}{'ours ms':>9}{'floor':>7}{'error':>9}   fastest with the same result, and without",
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row["shape"].values(), row["pass"]), []).append(row)
    lines += [_line(group) for group in groups.values()]
    missing = Counter(
        (row["impl"], row.get("failed") or f"skipped: {row['skipped']}") for row in rows if "ms" not in row
    )
    lines += [f"  {impl}: {reason} ({count} x)" for (impl, reason), count in missing.items()]
    return "\n".join(lines)


def _line(group: list[Row]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in group[0]["shape"].items())
    start = f"{shape:30} {group[0]['pass']:17}"
    measured = [row for row in group if "ms" in row]
    ours = next((row for row in measured if row["impl"] == OURS), None)
    if ours is None:
        return f"{start}{'-':>9}"
    start += f"{ours['ms']:9.3f}{ours['floor_share']:7.0%}{ours['error']:9.1e}"
    for same in (True, False):
        peers = [row for row in measured if row["impl"] != OURS and row["same"] == same]
        if peers:
            start += "   " + _against(ours, min(peers, key=lambda row: row["ms"]))
    return start


def _against(ours: Row, peer: Row) -> str:
    ratio = peer["ms"] / ours["ms"]
    verdict = f"ours {ratio:.2f}x" if ratio >= 1 else f"the peer wins, ours {ratio:.2f}x"
    if ours.get("graph_ms") and peer.get("graph_ms"):
        verdict += f", {peer['graph_ms'] / ours['graph_ms']:.2f}x without the host"
    return f"{peer['impl']} {peer['ms']:.3f} ms ({verdict})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the code that runs, marked if it was changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-changed" if changed else commit
