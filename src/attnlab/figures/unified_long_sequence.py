"""Figures of the chapter ``foundations/unified-long-sequence``: the ring step by step, matrices of mixers, what hides a transfer."""

from __future__ import annotations

from typing import Any

import altair as alt
import ipywidgets
import pandas as pd
import torch

from attnlab.figures.palette import CONTROL, LINEAR, NEGATIVE, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations.unified_long_sequence import MIXERS, WORKSPACE, build, influence
from attnlab.foundations.unified_long_sequence_runs import QUESTIONS, TRAINED
from attnlab.scale import LAYOUTS, positions

STATES = {"now": SOFTMAX, "done": "#9ecae1", "to come": "#d9d9d9"}
MIXER_COLOURS = dict(zip(TRAINED, (SOFTMAX, LINEAR, CONTROL, NEGATIVE), strict=True))

# ---------------------------------------------------------------------------------------------------------------- the ring


def work_frame(ranks: int, length: int = 1680) -> pd.DataFrame:
    """One row for each layout and pair of ranks: ``layout, query, key, step, work``.

    ``step`` is when the keys of rank ``key`` pass by rank ``query``, from 0; ``work`` the share of the query-key pairs of the
    two shards that a causal mask lets through.
    """
    rows = []
    for layout in LAYOUTS:
        at = positions(length - length % (2 * ranks), ranks, layout)
        for query in range(ranks):
            for key in range(ranks):
                share = (at[query][:, None] >= at[key]).double().mean()
                rows.append((layout, query, key, (query - key) % ranks, round(float(share), 4)))
    return pd.DataFrame(rows, columns=["layout", "query", "key", "step", "work"])


def busy_frame(work: pd.DataFrame) -> pd.DataFrame:
    """One row a layout: ``layout, busy``, the share of the time in which an average rank computes.

    A step lasts as long as its busiest rank, since all wait for the next keys.
    """
    steps = work.groupby(["layout", "step"]).work.agg(["max", "mean"]).groupby("layout").sum()
    return (steps["mean"] / steps["max"]).rename("busy").reset_index()


def ring_chart(ranks: int = 4) -> alt.VConcatChart:
    """Which block each rank computes at each step, and who waits; sliders choose step and layout."""
    work = work_frame(ranks)
    step = alt.param(
        name="ring_step", value=1, bind=alt.binding_range(min=0, max=ranks - 1, step=1, name="step of the ring ")
    )
    layout = alt.param(
        name="ring_layout", value="contiguous", bind=alt.binding_radio(options=list(LAYOUTS), name="layout ")
    )
    shown = alt.datum.layout == layout
    state = "datum.step == ring_step ? 'now' : datum.step < ring_step ? 'done' : 'to come'"
    base = alt.Chart(work).transform_filter(shown).transform_calculate(state=state)
    key = alt.X("key:O", title="keys and values of rank", axis=alt.Axis(labelAngle=0, orient="top"))
    rank = alt.Y("query:O", title="queries of rank")
    size = 200
    blocks = base.mark_rect(stroke="white", strokeWidth=2).encode(
        x=key,
        y=rank,
        color=alt.Color(
            "state:N",
            title=None,
            scale=alt.Scale(domain=list(STATES), range=list(STATES.values())),
            legend=alt.Legend(orient="bottom", direction="horizontal"),
        ),
        opacity=alt.condition("datum.work == 0", alt.value(0.15), alt.value(1.0)),
        tooltip=[
            alt.Tooltip("query:O", title="queries of rank"),
            alt.Tooltip("key:O", title="keys of rank"),
            alt.Tooltip("step:O", title="at step"),
            alt.Tooltip("work:Q", format=".0%", title="of its pairs are visible"),
        ],
    )
    shares = base.mark_text(fontSize=11).encode(
        x=key,
        y=rank,
        text=alt.Text("work:Q", format=".0%"),
        color=alt.condition("datum.state == 'now' && datum.work > 0", alt.value("white"), alt.value("#444444")),
    )
    bars = (
        alt.Chart(work)
        .transform_filter(shown)
        .transform_filter("datum.step == ring_step")
        .mark_bar(color=SOFTMAX)
        .encode(
            y=alt.Y("query:O", title="rank"),
            x=alt.X(
                "work:Q",
                title="work in this step",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=3),
            ),
            tooltip=[
                alt.Tooltip("query:O", title="rank"),
                alt.Tooltip("work:Q", format=".0%", title="of a full block"),
            ],
        )
    )
    top: Any = alt.hconcat(
        (blocks + shares).properties(width=size, height=size),
        bars.properties(width=120, height=size, title=alt.Title("who works now", fontSize=13)),
        spacing=20,
    )
    busy = (
        alt.Chart(busy_frame(work))
        .mark_bar()
        .encode(
            y=alt.Y("layout:N", sort=list(LAYOUTS), title=None),
            x=alt.X(
                "busy:Q",
                title="share of the time in which ranks compute",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=5),
            ),
            color=alt.condition(shown, alt.value(SOFTMAX), alt.value(CONTROL)),
            tooltip=["layout:N", alt.Tooltip("busy:Q", format=".0%")],
        )
        .properties(width=240, height=72)
    )
    chart: alt.VConcatChart = alt.vconcat(top, busy, spacing=16).add_params(step, layout)
    return chart.properties(title="Keys travel, queries stay: who has work?")


