"""Measurements, verdicts and tables of the chapter ``foundations/pointer-networks``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from attnlab import claims, records
from attnlab.foundations import polygons
from attnlab.foundations.pointer_networks import Solver
from attnlab.foundations.pointer_tasks import ATTENTION, POINTER, SOFTMAX, Scores, evaluate, instances

Interval = tuple[float, float]


def exact_by_kind(rows: Iterable[dict[str, Any]], n: int = 10) -> dict[str, tuple[float, Interval]]:
    """Percent of exact hulls of n points by network: mean and range over the seeds. Rows of ``rows_of``."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["n"] == n:
            found.setdefault(row["kind"], []).append(100 * row["exact"])
    return {kind: claims.mean_and_range(scores) for kind, scores in found.items()}


def three_lstms(rows: Iterable[dict[str, Any]], n: int = 10) -> dict[str, Any]:
    """Arguments of :func:`attnlab.claims.check` for ``same-updates`` and ``ordering``, which are about hulls of 10 points.

    Raises:
        ValueError: no row of one of the three networks at n points.
    """
    exact = exact_by_kind(rows, n)
    if missing := sorted({POINTER, ATTENTION, SOFTMAX} - exact.keys()):
        raise ValueError(f"n={n}: no row of {', '.join(missing)}; ask for a size at which all three LSTMs were tested")
    value, interval = exact[POINTER]
    return {
        "value": value,
        "interval": interval,
        "controls": {"attention": exact[ATTENTION], "softmax": exact[SOFTMAX]},
    }


def beyond_trained(solver: Solver, n: int = 20, count: int = 1000) -> dict[str, Any]:
    """Arguments for ``beyond-trained``: area covered at n points, beside what trivial answers cover."""
    points = instances(n, count)
    scores = evaluate(solver, "hull", points)
    if scores["simple"].sum() < 2:
        raise ValueError(f"solver: {scores['simple'].sum()} of {count} answers are simple polygons; train it longer")
    covered = 100 * scores["area"][scores["simple"]]
    half = 100 * polygons.half_area(points, np.random.default_rng(0))
    extremes = 100 * polygons.extremes_area(points)
    return {
        "value": covered.mean(),
        "interval": claims.bootstrap_mean(covered),
        "controls": {
            "half": (half.mean(), claims.bootstrap_mean(half)),
            "extremes": (extremes.mean(), claims.bootstrap_mean(extremes)),
            "simple": 100 * scores["simple"].mean(),
        },
    }


def near_lines(solver: Solver, n: int = 10, count: int = 2000) -> dict[str, Any]:
    """Arguments for ``near-lines``: exact hulls far from a change minus those near it; the same by early and late vertices."""
    points = instances(n, count)
    exact = evaluate(solver, "hull", points)["exact"]
    value, interval = halves(exact, polygons.margins(points))
    return {"value": value, "interval": interval, "controls": {"late": halves(exact, -polygons.lateness(points))}}


def halves(exact: np.ndarray, by: np.ndarray) -> tuple[float, Interval]:
    """Percent exact in the upper half of ``by`` minus that in the lower half, bootstrapped."""
    upper = by > np.median(by)

    def difference(picks: np.ndarray) -> np.ndarray:
        high, right = upper[picks], exact[picks]
        gap: np.ndarray = (right & high).sum(-1) / high.sum(-1) - (right & ~high).sum(-1) / (~high).sum(-1)
        return 100 * gap

    return float(difference(np.arange(len(exact)))), claims.bootstrap(len(exact), difference)


def above(length: np.ndarray, reference: np.ndarray) -> tuple[float, Interval]:
    """How far the mean length lies above the mean of the reference, in percent, bootstrapped over the instances."""

    def percent(picks: np.ndarray) -> np.ndarray:
        ratio: np.ndarray = length[picks].mean(-1) / reference[picks].mean(-1)
        return 100 * (ratio - 1)

    return float(percent(np.arange(len(length)))), claims.bootstrap(len(length), percent)


def short_tours(scores: Scores) -> dict[str, Any]:
    """Arguments for ``short-tours`` from the scores of a network on instances that are solved exactly."""
    shortest = scores["length"] / (1 + scores["excess"])
    value, interval = above(scores["length"], shortest)
    return {
        "value": value,
        "interval": interval,
        "controls": {"nearest": above(shortest * (1 + scores["greedy excess"]), shortest)},
    }


