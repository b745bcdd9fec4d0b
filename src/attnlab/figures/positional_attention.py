"""Figures of the chapter ``foundations/positional-attention``: fixed wires, learned weights beside moving ones, errors by scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd
import torch

from attnlab.data import list_tasks
from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations import positional_handmade as handmade
from attnlab.foundations.positional_attention import Network
from attnlab.foundations.positional_attention_runs import LIMIT, SCALES

MODEL_COLOURS = {
    "positional": OURS,
    "standard": SOFTMAX,
    "standard, P in every layer": BOTH,
    "positional, P at the input": NEGATIVE,
    "uniform": CONTROL,
    "standard, rescaled": LINEAR,
}
LISTS = ("first list", "second list")

# --------------------------------------------------------------------------------------------------------- the fixed wires


def held_frame(length: int, seeds: Sequence[int] = (1, 4)) -> pd.DataFrame:
    """One row for every number that a place holds: ``algorithm, list, place, round, number``; places from 1."""
    rows = []
    for name, seed in zip(LISTS, seeds, strict=True):
        x = torch.as_tensor(np.random.default_rng(seed).permutation(2 * length)[:length] - length // 2).double()
        for algorithm in handmade.ALGORITHMS:
            for number, held in enumerate(handmade.rounds(algorithm, x)):
                rows += [(algorithm, name, place + 1, number, round(float(held[place]), 6)) for place in range(length)]
    return pd.DataFrame(rows, columns=["algorithm", "list", "place", "round", "number"])


def wire_frame(length: int) -> pd.DataFrame:
    """One row a wire: ``algorithm, source, place, round``; it ends in ``place`` after round ``round``."""
    rows = [
        (algorithm, source + 1, place + 1, number)
        for algorithm in handmade.ALGORITHMS
        for number, pairs in enumerate(handmade.wires(algorithm, length), start=1)
        for source, place in pairs
    ]
    return pd.DataFrame(rows, columns=["algorithm", "source", "place", "round"])


def reach_frame(length: int) -> pd.DataFrame:
    """The wires through which each output of the last round is reached: :func:`wire_frame` with ``output``."""
    rows = []
    for algorithm in handmade.ALGORITHMS:
        stages = handmade.wires(algorithm, length)
        for output in range(length):
            wanted = {output}
            for number in range(len(stages), 0, -1):
                found = [(source, place) for source, place in stages[number - 1] if place in wanted]
                rows += [(algorithm, output + 1, source + 1, place + 1, number) for source, place in found]
                wanted = {source for source, _ in found}
    columns = ["algorithm", "output", "source", "place", "round"]
    return pd.DataFrame(rows, columns=columns)


def wires_chart(length: int = 8, algorithm: str = "running minimum") -> alt.LayerChart:
    """Who hears whom in three algorithms, and what all places hold; the wires stay when the list changes.

    Args:
        length: n, a power of two.
        algorithm: the one shown at first.
    """
    held, options = held_frame(length), list(handmade.ALGORITHMS)
    chosen = alt.param(
        name="wire_algorithm", value=algorithm, bind=alt.binding_select(options=options, name="algorithm ")
    )
    listed = alt.param(name="wire_list", value=LISTS[0], bind=alt.binding_radio(options=list(LISTS), name="numbers "))
    scale = alt.param(name="wire_scale", value=1, bind=alt.binding_range(min=1, max=50, step=1, name="all times c = "))
    layers = held.groupby("algorithm")["round"].max().to_dict()
    deepest = f"({layers}[wire_algorithm])"  # a list of algorithms is an object in Vega's expressions too
    pick = alt.selection_point(
        "wire_pick", fields=["place"], value=[{"place": length - 1}], on="click", toggle=False, empty=False
    )
    x = alt.X(
        "place:Q",
        title="place in the list",
        scale=alt.Scale(domain=[-0.5, length + 0.5], nice=False),
        axis=alt.Axis(values=list(range(1, length + 1)), format="d", grid=False),
    )
    down = alt.Scale(domain=[1.06, -0.06], nice=False)
    y = alt.Y("depth:Q", scale=down, axis=None)
    this = "datum.algorithm == wire_algorithm"
    deep = {"depth": f"datum.round / {deepest}", "above": f"(datum.round - 1) / {deepest}"}
    ends = {
        "x": alt.X("source:Q", title="place in the list"),
        "x2": "place:Q",
        "y": alt.Y("above:Q", scale=down, axis=None),
        "y2": "depth:Q",
    }
    names = alt.Chart(held[held.place == 1]).transform_filter(f"{this} && datum.list == wire_list")
    numbers = (
        alt.Chart(held)
        .transform_filter(f"{this} && datum.list == wire_list")
        .transform_calculate(**deep, shown="format(datum.number * wire_scale, '~r')")
    )
    lit = "wire_pick.place && datum.output == wire_pick.place[0]"
    chart: Any = alt.layer(
        names.transform_calculate(**deep, at="0.35", name="datum.round == 0 ? 'input' : 'layer ' + datum.round")
        .mark_text(align="right", fontSize=12)
        .encode(x=alt.X("at:Q", title="place in the list"), y=y, text="name:N"),
        alt.Chart(wire_frame(length))
        .transform_filter(this)
        .transform_calculate(**deep)
        .mark_rule(opacity=0.18)
        .encode(**ends),
        alt.Chart(reach_frame(length))
        .transform_filter(f"{this} && {lit}")
        .transform_calculate(**deep)
        .mark_rule(strokeWidth=2.2, opacity=0.9, color=OURS)
        .encode(**ends),
        numbers.mark_rect(width=32, height=17, cornerRadius=8, fill="#e8f3ee", stroke=OURS, strokeWidth=1).encode(
            x=x, y=y, tooltip=["place:Q", alt.Tooltip("round:Q", title="layer"), alt.Tooltip("shown:N", title="holds")]
        ),
        numbers.mark_text(fontSize=10.5, color="#10382a").encode(x=x, y=y, text="shown:N").add_params(pick),
    )
    whole: alt.LayerChart = chart.add_params(chosen, listed, scale).properties(
        width=290, height=290, title="Who tells whom does not depend on the numbers"
    )
    return whole


def wires_twin() -> Twin:
    """The same three algorithms for other lengths."""
    return twin(
        wires_chart,
        length=ipywidgets.SelectionSlider(options=[2, 4, 8], value=4, description="places"),
        algorithm=ipywidgets.Dropdown(options=list(handmade.ALGORITHMS), value="sorting", description="algorithm"),
        alt="The wires of three parallel algorithms between the places of a list, layer by layer, and the numbers held.",
        caption="Double the places: the minimum needs one layer more, the sum still one, sorting one for every stage.",
    )


# ------------------------------------------------------------------------------------------------- the attention explorer

GAP = 1.2  # between the maps of two heads or layers, in cells


def weight_rows(network: Network, x: torch.Tensor) -> list[tuple[float, float, int, int, str, str, float]]:
    """Cells of all layers and heads for one list x [n]: their place in the drawing, layer, head, query, key and weight."""
    with torch.no_grad():
        _, weights = network.run(x[None, :, None])
    rows = []
    for layer, a in enumerate(weights):
        for head, matrix in enumerate(a.reshape(-1, *a.shape[-2:])):
            nodes = len(matrix)
            names = [str(i + 1) for i in range(nodes - 1)] + ["scratch"]
            for q in range(nodes):
                for k in range(nodes):
                    at = (head * (nodes + GAP) + k, layer * (nodes + GAP) + q)
                    rows.append((*at, layer + 1, head + 1, names[q], names[k], round(float(matrix[q, k]), 3)))
    return rows


def explorer_frames(
    positional: Network, standard: Network, seeds: Sequence[int] = (1, 2), scales: Iterable[int] = range(1, 11)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The weights of both networks as cells; those of the standard one for every list and scale, ``list, c``."""
    columns = ["x", "y", "layer", "head", "query", "key", "weight"]
    lists = [
        torch.as_tensor(list_tasks.ranged(np.random.default_rng(s), 1, positional.length, LIMIT)[0]) for s in seeds
    ]
    lists = [one.float() for one in lists]
    fixed = pd.DataFrame(weight_rows(positional, lists[0]), columns=columns)
    moving = [
        pd.DataFrame(weight_rows(standard, scale * one), columns=columns).assign(list=name, c=scale)
        for name, one in zip(LISTS, lists, strict=True)
        for scale in scales
    ]
    return fixed, pd.concat(moving, ignore_index=True)


