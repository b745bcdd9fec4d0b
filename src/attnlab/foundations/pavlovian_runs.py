"""Trained models in the laboratory of the chapter ``foundations/pavlovian``: do they block, and does the rule in the layer decide?

``python -m attnlab.foundations.pavlovian_runs --record records/pavlovian.json`` trains small models to predict reinforcers in
worlds that are drawn anew for every sequence, and then runs the experiments on them with frozen weights. ``--large`` is meant for
a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attnlab import lab, mixers, records
from attnlab.foundations.pavlovian import CUES, EXPERIMENTS, Phase
from attnlab.models.language import MLP, SequenceModel
from attnlab.models.losses import squared_error
from attnlab.models.run import TrainConfig
from attnlab.models.training import fit, held_out, seeded

SOURCES = ("foundations/pavlovian_runs.py", "foundations/pavlovian.py", "mixers/recurrence.py", "mixers/named.py")
TRAINED = ("linear attention", "linear attention, fading", "DeltaNet", "Gated DeltaNet", "softmax")
HELD_OUT = 10_000
ANIMALS = 512  # draws of cues on which an experiment is averaged


class Worlds(NamedTuple):
    """What a model reads, [B, T, 2 F + 1], and what it should say, [B, T, 1]."""

    inputs: NDArray[np.float32]
    targets: NDArray[np.float32]


# ---------------------------------------------------------------------------------------------------------------- models


class Head(nn.Module):
    """A mixer with one of the rules, projections and unit keys around it; gates start open at the chapter's constants."""

    def __init__(self, rule: str, width: int, heads: int) -> None:
        super().__init__()
        if rule not in TRAINED:
            raise ValueError(f"rule={rule!r} is unknown; use one of {', '.join(TRAINED)}")
        self.rule, self.heads = rule, heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gates = nn.Linear(width, 2 * heads)  # of writes and of decay
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, T, H, D / H]
        write, fade = self.gates(x).split(self.heads, -1)
        beta, log_decay = write.sigmoid(), F.logsigmoid(fade + 2)  # [B, T, H]
        if self.rule == "softmax":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D / H]
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(o.transpose(1, 2).flatten(2))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        form: Any = {"form": "parallel", "scale": 1.0}
        if self.rule == "DeltaNet":
            o, _ = mixers.delta_rule(q, k, v, beta, **form)
        elif self.rule == "Gated DeltaNet":
            o, _ = mixers.gated_delta_rule(q, k, v, log_decay, beta, **form)
        else:
            o, _ = mixers.attend(q, k, v * beta[..., None], log_decay if "fading" in self.rule else None, **form)
        return self.out(o.flatten(2))


