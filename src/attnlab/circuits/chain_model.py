"""A model small enough that anchors can be tested exactly: sums with a chain of thought, and credit for its tokens.

The chain ``2 ; 1 ; 5 E`` has two kinds of tokens. A partial sum decides what follows, since every step goes on from what is
written; a separator says nothing. So it is known which tokens are anchors, and whether FAI finds them is a number.
Used by the chapter ``circuits/preplan-anchor``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attnlab import records
from attnlab.circuits import rhythm
from attnlab.circuits.credit import Credit, MapReader, Weigher
from attnlab.data import IGNORE, chains
from attnlab.models.grpo import GRPOConfig, grpo, rollout
from attnlab.models.losses import target_loss
from attnlab.models.training import TrainConfig, fit
from attnlab.models.word_model import WordModel

if TYPE_CHECKING:
    import pandas as pd

#: the numbers of the paper are made for answers of hundreds of tokens; these are for fourteen
CREDIT = Credit(window=4, horizon=(2, 6))
BASE = records.FOLDER / "models" / "preplan-anchor.safetensors"


@dataclass(frozen=True)
class Task:
    """Sums, the model that learns them, and how long it does.

    Attributes:
        operands: digits to add; a response has ``2 (operands - 1)`` tokens.
        slip: probability that a step of the training chains is a random digit. It leaves the model something to learn from
            its reward: greedy it adds well, sampled it slips as its data do.
        width: of the model, three layers of eight heads.
        batch: chains an update.
        steps: updates of supervised training.
        lr: their learning rate.
    """

    operands: int = 8
    slip: float = 0.2
    width: int = 64
    batch: int = 128
    steps: int = 600
    lr: float = 4e-3

    @property
    def length(self) -> int:
        """Tokens of a response."""
        return 2 * (self.operands - 1)

    def model(self, seed: int = 0) -> WordModel:
        """Untrained: three layers of eight heads."""
        sizes: dict[str, Any] = {"n_layers": 3, "n_heads": 8, "d_model": self.width, "d_mlp": 4 * self.width}
        return WordModel(chains.WORDS, **sizes, context=4 * self.operands - 2, init_std=self.width**-0.5, seed=seed)

    def ask(self, rng: np.random.Generator, n: int, slip: float = 0.0) -> chains.Sums:
        """``n`` problems."""
        return chains.sums(rng, n, operands=self.operands, slip=slip)

    def held_out(self, n: int = 128) -> chains.Sums:
        """Problems that no training sees, but by chance."""
        return self.ask(np.random.default_rng([0x7072_6570, 1]), n)


def train_base(task: Task = Task(), seed: int = 0) -> WordModel:
    """A model that learned chains with slips: the base that every credit rule starts from."""
    model = task.model(seed)

    def batches(rng: np.random.Generator) -> Any:
        batch = task.ask(rng, task.batch, task.slip)
        tokens = np.concatenate([batch.prompts, batch.chains], axis=1)
        targets = tokens[:, 1:].copy()
        targets[:, : batch.prompts.shape[1] - 1] = IGNORE  # operands are random: nothing to learn
        return tokens[:, :-1], targets

    warm = min(50, task.steps - 1)
    fit(model, batches, target_loss, TrainConfig(steps=task.steps, lr=task.lr, warmup=warm, seed=seed))
    return model


def load_base(path: Path = BASE) -> tuple[WordModel, str]:
    """The stored base and the SHA-256 of its file; where there is none (an installed package), it is trained: a minute, no hash."""
    if path.is_file():
        return WordModel.load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    return train_base(), ""


def accuracy(model: nn.Module, problems: chains.Sums, temperature: float = 0.0, seed: int = 0) -> float:
    """Share of right final digits: greedy, or sampled."""
    prompts = torch.as_tensor(problems.prompts)
    generator = torch.Generator().manual_seed(seed)
    responses, _ = rollout(model, prompts, problems.chains.shape[1], temperature, generator)
    return float(chains.correct(problems, responses).mean())


# ----------------------------------------------------------------------------------------------------- what decides what follows


@dataclass(frozen=True)
class Forced:
    """What became of the final answers when one token of the chain was replaced. Columns are the tokens before the last sum.

    Attributes:
        responses: greedy, ``[N, R]``, untouched.
        sums: which columns are partial sums (the others are separators), ``[F]``.
        changed: whether the final answer is another one, ``[N, F]``.
        carried: at partial sums, whether the answer moved by exactly the error that was forced, ``[N, F]``; False at separators.
        wrong: the tokens that were forced, ``[N, F]``.
    """

    responses: Tensor
    sums: np.ndarray
    changed: np.ndarray
    carried: np.ndarray
    wrong: np.ndarray

    def shares(self, sums: bool) -> np.ndarray:
        """Changed answers of each problem in percent, over its partial sums or over its separators, ``[N]``."""
        return np.asarray(100 * self.changed[:, self.sums == sums].mean(1))

    def by_word(self) -> dict[str, float]:
        """Changed answers in percent by what stood where a separator belongs."""
        wrong, changed = (table[:, ~self.sums] for table in (self.wrong, self.changed))
        kinds = {"a digit": wrong < chains.ZERO + 10, "+": wrong == chains.PLUS, "=": wrong == chains.EQUALS}
        return {kind: float(100 * changed[here].mean()) for kind, here in kinds.items() if here.any()}


def force_words(model: nn.Module, problems: chains.Sums, seed: int = 0) -> Forced:
    """Replace each token of the greedy chain in turn by a wrong word and let the model go on greedily.

    A partial sum becomes another digit; a separator becomes any word but itself and the end of the chain, which would end the
    answer by definition. The last sum is left alone: it is the answer.
    """
    prompts = torch.as_tensor(problems.prompts)
    length = problems.chains.shape[1]
    responses, _ = rollout(model, prompts, length, 0.0)
    before = chains.answer_of(responses)
    columns = np.arange(length - 2)
    sums = columns % 2 == 0
    rng = np.random.default_rng(seed)
    changed, carried = (np.zeros((len(prompts), len(columns)), dtype=bool) for _ in range(2))
    forced = np.zeros((len(prompts), len(columns)), dtype=np.int64)
    for at in columns:
        told = responses[:, at].numpy()
        forced[:, at] = wrong = _other_digit(rng, told) if sums[at] else _other_word(rng, told)
        start = torch.cat([prompts, responses[:, :at], torch.as_tensor(wrong)[:, None]], 1)
        rest, _ = rollout(model, start, length - at - 1, 0.0)
        after = chains.answer_of(torch.cat([start[:, prompts.shape[1] :], rest], 1))
        changed[:, at] = after != before
        if sums[at]:
            carried[:, at] = (after > 0) & ((after - before - wrong + told) % 10 == 0)
    return Forced(responses, sums, changed, carried, forced)


def _other_digit(rng: np.random.Generator, told: np.ndarray) -> np.ndarray:
    """A digit's token that differs from ``told``, each of the nine (or ten) alike."""
    return np.asarray(chains.ZERO + (told - chains.ZERO + rng.integers(1, 10, size=told.shape)) % 10)


