"""Figures of the chapter ``kernels/flowformer``: the flow network step by step, how even weights are, six arms, the price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt
import ipywidgets
import pandas as pd
import torch
from torch import Tensor

from attnlab.figures.palette import CONTROL, LINEAR, NEGATIVE, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.kernels.flowformer import ARMS, flow_steps

SINKS, SOURCES, CHANNELS = 6, 8, 4
STEPS = {
    "capacities": "1 raw",
    "sinks fixed": "2 fix sinks",
    "sources fixed": "3 fix sources",
    "competition": "4 competition",
    "allocation": "5 allocation",
}
FAMILY = {arm: "softmax" if arm == "softmax" else "linear" if "linear" in arm else "flow" for arm in ARMS}
COLOUR = alt.Color(
    "family:N", scale=alt.Scale(domain=["softmax", "linear", "flow"], range=[SOFTMAX, LINEAR, OURS]), legend=None
)

HEIGHT = float(SOURCES)  # of the network, in slots of a source
UNIT = 0.6  # how many slots a flow of 1 is wide
BAR, MARGIN = 0.2, 1.08  # length of a bar of flow 1, and room for bars and labels, where a band is 1 long
RAW = "capacities"  # drawn as if they summed to the number of sinks; their labels tell the true flow


def example(seed: int = 3, contrast: float = 2.0) -> tuple[Tensor, Tensor]:
    """Queries [6, 4] and keys [8, 4] of one head with logits of standard deviation ``contrast``."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, CHANNELS, generator=generator, dtype=torch.float64) for n in (SINKS, SOURCES))
    return contrast * q, contrast * k


