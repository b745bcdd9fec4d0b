"""What the rows of the record ``dsf`` say: accuracies by model, differences with their range over the seeds, verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attnlab import claims

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]
#: the models that verdicts look at
COMPARED = (
    "softmax, n = 32",
    "linear, n = 8",
    *(f"{kind}, n = 32{rest}" for kind in ("linear", "normalised") for rest in ("", ", no MLP")),
    *("qLSTM", "qLSTM, reversed", "qLSTM, long start"),
)


def accuracies(rows: Iterable[dict[str, Any]], case: str = "small") -> pd.DataFrame:
    """Accuracy in percent of the runs that count, one row a seed and one column a model."""
    import pandas as pd

    counted = pd.DataFrame([row for row in rows if row.get("counts") and row["case"] == case])
    return 100 * counted.pivot(index="seed", columns="impl", values="accuracy")


def spread(values: Iterable[float]) -> tuple[float, Interval]:
    """Mean and range over the seeds: with three there is no better interval."""
    values = list(values)
    return fmean(values), (min(values), max(values))


def gain(table: pd.DataFrame, of: str, over: str) -> tuple[float, Interval]:
    """Points by which one model is above another with the same seed: mean and range of the seeds."""
    return spread((table[of] - table[over]).tolist())


def verdicts(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Arguments for :func:`attnlab.claims.check` by claim, from :func:`accuracies`."""
    softmax = spread(table["softmax, n = 32"].tolist())
    form, start = gain(table, "qLSTM, reversed", "qLSTM"), gain(table, "qLSTM, long start", "qLSTM")
    bare = gain(table, "normalised, n = 32, no MLP", "linear, n = 32, no MLP")
    found = {
        "state-expansion": (gain(table, "linear, n = 32", "linear, n = 8"), {"softmax": softmax}),
        "normalisation": (gain(table, "normalised, n = 32", "linear, n = 32"), {"softmax": softmax}),
        "unequal-blocks": (gain(table, "linear, n = 32", "linear, n = 32, no MLP"), {"normaliser": bare}),
        "reversed-gate": (form, {"start": start}),
        "initial-memory": (start, {"form": form}),
    }
    return {
        claim: {"value": value, "interval": interval, "controls": controls}
        for claim, ((value, interval), controls) in found.items()
    }


def summary(rows: Iterable[dict[str, Any]], case: str = "small") -> pd.DataFrame:
    """One row a model: accuracy over the seeds in percent, its rate, parameters, and numbers of state a layer."""
    import pandas as pd

    counted = pd.DataFrame([row for row in rows if row.get("counts") and row["case"] == case])
    by_model = counted.groupby("impl", sort=False)
    accuracy = 100 * by_model.accuracy.agg(["mean", "min", "max"])
    accuracy.columns = ["mean %", "lowest %", "highest %"]
    return accuracy.assign(
        **{
            "rate": by_model.lr.first(),
            "parameters": by_model.parameters.first(),
            "state floats a layer": by_model.state_floats.first(),
            "state bytes a layer": 4 * by_model.state_floats.first(),
        }
    ).rename_axis(None)


def claim_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the ledger for all claims that rest on the training runs; none before all runs are there."""
    rows = list(rows)
    table = accuracies(rows)
    if not set(COMPARED) <= set(table) or table.isna().any(axis=None) or len(table) < 3:
        return []
    seconds = sum(row["seconds"] for row in rows if row["counts"])
    return [
        dict(claims.measure(f"dsf/{name}", **found, seconds=seconds, origin="record"))
        for name, found in verdicts(accuracies(rows)).items()
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

    counted = [row for row in rows if row.get("counts") and row["impl"].startswith("qLSTM") and row["case"] == "small"]
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
