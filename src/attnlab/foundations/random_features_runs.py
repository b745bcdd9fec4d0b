"""The experiments of the chapter ``foundations/random-features``: learning curves of frozen layers, and what a head more is worth.

``python -m attnlab.foundations.random_features_runs --record records/random-features.json --device cuda`` repeats the curves with
d = N = 16, a thousand heads and up to 16,000 labels; ``--size medium`` is what one CPU core does in some ten minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import claims, lab, records
from attnlab.foundations import random_features as rf
from attnlab.foundations.random_features import FAMILIES, Target
from attnlab.models import ridge

Interval = tuple[float, float]

SEEDS = tuple(range(8))
KERNEL_SEEDS = tuple(range(16))
BIASES = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
TARGETS = tuple(Target(family, p) for family in FAMILIES for p in (1, 2, 3, 4))
PURE = tuple(Target("correlation", p, pure=True) for p in (1, 2, 3))
WORST_OF = ("query 2", "keys 2", "correlation 1")  # the targets of which a claim takes the largest ratio
VALIDATION = 0.2  # of the labels choose the penalty, and are not fitted


@dataclass(frozen=True)
class Setting:
    """Size of the experiment.

    Attributes:
        d: dimensions of a token.
        keys: N.
        heads: M; every model but the linear one has ``M (d + 1)`` trained weights.
        sizes: numbers of labels, the validation split among them.
        test: held-out inputs.
        biases: strengths of the mean of the query-key weights.
        softmax_biases: those that softmax attention is run with.
        device: where it runs.
    """

    d: int = 8
    keys: int = 8
    heads: int = 120
    sizes: tuple[int, ...] = (100, 200, 400, 800)
    test: int = 1000
    biases: tuple[float, ...] = BIASES
    softmax_biases: tuple[float, ...] = (0.0, 1.0)
    device: str = "cpu"

    @property
    def weights(self) -> int:
        """Trained weights, the same for attention and both networks."""
        return self.heads * (self.d + 1)

    def features(self, tokens: Tensor, generator: torch.Generator) -> Iterable[tuple[str, float, Callable[[], Tensor]]]:
        """Model, bias and a function that computes its features [n, weights], all frozen weights drawn first and only once.

        Every bias shifts the same draw of W, so that differences between biases are not differences between draws.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=tokens.dtype, device=tokens.device)

        W = rf.draw_heads(self.heads, self.d + 1, generator)
        network = normal(self.weights, (self.keys + 1) * self.d + 1) * (self.keys + 2) ** -0.5  # scores of variance 1
        average = normal(self.weights, 2 * self.d + 1) * 3**-0.5
        seen = rf.augment(tokens)
        for mu in self.biases:
            yield "attention", mu, partial(rf.attention_features, seen, rf.biased(W, mu))
        for mu in self.softmax_biases:
            yield "softmax attention", mu, partial(rf.attention_features, seen, rf.biased(W, mu), "softmax")
        yield "network", 0.0, partial(rf.network_features, tokens, network)
        yield "averaged network", 0.0, partial(rf.set_features, tokens, average)
        yield "linear", 0.0, partial(tokens.flatten, 1)

    def run(self, seed: int, targets: Sequence[Target] = TARGETS + PURE) -> list[dict[str, Any]]:
        """One draw of weights, direction and data: ``seed, model, mu, labels, target, error, penalty, seconds`` a row.

        ``seconds`` is that of all targets together: one eigendecomposition serves them.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        most = max(self.sizes)
        tokens = rf.draw_tokens(most + self.test, self.keys, self.d, generator)
        beta = F.normalize(torch.randn(self.d, generator=generator, dtype=tokens.dtype, device=tokens.device), dim=0)
        y = torch.stack([target(tokens, beta) for target in targets], 1)
        rows = []
        for model, mu, compute in self.features(tokens, generator):
            x = compute()
            for n in self.sizes:
                began = time.perf_counter()
                fitted = n - round(VALIDATION * n)
                best = ridge.fit(x[:fitted], y[:fitted], x[fitted:n], y[fitted:n])
                errors = ridge.relative_error(best.predict(x[most:]), y[most:])
                for target, error, lam in zip(targets, errors.tolist(), best.lam.tolist(), strict=True):
                    row = {"seed": seed, "model": model, "mu": mu, "labels": n, "target": target.name}
                    rows.append(row | {"error": error, "penalty": lam, "seconds": time.perf_counter() - began})
        return rows


def curves(setting: Setting | None = None, seeds: Iterable[int] = SEEDS) -> pd.DataFrame:
    """Test errors of every model, number of labels and target, one draw a seed."""
    setting = setting or Setting()
    with lab.one_thread():
        return pd.DataFrame([row for seed in lab.progress(list(seeds), "draws") for row in setting.run(seed)])


# -------------------------------------------------------------------------------------------------------- what is compared


def spread(values: Sequence[float]) -> tuple[float, Interval]:
    """Mean and range over the draws."""
    return fmean(values), (min(values), max(values))


def errors_of(runs: pd.DataFrame, model: str, target: str, labels: int, mu: float = 0.0) -> pd.Series:
    """Error of one model by draw.

    Raises:
        ValueError: no such runs.
    """
    chosen = runs[(runs.model == model) & (runs.target == target) & (runs.labels == labels) & (runs.mu == mu)]
    if chosen.empty:
        raise ValueError(f"runs: none of model={model!r}, target={target!r}, labels={labels}, mu={mu}")
    return chosen.set_index("seed").error


def ratio(
    runs: pd.DataFrame,
    one: str,
    other: str,
    target: str | Sequence[str],
    labels: int,
    *,
    mu: float = 0.0,
    other_mu: float = 0.0,
) -> tuple[float, Interval]:
    """Error of one model over that of another of the same draw, of several targets the largest: mean and range of the draws."""
    names = [target] if isinstance(target, str) else target
    table = [errors_of(runs, one, t, labels, mu) / errors_of(runs, other, t, labels, other_mu) for t in names]
    return spread(pd.concat(table, axis=1).max(axis=1).tolist())


def verdicts(runs: pd.DataFrame, few: int = 400, many: int = 800) -> dict[str, dict[str, Any]]:
    """Arguments of ``claims.check`` for the claims on learning curves.

    Args:
        few: labels of the claims that compare models, ``many``: of those on pure parts.
    """
    bias = BIASES[-1]
    correlation = ratio(runs, "attention", "averaged network", "correlation 1 (pure)", many)
    found: dict[str, tuple[tuple[float, Interval], dict[str, tuple[float, Interval]]]] = {
        "fewer-samples": (ratio(runs, "attention", "network", WORST_OF, few), {}),
        "not-only-invariance": (
            ratio(runs, "attention", "averaged network", WORST_OF, few),
            {"correlation": correlation},
        ),
        "query-meets-key": (correlation, {"keys": ratio(runs, "attention", "averaged network", "keys 2", many)}),
        "bias-helps-some": (
            ratio(runs, "attention", "attention", "correlation 1", few, mu=1.0),
            {"keys": ratio(runs, "attention", "attention", "keys 2", few, mu=1.0)},
        ),
        "parity": (
            ratio(runs, "attention", "attention", "correlation 2 (pure)", many, mu=bias),
            {"cube": ratio(runs, "attention", "attention", "correlation 3 (pure)", many, mu=bias)},
        ),
        "softmax": (ratio(runs, "softmax attention", "network", WORST_OF, few), {}),
    }
    return {
        name: {"value": value, "interval": interval, "controls": controls}
        for name, ((value, interval), controls) in found.items()
    }


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, lowest and highest error over the draws: ``model, mu, target, labels, error, low, high``."""
    groups = runs.groupby(["model", "mu", "target", "labels"], sort=False).error
    table = pd.DataFrame({"error": groups.mean(), "low": groups.min(), "high": groups.max()})
    return table.reset_index()


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """Error of every biased model over the unbiased one of the same draw: ``target, labels, mu, ratio, low, high``."""
    attention = runs[runs.model == "attention"]
    table = attention.pivot_table(index=["target", "labels", "seed"], columns="mu", values="error", sort=False)
    unbiased = table[0.0]
    ratios = table.div(unbiased, axis=0).drop(columns=0.0).melt(ignore_index=False, value_name="ratio").reset_index()
    groups = ratios.groupby(["target", "labels", "mu"], sort=False).ratio
    return pd.DataFrame({"ratio": groups.mean(), "low": groups.min(), "high": groups.max()}).reset_index()


