"""Figures of the chapter ``kernels/aaren``: pure functions from scores, costs and scores of models to charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import ipywidgets
import pandas as pd
import torch

from attnlab.figures.palette import BOTH, CONTROL, LINEAR, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.kernels.aaren import Cost, scan_rounds
from attnlab.mixers import read

PREFIX, PIECE = "from the first token on", "from a later token on"
MIXER_COLOURS = {"Transformer": SOFTMAX, "Aaren": OURS, "Mean": CONTROL, "GRU": BOTH}
LAYER_COLOURS = {"Aaren": OURS, "softmax with KV cache": SOFTMAX}
WIDTH = 16  # K = V of the head whose memory the first figure counts

# ------------------------------------------------------------------------------------------------------- the scan tree


def draw(length: int, spread: float, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [T] with a standard deviation of ``spread`` and values [T, 1], in float64: the same ones for every length."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, 2, generator=generator, dtype=torch.float64)[:length]
    return spread * noise[:, 0], noise[:, 1:]


def node_frame(length: int, spread: float) -> pd.DataFrame:
    """One row a summary of the scan: ``node, t, round, first, kind, m, u, o``; it sums up tokens ``first`` to ``t``, from 1.

    Round 0 are the tokens. Nodes are numbered from 1, round by round.
    """
    rows = []
    for number, summary in enumerate(scan_rounds(*draw(length, spread))):
        outputs = read(summary)[:, 0]
        for t in range(1, length + 1):
            first = max(1, t - 2**number + 1)
            rows.append(
                {
                    "node": number * length + t,
                    "t": t,
                    "round": number,
                    "first": first,
                    "kind": PREFIX if first == 1 else PIECE,
                    "m": round(float(summary.m[t - 1]), 3),
                    "u": round(float(summary.u[t - 1]), 3),
                    "o": round(float(outputs[t - 1]), 3),
                }
            )
    return pd.DataFrame(rows)


def edge_frame(length: int) -> pd.DataFrame:
    """One row for each link of each tree: ``target`` is the node whose tree it is; it leads from (t, round) up to (t2, round2)."""
    rows = []
    for number in range(1, rounds(length) + 1):
        for t in range(1, length + 1):
            for link in _links(t, number):
                rows.append({"target": number * length + t, **link})
    return pd.DataFrame(rows, columns=["target", "t", "round", "t2", "round2"])


def rounds(length: int) -> int:
    """Rounds until every summary is that of a prefix: log2 of the length, rounded up."""
    return math.ceil(math.log2(length))


def merges(length: int) -> int:
    """Merges of the whole scan; one token after the other takes ``length - 1``."""
    return sum(length - 2**number for number in range(rounds(length)))


def _links(t: int, number: int) -> list[dict[str, int]]:
    """The links of the tree below the node of token t in a round. Where nothing came before, a summary is passed on."""
    if number == 0:
        return []
    sources = [t] if t <= 2 ** (number - 1) else [t - 2 ** (number - 1), t]
    here = [{"t": source, "round": number - 1, "t2": t, "round2": number} for source in sources]
    return here + [link for source in sources for link in _links(source, number - 1)]


def scan_figure(length: int = 16, output: int = 13, spread: float = 1.5) -> alt.HConcatChart:
    """The scan as a tree, the weights behind the picked summary, and what must be kept; a click picks a summary.

    Args:
        length: tokens.
        output: whose prefix is picked at first; beyond ``length`` the last one.
        spread: standard deviation of the scores.
    """
    nodes, last = node_frame(length, spread), rounds(length)
    start = last * length + min(output, length)
    pick = alt.selection_point("pick", fields=["node"], value=[{"node": start}], on="click", toggle=False, empty=False)
    left: Any = alt.vconcat(
        _tree(nodes, edge_frame(length), length, pick), _weights(length, spread), _sentence(nodes, length), spacing=8
    )
    chart: alt.HConcatChart = alt.hconcat(left, _kept(length), spacing=34).resolve_scale(color="independent")
    return chart.properties(title="Which merges feed an output?")


_PICKED = "pick.node && datum.node == pick.node[0]"
_IN_TREE = "pick.node && datum.target == pick.node[0]"


def _tokens(length: int, title: str | None) -> alt.X:
    axis = alt.Axis(values=list(range(1, length + 1)), grid=False, labelFlush=False)
    return alt.X("t:Q", title=title, scale=alt.Scale(domain=[0.4, length + 0.6], nice=False, padding=0), axis=axis)


def _tree(nodes: pd.DataFrame, edges: pd.DataFrame, length: int, pick: Any) -> alt.LayerChart:
    """All summaries faintly, and the tree of the picked one."""
    last = rounds(length)
    names = f"datum.value == 0 ? 'tokens' : datum.value == {last} ? 'outputs' : 'round ' + datum.value"
    y = alt.Y(
        "round:Q",
        title=None,
        scale=alt.Scale(domain=[-0.3, last + 0.3], nice=False),
        axis=alt.Axis(values=list(range(last + 1)), labelExpr=names, grid=False, domain=False, ticks=False),
    )
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=[PREFIX, PIECE], range=[OURS, LINEAR]),
        legend=alt.Legend(title="a circle sums up tokens", orient="top", columns=1, symbolOpacity=1),
    )
    x = _tokens(length, None)
    ends = {"x": x, "y": y, "x2": "t2:Q", "y2": "round2:Q"}
    whole = edges[edges.target > last * length].drop(columns="target").drop_duplicates()
    lit = alt.Chart(edges).transform_filter(_IN_TREE)
    circles = alt.Chart(nodes).encode(x=x, y=y, color=colour)
    tooltip = [
        alt.Tooltip("first:Q", title="from token"),
        alt.Tooltip("t:Q", title="to token"),
        alt.Tooltip("m:Q"),
        alt.Tooltip("u:Q"),
        alt.Tooltip("o:Q", title="w / u"),
    ]
    below = lit.transform_calculate(kind=f"datum.t <= pow(2, datum.round) ? '{PREFIX}' : '{PIECE}'")
    chart: Any = alt.layer(
        alt.Chart(whole).mark_rule(opacity=0.13).encode(**ends),
        lit.mark_rule(strokeWidth=2, opacity=0.9).encode(**ends),
        circles.mark_point(filled=True, size=95, opacity=0.25),
        below.mark_point(filled=True, size=95, opacity=1).encode(x=x, y=y, color=colour),
        circles.transform_filter(_PICKED).mark_point(filled=True, size=190, opacity=1),
        circles.mark_point(filled=True, size=300, opacity=0.001).encode(tooltip=tooltip).add_params(pick),
    )
    return chart.properties(width=360, height=210)


def _weights(length: int, spread: float) -> alt.Chart:
    """The share that each token has in the picked summary."""
    scores, _ = draw(length, spread)
    frame = pd.DataFrame({"t": range(1, length + 1), "s": [round(float(s), 4) for s in scores]})
    last, first = _place(length)
    return (
        alt.Chart(frame)
        .transform_calculate(e=f"datum.t <= {last} && datum.t >= {first} ? exp(datum.s) : 0")
        .transform_joinaggregate(all="sum(e)")
        .transform_calculate(weight="datum.e / datum.all")
        .mark_bar(color=OURS, size=240 / length)
        .encode(
            x=_tokens(length, "token"),
            y=alt.Y("weight:Q", title="weight", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(values=[0, 0.5, 1])),
            tooltip=["t:Q", alt.Tooltip("s:Q", title="score"), alt.Tooltip("weight:Q", format=".3f")],
        )
        .properties(width=360, height=70)
    )


def _place(length: int) -> tuple[str, str]:
    """The picked summary's last and first token, as expressions."""
    last = f"(pick.node[0] - 1) % {length} + 1"
    return last, f"max(1, {last} + 1 - pow(2, floor((pick.node[0] - 1) / {length})))"


