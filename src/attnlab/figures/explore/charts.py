"""Charts of the circuits explorer: pure functions from scores, patterns and circuits to altair."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from attnlab.circuits.edges import EdgeScores
from attnlab.circuits.graph import LOGITS, Graph
from attnlab.circuits.model import Node
from attnlab.circuits.scores import Scores
from attnlab.circuits.work import Evaluation
from attnlab.figures.palette import CONTROL, NEGATIVE, OURS, SOFTMAX

#: pixels: width of a text of tokens (a phone shows it unshrunk), of a letter in it, height of a line
STRIP_WIDTH, LETTER, LINE = 240, 7.9, 20
SIGN = alt.Scale(domain=["helps", "opposes"], range=[SOFTMAX, NEGATIVE])


def strip_frame(words: Sequence[str]) -> pd.DataFrame:
    """Where each token of a prompt stands in a text that is broken into lines: ``i, token, x, x2, line`` (pixels)."""
    rows, x, line = [], 0.0, 0
    for i, word in enumerate(words):
        shown = word.replace("\n", "↵")
        width = max(len(shown), 1) * LETTER + 3
        if x and x + width > STRIP_WIDTH:
            x, line = 0.0, line + 1
        rows.append({"i": i, "token": shown, "x": round(x, 1), "x2": round(x + width, 1), "line": line})
        x += width
        if "\n" in word:
            x, line = 0.0, line + 1
    return pd.DataFrame(rows)


def strip_marks(base: alt.Chart, value: str, lines: int, domain: Sequence[float] = (0, 1)) -> alt.LayerChart:
    """The tokens of a :func:`strip_frame` with ``value`` as the strength of their background."""
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, STRIP_WIDTH], nice=False, zero=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[0, lines * LINE], reverse=True, nice=False))
    placed = base.transform_calculate(y=f"datum.line * {LINE} + 1", y2=f"datum.line * {LINE} + {LINE - 2}")
    boxes = placed.mark_rect(color=SOFTMAX, cornerRadius=3).encode(
        x=x,
        x2="x2:Q",
        y=y,
        y2="y2:Q",
        opacity=alt.Opacity(
            f"{value}:Q", scale=alt.Scale(domain=list(domain), range=[0.05, 0.75], clamp=True), legend=None
        ),
        tooltip=[
            alt.Tooltip("token:N"),
            alt.Tooltip("i:Q", title="position"),
            alt.Tooltip(f"{value}:Q", title="attention", format=".3f"),
        ],
    )
    text = (
        placed.transform_calculate(middle=f"datum.line * {LINE} + {LINE / 2}")
        .mark_text(align="left", dx=2, font="ui-monospace, monospace", fontSize=13)
        .encode(x=x, y=alt.Y("middle:Q", axis=None), text="token:N")
    )
    chart: alt.LayerChart = (boxes + text).properties(width=STRIP_WIDTH, height=lines * LINE)
    return chart


def attention_strip(words: Sequence[str], weights: np.ndarray, title: str) -> alt.LayerChart:
    """Attention ``[T]`` from one token as the background of the prompt's tokens."""
    frame = strip_frame(words).assign(attention=np.round(weights, 4))
    chart = strip_marks(alt.Chart(frame), "attention", int(frame.line.max()) + 1)
    return chart.properties(
        title=title, description=f"{title}. Most goes to {words[int(np.argmax(weights))]!r}, {weights.max():.0%}."
    )


def pattern_chart(words: Sequence[str], pattern: np.ndarray, title: str) -> alt.Chart:
    """The whole pattern ``[T, T]`` of a head: a row for each token that looks, a column for each that is looked at."""
    names = [f"{i} {word}".replace("\n", "↵") for i, word in enumerate(words)]
    size = len(words)
    frame = pd.DataFrame(
        [
            {"from": names[q], "to": names[k], "attention": round(float(pattern[q, k]), 3)}
            for q in range(size)
            for k in range(q + 1)
        ]
    )
    axis = alt.Axis(labelFontSize=10, labelOverlap=False, ticks=False)
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X("to:N", sort=names, title="token looked at", axis=axis),
            y=alt.Y("from:N", sort=names, title="token that looks", axis=axis),
            color=alt.Color(
                "attention:Q",
                scale=alt.Scale(domain=[0, 1], scheme="blues"),
                legend=alt.Legend(orient="top", format="%"),
            ),
            tooltip=["from:N", "to:N", alt.Tooltip("attention:Q", format=".3f")],
        )
        .properties(
            width=alt.Step(13),
            height=alt.Step(13),
            title=title,
            description=f"{title}: attention from every token to every earlier one.",
        )
    )


