"""Tables of the chapter ``circuits/thinking-sparks``, from the rows that :mod:`attnlab.circuits.thinking_sparks_runs` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnlab import claims
from attnlab.circuits import thinking_sparks as ts
from attnlab.circuits.thinking_sparks_runs import AGAIN, head_counts, timelines

COMMAND = "python -m attnlab.circuits.thinking_sparks_runs --record records/thinking-sparks.json"


def summary(rows: Sequence[dict[str, Any]], tau: float = ts.TAU) -> pd.DataFrame:
    """What each method did, by regime, after its last update: means over seeds.

    Columns ``right`` (chance of the right chain), ``KL`` (nats a token), ``base`` (heads in its circuit), ``emergent``, ``lost``, and
    ``|E|``, the mean size of the effect among heads that are in either circuit. The base on other prompts has no behaviour of its own.
    """
    counts = head_counts(rows, [tau]).groupby(["regime", "method"], sort=False)[["base", "emergent", "lost"]].mean()
    behaviour: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for (regime, method, _), line in timelines(rows).items():
        first, last = line.shares[0], line.shares[-1]
        present = (first >= tau) | (last >= tau)
        size = float(np.abs(ts.effect(last, first))[present].mean()) if present.any() else 0.0
        behaviour.setdefault((regime, method), []).append((float(line.right[-1]), float(line.kl[-1]), size))
    means = {key: np.mean(values, 0) for key, values in behaviour.items()}
    done = pd.DataFrame.from_dict(means, orient="index", columns=["right", "KL", "|E|"])
    done.index = pd.MultiIndex.from_tuples(done.index, names=["regime", "method"])
    order = [(r, m) for r in dict.fromkeys(counts.index.get_level_values(0)) for m in ("SFT", "GRPO", "drift", AGAIN)]
    table = counts.join(done)[["right", "KL", "base", "emergent", "lost", "|E|"]]
    return table.loc[[key for key in order if key in table.index]]


def ablation_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Greedy accuracy in percent without emergent or lost heads, beside random sets of the same layers: means over runs.

    Columns ``regime, method, set, how, runs, heads, whole, without, random``; ``heads`` is the mean size of a set. Empty if no run had
    such heads.
    """
    found = pd.DataFrame(
        [
            {
                "regime": row["case"],
                "method": row["impl"],
                "set": row["set"],
                "how": row["how"],
                "heads": len(row["heads"]),
                "whole": row["whole"],
                "without": row["without"],
                "random": float(np.mean(row["random"])),
            }
            for row in rows
            if row.get("operator") == "ablation"
        ],
        columns=["regime", "method", "set", "how", "heads", "whole", "without", "random"],
    )
    by = found.groupby(["regime", "method", "set", "how"], sort=False)
    means = by[["heads", "whole", "without", "random"]].mean()
    means.insert(0, "runs", by.size())
    return means.reset_index()


def cards(rows: Sequence[dict[str, Any]], *ids: str) -> list[claims.Card]:
    """The cards of some claims of the chapter, as a record has them."""
    by_name = {row["claim"]: row for row in rows if "claim" in row}
    names = [f"thinking-sparks/{claim}" for claim in ids]
    return [claims.Card(claims.get(name), by_name[name]) for name in names if name in by_name]  # type: ignore[arg-type]


NewHeads = dict[tuple[str, int], dict[str, set[tuple[int, int]]]]


def new_heads(rows: Sequence[dict[str, Any]], tau: float = ts.TAU) -> NewHeads:
    """Heads ``(layer, head)`` that emerged under SFT and under GRPO by the last update, by regime and seed."""
    runs = timelines(rows)
    found: NewHeads = {}
    for regime, seed in dict.fromkeys((regime, seed) for regime, _, seed in runs):
        found[regime, seed] = {}
        for method in ("SFT", "GRPO"):
            shares = runs[regime, method, seed].shares
            heads = np.argwhere(ts.emergent(shares[-1], shares[0], tau))
            found[regime, seed][method] = {(int(layer), int(head)) for layer, head in heads}
    return found


def newcomers(rows: Sequence[dict[str, Any]], tau: float = ts.TAU) -> pd.DataFrame:
    """Names of :func:`new_heads`, by regime and seed: columns ``SFT, GRPO, in both``."""
    found = {}
    for run, sets in new_heads(rows, tau).items():
        named = {method: ", ".join(sorted(f"{la}.{h}" for la, h in heads)) or "none" for method, heads in sets.items()}
        found[run] = named | {"in both": len(sets["SFT"] & sets["GRPO"])}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["regime", "seed"])


def newcomers_by_threshold(rows: Sequence[dict[str, Any]], taus: Sequence[float] = ts.TAUS) -> pd.DataFrame:
    """Heads that emerged, added up over regimes and seeds, by threshold.

    Columns ``SFT, GRPO, in both, in either, in first layer``; the last counts those in either that lie in layer 0.
    """
    found = {}
    for tau in taus:
        pairs = [(sets["SFT"], sets["GRPO"]) for sets in new_heads(rows, tau).values()]
        found[tau] = {
            "SFT": sum(len(sft) for sft, _ in pairs),
            "GRPO": sum(len(grpo) for _, grpo in pairs),
            "in both": sum(len(sft & grpo) for sft, grpo in pairs),
            "in either": sum(len(sft | grpo) for sft, grpo in pairs),
            "in first layer": sum(layer == 0 for sft, grpo in pairs for layer, _ in sft | grpo),
        }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("threshold")


def findings(rows: Sequence[dict[str, Any]], tau: float = ts.TAU) -> list[str]:
    """What a record says, one sentence a regime and one a claim; verdicts are those of its rows."""
    table = summary(rows, tau)
    seeds = len({row["seed"] for row in rows if "seed" in row})
    said = []
    for regime in dict.fromkeys(table.index.get_level_values(0)):
        new = table.loc[regime].emergent
        said.append(
            f"{regime}, means of {seeds} seeds at a threshold of {tau:.1%}: {new['SFT']:.1f} emergent heads after SFT, {new['GRPO']:.1f} after GRPO, "
            f"{new['drift']:.1f} after drift, {new[AGAIN]:.1f} between two prompt samples of the base"
        )
    for card in cards(rows, *claims.load("thinking-sparks")):
        said.append(f"{card.verdict}: {card.claim.statement}")
    return said
