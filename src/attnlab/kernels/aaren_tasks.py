"""The two tasks of the chapter ``kernels/aaren`` and the four token mixers that learn them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnlab import data, lab
from attnlab.kernels.aaren import Aaren, CausalMean
from attnlab.models.language import MLP, Block, Decoder, SequenceModel, SoftmaxAttention
from attnlab.models.losses import squared_error, target_accuracy, target_loss
from attnlab.models.sweep import count_parameters, match_parameters
from attnlab.models.training import History, TrainConfig, fit, held_out, seeded

HELD_OUT = 0x6161_7265  # the seed of the held-out data: every model answers the same questions
EXAMPLES = 512


class GRU(nn.Module):
    """A gated RNN as a token mixer: it chooses what to forget (Cho et al. 2014, arXiv:1406.1078)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        outputs: Tensor = self.rnn(x)[0]
        return outputs


#: the token mixers that are compared, from width and heads
MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "Transformer": SoftmaxAttention,
    "Aaren": Aaren,
    "Mean": lambda width, heads: CausalMean(width),
    "GRU": lambda width, heads: GRU(width),
}


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A task, the size of the models that learn it, and their training.

    All models have the parameters of the Transformer within 2 percent: what a mixer saves or costs, its MLPs get or give.

    Attributes:
        width, layers, heads: D, L and H.
        hidden: size of the Transformer's MLPs inside.
        init_std: of the initial weights; see :func:`attnlab.models.language.initialise`.
        batch: sequences an update.
        steps: updates.
        lr: the highest learning rate, the same for all models unless one is given.
    """

    width: int = 32
    layers: int = 2
    heads: int = 4
    hidden: int = 64
    init_std: float = 0.1
    batch: int = 32
    steps: int = 300
    lr: float = 5e-3
    name: ClassVar[str]
    sign: ClassVar[int]  # 1 if a low score is good, -1 if a high one is

    def model(self, mixer: str) -> nn.Module:
        """A new model with the token mixer of this name; one that :data:`MIXERS` lacks raises a ``ValueError``."""
        if mixer not in MIXERS:
            raise ValueError(f"mixer={mixer!r} is not known; choose one of {', '.join(MIXERS)}")
        if mixer in ("Transformer", "Aaren"):  # the same but for the query, D numbers a layer
            return self._shell(mixer, self.hidden)
        target = count_parameters(seeded(lambda: self._shell("Transformer", self.hidden), 0))
        return self._shell(mixer, match_parameters(partial(self._shell, mixer), target))

    def train(self, mixer: str, seed: int, lr: float | None = None) -> Run:
        """Train a model on weights and batches of ``seed``; it is measured ten times, on the same data for every seed."""
        model = seeded(lambda: self.model(mixer), seed).to(lab.device())
        config = TrainConfig(
            steps=self.steps,
            lr=self.lr if lr is None else lr,
            warmup=self.steps // 10,
            seed=seed,
            evaluate_every=max(1, self.steps // 10),
        )
        evaluate = held_out([self.held_out()], score=self.score)
        return Run(
            self, mixer, config, model, fit(model, self.draw, self.loss, config, evaluate=evaluate, progress=False)
        )

    def held_out(self) -> Any:
        """The batch on which every model is measured."""
        return self.draw(np.random.default_rng(HELD_OUT), EXAMPLES)

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> Any:
        """A batch; its size is that of training if none is given."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What training minimises."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Any) -> Tensor:
        """What is reported."""
        raise NotImplementedError

    def _shell(self, mixer: str, hidden: int) -> nn.Module:
        """A model with MLPs of this size."""
        raise NotImplementedError

    def _layers(self, mixer: str, hidden: int) -> dict[str, Any]:
        return {
            "width": self.width,
            "layers": self.layers,
            "make_mixer": lambda _: MIXERS[mixer](self.width, self.heads),
            "make_mlp": lambda _: MLP(self.width, hidden),
            "init_std": self.init_std,
        }