def lower_share(p: int, setting: Setting | None = None, inputs: int = 20_000, seed: int = 0) -> float:
    """Share of the variance of ``correlation p`` that is not in its pure part, on random inputs."""
    setting = setting or Setting()
    generator = torch.Generator().manual_seed(seed)
    tokens = rf.draw_tokens(inputs, setting.keys, setting.d, generator)
    beta = F.normalize(torch.randn(setting.d, generator=generator, dtype=tokens.dtype), dim=0)
    whole, pure = (Target("correlation", p, pure=which)(tokens, beta).var() for which in (False, True))
    return float(1 - pure / whole)


def slopes(runs: pd.DataFrame) -> pd.DataFrame:
    """The slope of log error against log labels for each model and target, over all sizes: mean and range of the draws."""
    rows = []
    for (model, mu, target), group in runs.groupby(["model", "mu", "target"], sort=False):
        fits = [np.polyfit(np.log(one.labels), np.log(one.error), 1)[0] for _, one in group.groupby("seed")]
        value, (low, high) = spread([float(fit) for fit in fits])
        rows.append({"model": model, "mu": mu, "target": target, "slope": value, "low": low, "high": high})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------- from heads to a kernel


def kernel_errors(
    heads: Sequence[int] = (10, 32, 100, 316, 1000, 3162, 10_000),
    seed: int = 0,
    inputs: int = 24,
    d: int = 8,
    keys: int = 8,
) -> list[dict[str, Any]]:
    """How far the kernel of M heads is from the closed form, relative in the Frobenius norm: ``seed, heads, kernel, error``.

    ``kernel`` is ``all pairs`` (the closed form) or ``one to one`` (the same formula with keys i = j only, which is wrong).
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = rf.augment(rf.draw_tokens(inputs, keys, d, generator))
    exact = {"all pairs": rf.kernel(tokens, tokens), "one to one": rf.paired_kernel(tokens, tokens)}
    rows = []
    for M in heads:
        x = rf.attention_features(tokens, rf.draw_heads(M, d + 1, generator))
        gram = x @ x.T / M
        for name, right in exact.items():
            error = float((gram - right).norm() / right.norm())
            rows.append({"seed": seed, "heads": M, "kernel": name, "error": error})
    return rows


def exponent(rows: pd.DataFrame, kernel: str) -> tuple[float, Interval]:
    """Slope of the log of the root mean square error over the draws against log heads, with an interval bootstrapped over draws."""
    table = rows[rows.kernel == kernel].pivot(index="seed", columns="heads", values="error")
    heads, squares = np.log(table.columns.to_numpy(dtype=float)), table.to_numpy() ** 2

    def slope(picks: np.ndarray) -> np.ndarray:
        errors = np.log(squares[picks].mean(1)) / 2  # [draws, sizes]
        return np.asarray(np.polyfit(heads, errors.T, 1)[0])

    return float(slope(np.arange(len(squares))[None])[0]), claims.bootstrap(len(squares), slope)


def heads_curve(
    heads: Sequence[int] = (8, 16, 32, 64, 128, 256, 512), seed: int = 0, labels: int = 400, test: int = 500
) -> list[dict[str, Any]]:
    """Test error against the number of heads, and with infinitely many (``heads`` None): ``seed, heads, target, error``."""
    setting = Setting(test=test)
    generator = torch.Generator().manual_seed(seed)
    tokens = rf.draw_tokens(labels + test, setting.keys, setting.d, generator)
    beta = F.normalize(torch.randn(setting.d, generator=generator, dtype=tokens.dtype), dim=0)
    targets = [target for target in TARGETS if target.name in WORST_OF]
    y = torch.stack([target(tokens, beta) for target in targets], 1)
    seen = rf.augment(tokens)
    widest = rf.attention_features(seen, rf.draw_heads(max(heads), setting.d + 1, generator))
    models: list[tuple[int | None, Tensor]] = [(M, widest[:, : M * (setting.d + 1)]) for M in heads]
    models.append((None, rf.features_of(rf.kernel(seen, seen))))
    fitted = labels - round(VALIDATION * labels)
    rows = []
    for M, x in models:
        best = ridge.fit(x[:fitted], y[:fitted], x[fitted:labels], y[fitted:labels])
        errors = ridge.relative_error(best.predict(x[labels:]), y[labels:]).tolist()
        rows += [{"seed": seed, "heads": M, "target": t.name, "error": e} for t, e in zip(targets, errors, strict=True)]
    return rows


# ----------------------------------------------------------------------------------------------------------- the record

SIZES: dict[str, tuple[Setting, int]] = {  # with the number of draws
    "large": (Setting(16, 16, 1000, (500, 1000, 2000, 4000, 8000, 16_000), 4000, (0.0, 1.0, 4.0)), 10),
    "medium": (Setting(16, 16, 120, (250, 500, 1000, 2000, 4000), 2000, (0.0, 1.0, 4.0)), 5),
    "tiny": (Setting(3, 2, 4, (20, 40), 30, (0.0, 1.0, 4.0)), 2),
}
SOURCES = ("foundations/random_features.py", "foundations/random_features_runs.py", "models/ridge.py")
JUDGED = ("fewer-samples", "not-only-invariance", "query-meets-key", "bias-helps-some", "parity", "softmax")


def record_rows(runs: pd.DataFrame, setting: Setting) -> list[dict[str, Any]]:
    """Rows of the record: the errors of all targets by draw, model and labels, and verdicts at the two largest numbers of labels."""
    few, many = sorted(setting.sizes)[-2:]
    size = {"d": setting.d, "keys": setting.keys, "heads": setting.heads}
    rows: list[dict[str, Any]] = []
    for _, group in runs.groupby(["seed", "model", "mu", "labels"], sort=False):
        one = group.iloc[0].to_dict()
        errors = dict(zip(group.target, group.error.round(5), strict=True))
        row = {"case": "curve", **size, **{key: one[key] for key in ("seed", "model", "mu", "labels")}}
        rows.append(row | {"seconds": round(one["seconds"], 3), "errors": errors})
    seeds = sorted(runs.seed.unique().tolist())
    seconds = sum(row["seconds"] for row in rows)  # of the fits
    for name, found in verdicts(runs, few, many).items():
        judged = claims.measure(f"random-features/{name}", **found, seeds=seeds, seconds=seconds, origin="record")
        rows.append(dict(judged))
    return rows


def from_record(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The table of ``curves`` from the rows of a record, without the penalties."""
    kept = ("seed", "model", "mu", "labels", "seconds")
    return pd.DataFrame(
        [
            {key: row[key] for key in kept} | {"target": target, "error": error}
            for row in rows
            if row.get("case") == "curve"
            for target, error in row["errors"].items()
        ]
    )