# -------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """Size of worlds and models.

    Attributes:
        features: F, channels of a cue; a world has three cues, random unit vectors.
        trials: T of a training sequence.
        stay: probability that a trial repeats the compound of the one before.
        change: probability that a trial redraws what one of its world's cues is worth.
    """

    features: int = 16
    trials: int = 21
    stay: float = 0.7
    change: float = 0.04
    width: int = 64
    heads: int = 2
    steps: int = 400
    batch: int = 64
    lr: float = 3e-3

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> Worlds:
        """Random worlds: the reinforcer of a trial is the sum of what its cues are worth, each normal with variance 1."""
        batch, count = batch or self.batch, len(CUES)
        cues = directions(rng, batch, self.features)
        worth = rng.normal(size=(batch, count))
        shown = np.zeros((batch, count))
        keys, values = [], []
        for trial in range(self.trials):
            fresh = (rng.random((batch, 1)) > self.stay) | (trial == 0)
            shown = np.where(fresh, rng.random((batch, count)) < 0.5, shown)
            moved = (rng.random((batch, 1)) < self.change) & (np.arange(count) == rng.integers(count, size=(batch, 1)))
            worth = np.where(moved, rng.normal(size=(batch, count)), worth)
            keys.append(np.einsum("bc,bcf->bf", shown, cues))
            values.append((shown * worth).sum(1, keepdims=True))
        return sequence(np.stack(keys, 1), np.stack(values, 1))

    def model(self, rule: str, layers: int) -> nn.Module:
        """A model whose only difference is the rule."""
        return SequenceModel(
            2 * self.features + 1,
            1,
            self.width,
            layers,
            lambda _: Head(rule, self.width, self.heads),
            make_mlp=lambda _: MLP(self.width, 2 * self.width),
            positions=None,
        )

    def train(self, rule: str, layers: int, seed: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """One run and its experiments, one row: ``rule, layers, seed, error, ...`` and the indices of :func:`examine`."""
        model = seeded(lambda: self.model(rule, layers), seed).to(device)
        test = self.draw(np.random.default_rng(HELD_OUT), 1000)
        config = TrainConfig(
            self.steps, lr=self.lr, warmup=max(1, self.steps // 10) if self.steps > 1 else 0, seed=seed
        )
        evaluate = held_out([test], error=squared_error)
        history = fit(model, self.draw, squared_error, config, evaluate=evaluate, progress=False)
        row: dict[str, Any] = {"rule": rule, "layers": layers, "seed": seed, "error": history.final["error"]}
        return row | examine(model, self.features, seed) | {"seconds": round(history.seconds, 2)}


def directions(rng: np.random.Generator, batch: int, features: int) -> NDArray[np.float64]:
    """Unit vectors of all cues in ``batch`` worlds, [B, cues, F]."""
    cues = rng.normal(size=(batch, len(CUES), features))
    return cues / np.linalg.norm(cues, axis=-1, keepdims=True)


def sequence(keys: NDArray[np.float64], values: NDArray[np.float64]) -> Worlds:
    """Trials as tokens: the cues of this trial, and cues and reinforcer of the last one; the target is this trial's reinforcer.

    A head can thus pair the last trial's cue with its reinforcer, and ask for the present cue.
    """
    before = np.concatenate([np.zeros_like(keys[:, :1]), keys[:, :-1]], 1)
    earned = np.concatenate([np.zeros_like(values[:, :1]), values[:, :-1]], 1)
    return Worlds(np.concatenate([keys, before, earned], -1).astype(np.float32), values.astype(np.float32))


def zero_error(setting: Setting) -> float:
    """Error of whoever always says 0, on the held-out worlds."""
    return float(np.square(setting.draw(np.random.default_rng(HELD_OUT), 1000).targets).mean())


# ----------------------------------------------------------------------------------------------------------- experiments


PAUSE = Phase("", 0.0, 1)  # an empty trial, so that the last token says nothing about the trials before


def respond(model: nn.Module, phases: Sequence[Phase], cue: str, features: int, seed: int) -> float:
    """Response to one cue after the phases, mean over :data:`ANIMALS` draws of the cues. The model learns in its state alone."""
    rng = np.random.default_rng([seed, 1])
    cues = directions(rng, ANIMALS, features)
    trials = [(phase.cues, phase.us) for phase in phases for _ in range(phase.trials)] + [(cue, 0.0)]
    keys = np.stack(
        [sum((cues[:, CUES.index(name)] for name in names), np.zeros_like(cues[:, 0])) for names, _ in trials], 1
    )
    values = np.tile(np.array([us for _, us in trials])[None, :, None], (ANIMALS, 1, 1))
    inputs = torch.from_numpy(sequence(keys, values).inputs).to(next(model.parameters()).device)
    with torch.no_grad():
        return float(model(inputs)[:, -1, 0].mean())


def examine(model: nn.Module, features: int, seed: int) -> dict[str, float]:
    """The indices of :func:`attnlab.foundations.pavlovian.indices`, of a trained model, and ``blocking, paused``.

    Without a pause the token of the test carries the last trial too, and a model can reckon with it: what the compound earned, less
    what the store says of A, is what B is worth. After an empty trial only the store is left.
    """

    def answer(name: str, cue: str, *pause: Phase) -> float:
        return respond(model, (*EXPERIMENTS[name], *pause), cue, features, seed)

    learned = answer("acquisition", "A")
    scale = max(learned, 0.05)  # who never learned has no effect to share, and must not divide by nothing

    def less(effect: str, control: str, cue: str, *pause: Phase) -> float:
        return (answer(control, cue, *pause) - answer(effect, cue, *pause)) / scale

    return {
        "acquisition": learned,
        "extinction": less("extinction", "extinction, control: nothing happens", "A"),
        "blocking": less("blocking", "blocking, control: another cue first", "B"),
        "blocking, paused": less("blocking", "blocking, control: another cue first", "B", PAUSE),
        "overshadowing": less("overshadowing", "overshadowing, control: B alone", "B"),
    }


def spread(rows: Sequence[dict[str, Any]], rule: str, layers: int, index: str) -> tuple[float, tuple[float, float]]:
    """Mean and range over the seeds of one kind of model."""
    values = [row[index] for row in rows if row["rule"] == rule and row["layers"] == layers]
    if not values:
        raise ValueError(f"rows: no {rule} with {layers} layers; make the record again")
    return fmean(values), (min(values), max(values))


# --------------------------------------------------------------------------------------------------------------- command


TINY = Setting(steps=2, batch=4, width=16)
LARGE = Setting(features=64, trials=21, width=256, heads=4, steps=6000, batch=512, lr=1e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's text."""
    name = "python -m attnlab.foundations.pavlovian_runs"
    parser = argparse.ArgumentParser(prog=name, description="Train small models and put them into the laboratory.")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write, such as records/pavlovian.json")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, help="updates of a model, instead of the setting's own")
    parser.add_argument("--resume", action="store_true", help="go on with a record of the same setting")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no second model is begun"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--large", action="store_true", help="wider models and ten times the updates: for a GPU")
    size.add_argument("--tiny", action="store_true", help="two updates, to see that all of it works")
    options = parser.parse_args(arguments)
    setting = LARGE if options.large else TINY if options.tiny else Setting()
    if options.steps is not None:
        setting = replace(setting, steps=options.steps)
    command = f"{name} --record records/{options.record.name} --device {options.device} --seeds {options.seeds}"
    command += "".join(f" --{flag}" for flag in ("large", "tiny") if getattr(options, flag))
    command += f" --steps {options.steps}" if options.steps is not None else ""
    rows: list[dict[str, Any]] = [{"setting": asdict(setting), "zero error": zero_error(setting)}]
    if options.resume and (before := records.load(options.record.stem, options.record.parent)) is not None:
        if before.rows[0] != rows[0] or before.changed():
            parser.error("--resume: the record has another setting, or the code has changed since; make it anew")
        rows = before.rows
    done = {(row["seed"], row["layers"], row["rule"]) for row in rows[1:]}
    todo = [case for case in product(range(options.seeds), (1, 2), TRAINED) if case not in done]
    began, started = time.monotonic(), len(rows)
    with lab.one_thread():
        for seed, layers, rule in lab.progress(todo, "seeds x layers x rules"):
            if len(rows) > started and time.monotonic() - began > options.budget:
                break
            rows.append(setting.train(rule, layers, seed, options.device))
            records.write(options.record, rows, sources=SOURCES, command=command, commit=options.commit)


if __name__ == "__main__":
    main()
