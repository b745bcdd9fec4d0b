"""Figures of the chapter ``circuits/circuit-reuse``: pure functions from scores to charts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd

from attnlab.circuits.circuit_reuse import Repair
from attnlab.circuits.model import Node
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.scores import Scores
from attnlab.claims import bootstrap_mean
from attnlab.figures.palette import BOTH, CONTROL, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin

FIRST, SECOND, CONTROL_TASK = "IOI", "Colored Objects", "Greater-than"
STATES = ["both tasks", "IOI only", "other only", "neither"]


def head_frame(maps: Mapping[str, Scores]) -> pd.DataFrame:
    """One row a head: ``head, layer, h`` and, per task, its ``score`` and its rank by absolute score (1 = strongest)."""
    frame: pd.DataFrame | None = None
    for task, scores in maps.items():
        grid = scores.grid()
        rank = (-np.abs(grid)).ravel().argsort(kind="stable").argsort().reshape(grid.shape) + 1
        rows = [
            {
                "head": f"{la}.{h}",
                "layer": la,
                "h": h,
                f"score {task}": round(float(grid[la, h]), 4),
                f"rank {task}": int(rank[la, h]),
            }
            for la in range(grid.shape[0])
            for h in range(grid.shape[1])
        ]
        frame = pd.DataFrame(rows) if frame is None else frame.merge(pd.DataFrame(rows), on=["head", "layer", "h"])
    if frame is None:
        raise ValueError("maps is empty; give one Scores a task")
    return frame


def attention_frame(attention: Mapping[str, Mapping[Node, Mapping[str, np.ndarray]]]) -> pd.DataFrame:
    """Mean attention from END, one row a head, task and named position."""
    return pd.DataFrame(
        [
            {"head": str(node), "task": task, "to": to, "attention": round(float(values.mean()), 3)}
            for task, heads in attention.items()
            for node, positions in heads.items()
            for to, values in positions.items()
        ]
    )


def reuse_map(heads: pd.DataFrame, attention: pd.DataFrame, k: int = 27, picked: str = "23.3") -> alt.VConcatChart:
    """Two linked maps of all heads, a slider for how many count as "in the circuit", and where the clicked head looks.

    ``heads`` is a :func:`head_frame` of the three tasks, ``attention`` an :func:`attention_frame`. A head in the top ``k`` of
    both shown tasks is purple, of one alone blue or red. The menu swaps the second task for the control.
    """
    n = len(heads)
    top = alt.param("k", value=k, bind=alt.binding_range(min=1, max=n // 5, step=1, name="heads in each circuit: "))
    other = alt.param(
        "other", value=SECOND, bind=alt.binding_select(options=[SECOND, CONTROL_TASK], name="compare IOI with: ")
    )
    pick = alt.selection_point("pick", fields=["head"], value=[{"head": picked}], on="click", toggle=False, empty=False)
    hover = alt.selection_point("hover", fields=["head"], on="pointerover", empty=False, clear="pointerout")
    table = (
        alt.Chart(heads)
        .transform_calculate(
            mine=f"datum['rank {FIRST}'] <= k",
            theirs=f"(other == '{SECOND}' ? datum['rank {SECOND}'] : datum['rank {CONTROL_TASK}']) <= k",
            second=f"other == '{SECOND}' ? datum['score {SECOND}'] : datum['score {CONTROL_TASK}']",
        )
        .transform_calculate(
            state="datum.mine ? (datum.theirs ? 'both tasks' : 'IOI only') : (datum.theirs ? 'other only' : 'neither')"
        )
    )
    colour = alt.Color(
        "state:N",
        scale=alt.Scale(domain=STATES, range=[BOTH, SOFTMAX, NEGATIVE, CONTROL]),
        legend=alt.Legend(title=None, orient="top", columns=2),
    )

    def heat(which: str, title: str, axis: bool) -> Any:
        here = ["both tasks", which]
        lit = " || ".join(f"datum.state == '{state}'" for state in here)
        cells = table.mark_rect(stroke=None, cornerRadius=2).encode(
            x=alt.X("h:O", title="head", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
            y=alt.Y(
                "layer:O",
                title="layer" if axis else None,
                sort="descending",
                axis=alt.Axis(values=[0, 5, 10, 15, 20, 25, 29], ticks=False, domain=False) if axis else None,
            ),
            color=colour,
            opacity=alt.condition(lit, alt.value(1.0), alt.value(0.13)),
            tooltip=[
                alt.Tooltip("head:N", title="head"),
                alt.Tooltip(f"score {FIRST}:Q", title=FIRST, format="+.3f"),
                alt.Tooltip(f"score {SECOND}:Q", title=SECOND, format="+.3f"),
                alt.Tooltip(f"score {CONTROL_TASK}:Q", title=CONTROL_TASK, format="+.3f"),
            ],
        )
        frame = (
            table.mark_rect(fill=None, strokeWidth=2.5, cornerRadius=2)
            .encode(x="h:O", y=alt.Y("layer:O", sort="descending"), stroke=alt.value("currentColor"))
            .transform_filter(
                "pick.head && indexof(pick.head, datum.head) >= 0 || hover.head && indexof(hover.head, datum.head) >= 0"
            )
        )
        layers: Any = alt.layer(cells.add_params(pick, hover), frame)
        return layers.properties(width=alt.Step(14), height=alt.Step(11), title=title)

    with (
        warnings.catch_warnings()
    ):  # altair warns that it makes the two maps share their selections; that is what we want
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection parameter")
        maps = alt.hconcat(heat("IOI only", FIRST, True), heat("other only", "the other task", False), spacing=14)
    counted = table.transform_filter("datum.state == 'both tasks'").transform_aggregate(shared="count()")
    line: dict[str, Any] = {"align": "left", "x": 0, "fontSize": 14}
    found = counted.transform_calculate(line="datum.shared + ' of ' + k + ' heads shared'").mark_text(
        **line, y=8, fontWeight="bold"
    )
    expected = counted.transform_calculate(
        line=f"'two random lists would share ' + format(k * k / {n}, '.1f')"
    ).mark_text(**line, y=26)
    shared = (found.encode(text="line:N") + expected.encode(text="line:N")).properties(width=250, height=36)
    bars = (
        alt.Chart(attention)
        .transform_filter(pick)
        .mark_bar(cornerRadius=2, height=13)
        .encode(
            x=alt.X(
                "attention:Q",
                title="attention from the last token",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=4),
            ),
            y=alt.Y("to:N", title=None, sort=None),
            color=alt.Color("task:N", scale=alt.Scale(domain=[FIRST, SECOND], range=[SOFTMAX, NEGATIVE]), legend=None),
            tooltip=["head:N", "task:N", "to:N", alt.Tooltip("attention:Q", format=".2f")],
        )
        .properties(
            width=150,
            height=110,
            title=alt.TitleParams(
                text=alt.expr("'Where head ' + (pick.head ? pick.head[0] : '?') + ' looks'"),
                subtitle="blue: IOI, orange: Colored Objects",
            ),
        )
    )
    stacked: alt.VConcatChart = alt.vconcat(maps, shared, bars, spacing=10)
    titled: alt.VConcatChart = stacked.properties(title="Which heads matter to both tasks?")
    return titled.add_params(top, other).resolve_scale(color="independent")


def overlap_chart(curves: Mapping[str, pd.DataFrame]) -> alt.LayerChart:
    """Heads shared against list length for each pair of tasks, over the band of random lists (mean to 99% quantile)."""
    lines = pd.concat([curve.assign(pair=pair) for pair, curve in curves.items()])
    first = next(iter(curves))
    largest = int(lines.k.max())
    x = alt.X(
        "k:Q",
        title="heads in each list",
        scale=alt.Scale(type="log", domain=[int(lines.k.min()), largest], nice=False),
        axis=alt.Axis(values=[3, 5, 8, 14, 27, 54, 135]),
    )
    y = alt.Y(
        "overlap:Q",
        title="heads in both lists",
        scale=alt.Scale(type="symlog", constant=2, domain=[0, largest]),
        axis=alt.Axis(values=[0, 2, 5, 10, 20, 50, 100]),
    )
    random = alt.Chart(lines[lines.pair == first])
    band = random.mark_area(opacity=0.25, color=CONTROL).encode(x=x, y=alt.Y("chance:Q"), y2="chance_high:Q")
    domain = list(curves)
    colour = alt.Color(
        "pair:N",
        scale=alt.Scale(domain=domain, range=[BOTH, CONTROL, NEGATIVE][: len(domain)]),
        legend=alt.Legend(title=None, orient="top", columns=1),
    )
    tooltip = [
        alt.Tooltip("pair:N", title="tasks"),
        alt.Tooltip("k:Q", title="heads in each list"),
        alt.Tooltip("overlap:Q", title="in both"),
        alt.Tooltip("chance:Q", title="in both by chance", format=".1f"),
        alt.Tooltip("chance_high:Q", title="99% of chance below"),
    ]
    drawn = alt.Chart(lines).encode(x=x, y=y, color=colour)
    marks = drawn.mark_line(strokeWidth=2.5) + drawn.mark_point(filled=True, size=60, opacity=1).encode(tooltip=tooltip)
    title = "Do the lists of two tasks agree more than random lists?"
    chart: alt.LayerChart = band + marks
    return chart.properties(width=300, height=250, title=title)


def repair_chart(outcome: Repair, named: Mapping[str, str], random: Sequence[int]) -> alt.LayerChart:
    """Three-way accuracy of each forced group with its 95% interval; every random group is a tick.

    ``named`` maps rows of ``outcome`` (by name) to labels, ``random`` lists the rows of the control.
    """
    rows = []
    for name, label in named.items():
        correct = 100 * outcome.choice[outcome.names.index(name)]
        low, high = bootstrap_mean(correct)
        rows.append({"forced": label, "accuracy": correct.mean(), "low": low, "high": high})
    label = f"{len(random)} random groups"
    ticks = pd.DataFrame([{"forced": label, "accuracy": 100 * outcome.choice[i].mean()} for i in random])
    table = pd.DataFrame(rows)
    order = [*table.forced, label]
    x = alt.X("accuracy:Q", title="three-way accuracy, percent", scale=alt.Scale(domain=[0, 100]))
    y = alt.Y("forced:N", title=None, sort=order, axis=alt.Axis(labelLimit=150))
    points = (
        alt.Chart(table)
        .mark_point(filled=True, size=110, color=OURS, opacity=1)
        .encode(x=x, y=y, tooltip=["forced:N", alt.Tooltip("accuracy:Q", format=".1f")])
    )
    spans = alt.Chart(table).mark_rule(strokeWidth=2.5, color=OURS).encode(x="low:Q", x2="high:Q", y=y)
    chance = (
        alt.Chart(pd.DataFrame({"accuracy": [100 / 3]}))
        .mark_rule(strokeDash=[4, 4], color=PAPER, strokeWidth=2)
        .encode(x="accuracy:Q")
    )
    strips = (
        alt.Chart(ticks)
        .mark_tick(color=CONTROL, thickness=2, height=16)
        .encode(x=x, y=y, tooltip=[alt.Tooltip("accuracy:Q", format=".1f")])
    )
    title = "Which heads, forced to look at the wrong colours, make the model right?"
    chart: alt.LayerChart = chance + spans + points + strips
    return chart.properties(width=200, height=30 * len(order), title=title)


def attention_row(words: Sequence[str], weights: np.ndarray, title: str | list[str]) -> alt.Chart:
    """Attention from the last token to every token of one prompt."""
    table = pd.DataFrame(
        {"token": [f"{i} {word!r}" for i, word in enumerate(words)], "attention": np.round(weights, 4)}
    )
    return (
        alt.Chart(table)
        .mark_bar(color=SOFTMAX, height=12)
        .encode(
            x=alt.X(
                "attention:Q",
                title="attention from the last token",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=4),
            ),
            y=alt.Y("token:N", sort=None, title=None, axis=alt.Axis(labelOverlap=False)),
            tooltip=["token:N", alt.Tooltip("attention:Q", format=".3f")],
        )
        .properties(width=190, height=17 * len(words), title=title)
    )


def prompt_explorer(pairs: Pairs, rows: Mapping[Node, Sequence[np.ndarray]], scores: Scores, k: int = 27) -> Twin:
    """Widgets to choose a prompt, a head and the threshold; shows where the head looks, its score and its rank.

    ``rows`` is what :func:`attnlab.circuits.attention_rows` returns for ``pairs``.
    """
    ranked = [str(node) for node in scores.top(len(scores.groups))]

    def look(prompt: int, head: str, top: int) -> alt.Chart:
        rank = ranked.index(head) + 1
        inside = "in" if rank <= top else "not in"
        title = [f"head {head}, score {scores.of(head):+.3f}", f"rank {rank}, {inside} the top {top}"]
        return attention_row(pairs.words(prompt), rows[Node.parse(head)][prompt], title).properties(
            description=f"Attention of head {head} from the last token to each token of the prompt {pairs.pairs[prompt].clean!r}."
        )

    return twin(
        look,
        prompt=ipywidgets.IntSlider(value=0, min=0, max=len(pairs) - 1, description="prompt"),
        head=ipywidgets.Dropdown(options=[str(node) for node in rows], description="head"),
        top=ipywidgets.IntSlider(value=k, min=1, max=54, description="threshold"),
    )