@dataclass(frozen=True)
class Forecasting(Task):
    """Tell the next value of a noisy sinusoid of unknown frequency, phase and amplitude. The score is the squared error."""

    init_std: float = 0.18
    batch: int = 16
    steps: int = 400
    lr: float = 1e-2
    length: int = 24
    noise: float = 0.1
    name: ClassVar[str] = "forecasting"
    sign: ClassVar[int] = 1

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> data.Forecast:
        return data.sinusoids(rng, batch or self.batch, self.length, frequency=(0.05, 0.25), noise=self.noise)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch)

    score = loss

    def persistence(self) -> float:
        """The error of who repeats the last value, on the held-out series."""
        inputs, targets = self.held_out()
        return float(((inputs - targets) ** 2).mean())

    def _shell(self, mixer: str, hidden: int) -> nn.Module:
        return SequenceModel(1, 1, max_length=self.length, **self._layers(mixer, hidden))


@dataclass(frozen=True)
class Recall(Task):
    """Key-value pairs, then one of their keys: tell its value. A pair stands at one place. The score is the accuracy."""

    pairs: int = 4
    keys: int = 8
    values: int = 8
    name: ClassVar[str] = "recall"
    sign: ClassVar[int] = -1

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> data.Recall:
        return data.paired_recall(rng, batch or self.batch, self.pairs, self.keys, self.values)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return target_loss(model, batch)

    def score(self, model: nn.Module, batch: Any) -> Tensor:
        return target_accuracy(model, batch)

    def blind(self) -> float:
        """The accuracy of the best answer without the question, the value that was told most often: counted, not drawn."""
        told = product(range(self.values), repeat=self.pairs)
        return fmean(max(Counter(values).values()) / self.pairs for values in told)

    def _shell(self, mixer: str, hidden: int) -> nn.Module:
        vocab = self.keys + self.values + 1  # and a blank
        return Decoder(vocab, max_length=self.pairs + 1, **self._layers(mixer, hidden))


@dataclass(frozen=True)
class Run:
    """A trained model and how it came about."""

    task: Task
    mixer: str
    config: TrainConfig
    model: nn.Module
    history: History

    @property
    def score(self) -> float:
        """On held-out data, after the last update."""
        return self.history.final["score"]

    def row(self) -> dict[str, Any]:
        """One line of a table or a record; ``curve`` holds (step, score) of every measurement."""
        return {
            "case": self.task.name,
            "impl": self.mixer,
            "seed": self.config.seed,
            "lr": self.config.lr,
            "parameters": count_parameters(self.model),
            "score": self.score,
            "seconds": self.history.seconds,
            "curve": [(int(row["step"]), row["score"]) for row in self.history.evaluations],
        }


# ------------------------------------------------------------------------------------------------- what is looked at


@torch.no_grad()
def asked_weights(model: Decoder, tokens: NDArray[np.int64] | Tensor) -> Tensor:
    """How the last token of a recall model weighs the pairs, asked for each of their keys: [questions, L, H, pairs].

    Args:
        model: with layers of :class:`~attnlab.kernels.aaren.Aaren` or softmax attention.
        tokens: one sequence [pairs + 1, 2] of :class:`Recall`; its question is replaced by all that can be asked.

    Returns:
        Weights that sum to 1 over the pairs.
    """
    device = model.embedding.weight.device
    asked = torch.as_tensor(tokens, device=device).repeat(len(tokens) - 1, 1, 1)  # [questions, pairs + 1, 2]
    asked[:, -1, 0] = asked[0, :-1, 0]
    found: list[Tensor] = []

    def look(mixer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        found.append(_last_scores(mixer, inputs[0])[..., :-1].softmax(-1))

    blocks = [block for block in model.trunk.blocks if isinstance(block, Block)]
    hooks = [block.mixer.register_forward_hook(look) for block in blocks]
    try:
        model(asked)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found, 1)


def _last_scores(mixer: nn.Module, x: Tensor) -> Tensor:
    """Scores [B, H, T] of all tokens for the last one of x [B, T, D]."""
    if isinstance(mixer, Aaren):
        return mixer.scores_and_values(x)[0].mT
    if isinstance(mixer, SoftmaxAttention):
        q, k, _ = mixer.qkv(x).unflatten(-1, (3, mixer.heads, -1)).unbind(2)  # [B, T, H, K]
        scale = q.shape[-1] ** -0.5 if mixer.scale is None else mixer.scale
        return scale * torch.einsum("bhk,bthk->bht", q[:, -1], k)
    raise ValueError(f"model: a layer is {type(mixer).__name__}, which has no weights to look at")
