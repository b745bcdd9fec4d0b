"""The experiment of the chapter ``foundations/dsf``: recall of several keys (MQAR) with blocks that differ in their core alone.

``python -m attnlab.foundations.dsf_runs --record records/dsf.json`` trains every model on three seeds, in about ten minutes on one CPU
core. It goes on where a record was left (``--budget`` stops in time), and saves the models of seed 0. ``--size paper`` takes the two
smallest columns of the paper, at the best of four rates chosen on a seed that does not count, and needs a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnlab import data, lab, records
from attnlab.foundations import dsf_tables
from attnlab.foundations.dsf_models import Core, Layer, QLSTMCore, S6Core, Spec, SSDCore, effective_memory
from attnlab.models.language import MLP, Decoder
from attnlab.models.losses import target_accuracy, target_loss
from attnlab.models.sweep import count_parameters
from attnlab.models.training import Diverged, TrainConfig, evaluating, fit, held_out, seeded, tensors

NAME = "python -m attnlab.foundations.dsf_runs"
SOURCES = tuple(f"foundations/{name}.py" for name in ("dsf", "dsf_builders", "dsf_models", "dsf_runs"))
SEEDS = (0, 1, 2)
RATE_SEED = 100  # on which learning rates are chosen, so that no seed that counts has had a say
HELD_OUT = 0x6473_66
EXAMPLES = 1000
FORGETFUL = (S6Core, SSDCore, QLSTMCore)  # the cores whose transition is a memory, not a ratio of normalisers

#: every model of the small comparison; the last two are linear and normalised attention as the released sweep has blocks: bare
SMALL: tuple[Spec, ...] = (
    Spec("softmax", 32),
    Spec("linear", 8),
    Spec("linear", 32),
    Spec("normalised", 32),
    Spec("S6", 8),
    Spec("Mamba-2", 32),
    Spec("qLSTM"),
    Spec("qLSTM, reversed"),
    Spec("qLSTM, long start"),
    Spec("qLSTM, reversed, long start"),
    Spec("linear", 32, mlp=False),
    Spec("normalised", 32, mlp=False),
)
#: the models of the figure, which are saved
SHOWN: tuple[Spec, ...] = (
    Spec("softmax", 32),
    Spec("linear", 32),
    Spec("normalised", 32),
    Spec("S6", 8),
    Spec("Mamba-2", 32),
    Spec("qLSTM, reversed, long start"),
)


@dataclass(frozen=True)
class Setting:
    """Size of the task and of the models, and how they are trained; of several ``rates`` each model gets its best."""

    name: str = "small"
    pairs: int = 4
    length: int = 32
    vocab: int = 32
    width: int = 32
    layers: int = 2
    steps: int = 600
    batch: int = 64
    weight_decay: float = 0.01
    rates: tuple[float, ...] = (6e-3,)

    def draw(self, rng: np.random.Generator, batch: int | None = None) -> data.Recall:
        """tokens and targets [B, T]."""
        return data.mqar(rng, batch or self.batch, self.pairs, self.length, self.vocab)

    def model(self, spec: Spec) -> Decoder:
        """Learned positions, blocks of one shape, the core of ``spec``."""
        return Decoder(
            self.vocab,
            self.width,
            self.layers,
            lambda _: Layer(self.width, spec.core(self.width)),
            make_mlp=lambda _: MLP(self.width, 2 * self.width) if spec.mlp else Silent(),
            max_length=self.length,
        )

    def train(
        self, spec: Spec, seed: int, lr: float, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Any], Decoder]:
        """One run: its row of the record, and the model. The accuracy of a run that diverged is 0."""
        model = seeded(lambda: self.model(spec), seed).to(device)
        test = self.draw(np.random.default_rng(HELD_OUT), EXAMPLES)
        config = TrainConfig(
            self.steps,
            lr=lr,
            warmup=self.steps // 10,
            weight_decay=self.weight_decay,
            seed=seed,
            evaluate_every=max(1, self.steps // 6),
        )
        before = memories(model, torch.as_tensor(test.tokens[:100]))
        row: dict[str, Any] = {"operator": "training", "case": self.name, "impl": spec.name, "seed": seed, "lr": lr}
        try:
            history = fit(
                model,
                self.draw,
                target_loss,
                config,
                evaluate=held_out([test], accuracy=target_accuracy),
                progress=False,
            )
            curve = [round(e["accuracy"], 4) for e in history.evaluations]
            row |= {"accuracy": history.final["accuracy"], "seconds": history.seconds, "curve": curve}
        except Diverged:
            row |= {"accuracy": 0.0, "seconds": 0.0, "curve": []}
        row |= {"parameters": count_parameters(model), "state_floats": self.state_floats(spec)}
        row |= {"memory_before": before, "memory_after": memories(model, torch.as_tensor(test.tokens[:100]))}
        return row, model

    def state_floats(self, spec: Spec) -> int:
        """Numbers that one layer keeps after the whole sequence, its convolution apart."""
        return spec.core(self.width).state_floats(self.length)

    def blind(self) -> float:
        """Accuracy of who names one of the values told, without looking which key is asked: the most frequent one."""
        told = np.random.default_rng(0).integers(self.vocab - self.vocab // 2, size=(20_000, self.pairs))
        return fmean(int(np.bincount(row).max()) for row in told) / self.pairs


#: one pair and a long wait: a question of memory alone, which a quasi-LSTM can learn
GATES = Setting("gates", pairs=1, length=64, steps=150)

#: the two smallest columns of the paper, with its vocabulary and rates; 20 epochs instead of 64
PAPER: tuple[Setting, ...] = tuple(
    Setting(
        f"L = {length}, d = {width}",
        pairs=pairs,
        length=length,
        vocab=8192,
        width=width,
        steps=20 * 100_000 // batch,
        batch=batch,
        weight_decay=0.1,
        rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
    )
    for length, pairs, batch in ((64, 4, 512), (128, 8, 256))
    for width in (64, 128)
)
QLSTM_SPECS: tuple[Spec, ...] = tuple(spec for spec in reversed(SMALL) if spec.n is None)
Plan = Sequence[tuple[Setting, Sequence[Spec]]]
#: what the small record holds; the quasi-LSTMs on four pairs, which none of them learned in trials, come last
SMALL_PLAN: Plan = (
    (GATES, QLSTM_SPECS),
    (Setting(), tuple(spec for spec in SMALL if spec.n is not None)),
    (Setting(), QLSTM_SPECS),
)
PAPER_SPECS: tuple[Spec, ...] = (
    *(Spec(kind, n) for kind in ("softmax", "linear", "normalised", "S6", "Mamba-2") for n in (32, 64)),
    *(spec for spec in SMALL if spec.n is None),
    *(Spec(kind, 64, mlp=False) for kind in ("linear", "normalised")),
)


class Silent(nn.Module):
    """In the place of an MLP: adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> zeros [B, T, D]"""
        return torch.zeros_like(x)


def cores(model: Decoder, tokens: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The core of each layer, and what it is given for these tokens."""
    found: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    hooks = [
        layer.core.register_forward_hook(lambda core, given, _: found.append((core, given[0]))) for layer in layers
    ]
    try:
        with evaluating(model):
            model(tensors(tokens, model))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def memories(model: Decoder, tokens: Tensor) -> list[float] | None:
    """Effective memory of each layer in tokens; none for attention, whose transitions do not forget."""
    found = cores(model, tokens)
    if not isinstance(found[0][0], FORGETFUL):
        return None
    with torch.no_grad():
        return [round(effective_memory(core.record(x)), 3) for core, x in found if isinstance(core, Core)]