def _other_word(rng: np.random.Generator, told: np.ndarray) -> np.ndarray:
    words = np.array([chains.ZERO + i for i in range(10)] + [chains.PLUS, chains.EQUALS, chains.STEP])
    drawn = words[rng.integers(len(words), size=told.shape)]
    while (same := drawn == told).any():
        drawn[same] = words[rng.integers(len(words), size=int(same.sum()))]
    return drawn


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the curve: how often a positive item scores above a negative one, ties counting half; NaN items are left out.

    Raises:
        ValueError: no finite item of one kind.
    """
    x, yes = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    high, low = (x[kind & np.isfinite(x)] for kind in (yes, ~yes))
    if not high.size or not low.size:
        raise ValueError(f"scores: {high.size} positive and {low.size} negative items; at least one of each is needed")
    gap = high[:, None] - low
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def anchor_scores(
    model: WordModel,
    problems: chains.Sums,
    responses: Tensor,
    horizon: tuple[int, int | None] = CREDIT.horizon,
    group: Literal["local", "global"] = "global",
) -> np.ndarray:
    """FAI of every token of the responses, ``[N, R]``, from the heads of all layers; groups from these very responses.

    ``group="local"`` asks the heads that look near instead, as the paper does not.
    """
    start = problems.prompts.shape[1]
    tokens = torch.cat([torch.as_tensor(problems.prompts), responses], 1)
    reader = MapReader.of_words(model, range(len(model.network.transformer.h)))
    reader.calibrate(model, tokens, start)
    local, far, _ = reader.read(model, tokens)
    return rhythm.fai(local if group == "local" else far, start, horizon)[:, start:].double().numpy()


def uniform_scores(start: int, length: int, horizon: tuple[int, int | None] = CREDIT.horizon) -> np.ndarray:
    """FAI of every token of a response, ``[R]``, when all attention is uniform over the past."""
    return rhythm.fai(rhythm.uniform_maps(start + length), start, horizon)[start:].numpy()


def areas(scores: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Area under the curve of each problem's scores ``[N, R]`` for 'is a partial sum', over the first ``len(sums)`` tokens; ``[N]``."""
    return np.array([auc(row[: len(sums)], sums) for row in np.atleast_2d(scores)])


# --------------------------------------------------------------------------------------------------------------- credit


def weigher(model: WordModel, rule: str, task: Task, seed: int, settings: Credit = CREDIT) -> Weigher:
    """The weights of a rule, with head groups frozen from 64 sampled answers of the base (layers of the middle third)."""
    reader = MapReader.of_words(model)
    problems = task.held_out(64)
    prompts = torch.as_tensor(problems.prompts)
    responses, _ = rollout(model, prompts, task.length, 1.0, torch.Generator().manual_seed(0))
    reader.calibrate(model, torch.cat([prompts, responses], 1), prompts.shape[1])
    return Weigher(rule, reader, settings, seed)


def train_with_credit(
    base: WordModel,
    rule: str,
    seed: int,
    config: Callable[[int], GRPOConfig],
    task: Task = Task(),
    on_iteration: Callable[[int, nn.Module, float], None] | None = None,
) -> tuple[WordModel, pd.DataFrame]:
    """GRPO from a copy of the base with the credit of one rule; prompts and the generator of samples depend on the seed alone."""
    model = WordModel(**base.settings)
    model.load_state_dict(base.state_dict())

    def reward(batch: chains.Sums, responses: Tensor) -> Tensor:
        return torch.as_tensor(chains.correct(batch, responses))

    weigh = weigher(model, rule, task, seed)
    history = grpo(model, task.ask, reward, task.length, config(seed), weigh, on_iteration)
    return model, history
