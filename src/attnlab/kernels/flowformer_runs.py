"""The experiments of the chapter ``kernels/flowformer``: six arms on three tasks.

In :class:`Recall` every query asks for a source of its own; in :class:`Distractors` all queries ask for the same few among many;
:class:`Text` is the second kind on real text. Arms differ in the function between their projections, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attnlab import data, lab
from attnlab.kernels.flowformer import ARMS, Attention, MultiHead
from attnlab.models.language import Decoder, Trunk, initialise
from attnlab.models.losses import target_accuracy, target_loss
from attnlab.models.sweep import sweep
from attnlab.models.training import TrainConfig, held_out

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2)
HELD_OUT = 0x666C_6F77  # the seed of the held-out data: every model answers the same questions


@dataclass(frozen=True)
class Task:
    """A task and how models learn it; equal for all arms.

    Attributes:
        width, heads, layers: D, H and L.
        batch: sequences an update.
        steps: updates.
        lr: the highest learning rate.
        examples: held-out sequences.
        precision: see :class:`~attnlab.models.run.TrainConfig`.
    """

    width: int = 32
    heads: int = 4
    layers: int = 1
    batch: int = 64
    steps: int = 200
    lr: float = 2e-2
    examples: int = 1000
    precision: Literal["float32", "bfloat16"] = "float32"
    name: ClassVar[str]

    def model(self, attention: Attention) -> nn.Module:
        """A new model around an attention; order reaches it through positions only if the task has any."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> Any:
        """A batch (tokens, targets), of the size that training takes if none is given."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy in nats."""
        return target_loss(model, batch)

    def accuracy(self, model: nn.Module, batch: Any) -> Tensor:
        """Share of the answers that are right."""
        return target_accuracy(model, batch)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """``loss`` and ``accuracy`` on the held-out data."""
        batch = self.draw(np.random.default_rng(HELD_OUT), self.examples)
        return held_out([batch], loss=self.loss, accuracy=self.accuracy)(model)

    def layer(self, attention: Attention) -> Callable[[int], nn.Module]:
        """What a model asks for its mixers."""
        return lambda _: MultiHead(self.width, self.heads, attention)


@dataclass(frozen=True)
class Recall(Task):
    """Key and value at each place, then a query: tell the value of its key (:func:`attnlab.data.paired_recall`)."""

    pairs: int = 8
    keys: int = 32
    values: int = 8
    name: ClassVar[str] = "recall"

    def model(self, attention: Attention) -> nn.Module:
        vocab = self.keys + self.values + 1
        std = self.width**-0.5
        return Decoder(vocab, self.width, self.layers, self.layer(attention), positions=None, init_std=std)

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> data.Recall:
        return data.paired_recall(rng, batch or self.batch, self.pairs, self.keys, self.values)


@dataclass(frozen=True)
class Distractors(Task):
    """Key and value at each place; a few places have one of the keys that count, and their values agree. Tell it, everywhere.

    Keys ``0 .. counting - 1`` count, the others come with random values. Which keys those are is the same in all sequences and for
    all queries, and must be learned.

    Attributes:
        length: T.
        informative: places of a sequence with a key that counts.
        counting: keys that count.
        keys, values: sizes of the vocabulary.
        longer: lengths that trained models are tried on too.
    """

    batch: int = 8
    examples: int = 128
    length: int = 128
    informative: int = 4
    counting: int = 16
    keys: int = 64
    values: int = 8
    longer: tuple[int, ...] = (1024,)
    name: ClassVar[str] = "distractors"

    def model(self, attention: Attention) -> nn.Module:
        vocab = self.keys + self.values
        std = self.width**-0.5
        return Decoder(vocab, self.width, self.layers, self.layer(attention), positions=None, init_std=std)

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> data.Recall:
        shape = batch or self.batch, self.length
        keys = rng.integers(self.counting, self.keys, size=shape)
        values = self.keys + rng.integers(self.values, size=shape)
        answer = self.keys + rng.integers(self.values, size=(shape[0], 1))
        places = rng.random(shape).argsort(1)[:, : self.informative]
        np.put_along_axis(keys, places, rng.integers(self.counting, size=places.shape), axis=1)
        np.put_along_axis(values, places, answer, axis=1)
        return data.Recall(np.stack([keys, values], 2), np.broadcast_to(answer, shape))

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """``loss`` and ``accuracy``, and ``accuracy at <n>`` for longer sequences with as few informative places."""
        found = dict(super().evaluate(model))
        for length in self.longer:
            longer = replace(self, length=length, examples=32, longer=())
            found[f"accuracy at {length}"] = longer.evaluate(model)["accuracy"]
        return found


