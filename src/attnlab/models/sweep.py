"""Fair comparisons: equal parameter counts, and a learning rate of its own for every model, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from attnlab import lab
from attnlab.models.training import Batches, Diverged, Evaluate, Loss, TrainConfig, fit, seeded

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    make_model: Callable[[], nn.Module],
    batches: Batches,
    loss: Loss,
    config: TrainConfig,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    evaluate: Evaluate | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a model anew for every learning rate and seed.

    Args:
        make_model: builds the model; torch is seeded for it, so that a seed means initial weights, batches and dropout.
        batches: as in :func:`~attnlab.models.training.fit`.
        loss: as there.
        config: its ``lr`` and ``seed`` are replaced.
        lrs: learning rates, at least three for a comparison; if the best is the first or last, widen the grid.
        seeds: at least three for a claim about chance.
        evaluate: its last metrics become columns.
        device: to train on; left out, the one of :func:`attnlab.lab.device`.
        progress: show a bar over the runs.

    Returns:
        one row a run: ``lr, seed, parameters, diverged, train_loss, seconds`` and the metrics, NaN where a run diverged.
        ``train_loss`` is the mean over the last 5 % of the updates.

    Raises:
        ValueError: no learning rate or no seed, or what :func:`~attnlab.models.training.fit` refuses.
    """
    import pandas as pd

    for name, values in {"lrs": lrs, "seeds": seeds}.items():
        if not values:
            raise ValueError(f"{name}: it is empty; give at least one")
    runs = list(product(lrs, seeds))
    rows = []
    for lr, seed in lab.progress(runs, "sweep") if progress else runs:
        model = seeded(make_model, seed).to(lab.device() if device is None else device)
        row = {"lr": lr, "seed": seed, "parameters": count_parameters(model), "diverged": False}
        try:
            history = fit(model, batches, loss, replace(config, lr=lr, seed=seed), evaluate=evaluate, progress=False)
            row |= {"train_loss": history.final_loss(), "seconds": history.seconds} | history.final
        except Diverged:
            row["diverged"] = True
        rows.append(row)
    columns = ["lr", "seed", "parameters", "diverged", "train_loss", "seconds"]
    return pd.DataFrame(rows, columns=list(dict.fromkeys([*columns, *(name for row in rows for name in row)])))


def best(frame: pd.DataFrame, metric: str, mode: Literal["min", "max"] = "min") -> pd.DataFrame:
    """The rows of a sweep at its best learning rate: the one whose median over seeds is lowest (or highest).

    The median, because runs on recall tasks either learn or do not, and a mean of the two describes neither. A run that
    diverged counts as the worst.

    Raises:
        ValueError: an unknown metric or mode, or a sweep in which nothing but divergence is left to choose.
    """
    if metric not in frame.columns:
        raise ValueError(f"metric: the sweep has no column {metric!r}, only {list(frame.columns)}")
    if mode not in ("min", "max"):
        raise ValueError(f"mode: 'min' or 'max' is wanted, not {mode!r}")
    costs = frame[metric] if mode == "min" else -frame[metric]
    medians = costs.fillna(float("inf")).groupby(frame["lr"]).median()
    if medians.min() == float("inf"):
        raise ValueError(f"frame: at no learning rate do half of the runs have a {metric}; sweep lower ones")
    return frame[frame["lr"] == medians.idxmin()]


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers of a model; a matrix that is used twice (tied embeddings) counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def match_parameters(
    make_model: Callable[[int], nn.Module], target: int, *, multiple: int = 1, tolerance: float = 0.02
) -> int:
    """The hidden size at which ``make_model(hidden)`` has ``target`` trainable numbers, as closely as it can.

    The count of an MLP is linear in its hidden size, so two models give the line and a third confirms the answer.

    Args:
        make_model: builds the model for a hidden size; torch's stream is left as it was.
        target: trainable numbers to have.
        multiple: hidden sizes to choose from are multiples of this.
        tolerance: the largest difference to accept, as a share of ``target``.

    Raises:
        ValueError: a size that is not positive, no hidden size close enough, or a count that hidden size does not change.
    """
    for name, value in {"target": target, "multiple": multiple}.items():
        if value < 1:
            raise ValueError(f"{name}: a positive number is wanted, not {value}")

    def count(hidden: int) -> int:
        return count_parameters(seeded(lambda: make_model(hidden), 0))

    smallest, next_one = count(multiple), count(2 * multiple)
    if next_one <= smallest:
        raise ValueError(
            f"make_model: hidden sizes {multiple} and {2 * multiple} give {smallest} and {next_one} parameters; "
            "it must grow with its argument"
        )
    hidden = multiple * max(1, 1 + round((target - smallest) / (next_one - smallest)))
    found = count(hidden)
    if abs(found - target) > tolerance * target:
        raise ValueError(
            f"target: {target} parameters are out of reach within {tolerance:.1%}: hidden size {hidden} gives {found}; "
            "change the width, choose a smaller multiple or accept a larger tolerance"
        )
    return hidden