def _sentence(nodes: pd.DataFrame, length: int) -> alt.Chart:
    """The picked summary in words."""
    words = (
        "['Tokens ' + datum.first + ' to ' + datum.t + ': ' + (datum.t - datum.first) + (datum.t - datum.first == 1 ? ' merge' : ' merges')"
        " + ', ' + ceil(log(datum.t - datum.first + 1) / log(2) - 1e-9) + ' in a row.',"
        "'m = ' + format(datum.m, '.2f') + ',  u = ' + format(datum.u, '.2f') + ',  output w / u = ' + format(datum.o, '.2f'),"
        f"'All {length} outputs: {merges(length)} merges in {rounds(length)} rounds.',"
        f"'One token after the other: {length - 1} in a row.']"
    )
    return (
        alt.Chart(nodes)
        .transform_filter(_PICKED)
        .transform_calculate(words=words)
        .mark_text(align="left", baseline="top", fontSize=13, lineHeight=18)
        .encode(x=alt.value(0), y=alt.value(0), text="words:N")
        .properties(width=360, height=74)
    )


def _kept(length: int) -> alt.LayerChart:
    """Numbers that one head keeps after each token, and after the picked one."""
    frame = pd.DataFrame(
        [
            {"layer": layer, "t": t, "numbers": numbers}
            for t in range(1, length + 1)
            for layer, numbers in (("softmax with KV cache", 2 * WIDTH * t), ("Aaren", WIDTH + 2))
        ]
    )
    last, _ = _place(length)
    colour = alt.Color(
        "layer:N",
        scale=alt.Scale(domain=list(LAYER_COLOURS), range=list(LAYER_COLOURS.values())),
        legend=alt.Legend(title=None, orient="top", columns=1),
    )
    y = alt.Y("numbers:Q", title="numbers kept by a head of width 16", axis=alt.Axis(tickCount=4))
    x = alt.X(
        "t:Q", title="tokens read", scale=alt.Scale(domain=[0, length + 1], nice=False), axis=alt.Axis(tickCount=5)
    )
    base = alt.Chart(frame).encode(x=x, y=y, color=colour)
    at = base.transform_filter(f"pick.node && datum.t == {last}")
    chart: Any = alt.layer(
        base.mark_line(strokeWidth=2.5),
        at.mark_point(filled=True, size=100, opacity=1),
        at.mark_text(align="right", dx=-8, dy=-8, fontSize=13).encode(text="numbers:Q"),
    )
    return chart.properties(
        width=210, height=230, title=alt.TitleParams("What must be kept for the next token", fontSize=13)
    )


