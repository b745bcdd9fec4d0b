"""A training run on disk: parameters, optimizer, configuration and history, in one file that is whole or absent."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from attnlab.models.run import History, TrainConfig

FORMAT = 1
FREE = ("evaluate_every", "checkpoint_every")  # what may differ between the parts of a run: neither changes an update
REMEDY = "give another path, or resume=False to begin anew"


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, history: History) -> None:
    """Write the state of a run after its last recorded update.

    The file is written beside its place, flushed to the disk and then renamed: who is killed halfway leaves the
    previous checkpoint untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(
                {
                    "format": FORMAT,
                    "config": asdict(config),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": asdict(history),
                },
                stream,
            )
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> dict[str, Any]:
    """Put a saved run into ``model`` and ``optimizer``; returns the fields of its history.

    Only tensors and plain values are read: a file cannot bring code along.

    Raises:
        ValueError: the file is no checkpoint, is damaged, or belongs to another configuration or model.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        written, state, moments, history = (saved[key] for key in ("config", "model", "optimizer", "history"))
        known = saved["format"] == FORMAT
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read as one ({type(error).__name__}); {REMEDY}") from error
    if not known:
        raise ValueError(f"checkpoint: {path} has format {saved['format']!r}, not {FORMAT}; {REMEDY}")
    now = asdict(config)
    if changed := [name for name in now if name not in FREE and written.get(name) != now[name]]:
        parts = ", ".join(f"{name}={written.get(name)!r} and not {now[name]!r}" for name in changed)
        raise ValueError(f"checkpoint: {path} was written with {parts}; {REMEDY}")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError(f"checkpoint: {path} holds parameters of another model; {REMEDY}")
    model.load_state_dict(state)
    optimizer.load_state_dict(moments)
    return dict(history)
