"""Figures of the chapter ``foundations/pavlovian`` on conditioning: the chamber, similar cues, trained models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import ipywidgets
import pandas as pd

from attnlab.figures.palette import CONTROL, NEGATIVE, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations import pavlovian as lab

WIDTH = 250
EFFECTS = ("blocking", "extinction", "overshadowing")
CUE_COLOURS = {"A": SOFTMAX, "B": NEGATIVE}

# ------------------------------------------------------------------------------------------------- the conditioning chamber


def chamber_frames(
    rules: dict[str, lab.Rule] | None = None, cues: dict[str, Any] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Responses, trials and indices of all rules: three frames.

    ``effect, group, rule, trial, A, B`` (response before trial + 1); ``effect, group, trial, cue, us``; ``effect, rule, index``.
    Cues are orthogonal unless given.
    """
    rules, cues = rules or lab.RULES, cues or lab.cue_vectors(None)
    curves, trials, bars = [], [], []
    for name, phases in lab.EXPERIMENTS.items():
        effect, _, control = name.partition(", control: ")
        if effect not in EFFECTS:
            continue
        group = "control" if control else "experiment"
        for rule_name, rule in rules.items():
            found = lab.responses(rule, phases, cues)[["trial", "A", "B"]].round(3)
            curves.append(found.assign(effect=effect, group=group, rule=rule_name))
        at = 0
        for phase in phases:
            for trial in range(at, at + phase.trials):
                shown = [*phase.cues] + (["US"] if phase.us else [])
                trials += [(effect, group, trial + 1, cue) for cue in shown]
            at += phase.trials
    for rule_name, rule in rules.items():
        index = lab.indices(rule, cues)
        bars += [(effect, rule_name, round(index[effect], 3)) for effect in EFFECTS]
    return (
        pd.concat(curves, ignore_index=True),
        pd.DataFrame(trials, columns=["effect", "group", "trial", "cue"]),
        pd.DataFrame(bars, columns=["effect", "rule", "index"]),
    )


def chamber_chart(frames: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame] | None = None) -> alt.VConcatChart:
    """An experiment and its control group, trial by trial, under a chosen rule, and the index of every rule."""
    curves, trials, bars = frames or chamber_frames()
    rules = list(dict.fromkeys(bars["rule"]))
    effect = alt.param(
        name="chamber_effect", value="blocking", bind=alt.binding_select(options=list(EFFECTS), name="experiment ")
    )
    rule = alt.param(name="chamber_rule", value="delta", bind=alt.binding_radio(options=rules, name="rule "))
    group = alt.param(
        name="chamber_group",
        value="experiment",
        bind=alt.binding_radio(options=["experiment", "control"], name="animal "),
    )
    here = "datum.effect == chamber_effect && datum.group == chamber_group"
    x = alt.X("trial:Q", title="trial", scale=alt.Scale(domain=[0, 20]), axis=alt.Axis(tickCount=5))
    raster = (
        alt.Chart(trials)
        .transform_filter(here)
        .mark_square(size=70, opacity=1)
        .encode(
            x=x,
            y=alt.Y("cue:N", title=None, scale=alt.Scale(domain=["A", "B", "C", "US"])),
            color=alt.Color(
                "cue:N",
                scale=alt.Scale(domain=["A", "B", "C", "US"], range=[*CUE_COLOURS.values(), CONTROL, OURS]),
                legend=None,
            ),
            tooltip=["trial:Q", "cue:N"],
        )
        .properties(width=WIDTH, height=84, title=alt.Title("what is presented", fontSize=13))
    )
    lines = (
        alt.Chart(curves)
        .transform_filter(f"{here} && datum.rule == chamber_rule")
        .transform_fold(list(CUE_COLOURS), as_=["cue", "response"])
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=26))
        .encode(
            x=x,
            y=alt.Y("response:Q", title="response to the cue alone", axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "cue:N",
                title="cue",
                scale=alt.Scale(domain=list(CUE_COLOURS), range=list(CUE_COLOURS.values())),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["trial:Q", "cue:N", alt.Tooltip("response:Q", format=".2f")],
        )
        .properties(width=WIDTH, height=150)
    )
    index = (
        alt.Chart(bars)
        .transform_filter("datum.effect == chamber_effect")
        .mark_bar()
        .encode(
            y=alt.Y("rule:N", sort=rules, title=None),
            x=alt.X(
                "index:Q",
                title="effect, as a share of what A learns alone",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=4),
            ),
            color=alt.condition("datum.rule == chamber_rule", alt.value(OURS), alt.value(CONTROL)),
            tooltip=["rule:N", "effect:N", alt.Tooltip("index:Q", format=".0%")],
        )
        .properties(width=WIDTH - 60, height=120)
    )
    chart: alt.VConcatChart = alt.vconcat(raster, lines, index, spacing=14).resolve_scale(color="independent")
    return chart.add_params(effect, rule, group).properties(title="The conditioning chamber")