def explorer_chart(
    positional: Network, standard: Network, rows: Sequence[dict[str, Any]], seeds: Sequence[int] = (1, 2)
) -> alt.VConcatChart:
    """Attention of both networks side by side, with a slider for the scale of the list; below, the error at that scale."""
    fixed, moving = explorer_frames(positional, standard, seeds)
    scale = alt.param(
        name="attention_c", value=1, bind=alt.binding_range(min=1, max=10, step=1, name="list times c = ")
    )
    listed = alt.param(
        name="attention_list", value=LISTS[0], bind=alt.binding_radio(options=list(LISTS), name="numbers ")
    )
    nodes, layers = positional.length + 1, len(positional.layers)
    heads = round(fixed["head"].max())

    def panel(base: alt.Chart, title: str, colour: str) -> alt.Chart:
        def names(count: int, what: str) -> tuple[list[float], str]:
            middles = [i * (nodes + GAP) + (nodes - 1) / 2 for i in range(count)]
            return middles, f"'{what} ' + (1 + round((datum.value - {(nodes - 1) / 2}) / {nodes + GAP}))"

        (columns, head_name), (lines, layer_name) = names(heads, "head"), names(layers, "layer")
        far, deep = heads * (nodes + GAP) - GAP - 0.5, layers * (nodes + GAP) - GAP - 0.5
        quiet: Any = {"grid": False, "domain": False, "ticks": False}
        return (
            base.transform_calculate(x1="datum.x - 0.5", x2="datum.x + 0.5", y1="datum.y - 0.5", y2="datum.y + 0.5")
            .mark_rect(stroke="#999999", strokeWidth=0.3)
            .encode(
                x=alt.X(
                    "x1:Q",
                    title="listens to",
                    scale=alt.Scale(domain=[-0.5, far], nice=False),
                    axis=alt.Axis(values=columns, labelExpr=head_name, orient="top", **quiet),
                ),
                x2="x2:Q",
                y=alt.Y(
                    "y1:Q",
                    title=None,
                    scale=alt.Scale(domain=[deep, -0.5], nice=False),
                    axis=alt.Axis(values=lines, labelExpr=layer_name, labelAngle=-90, **quiet),
                ),
                y2="y2:Q",
                color=alt.Color(
                    "weight:Q",
                    scale=alt.Scale(domain=[0, 1], range=["#ffffff", colour], interpolate="rgb"),
                    legend=None,
                ),
                tooltip=[
                    "layer:O",
                    "head:O",
                    alt.Tooltip("query:N", title="place"),
                    alt.Tooltip("key:N", title="listens to"),
                    alt.Tooltip("weight:Q", format=".2f"),
                ],
            )
            .properties(width=132, height=200, title=alt.Title(title, fontSize=13))
        )

    shown = alt.Chart(moving).transform_filter("datum.c == attention_c && datum.list == attention_list")
    maps: Any = alt.hconcat(
        panel(alt.Chart(fixed), "positional", OURS), panel(shown, "standard", SOFTMAX), spacing=14
    ).resolve_scale(color="independent")
    rule = (
        alt.Chart(pd.DataFrame({"one": [1]}))
        .transform_calculate(c="attention_c")
        .mark_rule(strokeDash=[4, 4])
        .encode(x="c:Q")
    )
    errors = _error_layer(pd.DataFrame([row for row in rows if row["model"] in ("positional", "standard")]), "mse")
    chart: alt.VConcatChart = alt.vconcat(maps, (errors + rule).properties(width=300, height=150), spacing=16)
    return chart.add_params(scale, listed).properties(title="What moves when the numbers grow?")


