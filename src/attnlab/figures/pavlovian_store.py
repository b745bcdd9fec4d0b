"""Figures of the chapter ``foundations/pavlovian`` on the store: its inside, its capacity, heads, chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import pandas as pd
import torch

from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.foundations import pavlovian as lab
from attnlab.foundations import pavlovian_capacity as store

WIDTH = 250
PARTS = {"signal": OURS, "cross-talk": NEGATIVE}

# ------------------------------------------------------------------------------------------------------- inside the store


STORES: dict[str, lab.Rule] = {
    "Hebb": lab.Hebb(1.0),
    "Hebb, fading": lab.TraceDecay(1.0, 0.9),
    "delta": lab.Delta(1.0),
    "Oja": lab.Oja(0.3),
}
KEPT = {"Hebb": 1.0, "Hebb, fading": 0.9, "delta": 1.0, "Oja": 0.7}  # Oja's with responses of size 1: 1 - 0.3


def store_frames(pairs: int = 24, d_k: int = 16, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cosines of all cues, ``i, j, cosine``, and what each rule wrote for each pair: ``j, us`` and one column a rule.

    After n pairs the store is ``sum_j written_j kept^(n - j) k_j``, j from 1: the written strengths do not depend on what follows.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(pairs, d_k, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    us = torch.randint(2, (pairs, 1), generator=generator, dtype=torch.float64) * 2 - 1
    grid = [(i + 1, j + 1, round(float(k[i] @ k[j]), 3)) for i in range(pairs) for j in range(pairs)]
    written: dict[str, Any] = {"j": range(1, pairs + 1), "us": us[:, 0].int().tolist()}
    for name, rule in STORES.items():
        states = lab.learn(rule, k[None], us[None])[0]  # [n + 1, K, 1]
        change = states[1:] - KEPT[name] * states[:-1]
        written[name] = [round(float(k[t] @ change[t, :, 0]), 3) for t in range(pairs)]
    return pd.DataFrame(grid, columns=["i", "j", "cosine"]), pd.DataFrame(written)


def store_chart(pairs: int = 24, d_k: int = 16, seed: int = 0) -> alt.VConcatChart:
    """The cues' similarities, what each stored pair contributes to the response to a clicked cue, and which pairs are recalled."""
    grid, written = store_frames(pairs, d_k, seed)
    n = alt.param(name="store_n", value=12, bind=alt.binding_range(min=2, max=pairs, step=1, name="stored pairs n "))
    rule = alt.param(name="store_rule", value="Hebb", bind=alt.binding_radio(options=list(STORES), name="rule "))
    probe = alt.selection_point("store_probe", fields=["i"], value=[{"i": 1}], on="click", toggle=False, empty=False)
    factor = " : ".join(f"store_rule == '{name}' ? {kept}" for name, kept in KEPT.items()) + " : 1"
    base = (
        alt.Chart(grid)
        .transform_filter("datum.i <= store_n && datum.j <= store_n")
        .transform_lookup("j", alt.LookupData(written, "j", ["us", *STORES]))
        .transform_lookup("i", alt.LookupData(written, "j", ["us"]), as_=["own"])
        .transform_calculate(
            contribution=f"datum.cosine * datum[store_rule] * pow({factor}, store_n - datum.j)",
            part="datum.i == datum.j ? 'signal' : 'cross-talk'",
        )
    )
    size = 210
    axis = alt.Axis(labelAngle=0, values=[1, *range(4, pairs + 1, 4)])
    heat = (
        base.mark_rect()
        .encode(
            x=alt.X("j:O", title="stored cue", axis=axis),
            y=alt.Y("i:O", title="test cue (click)", axis=axis),
            color=alt.Color(
                "cosine:Q",
                title="similarity",
                scale=alt.Scale(domain=[-1, 0, 1], range=[NEGATIVE, "#f2f2f2", SOFTMAX]),
                legend=alt.Legend(orient="bottom", gradientLength=size - 40),
            ),
            stroke=alt.condition(probe, alt.value(OURS), alt.value(None)),
            strokeWidth=alt.value(1.5),
            tooltip=["i:O", "j:O", alt.Tooltip("cosine:Q", format=".2f")],
        )
        .properties(width=size, height=size)
        .add_params(probe)
    )
    bars = (
        base.transform_filter(probe)
        .mark_bar()
        .encode(
            x=alt.X("j:O", title="stored pair", axis=axis),
            y=alt.Y("contribution:Q", title="adds to the response", axis=alt.Axis(tickCount=5)),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=list(PARTS), range=list(PARTS.values())),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=[alt.Tooltip("j:O", title="pair"), alt.Tooltip("contribution:Q", format=".2f"), "part:N"],
        )
        .properties(width=size, height=130)
    )
    total = base.transform_aggregate(response="sum(contribution)", own="max(own)", groupby=["i"]).transform_calculate(
        margin="datum.response * datum.own", state="datum.response * datum.own > 0 ? 'recalled' : 'lost'"
    )
    margins = (
        total.mark_bar()
        .encode(
            x=alt.X("i:O", title="test cue", axis=axis),
            y=alt.Y("margin:Q", title="response × stored sign", axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=["recalled", "lost"], range=[OURS, NEGATIVE]),
                legend=alt.Legend(orient="top"),
            ),
            opacity=alt.condition(probe, alt.value(1), alt.value(0.55)),
            tooltip=["i:O", alt.Tooltip("response:Q", format=".2f"), alt.Tooltip("own:Q", title="stored")],
        )
        .properties(width=size, height=110)
    )
    summary = (
        total.transform_calculate(right="datum.margin > 0 ? 1 : 0")
        .transform_aggregate(right="sum(right)", all="count()")
        .transform_calculate(text="datum.right + ' of ' + datum.all + ' signs recalled'")
        .mark_text(align="left", fontSize=14, fontWeight="bold")
        .encode(text="text:N", x=alt.value(0), y=alt.value(8))
        .properties(width=size, height=16)
    )
    chart: alt.VConcatChart = alt.vconcat(summary, heat, bars, margins, spacing=12).resolve_scale(color="independent")
    return chart.add_params(n, rule).properties(title=f"Inside a store with d_k = {d_k}")