def tours_break(longer: Scores, trained: Scores) -> dict[str, Any]:
    """Arguments for ``tours-break`` from the scores of one network at 20 and at 10 points."""
    (value, interval), control = (
        above(scores["length"], scores["length"] / (1 + scores["over nearest"])) for scores in (longer, trained)
    )
    return {"value": value, "interval": interval, "controls": {"trained": control}}


def score_rows(record: records.Record, case: str) -> list[dict[str, Any]]:
    """One row a network, seed and number of points of a case, as ``rows_of`` gives them."""
    return [
        {"kind": row["impl"], "seed": row["seed"], **scores}
        for row in record.rows
        if row["case"] == case
        for scores in row["scores"]
    ]


# ---------------------------------------------------------------------------------------------------------- beside the paper

#: Table 1 of the paper: network, smallest and largest n of training, n of the test, exact percent, area percent (None: FAIL)
PAPER_HULLS = (
    (SOFTMAX, 50, 50, 50, 1.9, None),
    (ATTENTION, 50, 50, 50, 38.9, 99.7),
    (POINTER, 50, 50, 50, 72.6, 99.9),
    (SOFTMAX, 5, 5, 5, 87.7, 99.6),
    (POINTER, 5, 50, 5, 92.0, 99.6),
    (SOFTMAX, 10, 10, 10, 29.9, None),
    (POINTER, 5, 50, 10, 87.0, 99.8),
    (POINTER, 5, 50, 50, 69.6, 99.9),
    (POINTER, 5, 50, 100, 50.3, 99.9),
    (POINTER, 5, 50, 200, 22.1, 99.9),
    (POINTER, 5, 50, 500, 1.3, 99.2),
)


def paper_table() -> pd.DataFrame:
    """Table 1 of the paper, all rows, in the form of ``hull_table``."""
    rows = [
        (kind, trained(low, high), n, exact, "FAIL" if area is None else f"{area:.1f}")
        for kind, low, high, n, exact, area in PAPER_HULLS
    ]
    return pd.DataFrame(rows, columns=["network", "trained on", "n", "exact %", "area %"])


def hull_table(record: records.Record, cases: Sequence[str] = ("hull",)) -> pd.DataFrame:
    """Hulls of a record as the paper prints them: mean over the seeds, FAIL where more than 1 percent are not simple."""
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for row in record.rows:
        if row["case"] in cases:
            for scores in row["scores"]:
                found.setdefault((row["impl"], trained(*row["points"]), scores["n"]), []).append(scores)
    rows = []
    for (kind, on, n), scores in found.items():
        exact, simple, area = (100 * fmean(s[name] for s in scores) for name in ("exact", "simple", "area"))
        covered = f"{area:.1f}" if simple >= 99 else f"FAIL ({area:.1f} of {simple:.0f}%)"
        rows.append((kind, on, n, round(exact, 1), covered))
    return pd.DataFrame(rows, columns=["network", "trained on", "n", "exact %", "area %"])


#: what the paper says of its pointer network on the other tasks: exact and found triangles in percent (section 4.3), length of tours
#: and of the shortest ones (Table 2, trained on 5-20)
PAPER_TRIANGLES = {5: (80.7, 93.0), 10: (22.6, 81.3)}
PAPER_TOURS = {5: (2.12, 2.12), 10: (2.87, 2.87), 20: (3.88, 3.83)}


def other_tasks(record: records.Record) -> pd.DataFrame:
    """Triangulations and tours of a record of the paper's sizes beside the paper's numbers; tours above the optimum where it is known."""
    rows = []
    for row in record.rows:
        for scores in row["scores"]:
            n, ours, paper = scores["n"], None, ""
            if "coverage" in scores:
                ours = f"{100 * scores['exact']:.1f} % exact, {100 * scores['coverage']:.1f} % of the triangles"
                if n in PAPER_TRIANGLES:
                    paper = "{:.1f} %, {:.1f} %".format(*PAPER_TRIANGLES[n])
            elif "length" in scores:
                ours = f"length {scores['length']:.2f}"
                if "excess" in scores:
                    ours += f", {100 * scores['excess']:.1f} % above the optimum"
                if n in PAPER_TOURS:
                    length, shortest = PAPER_TOURS[n]
                    paper = f"length {length:.2f}, {100 * (length / shortest - 1):.1f} %"
            if ours:
                rows.append((row["case"].partition(" ")[0], row["impl"], trained(*row["points"]), n, ours, paper))
    return pd.DataFrame(rows, columns=["task", "network", "trained on", "n", "ours", "the paper's pointer"])


def trained(low: int, high: int) -> str:
    """Such as ``5-10`` or ``50``."""
    return f"{low}" if low == high else f"{low}-{high}"