def network_frames(q: Tensor, k: Tensor, *, clamp: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The network after every step, ready to draw, from queries [6, K] and keys [8, K].

    Returns:
        edges: four rows an edge and step, the corners of its band: ``step, source, sink, flow, x, low, high``; and nodes: one row a
        node and step, ``step, node, side, flow`` (what passes it), ``drawn`` (its width in units of flow), ``y, low, high``.
    """
    edges, nodes = [], []
    for step, weights in flow_steps(q, k, clamp=clamp).items():
        table = weights.numpy()
        scale = SINKS / table.sum() if step == RAW else 1.0
        ends = {"sources": _ends(table.T * scale), "sinks": _ends(table * scale)}
        for side, flows in (("sources", table.sum(0)), ("sinks", table.sum(1))):
            for number, flow in enumerate(flows):
                middle = (number + 0.5) * HEIGHT / len(flows)
                half = scale * flow * UNIT / 2
                nodes.append(
                    {
                        "step": step,
                        "node": f"{'k' if side == 'sources' else 'q'}{number + 1}",
                        "side": side,
                        "flow": round(float(flow), 4),
                        "drawn": round(float(flow * scale), 4),
                        "y": round(middle, 4),
                        "low": round(middle - half, 4),
                        "high": round(middle + half, 4),
                    }
                )
        for i in range(SINKS):
            for j in range(SOURCES):
                corners = [(0.0, "sources", j, i), (0.12, "sources", j, i), (0.88, "sinks", i, j), (1.0, "sinks", i, j)]
                for x, side, node, other in corners:
                    low, high = ends[side][node][other]
                    edges.append(
                        {
                            "step": step,
                            "source": f"k{j + 1}",
                            "sink": f"q{i + 1}",
                            "flow": round(float(table[i, j]), 4),
                            "x": x,
                            "low": round(low, 4),
                            "high": round(high, 4),
                        }
                    )
    return pd.DataFrame(edges), pd.DataFrame(nodes)


def _ends(flows: Any) -> list[list[tuple[float, float]]]:
    """Where bands [nodes, others] touch their node: stacked in order, centred on it; (low, high) for each."""
    ends = []
    for number, row in enumerate(flows):
        edge = (number + 0.5) * HEIGHT / len(flows) - row.sum() * UNIT / 2
        stack = []
        for flow in row:
            stack.append((float(edge), float(edge + flow * UNIT)))
            edge += flow * UNIT
        ends.append(stack)
    return ends


def network_chart(edges: pd.DataFrame, nodes: pd.DataFrame, step: str = RAW) -> alt.LayerChart:
    """Sources on the left, sinks on the right, bands as wide as their flow; buttons change the step, a click picks a node.

    One plot, so that it takes the width of its page. Bands run from x = 0 to 1, bars and labels stand outside.
    """
    shown = alt.param(
        "step", value=step, bind=alt.binding_radio(options=list(STEPS), labels=list(STEPS.values()), name=" ")
    )
    pick = alt.selection_point("pick", fields=["node"], on="click", toggle=False)
    y: dict[str, Any] = {"scale": alt.Scale(domain=[HEIGHT + 0.7, -0.6], nice=False, zero=False), "axis": None}
    across = alt.Scale(domain=[-MARGIN, 1 + MARGIN], nice=False, zero=False)

    band = (
        alt.Chart(edges.assign(node=edges["source"]))
        .transform_filter("datum.step == step")
        .mark_area(interpolate="monotone", color=OURS, strokeWidth=0)
        .encode(
            x=alt.X("x:Q", axis=None, scale=across),
            y=alt.Y("low:Q", **y),
            y2="high:Q",
            detail=["source:N", "sink:N", "node:N"],
            opacity=alt.condition(
                "!pick.node || pick.node[0] == datum.source || pick.node[0] == datum.sink",
                alt.value(0.6),
                alt.value(0.1),
            ),
            tooltip=[
                alt.Tooltip("source:N", title="from source"),
                alt.Tooltip("sink:N", title="to sink"),
                alt.Tooltip("flow:Q", format=".3f"),
            ],
        )
        .add_params(pick)
    )

    def bars(side: str) -> list[alt.Chart]:
        left = side == "sources"
        end = f"-{BAR} * min(datum.drawn, 2.7)" if left else f"1 + {BAR} * min(datum.drawn, 2.7)"
        here = (
            alt.Chart(nodes[nodes["side"] == side])
            .transform_filter("datum.step == step")
            .transform_calculate(
                start="0" if left else "1",
                end=end,
                top="datum.y - 0.24",
                bottom="datum.y + 0.24",
                line="datum.node + '  ' + format(datum.flow, '.2f')",
            )
        )
        bar = here.mark_rect(color=CONTROL).encode(
            x=alt.X("start:Q"),
            x2="end:Q",
            y=alt.Y("top:Q"),
            y2="bottom:Q",
            opacity=alt.condition(
                "!pick.node || pick.node[0] == datum.node || slice(pick.node[0], 0, 1) != slice(datum.node, 0, 1)",
                alt.value(0.9),
                alt.value(0.35),
            ),
            tooltip=["node:N", alt.Tooltip("flow:Q", format=".3f")],
        )
        label = here.mark_text(align="right" if left else "left", dx=-4 if left else 4)
        return [bar, label.encode(x="end:Q", y="y:Q", text="line:N")]

    def words(text: str, x: float, align: Literal["left", "right", "center"]) -> alt.Chart:
        at = alt.Chart(pd.DataFrame({"x": [x], "y": [-0.35], "text": [text]}))
        return at.mark_text(align=align, fontWeight="bold").encode(x="x:Q", y="y:Q", text="text:N")

    total = (
        alt.Chart(nodes)
        .transform_filter("datum.step == step")
        .transform_aggregate(total="sum(flow)", groupby=["side"])
        .transform_pivot("side", value="total")
        .transform_calculate(
            line="'sent in all ' + format(datum.sources, '.2f') + ', received in all ' + format(datum.sinks, '.2f')",
            x="0.5",
            y=f"{HEIGHT + 0.45}",
        )
        .mark_text(fontSize=13, fontWeight="bold")
        .encode(x="x:Q", y="y:Q", text="line:N")
    )
    titles = [words("sources send", 0.0, "right"), words("sinks receive", 1.0, "left")]
    layers: Any = alt.layer(band, *bars("sources"), *bars("sinks"), *titles, total)
    chart: alt.LayerChart = layers.properties(width=330, height=350, title="What flows from 8 sources to 6 sinks?")
    return chart.add_params(shown)


def network_panel() -> Twin:
    """Widgets to draw other queries and keys, change how far they differ, and loosen the clamp."""

    def draw(seed: int, contrast: float, clamp: float, step: str) -> alt.LayerChart:
        return network_chart(*network_frames(*example(seed, contrast), clamp=clamp), step=step)

    return twin(
        draw,
        alt="The flow network for the chosen queries and keys: 8 sources, 6 sinks, bands as wide as their flow, and what each sends "
        "and receives.",
        seed=ipywidgets.IntSlider(value=3, min=0, max=20, description="draw"),
        contrast=ipywidgets.FloatSlider(value=2.0, min=0.5, max=6.0, step=0.5, description="contrast"),
        clamp=ipywidgets.Dropdown(options=[1.0, 5.0, 10.0], description="clamp"),
        step=ipywidgets.Dropdown(options=[(label, step) for step, label in STEPS.items()], value="competition"),
    )


def evenness_chart(frame: pd.DataFrame) -> alt.FacetChart:
    """Distance from an even spread, 1 - evenness, in each situation: mean and interval, on a logarithmic axis.

    ``frame`` is what :func:`attnlab.kernels.flowformer.evenness_table` returns.
    """
    # an entropy of 0 has no logarithm: whatever is closer to a choice than the axis shows stands at its end
    uneven = {
        name: (1 - frame[column]).clip(1e-3, 1)
        for name, column in (("uneven", "even"), ("low", "high"), ("high", "low"))
    }
    table = frame.assign(**uneven, family=frame["arm"].map(FAMILY).fillna("flow"))
    x = alt.X(
        "uneven:Q",
        title="1 - entropy / log M (0: an even spread)",
        scale=alt.Scale(type="log", domain=[1e-3, 1]),
        axis=alt.Axis(values=[0.001, 0.01, 0.1, 1], format="~g"),
    )
    y = alt.Y("arm:N", title=None, sort=list(dict.fromkeys(frame["arm"])))
    tooltip = [
        "arm:N",
        alt.Tooltip("uneven:Q", format=".4f"),
        alt.Tooltip("share:Q", format=".2f", title="aligned key, times an average key"),
    ]
    base = alt.Chart(table)
    spans = base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q"), x2="high:Q", y=y, color=COLOUR)
    points = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=COLOUR, tooltip=tooltip)
    both: Any = alt.layer(spans, points).properties(width=190, height=24 * table["arm"].nunique())
    faceted: alt.FacetChart = both.facet(
        row=alt.Row(
            "situation:N",
            sort=list(dict.fromkeys(frame["situation"])),
            title=None,
            header=alt.Header(labelOrient="top", labelAnchor="start"),
        )
    )
    return faceted.properties(title="How far from an average?")


def running_chart(frame: pd.DataFrame, change: int) -> alt.FacetChart:
    """Mean conserved flow of the first t tokens, sinks above sources: the normal form and two kinds of tokens in the causal form.

    Args:
        frame: rows of :func:`attnlab.kernels.flowformer.running_means` with a column ``tokens`` of two names, the kind that changes
            last.
        change: tokens before the change.
    """
    steady, changing = dict.fromkeys(frame["tokens"])
    normal = "normal form, every prefix anew"
    names = {steady: f"causal, {steady}", changing: f"causal, {changing}"}
    table = frame.assign(line=frame["tokens"].map(names).where(frame["form"] == "causal", normal))
    table = table.drop_duplicates(["t", "side", "line"])[["t", "side", "line", "mean"]].round(5).assign(change=change)
    lines = [normal, *names.values()]
    base = alt.Chart(table)
    colour = alt.Color(
        "line:N",
        scale=alt.Scale(domain=lines, range=[CONTROL, OURS, NEGATIVE]),
        legend=alt.Legend(title=None, orient="top", columns=1, labelLimit=300),
    )
    drawn = base.mark_line(strokeWidth=2.5).encode(
        x=alt.X("t:Q", title="tokens read, t", scale=alt.Scale(nice=False)),
        y=alt.Y("mean:Q", title="mean flow", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=5)),
        color=colour,
        tooltip=["line:N", "t:Q", alt.Tooltip("mean:Q", format=".3f")],
    )
    rule = base.mark_rule(strokeDash=[4, 4], color=CONTROL).encode(x="min(change):Q")
    both: Any = alt.layer(rule, drawn).properties(width=250, height=120)
    faceted: alt.FacetChart = both.facet(
        row=alt.Row("side:N", title=None, header=alt.Header(labelOrient="top", labelAnchor="start"))
    )
    return faceted.properties(title="Is flow conserved while reading?")


def arms_chart(
    frame: pd.DataFrame, metric: str, title: str, axis: str, *, log: bool = False, chance: float | None = None
) -> alt.LayerChart:
    """A metric of every arm: one point a seed, a tick at the mean.

    ``frame`` is what :func:`attnlab.kernels.flowformer_runs.compare` returns; ``chance`` draws a dashed line.
    """
    table = frame[["arm", "seed", metric]].rename(columns={metric: "value"})
    table = table.assign(family=table["arm"].map(FAMILY))
    low, high, ticks = _decades(table["value"]) if log else (0.0, 1.0, [])
    scale = alt.Scale(type="log", domain=[low, high]) if log else alt.Scale(zero=False, nice=True)
    labels = alt.Axis(values=ticks, format="~g", labelFlush=False) if log else alt.Axis(tickCount=4, format="~g")
    x = alt.X("value:Q", title=axis, scale=scale, axis=labels)
    y = alt.Y("arm:N", title=None, sort=list(ARMS))
    seeds = (
        alt.Chart(table)
        .mark_point(filled=True, size=70, opacity=0.75)
        .encode(x=x, y=y, color=COLOUR, tooltip=["arm:N", "seed:O", alt.Tooltip("value:Q", format=".4f", title=axis)])
    )
    means = alt.Chart(table).mark_tick(thickness=2.5, height=18).encode(x="mean(value):Q", y=y, color=COLOUR)
    chart: alt.LayerChart = means + seeds
    if chance is not None:
        line = alt.Chart(pd.DataFrame({"value": [chance]})).mark_rule(strokeDash=[4, 4], color=CONTROL, strokeWidth=2)
        chart = line.encode(x="value:Q") + chart
    return chart.properties(width=190, height=26 * table["arm"].nunique(), title=title)


def scale_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """The loss of every arm on each task of a record: :func:`arms_chart` for each ``case`` of the rows, one below the other.

    The axis is logarithmic where losses differ tenfold; elsewhere that would push all seeds together.
    """
    panels = []
    for case, rows in frame.dropna(subset=["loss"]).groupby("case", sort=False):
        log = bool(0 < 10 * rows["loss"].min() < rows["loss"].max())
        axis = f"held-out loss, nats{' (log scale)' if log else ''}"
        panels.append(arms_chart(rows, "loss", str(case), axis, log=log))
    chart: alt.VConcatChart = alt.vconcat(*panels, spacing=24)
    return chart.properties(title="Larger tasks: who is ahead?")


def cost_chart(rows: Sequence[Mapping[str, Any]], values: Mapping[str, str]) -> alt.HConcatChart | alt.LayerChart:
    """What one attention costs against the number of tokens, on logarithmic axes.

    Args:
        rows: of :func:`attnlab.kernels.flowformer_record.cost`.
        values: columns to draw, with the titles of their axes: ``{"ms": "milliseconds", "memory_mb": "megabytes"}``.
    """
    table = pd.DataFrame([{"tokens": row["shape"]["T"]} | {key: row[key] for key in ("impl", *values)} for row in rows])
    colours = {"softmax": SOFTMAX, "elu+1 linear": LINEAR, "flow": OURS, "flow, causal kernel": CONTROL}
    shown = [impl for impl in colours if impl in set(table["impl"])]
    lengths = alt.Axis(
        values=sorted(set(table["tokens"])),
        labelExpr="datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value",
        labelOverlap="greedy",
    )
    panels = []
    for value, title in values.items():
        low, high, ticks = _decades(table[value].dropna())
        drawn = alt.Chart(table).encode(
            x=alt.X(
                "tokens:Q", title="tokens (1k = 1,024)", scale=alt.Scale(type="log", base=2, nice=False), axis=lengths
            ),
            y=alt.Y(
                f"{value}:Q",
                title=title,
                scale=alt.Scale(type="log", domain=[low, high]),
                axis=alt.Axis(values=ticks, format="~g"),
            ),
            color=alt.Color(
                "impl:N",
                scale=alt.Scale(domain=shown, range=[colours[impl] for impl in shown]),
                legend=alt.Legend(title=None, orient="top", columns=2),
            ),
            tooltip=["impl:N", "tokens:Q", alt.Tooltip(f"{value}:Q", format=".3g", title=title)],
        )
        panel: Any = drawn.mark_line(strokeWidth=2.5) + drawn.mark_point(filled=True, size=50, opacity=1)
        panels.append(panel.properties(width=230, height=200))
    chart: alt.HConcatChart | alt.LayerChart = alt.hconcat(*panels) if len(panels) > 1 else panels[0]
    return chart.properties(title="What does one attention cost?")


def _decades(values: pd.Series) -> tuple[float, float, list[float]]:
    """The powers of ten around positive values: the lowest, the highest, and all of them."""
    first, last = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    ticks = [10.0**power for power in range(first, max(last, first + 1) + 1)]
    return ticks[0], ticks[-1], ticks