def scan_explorer() -> Twin:
    """Controls over :func:`scan_figure`: length, picked output, spread of the scores."""
    return twin(
        scan_figure,
        alt="The scan tree for another number of tokens, with the merges of one output lit, its weights and its memory.",
        caption="Try a length that is no power of two: in the last round fewer summaries have anything left to take in.",
        length=ipywidgets.IntSlider(value=11, min=2, max=24, description="tokens"),
        output=ipywidgets.IntSlider(value=11, min=1, max=24, description="output"),
        spread=ipywidgets.Dropdown(value=5.0, options=[0.0, 1.5, 5.0, 50.0], description="score std"),
    )


# ------------------------------------------------------------------------------------------------------- measurements


def cost_chart(costs: Sequence[Cost]) -> alt.HConcatChart:
    """Bytes kept and microseconds a token against the tokens read before; every repeat is a point, lines join medians."""
    frame = pd.DataFrame(
        [
            {"layer": cost.layer, "context": cost.context, "bytes": cost.bytes, "us": round(1000 * float(ms), 2)}
            for cost in costs
            for ms in cost.ms
        ]
    )
    middle = frame.groupby(["layer", "context"], as_index=False).median()
    colour = alt.Color(
        "layer:N",
        scale=alt.Scale(domain=list(LAYER_COLOURS), range=list(LAYER_COLOURS.values())),
        legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
    )
    contexts = sorted({cost.context for cost in costs})
    x = alt.X(
        "context:Q",
        title="tokens read before",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(values=contexts, format="~s"),
    )

    def panel(column: str, title: str, points: pd.DataFrame) -> Any:
        y = alt.Y(
            f"{column}:Q",
            title=title,
            scale=alt.Scale(type="log"),
            axis=alt.Axis(values=[10.0**n for n in range(9)], format="~s"),
        )
        look = {"x": x, "y": y, "color": colour}
        tooltip = ["layer:N", alt.Tooltip("context:Q", format=","), alt.Tooltip(f"{column}:Q", format=",.4~g")]
        line = alt.Chart(middle).mark_line(strokeWidth=2.5).encode(**look)
        dots = alt.Chart(points).mark_point(filled=True, size=28, opacity=0.5).encode(**look, tooltip=tooltip)
        return alt.layer(line, dots).properties(width=270, height=220)

    chart: alt.HConcatChart = alt.hconcat(
        panel("bytes", "bytes kept by one layer", middle), panel("us", "microseconds for one token", frame), spacing=30
    )
    return chart.properties(title="What does the next token cost after a long past?")


