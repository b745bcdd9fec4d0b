"""Small attention-only models that continue a repeated sequence: circuits small enough to be known exactly.

Every model is trained on words that repeat with a period of 8 to 15. To predict the next word it must find the last place where
the present word stood and copy what came after it (induction; Olsson et al. 2022, arXiv:2209.11895). Ten seconds of exact
resample ablation then tell which of its heads matter, and by how much: a ground truth that nobody had to read off by eye.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pair, Pairs
from attnlab.models.losses import next_token_loss
from attnlab.models.training import History, TrainConfig, fit
from attnlab.models.word_model import WordModel

WORDS = [f"w{i}" for i in range(1, 64)]
CONTEXT, SHORTEST, LONGEST = 32, 8, 15  # tokens of a training sequence; periods of repetition
SIZES: dict[str, Any] = {
    "n_layers": 3,
    "n_heads": 8,
    "d_model": 128,
    "d_mlp": 0,
    "context": CONTEXT,
    "init_std": 128**-0.5,
}
SEEDS = (0, 1, 2, 3, 4)
FOLDER = Path(__file__).resolve().parents[3] / "records" / "models"  # of a checkout; an installed wheel has none


def sequences(rng: np.random.Generator, batch: int = 64) -> np.ndarray:
    """Random words repeated with a period of their own, ``[batch, CONTEXT]`` token ids."""
    period = rng.integers(SHORTEST, LONGEST + 1, size=(batch, 1))
    once = rng.integers(1, len(WORDS) + 1, size=(batch, LONGEST))
    return np.take_along_axis(once, np.arange(CONTEXT)[None] % period, axis=1)


def train(seed: int, steps: int = 1500, **sizes: int) -> tuple[WordModel, History]:
    """One model from scratch, its seed that of weights and data (about 100 s on one core)."""
    model = WordModel(WORDS, **(SIZES | sizes), seed=seed)
    config = TrainConfig(steps=steps, lr=3e-3, warmup=min(50, steps - 1), seed=seed)
    return model, fit(model, sequences, next_token_loss, config, progress=False)


def path_of(seed: int, folder: Path | None = None) -> Path:
    """The file of the trained model of one seed."""
    return (FOLDER if folder is None else folder) / f"sae-circuits-repeats-{seed}.safetensors"


def load(seed: int, folder: Path | None = None) -> HookedLM:
    """The trained model of one seed, ready to be taken apart.

    Raises:
        ValueError: if the file is not there; the message has the command that makes it.
    """
    path = path_of(seed, folder)
    if not path.is_file():
        raise ValueError(
            f"seed={seed}: no trained model {path.name}; "
            "make it with python -m attnlab.circuits.sae_circuits_runs --train"
        )
    return HookedLM(WordModel.load(path).bridge(f"repeats-{seed}"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, for the record."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pairs(tokenizer: Any, n: int = 50, seed: int = 0, period: int = 12, length: int = 20) -> Pairs:
    """A sequence that repeats, against one with the same end whose first period holds other words.

    Clean: ``period`` different words, then the first ``length - period`` of them again; the answer is the word that comes
    next. Corrupt: the first period has words that occur nowhere else, so that nothing repeats and nothing can be inferred. The
    foil is the word that the corrupt prompt has in the answer's place. Positions: ``END``.

    Raises:
        ValueError: if the prompt does not end inside the second period, or needs more words than there are.
    """
    if not period < length < 2 * period:
        raise ValueError(
            f"length={length} must lie between period={period} and {2 * period}, so that a word is to come"
        )
    if 2 * period > len(WORDS):
        raise ValueError(f"period={period} needs {2 * period} different words; there are {len(WORDS)}")
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        words = rng.permutation(WORDS)
        first, other = words[:period].tolist(), words[period : 2 * period].tolist()
        end = first[: length - period]
        answer, foil = first[length - period], other[length - period]
        made.append(Pair(" ".join([*first, *end]), " ".join([*other, *end]), [answer], [foil]))
    return Pairs("repeats", tokenizer, made)


def losses_by_position(model: WordModel, rng: np.random.Generator, batch: int = 256) -> Tensor:
    """Mean loss in nats at every position of training sequences, ``[CONTEXT - 1]``: high in the first period, low afterwards."""
    tokens = torch.as_tensor(sequences(rng, batch))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(0)


def all_models(folder: Path | None = None) -> Iterator[HookedLM]:
    """The trained models of :data:`SEEDS`, one after the other."""
    for seed in SEEDS:
        yield load(seed, folder)
