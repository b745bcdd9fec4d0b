"""What a training run is and what it measures: its configuration, its learning rate, its history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TrainConfig:
    """How :func:`attnlab.models.training.fit` trains; equal configurations, models and batches make equal runs.

    Attributes:
        steps: updates in all.
        lr: the highest learning rate.
        warmup: updates over which the rate rises linearly to ``lr``.
        schedule: what the rate does afterwards; see :func:`learning_rate`.
        floor: where the schedule ends, as a share of ``lr``.
        weight_decay: of AdamW, for matrices; see :func:`attnlab.models.training.decay_groups`.
        betas: of AdamW.
        clip: the largest norm of the whole gradient; None leaves it as it is.
        seed: of batches and dropout, ``0 <= seed < 2**32``. The initial weights are the model's own affair.
        precision: ``bfloat16`` computes under autocast, on a GPU; ``float32`` keeps the dtype that the model has.
        compile: whether the loss sees the model through ``torch.compile``, on a GPU.
        evaluate_every: updates between evaluations; None evaluates after the last only.
        checkpoint_every: updates between checkpoints; None saves whenever it evaluates.
    """

    steps: int
    lr: float = 3e-3
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    evaluate_every: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "a number of updates, at least 1, is wanted")
        _require(0 <= self.warmup < self.steps, "warmup", self.warmup, f"from 0 to {self.steps - 1} updates are wanted")
        _require(0 < self.lr < math.inf, "lr", self.lr, "a positive rate is wanted")
        _require(0 <= self.floor <= 1, "floor", self.floor, "a share of lr from 0 to 1 is wanted")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more is wanted")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "two numbers from 0 to below 1 are wanted",
        )
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive norm, or None, is wanted")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2**32 - 1 is wanted")
        for name, choices in {
            "schedule": ("cosine", "linear", "constant"),
            "precision": ("float32", "bfloat16"),
        }.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {choices} is wanted")


@dataclass
class History:
    """What a run measured: one entry an update in ``step`` (from 1), ``loss``, ``lr`` and ``grad_norm`` (unclipped).

    ``evaluations`` holds a row ``{"step": ..., metric: ...}`` an evaluation; ``seconds`` counts training and evaluating,
    over all parts of a resumed run.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.step)

    @property
    def final(self) -> dict[str, float]:
        """The metrics of the last evaluation, empty if there was none."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {name: value for name, value in last.items() if name != "step"}

    def final_loss(self, share: float = 0.05) -> float:
        """Mean training loss over the last ``share`` of the updates, at least one: a single batch is noisy."""
        last = self.loss[-max(1, round(share * len(self))) :]
        return sum(last) / len(last)

    def frame(self) -> pd.DataFrame:
        """One row an update: ``step, loss, lr, grad_norm``."""
        import pandas as pd

        return pd.DataFrame({"step": self.step, "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm})

    def evaluation_frame(self) -> pd.DataFrame:
        """One row an evaluation: ``step`` and its metrics."""
        import pandas as pd

        return pd.DataFrame(self.evaluations)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of update ``step``, from 1 to ``config.steps``.

    It rises as ``step / warmup``. Of the updates after that let p be the share already done, from 0 to below 1: the
    rate falls from ``lr`` to ``floor * lr`` as ``(1 + cos(pi p)) / 2`` or ``1 - p``, or stays.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - 1 - config.warmup) / (config.steps - config.warmup)
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.lr * (config.floor + (1 - config.floor) * falls)


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {wanted}, not {value!r}")
