"""What the chapter ``circuits/chinchilla-mcq`` keeps: small models that learn to answer by letter, and SmolLM2 taught to.

``python -m attnlab.circuits.chinchilla_mcq_runs --train records/models`` trains the small models (a CPU, about twenty minutes on
one thread; models that are there already are left alone). ``--finetune records/chinchilla-mcq-finetune.json`` teaches SmolLM2
(``--device cuda`` in minutes; ``--seeds 0 --steps 120`` is what a CPU can do in a quarter of an hour).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
    "mixed": Family(MIXTURE),
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
                    "commit": commit,
                    **measured,
                }
            )
            command = f"{MODULE} --train records/models --families {' '.join(families)}"
            records.write(record, rows, sources=SOURCES, command=command, commit=commit)
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


# ------------------------------------------------------------------------------------------------------ SmolLM2 is taught


@dataclass(frozen=True)
class Lesson:
    """How SmolLM2 is taught: ``steps`` updates of ``batch`` questions, changes of rank ``rank`` in the layers from ``first_layer`` on."""

    steps: int = 400
    batch: int = 16
    rank: int = 8
    first_layer: int = 0
    lr: float = 1e-3


def finetune(path: Path, lesson: Lesson, seeds: Sequence[int], device: str, commit: str) -> None:
    """Teach SmolLM2 to answer by letter and record accuracy and heads before and after, one row a seed; the changes are kept beside."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        row = finetune_one(
            lesson, seed, device, keep=path.parent / "models" / f"chinchilla-mcq-smollm2-{seed}.safetensors"
        )
        rows.append(row)
        command = f"{MODULE} --finetune records/{path.name} --seeds {' '.join(map(str, seeds))} --steps {lesson.steps}"
        records.write(path, rows, sources=TAUGHT, command=f"{command} --device {device}", commit=commit)
        print({key: row[key] for key in ("seed", "before", "after", "seconds", "heads")}, flush=True)


def finetune_one(lesson: Lesson, seed: int, device: str, keep: Path | None = None) -> dict[str, Any]:
    """One seed: teach, keep the change, and measure on countries that were never asked in training."""
    from attnlab.circuits import lettered_tuning
    from attnlab.models import smollm2

    loaded, tokenizer = smollm2.load_model()
    model: Any = loaded
    model = model.to(device)
    taught, asked = lettered_tuning.split_facts(seed)
    before = held_out_measures(model, tokenizer, asked)
    lettered_tuning.attach(model, lesson.rank, lesson.first_layer, seed)
    config = TrainConfig(
        steps=lesson.steps, lr=lesson.lr, warmup=min(20, lesson.steps // 4), weight_decay=0.0, seed=seed
    )
    history = lettered_tuning.teach(model, tokenizer, taught, config, batch=lesson.batch, progress=sys.stderr.isatty())
    row: dict[str, Any] = {"operator": "finetuning", "seed": seed, **asdict(lesson), "seconds": history.seconds}
    row |= {"loss": history.final_loss(), "curve": history.loss, "asked": [country for country, _ in asked]}
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        lettered_tuning.save_change(model, keep, asdict(lesson) | {"seed": seed})
        row |= {"file": keep.name, "sha256": digest(keep)}
    after = held_out_measures(lettered_tuning.merge(model), tokenizer, asked)
    scores = np.array(after["scores"])
    heads = [f"{layer}.{head}" for layer, head in np.argwhere(scores >= 0.3).tolist()]
    return (
        row
        | {"before": before["accuracy"], "after": after["accuracy"], "heads": heads}
        | {
            "scores_before": before["scores"],
            "scores_after": after["scores"],
        }
    )


def held_out_measures(model: Any, tokenizer: Any, facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """``accuracy`` by kind of labels, ``[percent, low, high]`` over countries, and ``scores`` [L, H]: correct-letter scores."""
    from attnlab.circuits import lettered
    from attnlab.circuits.chinchilla_mcq import correct_letter_score, gold_matrix, is_right, label_attention
    from attnlab.circuits.model import HookedLM
    from attnlab.claims import bootstrap_mean
    from attnlab.models.booting import boot, quiet

    with quiet():
        hooked = HookedLM(boot("smollm2-135m-instruct", copy.deepcopy(model), tokenizer))
    result: dict[str, Any] = {"accuracy": {}}
    for condition in ("ABCD", "shuffled", "random"):
        asked = lettered.questionnaire(facts, condition=condition)
        gold = torch.tensor([item.gold for item in asked])
        by_country = 100 * is_right(lettered.by_letter(hooked, asked), gold).reshape(len(facts), -1).mean(1)
        result["accuracy"][condition] = [float(by_country.mean()), *bootstrap_mean(by_country)]
    asked = lettered.questionnaire(facts)
    parts = [(numbers, label_attention(hooked, sheet)) for numbers, sheet in lettered.sheets(tokenizer, asked)]
    attention = np.concatenate([part for _, part in parts], axis=2)
    order = [asked[i].gold for numbers, _ in parts for i in numbers]
    result["scores"] = np.round(correct_letter_score(gold_matrix(attention, order)), 3).tolist()
    return result


TAUGHT = (
    "circuits/chinchilla_mcq_runs.py",
    "circuits/lettered.py",
    "circuits/lettered_tuning.py",
    "models/training.py",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, help="folder to put the small models into")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which of them")
    parser.add_argument("--finetune", type=Path, help="record to write what SmolLM2 learns to")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the lessons")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to teach on")
    for field in fields(Lesson):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=f"{field.default} if left out"
        )
    parser.add_argument("--commit", default="unknown", help="of the code, for the record")
    chosen = parser.parse_args(arguments)
    if chosen.train:
        train(chosen.train, chosen.commit, chosen.families)
    if chosen.finetune:
        lesson = Lesson(**{field.name: getattr(chosen, field.name) for field in fields(Lesson)})
        finetune(chosen.finetune, lesson, chosen.seeds, chosen.device, chosen.commit)


if __name__ == "__main__":
    main()
