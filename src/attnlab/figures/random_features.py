"""Figures of the chapter ``foundations/random-features``: learning curves with the bias at work, gains, heads to kernel, real heads."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd

from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations.random_features_heads import OFFSETS
from attnlab.foundations.random_features_runs import BIASES, PURE, TARGETS, summary

MODELS: dict[str, str] = {
    "attention": OURS,
    "softmax attention": SOFTMAX,
    "network": NEGATIVE,
    "averaged network": BOTH,
    "linear": CONTROL,
}
NAMES = [target.name for target in TARGETS + PURE]
GRID = [round(x, 3) for x in np.linspace(-4, 8, 97).tolist()]  # scores
CORRELATIONS = [round(x, 3) for x in np.linspace(-1, 1, 41).tolist()]
WIDTH = 300
LEAST = 1e-4  # smaller errors are drawn here

# ------------------------------------------------------------------------------------------------------- the explorer


def explorer_chart(runs: pd.DataFrame, name: str = "rf") -> alt.VConcatChart:
    """Error against labels for a chosen target and bias; below, what the bias does to a score and to the weight of a key.

    Args:
        runs: rows of :func:`~attnlab.foundations.random_features_runs.curves`.
        name: what the controls' names begin with, since two figures of a page must not share any.
    """
    biases = sorted(runs[runs.model == "attention"].mu.unique().tolist())
    target = alt.param(
        name=f"{name}_target",
        value="correlation 1",
        bind=alt.binding_select(options=NAMES, name="target (family, degree) "),
    )
    mu = alt.param(name=f"{name}_mu", value=1, bind=alt.binding_radio(options=biases, name="mean μ of the weights "))
    table = summary(runs[(runs.model == "attention") | (runs.mu == 0)])
    table[["error", "low", "high"]] = table[["error", "low", "high"]].clip(lower=LEAST).round(5)
    sizes = sorted(table.labels.unique().tolist())
    base = (
        alt.Chart(table)
        .transform_filter(f"datum.target == {name}_target && (datum.model != 'attention' || datum.mu == {name}_mu)")
        .encode(
            x=alt.X("labels:Q", title="labels", scale=alt.Scale(type="log"), axis=alt.Axis(values=sizes)),
            color=_model_colour(),
        )
    )
    y = alt.Y(
        "error:Q",
        title="relative test error",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    told = [
        "model",
        alt.Tooltip("labels:Q"),
        *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("error", "low", "high")),
    ]
    nothing = alt.Chart(pd.DataFrame({"error": [1.0]})).mark_rule(strokeDash=[5, 4]).encode(y="error:Q")
    curves = alt.layer(
        nothing,
        base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title="relative test error"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_circle(size=55, opacity=1).encode(y=y, tooltip=told),
    ).properties(width=WIDTH, height=220)
    chart: alt.VConcatChart = alt.vconcat(
        curves, alt.hconcat(_score_panel(f"{name}_mu"), _weight_panel(f"{name}_mu"), spacing=14), spacing=16
    ).add_params(target, mu)
    chart = chart.resolve_scale(color="independent")
    return chart.properties(title="How many labels does it take?")


def _model_colour() -> alt.Color:
    return alt.Color(
        "model:N",
        title=None,
        scale=alt.Scale(domain=list(MODELS), range=list(MODELS.values())),
        legend=alt.Legend(orient="top", columns=2, symbolType="circle"),
    )


def _score_panel(mu: str) -> alt.Chart:
    """Density of a head's score for a key that equals the query, and for one at right angles; they part as the mean grows."""
    pairs = pd.DataFrame([(s, pair, c) for s in GRID for pair, c in (("same", 1), ("right angle", 0))])
    pairs.columns = pd.Index(["score", "pair", "c"])
    return (
        alt.Chart(pairs)
        .transform_calculate(density=f"densityNormal(datum.score, {mu} * datum.c, 1)")
        .mark_area(opacity=0.45)
        .encode(
            x=alt.X("score:Q", title="score", axis=alt.Axis(values=[-4, 0, 4, 8])),
            y=alt.Y("density:Q", title="share of heads", stack=None, axis=alt.Axis(labels=False, ticks=False)),
            color=alt.Color(
                "pair:N",
                title="key and query",
                scale=alt.Scale(domain=["same", "right angle"], range=[PAPER, LINEAR]),
                legend=alt.Legend(orient="bottom", direction="vertical"),
            ),
        )
        .properties(width=125, height=100, title=alt.Title("score of a head", fontSize=13))
    )