# -------------------------------------------------------------------------------------------------------------- the command


def best_rate(rows: Iterable[dict[str, Any]]) -> float:
    """The rate of the most accurate of these rows."""
    return float(max(rows, key=lambda row: row["accuracy"])["lr"])


def todo(
    setting: Setting, specs: Sequence[Spec], rows: list[dict[str, Any]]
) -> Iterable[tuple[Spec, int, float, bool]]:
    """The runs that ``rows`` lack: (model, seed, rate, whether it counts). Rates first; then seed by seed, so that a cut is fair."""

    def done(spec: Spec, seed: int, lr: float | None = None) -> bool:
        key = (setting.name, spec.name, seed)
        return any((r["case"], r["impl"], r["seed"]) == key and lr in (None, r["lr"]) for r in rows)

    for lr in setting.rates if len(setting.rates) > 1 else ():
        yield from ((spec, RATE_SEED, lr, False) for spec in specs if not done(spec, RATE_SEED, lr))
    for seed in SEEDS:
        for spec in specs:
            if not done(spec, seed):
                searched = [r for r in rows if (r["case"], r["impl"]) == (setting.name, spec.name) and not r["counts"]]
                yield spec, seed, best_rate(searched) if searched else setting.rates[0], True


def run(path: Path, plan: Plan, *, commit: str, command: str, budget: float, device: str = "cpu") -> None:
    """Train what is missing in the record at ``path``, which is written after each run, until ``budget`` seconds are over."""
    old = records.load(path.stem, path.parent)
    rows = [] if old is None else [row for row in old.rows if "claim" not in row]
    began = time.perf_counter()

    def write() -> None:
        judged = dsf_tables.claim_rows(rows)
        records.write(path, [*rows, *judged], sources=SOURCES, command=command, commit=commit)

    for setting, specs in plan:
        for spec, seed, lr, counts in todo(setting, specs, rows):
            if time.perf_counter() - began > budget:
                print("out of time; the same command goes on")
                return
            row, model = setting.train(spec, seed, lr, device)
            rows.append(row | {"counts": counts})
            if counts and seed == SEEDS[0] and setting == Setting() and spec in SHOWN:
                save(model, spec, path.parent / "models")
            write()
            print(f"{setting.name}: {spec.name}, seed {seed}, {lr:g}: {row['accuracy']:.3f}", flush=True)


