"""The experiment of the chapter ``foundations/unified-long-sequence``: fixed and asking mixers on two questions about the past.

Both tasks show the same tokens, pairs of a key and a value, and one question at the end. In ``recall`` the last token names a key
and wants its value, which may stand anywhere; in ``fixed distance`` it wants the value that stands first, always equally far away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn

from attnlab import claims, data, lab
from attnlab.foundations.unified_long_sequence import MIXERS
from attnlab.models.language import MLP, Decoder
from attnlab.models.losses import target_accuracy, target_loss
from attnlab.models.run import TrainConfig
from attnlab.models.training import fit, held_out, seeded

Question = Literal["recall", "fixed distance"]
QUESTIONS: tuple[Question, ...] = ("recall", "fixed distance")
TRAINED = ("softmax attention", "linear attention", "convolution", "Fourier (FNet)")
FIXED = ("convolution", "Fourier (FNet)")
SEEDS = (0, 1, 2)
HELD_OUT, EXAMPLES = 10_000, 1000


@dataclass(frozen=True)
class Setting:
    """Size of the task and the model."""

    pairs: int = 12
    keys: int = 24
    values: int = 8
    width: int = 32
    layers: int = 2
    steps: int = 250
    batch: int = 64
    lr: float = 3e-3

    def draw(self, question: Question, rng: np.random.Generator, batch: int | None = None) -> data.Recall:
        """tokens [B, pairs + 1, 2] and targets [B, pairs + 1], which count at the last place only."""
        drawn = data.paired_recall(rng, batch or self.batch, self.pairs, self.keys, self.values)
        if question == "fixed distance":
            drawn.targets[:, -1] = drawn.tokens[:, 0, 1]
        return drawn

    def train(self, mixer: str, question: Question, seed: int) -> dict[str, Any]:
        """One run: ``mixer, question, seed, accuracy, seconds``."""
        model = seeded(lambda: self.model(mixer), seed)
        config = TrainConfig(self.steps, lr=self.lr, warmup=self.steps // 10, seed=seed)
        test = self.draw(question, np.random.default_rng(HELD_OUT), EXAMPLES)
        history = fit(
            model,
            lambda rng: self.draw(question, rng),
            target_loss,
            config,
            evaluate=held_out([test], accuracy=target_accuracy),
            progress=False,
        )
        row = {"mixer": mixer, "question": question, "seed": seed}
        return row | {"accuracy": history.final["accuracy"], "seconds": history.seconds}

    def model(self, mixer: str) -> nn.Module:
        """A decoder whose only difference is its mixer."""
        length = self.pairs + 1
        return Decoder(
            self.keys + self.values + 1,
            self.width,
            self.layers,
            lambda _: MIXERS[mixer](self.width, length),
            make_mlp=lambda _: MLP(self.width, 2 * self.width),
            max_length=length,
        )


def compare(
    setting: Setting | None = None, mixers: Iterable[str] = TRAINED, seeds: Iterable[int] = SEEDS
) -> pd.DataFrame:
    """Every mixer on both questions, on one thread: matrices this small gain nothing from a second."""
    setting = setting or Setting()
    todo = list(product(QUESTIONS, mixers, seeds))
    with lab.one_thread():
        return pd.DataFrame([setting.train(m, q, s) for q, m, s in lab.progress(todo, "mixers x questions x seeds")])


def advantage(runs: pd.DataFrame, question: Question) -> tuple[float, tuple[float, float]]:
    """Accuracy of softmax attention above the better fixed mixer of the same seed, in points: mean and range of the seeds."""
    table = runs[runs.question == question].pivot(index="seed", columns="mixer", values="accuracy")
    return claims.mean_and_range(100 * (table["softmax attention"] - table[list(FIXED)].max(axis=1)))


def blind(setting: Setting | None = None, draws: int = 20_000, seed: int = 0) -> float:
    """Accuracy of whoever names the most frequent value whatever is asked: what a sum over the past is good for."""
    setting = setting or Setting()
    told = np.random.default_rng(seed).integers(setting.values, size=(draws, setting.pairs))
    most: Sequence[int] = [np.bincount(row).max() for row in told]
    return fmean(most) / setting.pairs
