"""What is measured once and kept under ``records/``: rows with where, when and by which command they were made.

A record is one JSON: ``{"schema": 1, "command", "commit", "date", "machine": {...}, "versions": {...}, "rows": [...]}``. A row
of the kernel benchmark has ``case``, ``operator``, ``impl``, ``pass``, ``shape`` (sizes by letter: B, T, H, K, V), ``ms``, errors;
a row with ``claim`` belongs to the claims ledger.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlab import lab

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
FOLDER = Path(__file__).resolve().parents[2] / "records"  # of a checkout; an installed wheel has none
REQUIRED = ("command", "commit", "date", "machine", "versions", "rows")


@dataclass(frozen=True)
class Record:
    """One measured file.

    Attributes:
        name: of the file, without its suffix.
        command: what made it.
        commit: of the code that was measured.
        date: ISO, UTC.
        machine: ``platform``, ``cpus`` and ``gpu``, as in a row of the ledger, and what else its command knows.
        versions: of Python and the libraries, the peers' among them.
        rows: the measurements as they stand in the file.
        sources: what :func:`digests` gave for the measured files; empty if the record does not tell.
    """

    name: str
    command: str
    commit: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]]
    sources: dict[str, str]

    def frame(self) -> pd.DataFrame:
        """The measurements (not the rows of the ledger), one row each, the sizes of ``shape`` as columns of their own."""
        import pandas as pd

        measured = [row for row in self.rows if "claim" not in row]
        return pd.DataFrame(
            [
                {**{key: x for key, x in row.items() if key != "shape"}, **dict(row.get("shape") or {})}
                for row in measured
            ]
        )

    @property
    def origin(self) -> str:
        """Machine, date, command, commit and versions in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit, dash, note = self.commit.partition("-")  # "-changed": not exactly that commit
        where = self.machine["gpu"] or f"no GPU, {self.machine['cpus']} CPUs"
        return f"{where}, {self.date[:10]}, `{self.command}` at {commit[:10]}{dash}{note} ({versions})"

    def changed(self) -> list[str]:
        """The measured files that differ from those of this installation: their numbers are of older code."""
        return [name for name, digest in digests(self.sources).items() if digest != self.sources[name]]


def unbroken(cells: Iterable[str]) -> str:
    """Texts with a slash between them, such as times forward and with backward, as one that no table breaks over lines."""
    return "\u202f/\u202f".join(cells)


def load(name: str, folder: Path | None = None) -> Record | None:
    """The record ``<folder>/<name>.json``, or None where there is none (an installation without ``records/``, or not made yet).

    Args:
        folder: left out, ``records/`` of this checkout.

    Raises:
        ValueError: a file that is no record of this schema; the message names it and what is missing.
    """
    path = (FOLDER if folder is None else folder) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: no JSON ({error}); make it again with its command") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path.name}: schema {found!r}, but this version reads {SCHEMA}; make the record again")
    if missing := [key for key in REQUIRED if key not in data]:
        raise ValueError(f"{path.name}: no record without {', '.join(missing)}; make it again with its command")
    return Record(name, sources=data.get("sources", {}), **{key: data[key] for key in REQUIRED})


def write(path: Path, rows: list[dict[str, Any]], *, sources: Iterable[str], command: str, commit: str) -> None:
    """Write a record of this machine, now. Called after every part of a long run, so that an interruption costs one part.

    Args:
        path: the file.
        rows: the measurements so far.
        sources: files of the package that were measured, given relative to it.
        command: what is running.
        commit: of the code.
    """
    versions = lab.versions()
    if importlib.util.find_spec("triton") is not None:
        versions["triton"] = metadata.version("triton")
    record = {
        "schema": SCHEMA,
        "command": command,
        "commit": commit,
        "date": lab.now(),
        "machine": lab.machine(),
        "versions": versions,
        "sources": digests(sources),
        "rows": rows,
    }
    lab.write_json(path, record)


def digests(files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of the package, given relative to it (``kernels/decay_sweep.py``); "" for one that is gone."""
    package = Path(__file__).resolve().parent
    paths = {name: package / name for name in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for name, path in paths.items()
    }