def model_file(spec: Spec, folder: Path) -> Path:
    """Where the model of seed 0 lies."""
    return folder / f"dsf-{spec.kind.replace(', ', '-').replace(' ', '-').lower()}.safetensors"


def save(model: nn.Module, spec: Spec, folder: Path) -> None:
    """Write the weights, under 100 kB."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(weights, model_file(spec, folder))


def trained(spec: Spec, folder: Path | None = None) -> Decoder | None:
    """A model of the record, or none where it is not there (an installation without ``records/``)."""
    from safetensors.torch import load_file

    path = model_file(spec, records.FOLDER / "models" if folder is None else folder)
    if not path.is_file():
        return None
    model = seeded(lambda: Setting().model(spec), 0)
    model.load_state_dict(load_file(path))
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=NAME, description="Train the models of the chapter foundations/dsf.")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write or to go on with")
    parser.add_argument("--size", choices=("small", "paper"), default="small", help="paper: its two smallest columns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no new run begins")
    parser.add_argument("--tiny", action="store_true", help="a few updates, to see that all of it works")
    options = parser.parse_args(arguments)
    plan = SMALL_PLAN if options.size == "small" else [(setting, PAPER_SPECS) for setting in PAPER]
    if options.tiny:
        plan = ((replace(Setting(), name="tiny", steps=6, batch=4, width=16), SMALL[:2]),)
    flags = "".join(f" --{x}" for x in ("tiny",) if getattr(options, x))
    command = f"{NAME} --record records/{options.record.name} --size {options.size} --device {options.device}{flags}"
    with lab.one_thread():
        run(
            options.record,
            plan,
            commit=options.commit,
            command=command,
            budget=options.budget,
            device=options.device,
        )


if __name__ == "__main__":
    main()