def _weight_panel(mu: str) -> alt.Chart:
    """Mean weight of a key against its correlation with the query."""
    return (
        alt.Chart(pd.DataFrame({"c": CORRELATIONS}))
        .transform_calculate(s=f"{mu} * datum.c")
        .transform_calculate(weight="datum.s * cumulativeNormal(datum.s) + densityNormal(datum.s)")
        .mark_line(color=PAPER, strokeWidth=2.5)
        .encode(
            x=alt.X("c:Q", title="⟨query, key⟩", axis=alt.Axis(values=[-1, 0, 1])),
            y=alt.Y(
                "weight:Q", title="mean weight", scale=alt.Scale(domain=[0, 4]), axis=alt.Axis(values=[0, 1, 2, 3, 4])
            ),
        )
        .properties(width=125, height=100, title=alt.Title("what all heads share", fontSize=13))
    )


# ------------------------------------------------------------------------------------------------------------- the bias


def gains_chart(table: pd.DataFrame, labels: int) -> Any:
    """Error with the chosen mean over error without, target by target; a radio chooses the mean."""
    mu = alt.param(
        name="gain_mu",
        value=1,
        bind=alt.binding_radio(options=[mu for mu in BIASES if mu], name="mean μ of the weights "),
    )
    shown = table[table.labels == labels].round(4)
    shown["change"] = np.select([shown.high < 1, shown.low > 1], ["gains", "loses"], "undecided")
    base = alt.Chart(shown).transform_filter("datum.mu == gain_mu")
    y = alt.Y("target:N", sort=NAMES, title=None)
    x = alt.X(
        "ratio:Q",
        title="error with the mean / without",
        scale=alt.Scale(type="log", domain=[0.4, 100], clamp=True),
        axis=alt.Axis(values=[0.5, 1, 2, 5, 10, 50], format="~g"),
    )
    colour = alt.Color(
        "change:N",
        title=None,
        scale=alt.Scale(domain=["gains", "undecided", "loses"], range=[OURS, CONTROL, NEGATIVE]),
        legend=alt.Legend(orient="bottom"),
    )
    told = ["target", *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("ratio", "low", "high"))]
    even = alt.Chart(pd.DataFrame({"ratio": [1.0]})).mark_rule(strokeDash=[5, 4]).encode(x=x)
    chart: Any = alt.layer(
        even,
        base.mark_rule(strokeWidth=2).encode(
            y=y, x=alt.X("low:Q", title="error with the mean / without"), x2="high:Q", color=colour
        ),
        base.mark_circle(size=70, opacity=1).encode(y=y, x=x, color=colour, tooltip=told),
    ).add_params(mu)
    return chart.properties(width=200, height=300, title=f"Who gains from the mean? ({labels} labels)")


# ------------------------------------------------------------------------------------------------------ heads to kernel


def kernel_chart(errors: pd.DataFrame, curve: pd.DataFrame) -> alt.VConcatChart:
    """Distance of M heads from the closed form, every draw a point, with a line of slope -1/2; below, test errors against M."""
    heads = alt.X("heads:Q", title="heads M", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s", tickCount=5))
    mean = errors.assign(square=errors.error**2).groupby(["kernel", "heads"]).square.mean() ** 0.5
    lines = mean.rename("error").reset_index()
    first = lines[lines.kernel == "all pairs"].sort_values("heads").iloc[0]
    rate = pd.DataFrame(
        {"heads": [10, 10_000], "error": [first.error * (first.heads / m) ** 0.5 for m in (10, 10_000)]}
    )
    colour = alt.Color(
        "kernel:N",
        title=None,
        scale=alt.Scale(domain=["all pairs", "one to one"], range=[OURS, CONTROL]),
        legend=alt.Legend(orient="top"),
    )
    y = alt.Y(
        "error:Q", title="relative difference", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=4)
    )
    told = ["kernel", "seed", "heads", alt.Tooltip("error:Q", format=".3f")]
    distance = alt.layer(
        alt.Chart(errors.round(5)).mark_circle(opacity=0.35, size=30).encode(x=heads, y=y, color=colour, tooltip=told),
        alt.Chart(lines).mark_line(strokeWidth=2).encode(x=heads, y=y, color=colour),
        alt.Chart(rate).mark_line(strokeDash=[5, 4], color="currentColor").encode(x=heads, y=y),
    ).properties(width=WIDTH, height=150, title=alt.Title("kernel of M heads against the closed form", fontSize=13))
    names = sorted(curve.target.unique())
    target = alt.Color(
        "target:N",
        title=None,
        scale=alt.Scale(domain=names, range=[PAPER, OURS, BOTH]),
        legend=alt.Legend(orient="top"),
    )
    error = alt.Y(
        "error:Q", title="relative test error", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=4)
    )
    means = curve.groupby(["target", "heads"], dropna=False).error.mean().reset_index().round(4)
    finite, limit = means[means.heads.notna()], means[means.heads.isna()]
    tests = alt.layer(
        alt.Chart(finite)
        .mark_line(point=True)
        .encode(x=heads, y=error, color=target, tooltip=["target", "heads", "error"]),
        alt.Chart(limit)
        .mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
        .encode(y=error, color=target, tooltip=["target", "error"]),
    ).properties(
        width=WIDTH, height=150, title=alt.Title("test error, 400 labels; dashed: infinitely many heads", fontSize=13)
    )
    chart: alt.VConcatChart = alt.vconcat(distance, tests, spacing=16).resolve_scale(color="independent")
    return chart.properties(title="What is one more head worth?")