def head_frame(scores: Scores) -> pd.DataFrame:
    """One row a head: ``head, layer, h, score``."""
    grid = scores.grid()
    return pd.DataFrame(
        [
            {"head": f"{layer}.{h}", "layer": layer, "h": h, "score": round(float(value), 4)}
            for layer, row in enumerate(grid)
            for h, value in enumerate(row)
            if np.isfinite(value)
        ]
    )


def score_colour(largest: float) -> alt.Color:
    """Blue helps, orange opposes, symmetric around 0."""
    return alt.Color(
        "score:Q",
        scale=alt.Scale(domain=[-largest, 0, largest], range=[NEGATIVE, "#d9d9d9", SOFTMAX], interpolate="lab"),
        legend=alt.Legend(title="score", orient="top", gradientLength=110, format="+.2f", tickCount=3),
    )


def head_map(scores: Scores, picked: str = "") -> alt.LayerChart:
    """A map of all heads; a click picks one (parameter ``pick``)."""
    frame = head_frame(scores)
    largest = float(frame.score.abs().max()) or 1.0
    best, method = scores.top(1)[0], scores.made["method"].split(",")[0]
    pick = alt.selection_point("pick", fields=["head"], value=[{"head": picked or str(best)}], on="click", toggle=False)
    base = alt.Chart(frame).encode(
        x=alt.X("h:O", title="head", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        y=alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(ticks=False, domain=False)),
    )
    cells = base.mark_rect(cornerRadius=2).encode(
        color=score_colour(largest), tooltip=["head:N", alt.Tooltip("score:Q", format="+.3f")]
    )
    mark = base.mark_rect(fill=None, stroke="#111111", strokeWidth=2.5, cornerRadius=2).transform_filter(pick)
    chart: alt.LayerChart = (cells.add_params(pick) + mark).properties(
        width=alt.Step(18),
        height=alt.Step(11),
        title=alt.TitleParams("Which heads carry the difference?", subtitle=f"{method}, {scores.made['metric']}"),
        description=f"Scores of {len(frame)} heads; the largest is {best} with {scores.of(best):+.2f}.",
    )
    return chart


def exact_chart(estimate: Scores, exact: Scores) -> alt.LayerChart:
    """The exact score of chosen heads with its interval over pairs, beside the first-order estimate, each with its metric."""
    rows = []
    for (node,) in exact.groups:
        low, high = (
            exact.interval(node) if len(exact.gap) > 1 else (exact.of(node), exact.of(node))
        )  # one pair: no spread
        rows.append(
            {"head": str(node), "exact": exact.of(node), "low": low, "high": high, "estimate": estimate.of(node)}
        )
    frame = pd.DataFrame(rows)
    order = list(frame.reindex(frame.exact.abs().sort_values(ascending=False).index)["head"])
    y = alt.Y("head:N", sort=order, title="head", axis=alt.Axis(labelOverlap=False))
    x = alt.X("exact:Q", title="share of the clean-corrupt difference")
    spans = alt.Chart(frame).mark_rule(strokeWidth=2.5, color=OURS).encode(x=alt.X("low:Q"), x2="high:Q", y=y)
    tooltip = ["head:N", *(alt.Tooltip(f"{name}:Q", format="+.3f") for name in ("exact", "low", "high", "estimate"))]
    points = alt.Chart(frame).mark_point(filled=True, size=90, color=OURS, opacity=1).encode(x=x, y=y, tooltip=tooltip)
    ticks = (
        alt.Chart(frame).mark_tick(color=CONTROL, thickness=3, height=13).encode(x="estimate:Q", y=y, tooltip=tooltip)
    )
    subtitle = [
        f"green: exact ({exact.made['metric']}, positions {exact.made['positions']}), 95% over pairs",
        f"grey: the estimate ({estimate.made['metric']}, positions {estimate.made['positions']})",
    ]
    chart: alt.LayerChart = (spans + ticks + points).properties(
        width=300,
        height=alt.Step(20),
        title=alt.TitleParams("Exact patching", subtitle=subtitle),
        description=f"Exact scores of {len(frame)} heads beside their estimates; the largest is {order[0]}.",
    )
    return chart


