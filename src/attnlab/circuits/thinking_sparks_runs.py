"""The experiment of the chapter ``circuits/thinking-sparks``: circuits along SFT, GRPO and drift, in two regimes, on five seeds.

``python -m attnlab.circuits.thinking_sparks_runs --record records/thinking-sparks.json`` makes the record, on one CPU core in some
ten minutes; ``--seeds 0 1`` takes some, ``--resume`` goes on where an interruption stopped. The chapter itself runs one seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from attnlab import claims, lab, records
from attnlab.circuits import thinking_sparks as ts
from attnlab.circuits.attribution import attention_rows
from attnlab.circuits.model import HookedLM
from attnlab.circuits.patching import activation_patch
from attnlab.circuits.post_training import (
    METHODS,
    REGIMES,
    Base,
    Checkpoint,
    Head,
    Method,
    Plan,
    Regime,
    base_model,
    chain_accuracy,
    like,
    mean_outputs,
    post_train,
    reluctant,
    right_samples,
    scaled,
)
from attnlab.circuits.thinking_sparks import Timeline
from attnlab.data import chains
from attnlab.models.word_model import WordModel

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2, 3, 4)
AGAIN = "base, other prompts"
PAIRS_A_STEP = 16
PROBLEMS = 512
SAMPLED, SAMPLES, KS = 64, 16, (1, 2, 4, 8)
RANDOM_SETS = 10
SMALLEST_KL = 1e-6  # the resolution of a record
STREAM = 0x7370_6B73
SOURCES = tuple(f"circuits/{name}.py" for name in ("thinking_sparks", "post_training", "thinking_sparks_runs"))

Interval = tuple[float, float]
Look = Callable[[Method, int, HookedLM], None]

# ------------------------------------------------------------------------------------------------------ one seed


def bases(plan: Plan, seed: int, regimes: Iterable[Regime] = REGIMES) -> dict[Regime, Base]:
    """The base of each regime; that of ``"switch"`` goes on from that of ``"sharpen"``."""
    first = base_model(plan, seed)
    return {regime: first if regime == "sharpen" else reluctant(first, plan, seed) for regime in regimes}


def measure_regime(
    regime: Regime, base: Base, plan: Plan, seed: int, look: Look | None = None
) -> tuple[list[dict[str, Any]], dict[str, list[Checkpoint]]]:
    """All rows of one regime and seed, and the models they were measured on, by method.

    Args:
        regime: its name in the rows.
        base: what all runs start from.
        plan: sizes and rates.
        seed: of batches, samples and prompts.
        look: is shown every checkpoint as ``(method, updates, model)``.
    """
    again = HookedLM(base.model.bridge())
    pairs, others = (ts.step_pairs(again.tokenizer, PAIRS_A_STEP, 2 * seed + i) for i in (0, 1))
    problems = chains.sums(np.random.default_rng([STREAM, seed]), PROBLEMS)
    where = {"case": regime, "seed": seed}
    noise = {"operator": "noise", "impl": AGAIN, "shares": ts.head_shares(again, others).round(5).tolist()}
    rows: list[dict[str, Any]] = [{**where, **noise}]
    runs: dict[str, list[Checkpoint]] = {}
    for method in METHODS:
        start = time.perf_counter()
        run = post_train(base, method, plan, seed)
        trained = time.perf_counter()
        each = None if look is None else _bound(look, method)
        line = ts.timeline(method, run, pairs, problems, each)
        took = {"seconds": round(trained - start, 2), "circuit_seconds": round(time.perf_counter() - trained, 2)}
        rows.append({**where, "operator": "run", **line.row(), **took})
        if method != "drift":
            rows += [
                {**where, "operator": "ablation", "impl": method, **row} for row in ablations(line, run, problems, seed)
            ]
        rows.append({**where, "operator": "pass", "impl": method, "pass": passes(run[-1].model, problems, seed)})
        runs[method] = run
    rows.append({**where, "operator": "pass", "impl": "base", "pass": passes(base.model, problems, seed)})
    return rows, runs


class Looks:
    """What a click on a head shows: collects, checkpoint by checkpoint, attention on one prompt and the effect of exact patching.

    Attributes:
        words: the prompt, token by token.
        rows: for a method and its updates, attention from the last token, ``[L, H, T]``.
        patched: for a method and its updates, the share of the logit difference that goes when a head alone writes what it writes on
            the corrupt prompt, ``[L, H]``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.words: list[str] = []
        self.rows: dict[tuple[str, int], np.ndarray] = {}
        self.patched: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, method: Method, updates: int, model: HookedLM) -> None:
        if updates == 0 and self.rows:  # all runs begin at one model
            first = next(iter(self.rows))
            self.rows[method, 0], self.patched[method, 0] = self.rows[first], self.patched[first]
            return
        pairs = ts.step_pairs(model.tokenizer, PAIRS_A_STEP, 2 * self.seed)
        few, example = pairs.subset(range(0, len(pairs), 4)), pairs.subset([PAIRS_A_STEP])  # the second step of a chain
        self.words = example.words(0)
        self.patched[method, updates] = activation_patch(model, few, positions="all").grid()
        looked = attention_rows(model, example, model.spec.heads)
        shape = model.spec.n_layers, model.spec.n_heads, len(self.words)
        self.rows[method, updates] = np.array([looked[head][0] for head in model.spec.heads]).reshape(shape)