# ----------------------------------------------------------------------------------------------------------------- errors


def _error_layer(frame: pd.DataFrame, field: str) -> Any:
    """Error against scale on logarithmic axes, a thin line a seed and a thick one for their geometric mean."""
    kinds = [model for model in MODEL_COLOURS if model in set(frame["model"])]
    frame = frame.assign(run=frame["model"] + " " + frame["seed"].astype(str))
    logs = frame.assign(mse=np.log(frame["mse"]), relative=np.log(frame["relative"]))
    means = logs.groupby(["model", "scale"])[["mse", "relative"]].mean().apply(np.exp).reset_index()
    x = alt.X(
        "scale:Q",
        title="values up to c times those of training",
        scale=alt.Scale(type="log", domain=[1, 10], nice=False),
        axis=alt.Axis(values=list(SCALES), format="d"),
    )
    y = alt.Y(f"{field}:Q", title="squared error", scale=alt.Scale(type="log"), axis=alt.Axis(format="~e", tickCount=5))
    colour = alt.Color(
        "model:N",
        title=None,
        scale=alt.Scale(domain=kinds, range=[MODEL_COLOURS[model] for model in kinds]),
        legend=alt.Legend(orient="bottom", columns=2 if len(kinds) < 4 else 1, symbolOpacity=1),
    )
    tip = [
        "model:N",
        "scale:Q",
        alt.Tooltip("mse:Q", format=".2e"),
        alt.Tooltip("relative:Q", format=".2e", title="by c²"),
    ]
    thin = alt.Chart(frame).mark_line(strokeWidth=1, opacity=0.6).encode(x=x, y=y, color=colour, detail="run:N")
    thick = alt.Chart(means).mark_line(strokeWidth=2.5, point=True).encode(x=x, y=y, color=colour, tooltip=tip)
    chart: Any = alt.layer(thin, thick)
    return chart


