"""A file that an interrupted analysis goes on from: arrays and the settings they belong to, no code.

It is written whole or not at all, so a run that is killed while writing leaves the one before.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SCHEMA = 1


class CheckpointError(ValueError):
    """The file is no checkpoint, or one of another run."""


class Checkpoint(NamedTuple):
    """The settings of the stages that were begun, and the state of each."""

    settings: dict[str, dict[str, Any]]
    states: dict[str, dict[str, np.ndarray]]


def beside(out: Path) -> Path:
    """Where the checkpoint of a result lies."""
    return out.with_name(out.name + ".checkpoint")


def save(path: Path, settings: Mapping[str, Mapping[str, Any]], states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write settings and states, by the name of their stage."""
    arrays = {f"{stage}/{key}": value for stage, state in states.items() for key, value in state.items()}
    head = json.dumps({"schema": SCHEMA, "settings": settings}, sort_keys=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as file:
            np.savez(file, head=np.array(head), **arrays)  # type: ignore[arg-type]
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read what :func:`save` wrote.

    Raises:
        CheckpointError: if it is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            arrays = {key: file[key] for key in file.files if key != "head"}
        if head["schema"] != SCHEMA:
            raise CheckpointError(f"{path}: its schema is {head['schema']!r}, this version reads {SCHEMA}")
        states: dict[str, dict[str, np.ndarray]] = {}
        for key, value in arrays.items():
            stage, _, name = key.partition("/")
            states.setdefault(stage, {})[name] = value
        return Checkpoint(head["settings"], states)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no checkpoint of this command ({error}); remove it to start over") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings in which two runs differ, each as ``"steps: 5 there, 3 here"``."""
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]