def _bound(look: Look, method: Method) -> Callable[[int, HookedLM], None]:
    return lambda updates, model: look(method, updates, model)


def ablations(line: Timeline, run: Sequence[Checkpoint], problems: chains.Sums, seed: int) -> list[dict[str, Any]]:
    """What the last model of a run loses without its emergent heads, and without heads that it no longer uses, beside random sets.

    One row for each set that is not empty and each ``how``: ``zero`` removes what a head writes, ``mean`` puts its mean there.
    Accuracies are greedy, in percent.
    """
    model, base = run[-1].model, line.shares[0].round(5)
    last = line.shares[-1].round(5)
    mean = mean_outputs(model, problems)
    rows = []
    for name, mask in (("emergent", ts.emergent(last, base)), ("lost", ts.emergent(base, last))):
        heads: list[Head] = [(int(layer), int(head)) for layer, head in np.argwhere(mask)]
        if not heads:
            continue
        sets = like(heads, mask.shape[1], RANDOM_SETS, np.random.default_rng([STREAM, seed, len(heads)]))
        for how in ("zero", "mean"):
            filled = mean if how == "mean" else None
            accuracy = [100 * chain_accuracy(scaled(model, chosen, mean=filled), problems) for chosen in [heads, *sets]]
            rows.append(
                {
                    "set": name,
                    "how": how,
                    "heads": [list(head) for head in heads],
                    "whole": round(100 * chain_accuracy(model, problems), 3),
                    "without": round(accuracy[0], 3),
                    "random": [round(x, 3) for x in accuracy[1:]],
                }
            )
    return rows


def passes(model: WordModel, problems: chains.Sums, seed: int) -> dict[str, float]:
    """pass@k of the first problems for the chapter's k."""
    few = chains.Sums(*(part[:SAMPLED] for part in problems))
    right = right_samples(model, few, SAMPLES, seed)
    return {str(k): round(float(np.mean([ts.pass_at_k(SAMPLES, int(c), k) for c in right])), 5) for k in KS}


# ------------------------------------------------------------------------------------------------------ reading the rows


def timelines(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], Timeline]:
    """The runs among the rows, by regime, method and seed."""
    return {(row["case"], row["impl"], row["seed"]): Timeline.of(row) for row in rows if row.get("operator") == "run"}


def head_counts(rows: Sequence[dict[str, Any]], taus: Sequence[float] = ts.TAUS) -> pd.DataFrame:
    """Columns ``regime, seed, method, tau, base, emergent, lost``; a method more is the base itself on other prompts."""
    import pandas as pd

    runs, found = timelines(rows), []
    ends = {key: (line.shares[0], line.shares[-1]) for key, line in runs.items()}
    for row in rows:
        if row.get("operator") == "noise":
            one = ends[row["case"], "SFT", row["seed"]][0]
            ends[row["case"], AGAIN, row["seed"]] = one, np.array(row["shares"])
    for (regime, method, seed), (base, last) in ends.items():
        for tau in taus:
            new, gone = float(ts.emergent(last, base, tau).sum()), float(ts.emergent(base, last, tau).sum())
            if method == AGAIN:  # neither sample comes first
                new = gone = (new + gone) / 2
            size = int((base >= tau).sum())
            found.append(
                {
                    "regime": regime,
                    "seed": seed,
                    "method": method,
                    "tau": tau,
                    "base": size,
                    "emergent": new,
                    "lost": gone,
                }
            )
    return pd.DataFrame(found)