def ring_twin() -> Twin:
    """The ring for other numbers of ranks."""
    return twin(
        ring_chart,
        ranks=ipywidgets.IntSlider(value=6, min=2, max=8, description="ranks"),
        alt="Blocks of queries and keys of all ranks under a causal mask, the step at which each is computed, and the share of "
        "the time in which ranks compute, for three layouts.",
        caption="The more ranks, the more contiguous shards waste: their share of busy time falls towards one half.",
    )


# ------------------------------------------------------------------------------------------------------------ the matrices


def matrix_frame(length: int = 24, width: int = 8, seed: int = 0) -> pd.DataFrame:
    """One row for each mixer and pair of places: ``mixer, query, key, weight`` (scaled to at most 1 in a mixer) and ``influence``.

    Weights of the complex Fourier matrix are its real part. The token MLP mixes into hidden units: the first ``length`` of them.
    """
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    frames = []
    for name in MIXERS:
        with torch.no_grad():
            matrix = build(name, width, length, seed).mix(x).matrix[0, :, :length]
        real = matrix.real if matrix.is_complex() else matrix
        felt = torch.stack([influence(name, at, width, length, seed) for at in range(length)])
        grid = pd.MultiIndex.from_product([range(length), range(length)], names=["query", "key"]).to_frame(index=False)
        grid["weight"] = (real / real.abs().max()).detach().flatten().double().numpy().round(3)
        grid["influence"] = (felt / felt.max()).flatten().numpy().round(4)
        frames.append(grid.assign(mixer=name))
    return pd.concat(frames, ignore_index=True)


def matrix_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """The matrix of a chosen mixer, and how far the output of a clicked row feels the tokens."""
    mixer = alt.param(
        name="mixer_name", value=next(iter(MIXERS)), bind=alt.binding_select(options=list(MIXERS), name="mixer ")
    )
    last = int(frame["query"].max())
    row = alt.selection_point(
        "mixer_row", fields=["query"], value=[{"query": last - 4}], on="click", toggle=False, empty=False
    )
    base = alt.Chart(frame).transform_filter("datum.mixer == mixer_name")
    axis = alt.Axis(values=list(range(0, last + 1, 4)), labelAngle=0)
    heat = base.mark_rect().encode(
        x=alt.X("key:O", title="token j", axis=axis),
        y=alt.Y("query:O", title="output i", axis=axis),
        color=alt.Color(
            "weight:Q",
            title="weight M_ij (largest: 1)",
            scale=alt.Scale(domain=[-1, 0, 1], range=[NEGATIVE, "#f2f2f2", SOFTMAX]),
            legend=alt.Legend(orient="bottom", gradientLength=200),
        ),
        stroke=alt.condition(row, alt.value(OURS), alt.value(None)),
        strokeWidth=alt.value(1.5),
        tooltip=[
            alt.Tooltip("query:O", title="output"),
            alt.Tooltip("key:O", title="token"),
            alt.Tooltip("weight:Q", format=".2f"),
            alt.Tooltip("influence:Q", format=".3f"),
        ],
    )
    felt = (
        base.transform_filter(row)
        .mark_bar(color=OURS)
        .encode(
            x=alt.X("key:O", title="token j", axis=axis),
            y=alt.Y("influence:Q", title="influence on output i", axis=alt.Axis(tickCount=3)),
        )
    )
    width = 270
    chart: alt.VConcatChart = alt.vconcat(
        heat.properties(width=width, height=width).add_params(row), felt.properties(width=width, height=90), spacing=14
    ).add_params(mixer)
    return chart.properties(title="Who reads whom")


def workspace_frame(length: int = 16, width: int = 8, seed: int = 0) -> pd.DataFrame:
    """One row for each mixer of the workspace and pair of places: ``mixer, query, key, weight``, scaled to at most 1 in a mixer."""
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    grid = pd.MultiIndex.from_product([range(length), range(length)], names=["query", "key"]).to_frame(index=False)
    frames = []
    for name in WORKSPACE:
        with torch.no_grad():
            matrix = build(name, width, length, seed).mix(x).matrix[0]
        matrix = matrix[0] if matrix.ndim == 3 else matrix  # of a matrix for each channel the first
        weight = (matrix / matrix.abs().max()).flatten().double().numpy().round(3)
        frames.append(grid.assign(weight=weight, mixer=name))
    return pd.concat(frames, ignore_index=True)