def curve_frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a measurement of a run: ``impl, seed, run, step, score``."""
    return pd.DataFrame(
        [
            {
                "impl": row["impl"],
                "seed": row["seed"],
                "run": f"{row['impl']} {row['seed']}",
                "step": step,
                "score": round(score, 5),
            }
            for row in rows
            for step, score in row["curve"]
        ]
    )


def curves_chart(
    forecasting: Sequence[dict[str, Any]],
    recall: Sequence[dict[str, Any]],
    *,
    floor: float,
    blind: float,
    title: str = "Where is a fixed query enough?",
) -> alt.HConcatChart:
    """Error and accuracy on held-out data while models train, a line a seed; a menu keeps one mixer.

    Args:
        forecasting, recall: rows of runs with ``impl, seed`` and ``curve``.
        floor: the squared error that nobody can undercut.
        blind: the accuracy without the question.
    """
    everybody = "all four"
    menu = alt.binding_select(options=[everybody, *MIXER_COLOURS], name="show: ")
    only = alt.param("only", value=everybody, bind=menu)
    shown = f"only == '{everybody}' || datum.impl == only"
    colour = alt.Color(
        "impl:N",
        scale=alt.Scale(domain=list(MIXER_COLOURS), range=list(MIXER_COLOURS.values())),
        legend=alt.Legend(title=None, orient="top", columns=4),
    )

    def panel(rows: Sequence[dict[str, Any]], y: alt.Y, level: float, name: str, heading: str) -> Any:
        frame = curve_frame(rows)
        look: dict[str, Any] = {
            "x": alt.X("step:Q", title="updates", axis=alt.Axis(tickCount=4)),
            "y": y,
            "color": colour,
            "detail": "run:N",
            "opacity": alt.condition(shown, alt.value(0.95), alt.value(0.08)),
        }
        tooltip = ["impl:N", "seed:Q", "step:Q", alt.Tooltip("score:Q", format=".4f")]
        mark = alt.Chart(pd.DataFrame({"level": [level], "name": [name], "step": [frame.step.max()]}))
        words = mark.mark_text(align="right", baseline="bottom", dx=-4, dy=-3)
        layers = [
            mark.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(y="level:Q"),
            words.encode(x="step:Q", y="level:Q", text="name:N"),
            alt.Chart(frame).mark_line(strokeWidth=2).encode(**look),
            alt.Chart(frame).mark_point(filled=True, size=30).encode(**look, tooltip=tooltip),
        ]
        return alt.layer(*layers).properties(width=270, height=240, title=alt.TitleParams(heading, fontSize=13))

    low, high = min(floor, *(row["score"] for row in forecasting)), max(s for r in forecasting for _, s in r["curve"])
    ticks = [x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if 0.8 * low <= x <= 1.25 * high]
    error = alt.Y(
        "score:Q",
        title="squared error, lower is better",
        scale=alt.Scale(type="log", domain=[0.8 * low, 1.25 * high], nice=False),
        axis=alt.Axis(values=ticks, format="~g"),
    )
    accuracy = alt.Y(
        "score:Q",
        title="accuracy, higher is better",
        scale=alt.Scale(domain=[0, 1.02], nice=False),
        axis=alt.Axis(format=".0%", tickCount=5),
    )
    chart: alt.HConcatChart = alt.hconcat(
        panel(forecasting, error, floor, "noise: nobody is below", "Forecasting"),
        panel(recall, accuracy, blind, "without the question", "Recall"),
        spacing=30,
    )
    titled: alt.HConcatChart = chart.properties(title=title)
    return titled.add_params(only)