def moves(rows: Sequence[dict[str, Any]], tau: float = ts.TAU) -> pd.DataFrame:
    """Every checkpoint after the base: columns ``regime, method, seed, updates, kl, distance, right, emergent``."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "regime": regime,
                "method": method,
                "seed": seed,
                "updates": at,
                "kl": round(float(line.kl[k]), 6),
                "distance": round(float(line.distance[k]), 4),
                "right": round(float(line.right[k]), 4),
                "emergent": int(ts.emergent(line.shares[k], line.shares[0], tau).sum()),
            }
            for (regime, method, seed), line in timelines(rows).items()
            for k, at in enumerate(line.updates)
            if k
        ]
    )


def at_equal_kl(sft: Timeline, grpo: Timeline) -> tuple[int, int]:
    """Indices of the checkpoints of two runs that lie nearest, in log KL, to the smaller of their final divergences."""
    target = max(min(sft.kl[-1], grpo.kl[-1]), SMALLEST_KL)
    first, second = (1 + int(np.abs(np.log(line.kl[1:].clip(SMALLEST_KL) / target)).argmin()) for line in (sft, grpo))
    return first, second


def matched_gap(sft: Timeline, grpo: Timeline, tau: float = ts.TAU) -> int:
    """Emergent heads of SFT minus those of GRPO at equal KL divergence from the base."""
    at = zip((sft, grpo), at_equal_kl(sft, grpo), strict=True)
    new = [int(ts.emergent(line.shares[k], line.shares[0], tau).sum()) for line, k in at]
    return new[0] - new[1]


def rank_correlation(churn: np.ndarray, moved: np.ndarray) -> float:
    """Spearman's correlation; 0 where one of the two never changes, which is no evidence for either side."""
    if np.ptp(churn) == 0 or np.ptp(moved) == 0:
        return 0.0
    return float(stats.spearmanr(churn, moved).statistic)