def workspace_chart(frame: pd.DataFrame) -> alt.FacetChart:
    """The matrices of :func:`workspace_frame`, one small map each."""
    maps = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X("key:O", title=None, axis=None),
            y=alt.Y("query:O", title=None, axis=None),
            color=alt.Color(
                "weight:Q",
                title="weight M_ij (largest: 1)",
                scale=alt.Scale(domain=[-1, 0, 1], range=[NEGATIVE, "#f2f2f2", SOFTMAX]),
                legend=alt.Legend(orient="bottom", gradientLength=200),
            ),
            tooltip=[
                "mixer",
                alt.Tooltip("query:O", title="output"),
                alt.Tooltip("key:O", title="token"),
                alt.Tooltip("weight:Q", format=".2f"),
            ],
        )
        .properties(width=92, height=92)
    )
    facet = alt.Facet("mixer:N", sort=list(WORKSPACE), title=None, header=alt.Header(labelFontSize=10, labelPadding=3))
    chart: alt.FacetChart = maps.facet(facet, columns=3, spacing=8)
    return chart.properties(title="Whom does each output read?")


# ------------------------------------------------------------------------------------------------------------ measurements


def accuracy_chart(runs: pd.DataFrame, blind: float) -> alt.HConcatChart:
    """Accuracy of every mixer and seed on both questions; the dashed line is the best answer without the question."""
    panels: list[alt.LayerChart | alt.Chart] = []
    for question in QUESTIONS:
        points = (
            alt.Chart(runs[runs.question == question])
            .mark_circle(size=90, opacity=0.8)
            .encode(
                x=alt.X(
                    "accuracy:Q",
                    title="accuracy",
                    scale=alt.Scale(domain=[0, 1]),
                    axis=alt.Axis(format="%", tickCount=3),
                ),
                y=alt.Y("mixer:N", sort=list(TRAINED), title=None, axis=None if panels else alt.Axis()),
                color=alt.Color(
                    "mixer:N",
                    scale=alt.Scale(domain=list(MIXER_COLOURS), range=list(MIXER_COLOURS.values())),
                    legend=None,
                ),
                tooltip=["mixer", "question", "seed", alt.Tooltip("accuracy:Q", format=".1%")],
            )
        )
        rule = alt.Chart(pd.DataFrame({"blind": [blind]})).mark_rule(strokeDash=[5, 4]).encode(x="blind:Q")
        layers = points + rule if question == "recall" else points
        panels.append(layers.properties(width=120, height=130, title=alt.Title(question, fontSize=13)))
    chart: alt.HConcatChart = alt.hconcat(*panels, spacing=16)
    return chart.properties(title="Who finds it?")


def hiding_chart(width: int = 1024, element: int = 2) -> alt.LayerChart:
    """Seconds of one ring step against tokens a rank: computing grows with the square, sending does not. Two sliders.

    Args:
        width: numbers a token of queries, keys and values each.
        element: bytes a number.
    """
    speed = alt.param(
        name="device_speed", value=400, bind=alt.binding_range(min=50, max=1000, step=50, name="computes, TFLOP/s ")
    )
    link = alt.param(name="link_speed", value=50, bind=alt.binding_range(min=10, max=450, step=10, name="sends, GB/s "))
    tokens = [round(64 * 2 ** (i / 4), 1) for i in range(45)]
    base = alt.Chart(pd.DataFrame({"tokens": tokens})).transform_calculate(
        compute=f"4 * datum.tokens * datum.tokens * {width} / (device_speed * 1e12)",
        send=f"2 * datum.tokens * {width} * {element} / (link_speed * 1e9)",
    )
    x = alt.X(
        "tokens:Q",
        title="tokens on a rank",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(format=",", values=[64, 512, 4096, 32768]),
    )
    lines = (
        base.transform_fold(["compute", "send"], as_=["what", "seconds"])
        .mark_line(strokeWidth=2.5)
        .encode(
            x=x,
            y=alt.Y(
                "seconds:Q",
                title="seconds of a ring step",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(format="~e", tickCount=6),
            ),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["compute", "send"], range=[SOFTMAX, NEGATIVE]),
                legend=alt.Legend(orient="top"),
            ),
        )
    )
    threshold = (
        alt.Chart(pd.DataFrame({"one": [1]}))
        .transform_calculate(tokens=f"{element} * device_speed * 1e12 / (2 * link_speed * 1e9)")
        .mark_rule(strokeDash=[5, 4])
        .encode(
            x=x, tooltip=[alt.Tooltip("tokens:Q", format=",.0f", title="sending is hidden from this many tokens on")]
        )
    )
    label = threshold.mark_text(align="right", dx=-6, y=10).transform_calculate(
        text="'hidden from ' + format(datum.tokens, ',.0f') + ' tokens'"
    )
    chart: alt.LayerChart = (lines + threshold + label.encode(text="text:N")).add_params(speed, link)
    return chart.properties(width=280, height=220, title="When does computing hide sending?")