def error_chart(rows: Sequence[dict[str, Any]], title: str = "How far does it carry?") -> alt.HConcatChart:
    """The error by scale, as it is and divided by c², which is what a model that scales keeps level."""
    frame = pd.DataFrame(rows)[["model", "seed", "scale", "mse", "relative"]]
    panels = [
        _error_layer(frame, field).properties(width=230, height=230, title=alt.Title(words, fontSize=13))
        for field, words in (("mse", "squared error"), ("relative", "squared error by c²"))
    ]
    chart: alt.HConcatChart = alt.hconcat(*panels, spacing=24)
    return chart.properties(title=title)


def surgery_chart(found: pd.DataFrame) -> alt.Chart:
    """The error of the standard model with its own weights, with those of the small list, and with those of another list."""
    names = {
        "own": "its own weights",
        "small": "weights of the list made small",
        "other": "weights of another list made small",
    }
    frame = found.melt(["seed", "scale"], list(names), var_name="kind", value_name="mse")
    frame["weights"] = frame["kind"].map(names)
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_line(point=True, strokeWidth=2)
        .encode(
            x=alt.X(
                "scale:Q",
                title="values up to c times those of training",
                scale=alt.Scale(type="log", domain=[1, 10], nice=False),
                axis=alt.Axis(values=list(SCALES), format="d"),
            ),
            y=alt.Y(
                "mse:Q", title="squared error", scale=alt.Scale(type="log"), axis=alt.Axis(format="~e", tickCount=5)
            ),
            color=alt.Color(
                "weights:N",
                title="the standard model with",
                sort=list(names.values()),
                scale=alt.Scale(domain=list(names.values()), range=[SOFTMAX, OURS, NEGATIVE]),
                legend=alt.Legend(orient="bottom", columns=1),
            ),
            detail="seed:N",
            tooltip=["weights:N", "seed:O", "scale:Q", alt.Tooltip("mse:Q", format=".2e")],
        )
        .properties(width=290, height=220, title="Hold the weights still: does the error go?")
    )
    return chart
