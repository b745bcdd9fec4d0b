"""What the chapter ``circuits/chinchilla-mcq`` keeps: small models that learn to answer by letter, and SmolLM2 taught to.

``python -m attnlab.circuits.chinchilla_mcq_runs --train records/models`` trains the small models (a CPU, about twenty minutes on
one thread; models that are there already are left alone); ``--finetune records/chinchilla-mcq-finetune.json`` teaches SmolLM2.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab import records
from attnlab.data.choices import CONDITIONS, WORDS, choices
from attnlab.models.training import TrainConfig, fit
from attnlab.models.word_model import WordModel

MODULE = "python -m attnlab.circuits.chinchilla_mcq_runs"
MODELS = records.FOLDER / "models"
SEEDS = (0, 1, 2)
BATCH, TEST = 128, 400
SIZES: Mapping[str, int] = {"n_layers": 3, "n_heads": 4, "d_model": 64, "d_mlp": 128}
#: seed of held-out prompts; training draws from another stream
HELD_OUT = 20230718


@dataclass(frozen=True)
class Family:
    """Small models that see the same prompts: ``mixture`` of labels by weight, ``options``, ``layout``, ``steps`` updates, ``seeds``."""

    mixture: Mapping[str, float]
    options: int = 4
    layout: str = "lines"
    steps: int = 2500
    seeds: tuple[int, ...] = SEEDS


MIXTURE: Mapping[str, float] = {"ABCD": 0.4, "shuffled": 0.2, "random": 0.4}
FAMILIES: Mapping[str, Family] = {
    "lines": Family(MIXTURE),
    "order": Family({"ABCD": 1.0}, steps=600),
    "list": Family(MIXTURE, layout="list"),
    "eight": Family(MIXTURE, options=8, layout="list", steps=2000, seeds=(0,)),
}


def train_one(family: Family, seed: int, progress: bool = True) -> tuple[WordModel, dict[str, Any]]:
    """A small model and what its training measured: ``loss``, ``seconds``, ``accuracy`` by condition, ``curve``."""
    length = 2 * family.options + 3
    model = WordModel(WORDS, **SIZES, context=length, init_std=SIZES["d_model"] ** -0.5, seed=seed)

    def batches(rng: np.random.Generator) -> tuple[Any, Any]:
        drawn = choices(rng, BATCH, family.mixture, family.options, layout=family.layout)
        return drawn.tokens, drawn.answers

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch[0])[:, -1], batch[1])

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {name: accuracy(network, name, family) for name in CONDITIONS}

    config = TrainConfig(steps=family.steps, lr=2e-3, warmup=50, seed=seed, evaluate_every=min(500, family.steps))
    history = fit(model, batches, loss, config, evaluate=evaluate, progress=progress)
    return model, {
        "loss": history.final_loss(),
        "seconds": history.seconds,
        "accuracy": history.final,
        "curve": history.evaluations,
    }


def accuracy(network: nn.Module, condition: str, family: Family, n: int = TEST, seed: int = HELD_OUT) -> float:
    """Share of held-out prompts, right lines balanced, whose right label beats the other labels shown."""
    drawn = choices(np.random.default_rng(seed), n, condition, family.options, balanced=True, layout=family.layout)
    device = next(network.parameters()).device
    with torch.no_grad():
        end = network(torch.as_tensor(drawn.tokens, device=device))[:, -1].cpu()
    shown = end.gather(1, torch.as_tensor(drawn.labels))
    return float((shown.argmax(1) == torch.as_tensor(drawn.gold)).double().mean())


def train(folder: Path, commit: str, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Train every family on every seed into ``folder`` and write the record beside it; models that are recorded already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder.parent / "chinchilla-mcq-models.json"
    before = records.load(record.stem, record.parent)
    rows: list[dict[str, Any]] = list(before.rows) if before else []
    for name in families:
        family = FAMILIES[name]
        for seed in family.seeds:
            path = model_path(name, seed, folder)
            if path.is_file() and any(row["file"] == path.name and row["sha256"] == digest(path) for row in rows):
                continue
            model, measured = train_one(family, seed, progress=sys.stderr.isatty())
            model.save(path)
            rows = [row for row in rows if row["file"] != path.name]
            rows.append(
                {
                    "operator": "training",
                    "case": name,
                    "seed": seed,
                    "mixture": dict(family.mixture),
                    "options": family.options,
                    "layout": family.layout,
                    "steps": family.steps,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "file": path.name,
                    "sha256": digest(path),
                    **measured,
                }
            )
            records.write(record, rows, sources=SOURCES, command=f"{MODULE} --train records/models", commit=commit)
            print(f"{path.name}: {measured['seconds']:.0f} s, {measured['accuracy']}", flush=True)


SOURCES = ("circuits/chinchilla_mcq_runs.py", "data/choices.py", "models/word_model.py", "models/training.py")


def model_path(family: str, seed: int, folder: Path = MODELS) -> Path:
    """Where a trained model lies."""
    return folder / f"chinchilla-mcq-{family}-{seed}.safetensors"


def load_models(family: str, folder: Path = MODELS) -> list[WordModel]:
    """The trained models of one family, one a seed.

    Raises:
        ValueError: an unknown family, or files that are not there (an installation without ``records/``).
    """
    if family not in FAMILIES:
        raise ValueError(f"family: {', '.join(FAMILIES)} are known, not {family!r}")
    paths = [model_path(family, seed, folder) for seed in FAMILIES[family].seeds]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"family: {missing[0]} is not in {folder.name}; make it with {MODULE} --train records/models")
    return [WordModel.load(path) for path in paths]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, help="folder to put the small models into")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which of them")
    parser.add_argument("--commit", default="unknown", help="of the code, for the record")
    chosen = parser.parse_args(arguments)
    if chosen.train:
        train(chosen.train, chosen.commit, chosen.families)


if __name__ == "__main__":
    main()
