"""The explorer without a kernel: three tasks computed ahead, in one chart whose parts follow the chosen task and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd

from attnlab.circuits.attribution import attention_rows, attribution_patch
from attnlab.circuits.eap import eap
from attnlab.circuits.edges import EdgeScores
from attnlab.circuits.faithfulness import sparsity_curve
from attnlab.circuits.graph import Graph
from attnlab.circuits.metrics import log_odds
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.scores import Scores
from attnlab.figures.explore.charts import (
    LINE,
    STRIP_WIDTH,
    graph_frames,
    graph_marks,
    head_frame,
    strip_frame,
    strip_marks,
)
from attnlab.figures.palette import CONTROL, NEGATIVE, OURS, SOFTMAX

DRAWN = 60  # edges in the circuit that is drawn
CURVE = (0.0005, 0.001, 0.003, 0.01, 0.05, 0.2)  # shares of all edges at which circuits are measured


class Study(NamedTuple):
    """One task taken apart."""

    name: str
    words: list[str]  # of the prompt whose attention is shown
    attention: np.ndarray  # [n_layers, n_heads, T] from its last token
    heads: Scores
    edges: EdgeScores
    circuit: Graph
    curve: pd.DataFrame


def study(
    name: str, model: HookedLM, wide: HookedLM, found_on: Pairs, judged_on: Pairs, *, steps: int = 5, drawn: int = DRAWN
) -> Study:
    """Score heads and edges on some pairs, and measure circuits of those edges on others.

    Args:
        name: of the task.
        model: the model.
        wide: its ungrouped copy, which edges need.
        found_on: pairs for the scores; the first one's attention is shown.
        judged_on: pairs for the curve.
        steps: gradient points of the edge scores.
        drawn: edges of the circuit that is drawn, before pruning.
    """
    heads = attribution_patch(model, found_on, metric=log_odds)
    edges = eap(wide, found_on, metric=log_odds, steps=steps)
    counts = sorted({max(1, round(share * edges.wiring.n_edges)) for share in CURVE})
    rows = attention_rows(model, found_on.subset([0]), model.spec.heads)
    attention = np.stack([rows[node][0] for node in model.spec.heads])
    return Study(
        name,
        found_on.words(0),
        attention.reshape(model.spec.n_layers, model.spec.n_heads, -1),
        heads,
        edges,
        Graph.top_n(edges, min(drawn, edges.wiring.n_edges)).prune(),
        sparsity_curve(wide, edges, judged_on, counts, metric=log_odds).frame,
    )


def explorer_chart(studies: Sequence[Study]) -> alt.VConcatChart:
    """Head map, attention of the clicked head, circuit and curve of the task chosen in the menu."""
    if not studies:
        raise ValueError("studies is empty; give at least one task")
    frames = _frames(studies)
    names = [one.name for one in studies]
    task = alt.param("task", value=names[0], bind=alt.binding_select(options=names, name="task: "))
    best = {one.name: str(one.heads.top(1)[0]) for one in studies}
    pick = alt.selection_point("pick", fields=["head"], on="click", toggle=False)
    node = alt.selection_point("node", fields=["node"], on="click", toggle=False)
    head = f"(pick.head ? pick.head[0] : {best}[task])"
    chosen = "datum.task == task"
    maps = _map(frames["heads"], pick, head, chosen)
    lines = max(int(strip_frame(one.words).line.max()) + 1 for one in studies)
    looks = _attention(frames, head, chosen, lines)
    graphs = _circuits(frames, studies, node, chosen)
    curve = _curve(frames["curve"], chosen, names)
    left = alt.vconcat(maps, spacing=8)
    right = alt.vconcat(looks, curve, spacing=18)
    body = alt.vconcat(alt.hconcat(left, right, spacing=24), graphs, spacing=18)
    chart: alt.VConcatChart = body.add_params(task).resolve_scale(color="independent", x="independent", y="independent")
    return chart.properties(title="Three tasks in SmolLM2, taken apart")


def _frames(studies: Sequence[Study]) -> dict[str, pd.DataFrame]:
    parts: dict[str, list[Any]] = {
        key: [] for key in ("heads", "attention", "tokens", "nodes", "edges", "rows", "curve")
    }
    most = max(len(graph_frames(one.circuit)[2]) for one in studies)
    for one in studies:
        heads = head_frame(one.heads)
        strength = (heads.score / (heads.score.abs().max() or 1.0)).round(3)  # a task's strongest head is at one end
        parts["heads"].append(heads.assign(task=one.name, strength=strength))
        percent = np.round(100 * one.attention).astype(int)
        keys = [f"{one.name}|{layer}.{h}" for layer in range(len(percent)) for h in range(len(percent[0]))]
        parts["attention"].append(pd.DataFrame({"key": keys, "a": percent.reshape(len(keys), -1).tolist()}))
        parts["tokens"].append(strip_frame(one.words).assign(task=one.name))
        nodes, edges, rows = graph_frames(one.circuit, one.edges)
        stretch = (most - 1) / max(len(rows) - 1, 1)  # all tasks fill the same height
        for frame in (nodes, edges):
            for column in {"y", "y2"} & set(frame.columns):
                frame[column] = (frame[column] * stretch).round(3)
        parts["nodes"].append(nodes.assign(task=one.name))
        parts["edges"].append(edges.assign(task=one.name))
        levels = [round(level * stretch, 3) for level in range(len(rows))]
        parts["rows"].append(pd.DataFrame({"y": levels, "row": rows, "task": one.name}))
        curve = one.curve[["n_edges", "kept"]].assign(faithfulness=one.curve.ratio_of_means.round(4), task=one.name)
        parts["curve"].append(curve)
    return {key: pd.concat(frames, ignore_index=True) for key, frames in parts.items()}


def _map(heads: pd.DataFrame, pick: alt.Parameter, head: str, chosen: str) -> alt.LayerChart:
    base = (
        alt.Chart(heads)
        .transform_filter(chosen)
        .encode(
            x=alt.X("h:O", title="head", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
            y=alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(ticks=False, domain=False)),
        )
    )
    cells = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color(
            "strength:Q",
            scale=alt.Scale(domain=[-1, 0, 1], range=[NEGATIVE, "#d0d0d0", SOFTMAX], interpolate="lab"),
            legend=alt.Legend(
                title="score / strongest", orient="bottom", gradientLength=120, format="+.0f", values=[-1, 0, 1]
            ),
        ),
        tooltip=["head:N", alt.Tooltip("score:Q", format="+.3f")],
    )
    frame = base.mark_rect(fill=None, stroke="#111111", strokeWidth=2.5, cornerRadius=2).transform_filter(
        f"datum.head == {head}"
    )
    chart: alt.LayerChart = (cells.add_params(pick) + frame).properties(
        width=alt.Step(17), height=alt.Step(13), title="Click a head"
    )
    return chart


def _attention(frames: dict[str, pd.DataFrame], head: str, chosen: str, lines: int) -> alt.LayerChart:
    base = (
        alt.Chart(frames["tokens"])
        .transform_filter(chosen)
        .transform_calculate(key=f"task + '|' + {head}")
        .transform_lookup(lookup="key", from_=alt.LookupData(frames["attention"], key="key", fields=["a"]))
        .transform_calculate(attention="datum.a[datum.i] / 100")
    )
    title = alt.TitleParams(text=alt.expr(f"'Head ' + {head} + ': where END looks'"))
    return strip_marks(base, "attention", lines).properties(title=title)


def _circuits(
    frames: dict[str, pd.DataFrame], studies: Sequence[Study], node: alt.Parameter, chosen: str
) -> alt.LayerChart:
    n_heads = studies[0].circuit.wiring.n_heads
    most = round(float(frames["rows"].y.max())) + 1
    nodes = alt.Chart(frames["nodes"]).transform_filter(chosen)
    edges = alt.Chart(frames["edges"]).transform_filter(chosen)
    marks = graph_marks(nodes, edges, [""] * most, n_heads, node, axis=False)
    labels = (
        alt.Chart(frames["rows"])
        .transform_filter(chosen)
        .mark_text(align="right", x=-6, fontSize=11)
        .encode(y=alt.Y("y:Q", axis=None), text="row:N")
    )
    chart: alt.LayerChart = (marks + labels).properties(
        width=330,
        height=25 * most,
        title=alt.TitleParams(
            "The strongest edges, input below, logits above", subtitle="click a node to see its edges alone"
        ),
    )
    return chart


def _curve(curve: pd.DataFrame, chosen: str, names: Sequence[str]) -> alt.LayerChart:
    base = alt.Chart(curve).encode(
        x=alt.X(
            "n_edges:Q",
            title="edges kept",
            scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(format="~s", tickCount=5),
        ),
        y=alt.Y("faithfulness:Q", title="faithfulness on other pairs"),
        detail="task:N",
        tooltip=[
            "task:N",
            alt.Tooltip("n_edges:Q", title="edges", format=","),
            alt.Tooltip("kept:Q", title="after pruning", format=","),
            alt.Tooltip("faithfulness:Q", format=".3f"),
        ],
    )
    others = base.transform_filter(f"!({chosen})").mark_line(color=CONTROL, strokeWidth=1.2, opacity=0.6)
    mine = base.transform_filter(chosen)
    whole = alt.Chart(pd.DataFrame({"y": [1.0]})).mark_rule(strokeDash=[4, 4], color=CONTROL).encode(y="y:Q")
    points = mine.mark_point(color=OURS, filled=True, size=60, opacity=1)
    chart: alt.LayerChart = (whole + others + mine.mark_line(color=OURS, strokeWidth=2.5) + points).properties(
        width=STRIP_WIDTH,
        height=8 * LINE,
        title=alt.TitleParams("How small can the circuit be?", subtitle="green: the chosen task, grey: the others"),
    )
    return chart