# ------------------------------------------------------------------------------------------------------ verdicts


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, Interval]:
    """Mean and Student's interval over seeds or runs; two at least."""
    table = np.asarray(values, dtype=float)
    if len(table) < 2:
        raise ValueError(f"values holds {len(table)} number; an interval needs at least 2 seeds")
    half = float(stats.t.ppf((1 + level) / 2, len(table) - 1) * table.std(ddof=1) / len(table) ** 0.5)
    return float(table.mean()), (float(table.mean()) - half, float(table.mean()) + half)


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arguments of :func:`attnlab.claims.check` for every claim of the chapter, from rows of at least two seeds."""
    lines = timelines(rows)
    seeds = sorted({seed for _, _, seed in lines})
    emergent = head_counts(rows, [ts.TAU]).pivot_table(index="seed", columns=["regime", "method"], values="emergent")
    judged: dict[str, dict[str, Any]] = {}
    for regime, claim in (
        ("sharpen", "sft-makes-more-emergent-heads-than-grpo"),
        ("switch", "new-strategy-makes-more-emergent-heads"),
    ):
        new = emergent[regime]
        judged[claim] = _measured(
            t_interval(new["SFT"] - new["GRPO"]),
            noise=t_interval(new["SFT"] - new[AGAIN]),
            drift=t_interval(new["SFT"] - new["drift"]),
        )
    matched = [[matched_gap(lines[r, "SFT", s], lines[r, "GRPO", s]) for r in REGIMES] for s in seeds]
    gap = sum(emergent[regime]["SFT"] - emergent[regime]["GRPO"] for regime in REGIMES) / len(REGIMES)
    judged["not-only-step-size"] = _measured(t_interval(np.mean(matched, 1).tolist()), gap=t_interval(gap))
    judged["sft-heads-stay"] = _staying(lines)
    judged["grpo-churn-follows-reward"] = _following(lines)
    judged["emergent-heads-matter"] = _mattering(rows)
    return {claim: {**arguments, "seeds": seeds} for claim, arguments in judged.items()}


def _measured(value: tuple[float, Interval], **controls: Any) -> dict[str, Any]:
    return {"value": value[0], "interval": value[1], "controls": controls}


def _staying(lines: dict[tuple[str, str, int], Timeline]) -> dict[str, Any]:
    tables = {
        method: np.array([ts.retention(line.shares) for (_, name, _), line in lines.items() if name == method])
        for method in ("SFT", "GRPO")
    }

    def share(table: np.ndarray) -> float:
        kept, seen = table.sum(0)
        return float(kept / seen) if seen else 0.0

    def resampled(picks: np.ndarray) -> np.ndarray:
        kept, seen = tables["SFT"][picks].sum(1).T
        return np.asarray(np.divide(kept, seen, out=np.full(len(picks), share(tables["SFT"])), where=seen > 0))

    value = share(tables["SFT"])
    interval = claims.bootstrap(len(tables["SFT"]), resampled)
    seen, seen_grpo = (float(tables[method][:, 1].sum()) for method in ("SFT", "GRPO"))
    return _measured((value, interval), grpo=share(tables["GRPO"]), emerged=seen, emerged_grpo=seen_grpo)


def _following(lines: dict[tuple[str, str, int], Timeline], draws: int = 2000) -> dict[str, Any]:
    rng, own, drifting, shuffled, changes = np.random.default_rng(0), [], [], [], 0
    for (regime, method, seed), line in lines.items():
        if method != "GRPO":
            continue
        moved = np.abs(np.diff(line.reward[1:]))  # the first checkpoint has no reward before it
        churn = ts.churn(line.shares)[1:]
        own.append(rank_correlation(churn, moved))
        drifting.append(rank_correlation(ts.churn(lines[regime, "drift", seed].shares)[1:], moved))
        shuffled.append([rank_correlation(churn, rng.permutation(moved)) for _ in range(draws)])
        changes += int(churn.sum())
    null = np.mean(shuffled, 0)
    spread = float(null.mean()), (float(np.quantile(null, 0.025)), float(np.quantile(null, 0.975)))
    value = float(np.mean(own)), claims.bootstrap_mean(own)
    return _measured(value, null=spread, drift=float(np.mean(drifting)), changes=float(changes))


def _mattering(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    extra: dict[str, list[float]] = {"zero": [], "mean": []}
    for row in rows:
        if row.get("operator") == "ablation" and row["set"] == "emergent":
            extra[row["how"]].append(float(np.mean(row["random"])) - row["without"])
    n = len(extra["zero"])
    zero, mean = (t_interval(x) if n > 1 else (sum(x), (sum(x), sum(x))) for x in extra.values())
    return _measured(zero, mean=mean, sets=float(n))


# ------------------------------------------------------------------------------------------------------ the record


def write_record(
    path: Path, seeds: Sequence[int], plan: Plan, *, commit: str, command: str, resume: bool = False
) -> None:
    """Run the seeds and write the record, anew after each, so that an interruption costs one seed.

    Raises:
        ValueError: ``resume`` from a record of other code.
    """
    rows: list[dict[str, Any]] = []
    if resume and path.is_file():
        before = records.load(path.stem, path.parent)
        if before is not None:
            if before.changed():
                raise ValueError(
                    f"resume: {', '.join(before.changed())} changed since {path.name} was begun; start anew"
                )
            rows = [row for row in before.rows if "claim" not in row]
    start = time.perf_counter()
    for seed in seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        with lab.one_thread():
            for regime, base in bases(plan, seed).items():
                rows += measure_regime(regime, base, plan, seed)[0]
        records.write(path, rows, sources=SOURCES, command=command, commit=commit)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    if len({row["seed"] for row in rows}) > 1:
        verdicts = [
            dict(claims.measure(f"thinking-sparks/{claim}", **arguments, origin="record"))
            for claim, arguments in judge(rows).items()
        ]
        records.write(path, [*rows, *verdicts], sources=SOURCES, command=command, commit=commit)
        for row in verdicts:
            print(f"{row['claim']}: {row['verdict']}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="file to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2 3 4")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that the file already holds")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    chosen = parser.parse_args(arguments)
    command = f"python -m attnlab.circuits.thinking_sparks_runs --record records/{chosen.record.name}"
    write_record(chosen.record, chosen.seeds, Plan(), commit=chosen.commit, command=command, resume=chosen.resume)


if __name__ == "__main__":
    main()