def graph_frames(graph: Graph, scores: EdgeScores | None = None) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Nodes (``node, x, y, score``), edges (``edge, src, dst, port, x, y, x2, y2, score, share, sign``) and the names of the rows.

    Heads stand in the column of their number, MLPs right of them; layers without a node take no room. ``share`` is the size of
    a score over the largest of the circuit (1 without scores).
    """
    heads, nodes = graph.wiring.n_heads, graph.nodes()
    layers = sorted({Node.parse(name).layer for name in nodes if name not in ("input", LOGITS)})
    rows = ["input", *map(str, layers), LOGITS]
    places: dict[str, tuple[float, int]] = {}
    for name in nodes:
        if name in ("input", LOGITS):
            places[name] = (heads / 2, rows.index(name))
        else:
            node = Node.parse(name)
            places[name] = (heads if node.head is None else node.head, rows.index(str(node.layer)))
    totals = dict(zip(graph.wiring.sources, scores.node_scores().tolist(), strict=True)) if scores else {}
    short = {name: name if name in ("input", LOGITS) or name[0] == "m" else str(Node.parse(name)) for name in nodes}
    points = [
        {"node": short[name], "x": places[name][0], "y": places[name][1], "score": round(totals.get(name, 0.0), 4)}
        for name in nodes
    ]
    largest = float((scores.values.abs() * graph.mask).max()) if scores and len(graph) else 0.0
    lines = []
    for row, column in graph.mask.nonzero().tolist():
        src = graph.wiring.sources[row]
        dst, _, port = graph.wiring.destinations[column].rstrip(">").partition("<")
        value = float(scores.values[row, column]) if scores else 0.0
        lines.append(
            {
                "src": short[src],
                "dst": short[dst],
                "port": port or "in",
                "x": places[src][0],
                "y": places[src][1],
                "x2": places[dst][0],
                "y2": places[dst][1],
                "score": round(value, 4),
                "share": round(abs(value) / largest, 3) if largest else 1.0,
                "sign": "opposes" if value < 0 else "helps",
            }
        )
    return pd.DataFrame(points), pd.DataFrame(lines), rows


def graph_marks(
    nodes: alt.Chart, edges: alt.Chart, rows: Sequence[str], n_heads: int, pick: alt.Parameter, axis: bool = True
) -> alt.LayerChart:
    """Nodes and edges of :func:`graph_frames`; the edges of the picked node stand out, of all nodes if none is picked."""
    ticks = alt.Axis(
        values=list(range(len(rows))), labelExpr=f"{list(rows)}[datum.value]", grid=False, ticks=False, domain=False
    )
    x = alt.X(
        "x:Q",
        title="head (MLPs on the right)",
        scale=alt.Scale(domain=[-0.6, n_heads + 0.6], nice=False),
        axis=alt.Axis(values=list(range(n_heads)), format="d", grid=False, ticks=False, domain=False),
    )
    y = alt.Y(
        "y:Q",
        title="layer",
        scale=alt.Scale(domain=[-0.6, len(rows) - 0.4], nice=False),
        axis=ticks if axis else None,
    )
    mine = (
        f"!{pick.name}.node || indexof({pick.name}.node, datum.src) >= 0 || indexof({pick.name}.node, datum.dst) >= 0"
    )
    lines = edges.mark_rule().encode(
        x=x,
        y=y,
        x2="x2:Q",
        y2="y2:Q",
        color=alt.Color("sign:N", scale=SIGN, legend=alt.Legend(title=None, orient="top")),
        strokeWidth=alt.StrokeWidth("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.8, 6]), legend=None),
        opacity=alt.condition(mine, alt.value(0.75), alt.value(0.06)),
        tooltip=["src:N", "dst:N", "port:N", alt.Tooltip("score:Q", format="+.3f")],
    )
    dots = nodes.mark_circle(size=560, opacity=1, color="#f2f2f2", stroke=CONTROL, strokeWidth=1).encode(
        x=x, y=y, tooltip=["node:N", alt.Tooltip("score:Q", title="sum of its edges", format="+.3f")]
    )
    labels = nodes.mark_text(fontSize=9, color="#111111").encode(x=x, y=y, text="node:N")
    chart: alt.LayerChart = lines + dots.add_params(pick) + labels
    return chart


def circuit_chart(graph: Graph, scores: EdgeScores | None = None) -> alt.LayerChart:
    """A circuit drawn from the input upwards to the logits; click a node to see its edges alone, beside it to see all."""
    if not len(graph):
        raise ValueError("graph is empty; take more edges")
    points, lines, rows = graph_frames(graph, scores)
    pick = alt.selection_point("node_pick", fields=["node"], on="click", toggle=False)
    chart = graph_marks(alt.Chart(points), alt.Chart(lines), rows, graph.wiring.n_heads, pick)
    made = "" if scores is None else f"{scores.info['method']}, {scores.info['metric']}"
    named: alt.LayerChart = chart.properties(
        width=340,
        height=26 * len(rows),
        title=alt.TitleParams(f"The circuit: {len(graph)} edges", subtitle=made),
        description=f"A circuit of {len(graph)} edges between {len(points)} nodes in {len(rows)} rows from the input to the logits.",
    )
    return named


def curve_chart(evaluation: Evaluation, kept: int | None = None) -> alt.LayerChart:
    """Faithfulness against the size of the circuit, and how it was measured; ``kept`` marks the one that is shown."""
    frame = evaluation.curve.frame
    unit = "n_heads" if "n_heads" in frame else "n_edges"
    words = unit.removeprefix("n_")
    base = alt.Chart(frame).encode(
        x=alt.X(f"{unit}:Q", title=f"{words} kept, strongest first", scale=alt.Scale(type="log", nice=False)),
        y=alt.Y("ratio_of_means:Q", title="faithfulness (1 = the model)"),
        tooltip=[
            alt.Tooltip(f"{unit}:Q", title=words),
            alt.Tooltip("kept:Q", title="edges after pruning"),
            alt.Tooltip("ratio_of_means:Q", title="faithfulness", format=".3f"),
        ],
    )
    whole = alt.Chart(pd.DataFrame({"y": [1.0]})).mark_rule(strokeDash=[4, 4], color=CONTROL).encode(y="y:Q")
    layers = (
        whole
        + base.mark_line(color=OURS, strokeWidth=2.5)
        + base.mark_point(color=OURS, filled=True, size=70, opacity=1)
    )
    if kept is not None and frame[unit].min() <= kept <= frame[unit].max():
        layers += alt.Chart(pd.DataFrame({unit: [kept]})).mark_rule(color=SOFTMAX).encode(x=f"{unit}:Q")
    last = frame.iloc[-1]
    chart: alt.LayerChart = layers.properties(
        width=320,
        height=200,
        title=alt.TitleParams(f"How many {words} does the task need?", subtitle=evaluation.measured),
        description=f"Faithfulness of circuits of {int(frame[unit].min())} to {int(last[unit])} {words} ({evaluation.measured}): from "
        f"{frame.ratio_of_means.iloc[0]:.2f} to {last.ratio_of_means:.2f}.",
    )
    return chart


def head_order(scores: Scores) -> list[str]:
    """Heads by the size of their score, strongest first."""
    return [str(node) for node in scores.top(len(scores.groups))]