def write_record(
    path: Path,
    setting: Setting,
    draws: int,
    *,
    command: str,
    commit: str,
    resume: bool = False,
    budget: float = math.inf,
) -> None:
    """Run draw after draw and write the record anew after each, so that an interruption costs one draw.

    Args:
        resume: keep the draws of a record that was begun, and go on after them.
        budget: seconds after which no further draw begins.

    Raises:
        ValueError: a record to resume that was made by other code or at another size.
    """
    began = records.load(path.stem, path.parent) if resume else None
    found: list[dict[str, Any]] = []
    if began is not None:
        if began.changed() or began.command != command:
            raise ValueError(f"{path}: begun by other code or as {began.command!r}; leave out --resume to make it anew")
        found = [{str(key): x for key, x in row.items()} for row in from_record(began.rows).to_dict("records")]
    opened = time.perf_counter()
    for seed in range(len({row["seed"] for row in found}), draws):
        if (start := time.perf_counter()) - opened > budget:
            print(f"{seed} of {draws} draws are there; go on with --resume", flush=True)
            return
        found += setting.run(seed)
        records.write(path, record_rows(pd.DataFrame(found), setting), sources=SOURCES, command=command, commit=commit)
        print(f"draw {seed + 1} of {draws}: {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    name = "python -m attnlab.foundations.random_features_runs"
    parser = argparse.ArgumentParser(
        prog=name, description="Learning curves of frozen layers, larger than in the chapter."
    )
    parser.add_argument(
        "--record", type=Path, required=True, help="the JSON to write, such as records/random-features.json"
    )
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"), help="left out: a GPU if there is one")
    parser.add_argument("--size", default=None, choices=tuple(SIZES), help="left out: large on a GPU, medium without")
    parser.add_argument("--draws", type=int, default=None, help="left out: 10 of the large size, 5 of the medium one")
    parser.add_argument("--resume", action="store_true", help="go on after the draws that the record already has")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further draw begins")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    options = parser.parse_args(arguments)
    device = options.device or lab.device().type
    size = options.size or ("large" if device == "cuda" else "medium")
    setting, draws = SIZES[size]
    draws = options.draws or draws
    command = f"{name} --record records/{options.record.name} --device {device} --size {size} --draws {draws}"
    setting = replace(setting, device=device)
    write_record(
        options.record,
        setting,
        draws,
        command=command,
        commit=options.commit,
        resume=options.resume,
        budget=options.budget,
    )


if __name__ == "__main__":
    main()