def similarity_chart(rule: str, similarity: float, rate: float) -> alt.LayerChart:
    """Blocking with cues A and B of a chosen cosine: responses to both under one rule, experiment and control group.

    Args:
        rule: a name of :data:`attnlab.foundations.pavlovian.RULES`.
        similarity: cosine of A and B.
        rate: of the writes.
    """
    changed = type(lab.RULES[rule])(rate=rate)
    curves, _, _ = chamber_frames({rule: changed}, lab.cue_vectors(None, similarity=similarity))
    shown = curves[curves.effect == "blocking"].melt(["trial", "group"], ["A", "B"], "cue", "response")
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2.5)
        .encode(
            x=alt.X("trial:Q", title="trial"),
            y=alt.Y("response:Q", title="response to the cue alone"),
            color=alt.Color(
                "cue:N",
                scale=alt.Scale(domain=list(CUE_COLOURS), range=list(CUE_COLOURS.values())),
                title=None,
                legend=alt.Legend(orient="top"),
            ),
            strokeDash=alt.StrokeDash(
                "group:N", title=None, sort=["experiment", "control"], legend=alt.Legend(orient="bottom")
            ),
            tooltip=["trial", "group", "cue", alt.Tooltip("response:Q", format=".2f")],
        )
    )
    start = alt.Chart(pd.DataFrame({"trial": [lab.N]})).mark_rule(strokeDash=[2, 3]).encode(x="trial:Q")
    chart: alt.LayerChart = (start + lines).properties(width=WIDTH, height=190)
    return chart.properties(title=f"Blocking under {rule}: AB+ from trial {lab.N + 1}")


def similarity_twin() -> Twin:
    """Blocking for other rules, rates, and cues that resemble each other."""
    return twin(
        similarity_chart,
        rule=ipywidgets.Dropdown(options=list(lab.RULES), value="delta", description="rule"),
        similarity=ipywidgets.FloatSlider(value=0.5, min=-0.5, max=0.9, step=0.1, description="similarity"),
        rate=ipywidgets.FloatSlider(value=0.3, min=0.1, max=0.6, step=0.1, description="rate"),
        alt="Response to cues A and B over the trials of a blocking experiment and its control group.",
        caption="Raise the similarity: B answers before it was ever presented (generalisation). Under the delta rule A and B then promise "
        "together more than comes, and both lose although every trial is reinforced: overexpectation, another effect of the laboratory.",
    )


# ------------------------------------------------------------------------------------------------------- trained models


def trained_chart(rows: Sequence[dict[str, Any]]) -> alt.VConcatChart:
    """Blocking index of trained models, one point a seed: tested at once, and after an empty trial."""
    table = pd.DataFrame([row for row in rows if "rule" in row])
    rules = list(dict.fromkeys(table["rule"]))
    panels = []
    for column, title in (("blocking", "tested at once"), ("blocking, paused", "after an empty trial")):
        shown = table.assign(index=table[column], model=table["layers"].map({1: "one layer", 2: "two layers"}))
        points = (
            alt.Chart(shown)
            .mark_point(filled=True, size=70, opacity=0.8)
            .encode(
                x=alt.X(
                    "index:Q",
                    title="blocking index",
                    scale=alt.Scale(domain=[-0.1, 0.6], clamp=True, nice=False),
                    axis=alt.Axis(values=[0, 0.2, 0.4, 0.6]),
                ),
                y=alt.Y("rule:N", sort=rules, title=None),
                yOffset=alt.YOffset("model:N"),
                color=alt.Color(
                    "model:N",
                    title=None,
                    scale=alt.Scale(domain=["one layer", "two layers"], range=[OURS, SOFTMAX]),
                    legend=alt.Legend(orient="top"),
                ),
                shape=alt.Shape("model:N", legend=None),
                tooltip=[
                    "rule",
                    "model",
                    "seed",
                    alt.Tooltip("index:Q", format=".2f"),
                    alt.Tooltip("error:Q", format=".3f"),
                ],
            )
            .properties(width=WIDTH - 80, height=150, title=alt.Title(title, fontSize=13))
        )
        panels.append(points)
    chart: alt.VConcatChart = alt.vconcat(*panels, spacing=16)
    return chart.properties(title="Do trained models block?")