# ----------------------------------------------------------------------------------------------------------- real heads


def heads_chart(heads: pd.DataFrame) -> alt.VConcatChart:
    """Ratio of every head as a map of layers and heads; a clicked head shows its ratio for keys further back."""
    picked = alt.selection_point(
        "rf_head", fields=["name"], value=[{"name": _largest(heads)}], on="click", toggle=False, empty=False
    )
    kept = ["layer", "head", "name", "ratio", "limit", "low limit"]
    cells = (
        alt.Chart(heads[kept].round(3))
        .mark_rect()
        .encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("layer:O", title="layer", axis=alt.Axis(values=list(range(0, 30, 5)))),
            color=alt.Color(
                "ratio:Q",
                title="mean diagonal / spread off it",
                scale=alt.Scale(domain=[-3, 0, 3], range=[NEGATIVE, "#f2f2f2", SOFTMAX], clamp=True),
                legend=alt.Legend(orient="bottom", gradientLength=220),
            ),
            stroke=alt.condition(picked, alt.value("currentColor"), alt.value(None)),
            strokeWidth=alt.value(2),
            tooltip=["name", *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("ratio", "low limit", "limit"))],
        )
        .properties(width=240, height=360)
        .add_params(picked)
    )
    columns = {f"at {t}": t for t in OFFSETS}
    long = heads[["name", *columns]].melt("name", var_name="offset", value_name="ratio").round(3)
    long["offset"] = long.offset.map(columns)
    further = (
        alt.Chart(long)
        .transform_filter(picked)
        .mark_line(point=True, color=SOFTMAX)
        .encode(
            x=alt.X("offset:O", title="tokens from key to query", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("ratio:Q", title="ratio", scale=alt.Scale(domain=[-5, 9])),
            tooltip=["name", "offset", alt.Tooltip("ratio:Q", format=".2f")],
        )
    )
    label = (
        alt.Chart(long[long.offset == OFFSETS[0]])
        .transform_filter(picked)
        .mark_text(align="left", fontWeight="bold", fontSize=13)
        .encode(text="name:N", x=alt.value(8), y=alt.value(12))
    )
    chart: alt.VConcatChart = alt.vconcat(cells, (further + label).properties(width=240, height=110), spacing=14)
    return chart.properties(title="Does a trained head compare like with like?")


def _largest(heads: pd.DataFrame) -> str:
    return str(heads["name"].iloc[int(heads.ratio.argmax())])


# ------------------------------------------------------------------------------------------------------------- the twin


def weight_chart(mu: float, d: int) -> alt.LayerChart:
    """Mean weight of a key against its correlation, with the shape of the correlations that occur in ``d`` dimensions."""
    c = np.linspace(-0.999, 0.999, 81)
    s = mu * c
    normal = np.exp(-(s**2) / 2) / np.sqrt(2 * np.pi)
    cdf = np.array([_normal_cdf(x) for x in s])
    density = (1 - c**2) ** ((d - 3) / 2) if d > 2 else np.ones_like(c)
    frame = pd.DataFrame(
        {"c": c.round(4), "weight": (s * cdf + normal).round(4), "density": (density / density.max()).round(4)}
    )
    x = alt.X("c:Q", title="correlation of query and key", scale=alt.Scale(domain=[-1, 1]), axis=alt.Axis(tickCount=5))
    occur = (
        alt.Chart(frame)
        .mark_area(color=CONTROL, opacity=0.25)
        .encode(x=x, y=alt.Y("density:Q", title="how often it occurs (area)", axis=alt.Axis(labels=False, ticks=False)))
    )
    line = (
        alt.Chart(frame)
        .mark_line(color=PAPER, strokeWidth=2.5)
        .encode(x=x, y=alt.Y("weight:Q", title="mean weight (line)"))
    )
    chart: alt.LayerChart = alt.layer(occur, line).resolve_scale(y="independent")
    return chart.properties(width=WIDTH - 30, height=200, title=f"μ = {mu:g}, d = {d}")


def _normal_cdf(x: float) -> float:
    return (1 + erf(x / sqrt(2))) / 2


def weight_twin() -> Twin:
    """Mean weights for other strengths and dimensions."""
    return twin(
        weight_chart,
        mu=ipywidgets.FloatSlider(value=2, min=0, max=8, step=0.5, description="mean μ"),
        d=ipywidgets.IntSlider(value=8, min=3, max=64, description="dimensions"),
        alt="The mean weight of a key against its correlation with the query, over the correlations that occur between random unit "
        "vectors of the chosen dimension.",
        caption="In more dimensions correlations crowd around 0, where the line is nearly straight: the same mean then gives less curvature.",
    )
