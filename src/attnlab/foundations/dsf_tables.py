"""What the rows of the record ``dsf`` say: accuracies by model, differences with their range over the seeds, verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attnlab import claims

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]
#: the models that verdicts look at, by task
COMPARED = {
    "small": {
        "softmax, n = 32",
        "linear, n = 8",
        *(f"{kind}, n = 32{rest}" for kind in ("linear", "normalised") for rest in ("", ", no MLP")),
    },
    "gates": {"qLSTM", "qLSTM, reversed", "qLSTM, long start", "qLSTM, reversed, long start"},
}
SEEDS = 3


def accuracies(rows: Iterable[dict[str, Any]], case: str = "small") -> pd.DataFrame:
    """Accuracy in percent of the runs that count, one row a seed and one column a model."""
    import pandas as pd

    counted = [
        (row["seed"], row["impl"], 100 * row["accuracy"]) for row in rows if row.get("counts") and row["case"] == case
    ]
    found = pd.DataFrame(counted, columns=["seed", "impl", "percent"])
    return found.pivot(index="seed", columns="impl", values="percent")


def gain(table: pd.DataFrame, of: str, over: str) -> tuple[float, Interval]:
    """Points by which one model is above another with the same seed: mean and range of the seeds."""
    return claims.mean_and_range(table[of] - table[over])


def verdicts(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arguments for :func:`attnlab.claims.check` by claim; only those all of whose runs are there."""
    rows, found = list(rows), {}
    table = accuracies(rows)
    if _complete(table, COMPARED["small"]):
        softmax = {"softmax": claims.mean_and_range(table["softmax, n = 32"])}
        linear, normalised = "linear, n = 32", "normalised, n = 32"
        found["state-expansion"] = (gain(table, linear, "linear, n = 8"), softmax)
        found["normalisation"] = (gain(table, normalised, linear), softmax)
        bare = gain(table, f"{normalised}, no MLP", f"{linear}, no MLP")
        found["unequal-blocks"] = (gain(table, linear, f"{linear}, no MLP"), {"normaliser": bare})
    table = accuracies(rows, "gates")
    if _complete(table, COMPARED["gates"]):
        form, start = gain(table, "qLSTM, reversed", "qLSTM"), gain(table, "qLSTM, long start", "qLSTM")
        learned = claims.mean_and_range(table[sorted(COMPARED["gates"])].max(axis=1))
        found["reversed-gate"] = (form, {"start": start, "best": learned})
        found["initial-memory"] = (start, {"form": form, "best": learned})
    return {
        claim: {"value": value, "interval": interval, "controls": controls}
        for claim, ((value, interval), controls) in found.items()
    }


def _complete(table: pd.DataFrame, models: set[str]) -> bool:
    return models <= set(table) and len(table) == SEEDS and bool(table[sorted(models)].notna().all(axis=None))


def summary(rows: Iterable[dict[str, Any]], case: str = "small") -> pd.DataFrame:
    """One row a model: accuracy over the seeds in percent, parameters, and numbers of state a layer."""
    import pandas as pd

    counted = pd.DataFrame([row for row in rows if row.get("counts") and row["case"] == case])
    by_model = counted.groupby("impl", sort=False)
    accuracy = 100 * by_model.accuracy.agg(["mean", "min", "max"])
    accuracy.columns = ["mean", "lowest", "highest"]
    return accuracy.assign(
        **{
            "parameters": by_model.parameters.first(),
            "state, numbers": by_model.state_floats.first(),
            "state, bytes": 4 * by_model.state_floats.first(),
        }
    ).rename_axis(None)


def claim_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the ledger for the claims all of whose runs are there."""
    rows = list(rows)
    seconds = sum(row["seconds"] for row in rows if row["counts"])
    return [
        dict(claims.measure(f"dsf/{name}", **found, seconds=seconds, origin="record"))
        for name, found in verdicts(rows).items()
    ]


def cards(rows: Iterable[dict[str, Any]], *ids: str) -> list[claims.Card]:
    """The cards of these claims, as the record has them."""
    by_name = {row["claim"]: row for row in rows if "claim" in row}
    names = [f"dsf/{name}" for name in ids]
    return [claims.Card(claims.get(name), by_name[name]) for name in names if name in by_name]  # type: ignore[arg-type]


def rate(rows: Iterable[dict[str, Any]], impl: str, default: float = 1e-2) -> float:
    """The learning rate that the record chose for a model; ``default`` where there is no record."""
    chosen = [row["lr"] for row in rows if row.get("counts") and row["impl"] == impl and row["case"] == "small"]
    return float(chosen[0]) if chosen else default


def gates(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The four quasi-LSTMs: accuracy in percent, and the effective memory of each layer in tokens before and after, means of the seeds."""
    import pandas as pd

    counted = [row for row in rows if row.get("counts") and row["case"] == "gates"]
    names = list(dict.fromkeys(row["impl"] for row in counted))
    found = {}
    for name in names:
        mine = [row for row in counted if row["impl"] == name]
        found[name] = {"accuracy, %": 100 * fmean(row["accuracy"] for row in mine)}
        for when in ("before", "after"):
            for layer in (0, 1):
                column = f"memory {when}, layer {layer}"
                found[name][column] = fmean(row[f"memory_{when}"][layer] for row in mine)
    return pd.DataFrame.from_dict(found, orient="index")