# ------------------------------------------------------------------------------------------------------------- capacity


def capacity_chart(found: pd.DataFrame, curves: pd.DataFrame) -> alt.VConcatChart:
    """Guarantee, average case, prediction and measurement against the key width; below, how failure sets in at a clicked width.

    Args:
        found: of :func:`attnlab.foundations.pavlovian_capacity.capacities`.
        curves: ``d_k`` and the columns of :func:`attnlab.foundations.pavlovian_capacity.failure_curve`.
    """
    widths = sorted({int(width) for width in found.d_k})
    laws: dict[str, Callable[[int], float]] = {
        "guaranteed (Theorem 6.2)": store.guaranteed,
        "average case (Theorem 6.1)": store.average_case,
        "predicted (ours)": store.predicted,
    }
    lines = pd.DataFrame(
        [(d, name, max(float(law(d)), 0.1)) for name, law in laws.items() for d in widths],
        columns=["d_k", "what", "n"],
    )
    names = {"all retrieved": "measured, none fails", "worst signs": "measured, worst signs"}
    points = found.assign(what=found.criterion.map(names))
    colour = alt.Color(
        "what:N",
        title=None,
        scale=alt.Scale(domain=[*laws, *names.values()], range=[PAPER, BOTH, CONTROL, OURS, LINEAR]),
        legend=alt.Legend(orient="bottom", columns=1),
    )
    width = alt.selection_point("capacity_width", fields=["d_k"], value=[{"d_k": widths[-1]}], on="click", toggle=False)
    x = alt.X("d_k:Q", title="key width d_k", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=widths))
    y = alt.Y("n:Q", title="pairs n", scale=alt.Scale(type="log", base=2), axis=alt.Axis(format="d", tickCount=6))
    rules = (
        alt.Chart(lines)
        .mark_line(strokeWidth=2)
        .encode(x=x, y=y, color=colour, tooltip=["what", "d_k", alt.Tooltip("n:Q", format=".1f")])
    )
    dots = (
        alt.Chart(points)
        .mark_circle(size=60)
        .encode(
            x=x,
            y=y,
            color=colour,
            opacity=alt.condition(width, alt.value(1), alt.value(0.5)),
            tooltip=["what", "d_k", "seed", "n"],
        )
        .add_params(width)
    )
    onset = alt.Chart(curves).transform_filter(width)
    share = (
        onset.transform_fold(["measured", "bound"], as_=["kind", "share"])
        .mark_line(strokeWidth=2.5, point=True)
        .encode(
            x=alt.X("n:Q", title="pairs n", scale=alt.Scale(type="log", base=2)),
            y=alt.Y("share:Q", title="any of n fails", axis=alt.Axis(format="%", tickCount=4)),
            color=alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=["measured", "bound"], range=[OURS, PAPER]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["d_k:Q", "n:Q", "kind:N", alt.Tooltip("share:Q", format=".2f")],
        )
    )
    label = (
        onset.transform_aggregate(d_k="max(d_k)")
        .transform_calculate(text="'d_k = ' + datum.d_k")
        .mark_text(align="left", fontSize=13)
        .encode(text="text:N", x=alt.value(6), y=alt.value(10))
    )
    chart: alt.VConcatChart = alt.vconcat(
        (rules + dots).properties(width=WIDTH, height=250),
        (share + label).properties(width=WIDTH, height=130),
        spacing=16,
    ).resolve_scale(color="independent")
    return chart.properties(title="How many pairs fit?")