@dataclass(frozen=True)
class Text(Task):
    """Which part of a library does a piece of its text come from? Parts are equal stretches of :func:`attnlab.data.text`.

    A token is a character and a hash of the last four, so that names can be seen without a layer that gathers letters.
    Every fifth block of a part is held out; no piece crosses a border.

    Attributes:
        length: T, characters.
        parts: classes.
        buckets: of the hash.
    """

    width: int = 128
    layers: int = 2
    batch: int = 8
    steps: int = 250
    lr: float = 2e-3
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    length: int = 2048
    parts: int = 16
    buckets: int = 4096
    name: ClassVar[str] = "text"
    BLOCK: ClassVar[int] = 8192
    EVERY: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if not 0 < self.length <= self.BLOCK or self.BLOCK % self.length:
            raise ValueError(
                f"length={self.length}: a divisor of {self.BLOCK} is wanted, so that blocks fall into pieces"
            )

    def model(self, attention: Attention) -> nn.Module:
        return Classifier(self, attention)

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        blocks = library(self.parts, self.BLOCK, self.buckets)
        training = np.flatnonzero(np.arange(blocks.shape[1]) % self.EVERY != self.EVERY - 1)
        n = batch or self.batch
        part, block = rng.integers(self.parts, size=n), rng.choice(training, size=n)
        start = rng.integers(self.BLOCK - self.length + 1, size=n)
        return blocks[part[:, None], block[:, None], start[:, None] + np.arange(self.length)], part

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        tokens, part = batch
        return F.cross_entropy(model(tokens), part)

    def accuracy(self, model: nn.Module, batch: Any) -> Tensor:
        tokens, part = batch
        return (model(tokens).argmax(-1) == part).double().mean()

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        blocks = library(self.parts, self.BLOCK, self.buckets)[:, self.EVERY - 1 :: self.EVERY]
        pieces = blocks.reshape(self.parts, -1, self.length, 2).swapaxes(0, 1)  # [pieces, parts, T, 2]
        return held_out([(piece, np.arange(self.parts)) for piece in pieces], loss=self.loss, accuracy=self.accuracy)(
            model
        )


class Classifier(nn.Module):
    """The shell of a decoder with a mean over tokens before its head: [B, T, 2] -> [B, parts]."""

    def __init__(self, task: Text, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(data.char_vocab) + task.buckets, task.width)
        self.trunk = Trunk(task.width, task.layers, task.layer(attention), None, nn.RMSNorm, "learned", task.length)
        self.head = nn.Linear(task.width, task.parts)
        initialise(self, task.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.trunk(self.embedding(tokens).sum(2)).mean(1))


@cache
def library(parts: int, block: int, buckets: int) -> NDArray[np.int64]:
    """Characters and hashes of the standard library, [parts, blocks, ``block``, 2]; what does not fill a block is left out."""
    ids = data.char_vocab.encode(data.text())
    hashed = sum(np.roll(ids, back) * 31**back for back in range(4)) % buckets  # of a character and the three before
    tokens = np.stack([ids, len(data.char_vocab) + hashed], 1)  # [N, 2]
    each = len(ids) // (parts * block)
    return tokens[: parts * each * block].reshape(parts, each, block, 2)


def compare(task: Task, *, lrs: Sequence[float] | None = None, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Train every arm on a task: one row a run, with ``arm`` beside the columns of :func:`~attnlab.models.sweep.sweep`.

    On one thread: two lose more time waiting for each other in models so small than they gain.

    Args:
        lrs: learning rates; left out, the task's.
        seeds: of weights and batches.
    """
    import pandas as pd

    with lab.one_thread():
        frames = [train(task, arm, lrs or (task.lr,), seeds) for arm in lab.progress(list(ARMS), task.name)]
    return pd.concat(frames, ignore_index=True)


def train(task: Task, arm: str, lrs: Sequence[float], seeds: Sequence[int]) -> pd.DataFrame:
    """The rows of one arm; see :func:`compare`.

    Raises:
        ValueError: an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r} is not known; choose one of {', '.join(ARMS)}")
    config = TrainConfig(task.steps, task.lr, warmup=task.steps // 10, precision=task.precision)
    frame = sweep(
        partial(task.model, ARMS[arm]),
        task.draw,
        task.loss,
        config,
        lrs=lrs,
        seeds=seeds,
        evaluate=task.evaluate,
        progress=False,
    )
    frame.insert(0, "arm", arm)
    return frame


def measured(frame: pd.DataFrame, arm: str, metric: str, scale: float = 1.0) -> tuple[float, tuple[float, float]]:
    """Mean of a metric over the seeds of an arm, and their range: what the claims compare."""
    values = scale * frame.loc[frame["arm"] == arm, metric]
    return float(values.mean()), (float(values.min()), float(values.max()))


def verdict(frame: pd.DataFrame, claim: str) -> dict[str, Any]:
    """The arguments of ``claims.check`` for a trained claim, ``recall`` or ``distractors``: flow attention and what it must beat."""
    metric, scale = {"recall": ("accuracy", 100.0), "distractors": ("loss", 1.0)}[claim]
    arms = {"sigmoid": "sigmoid linear", "elu": "elu+1 linear"}
    if claim == "distractors":
        arms["uncontested"] = "flow, no competition"
    value, interval = measured(frame, "flow", metric, scale)
    controls = {name: measured(frame, arm, metric, scale) for name, arm in arms.items()}
    seeds = sorted({int(seed) for seed in frame["seed"]})
    return {"value": value, "interval": interval, "controls": controls, "seeds": seeds}