# -------------------------------------------------------------------------------------------------------- heads and depth


def heads_frame(
    sources: Sequence[int | None] = (None, 256, 64),
    heads: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
) -> pd.DataFrame:
    """Noise power of averaged heads: ``keys, heads, noise, theory``, mean of the seeds."""
    rows = []
    for d_model in sources:
        name = "independent keys" if d_model is None else f"projections of {d_model} channels"
        for h in heads:
            noise = sum(store.averaged_noise(h, d_model, seed) for seed in seeds) / len(seeds)
            rows.append((name, h, noise, store.averaged_noise_theory(h, d_model)))
    return pd.DataFrame(rows, columns=["keys", "heads", "noise", "theory"])


def heads_chart(found: pd.DataFrame) -> alt.LayerChart:
    """Noise of the average of H heads, measured and by formula."""
    names = list(dict.fromkeys(found["keys"]))
    x = alt.X(
        "heads:Q",
        title="heads averaged, H",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(values=[1, 2, 4, 8, 16]),
    )
    colour = alt.Color(
        "keys:N",
        title=None,
        scale=alt.Scale(domain=names, range=[OURS, LINEAR, NEGATIVE]),
        legend=alt.Legend(orient="top", columns=1),
    )
    scale = alt.Scale(type="log", domain=[0.05, 3], nice=False)
    axis = alt.Axis(values=[0.05, 0.1, 0.2, 0.5, 1, 2], format="~g")
    base = alt.Chart(found)
    lines = base.mark_line(strokeWidth=2).encode(
        x=x, y=alt.Y("theory:Q", title="noise power (signal: 1)", scale=scale, axis=axis), color=colour
    )
    points = base.mark_circle(size=80, opacity=1).encode(
        x=x,
        y=alt.Y("noise:Q", title="noise power (signal: 1)", scale=scale, axis=axis),
        color=colour,
        tooltip=["keys", "heads", alt.Tooltip("noise:Q", format=".3f"), alt.Tooltip("theory:Q", format=".3f")],
    )
    chart: alt.LayerChart = (lines + points).properties(width=WIDTH, height=200)
    return chart.properties(title="What does averaging heads remove?")


def depth_chart(found: pd.DataFrame) -> alt.VConcatChart:
    """Chains of stores at a chosen load: failures against the bound, and the share whose nearest pattern is right."""
    load = alt.param(
        name="chain_n",
        value=32,
        bind=alt.binding_radio(options=sorted({int(n) for n in found.n}), name="pairs a layer (d = 128) "),
    )
    names = {"none": "chained as they are", "norm": "output norm between", "sign": "sign between"}
    mean = (
        found.groupby(["n", "clean_up", "layer"])[["failed", "found", "noise", "bound"]].mean().round(4).reset_index()
    )
    mean["between"] = mean.clean_up.map(names)
    bound = mean[mean.clean_up == "none"].assign(between="bound (Theorem 9)").assign(failed=lambda rows: rows.bound)
    colour = alt.Color(
        "between:N",
        title=None,
        scale=alt.Scale(domain=[*names.values(), "bound (Theorem 9)"], range=[NEGATIVE, LINEAR, OURS, PAPER]),
        legend=alt.Legend(orient="bottom", columns=1),
    )
    x = alt.X("layer:Q", title="layers L", axis=alt.Axis(tickCount=8))

    def panel(rows: pd.DataFrame, column: str, title: str) -> alt.Chart:
        chart: alt.Chart = (
            alt.Chart(rows)
            .transform_filter("datum.n == chain_n")
            .mark_line(strokeWidth=2.5, point=True)
            .encode(
                x=x,
                y=alt.Y(
                    f"{column}:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=4)
                ),
                color=colour,
                tooltip=["between:N", "layer:Q", alt.Tooltip(f"{column}:Q", format=".1%")],
            )
            .properties(width=WIDTH, height=140)
        )
        return chart

    chart: alt.VConcatChart = alt.vconcat(
        panel(pd.concat([mean, bound]), "failed", "chains that failed"),
        panel(mean, "found", "nearest pattern is right"),
        spacing=14,
    ).add_params(load)
    return chart.properties(title="How far does a chain carry?")
