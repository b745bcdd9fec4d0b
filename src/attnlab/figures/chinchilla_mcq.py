"""Figures of the chapter ``circuits/chinchilla-mcq``: where a head looks, what its queries and keys sort by, what a rank keeps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd
import torch

from attnlab.circuits.chinchilla_mcq import DirectEffects, gold_matrix, label_attention
from attnlab.circuits.chinchilla_mcq_study import PARTS, Small
from attnlab.circuits.scores import Scores
from attnlab.circuits.subspaces import compress, head_vectors
from attnlab.claims import bootstrap_mean
from attnlab.data.choices import LETTERS, WORDS
from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin

#: what the radio calls the conditions
SHOWN: Mapping[str, str] = {"ABCD": "A B C D", "shuffled": "shuffled", "random": "random letters"}
PART_COLOURS = {
    "queries": SOFTMAX,
    "keys": OURS,
    "queries and keys": BOTH,
    "values": NEGATIVE,
    "all three": CONTROL,
}


#: models of the figure with the heads to show of each
Chosen = Sequence[tuple[Small, Sequence[str]]]
#: what the points can be coloured by
COLOURINGS = ("place", "letter", "right or wrong")


def cell_frame(chosen: Chosen) -> pd.DataFrame:
    """Attention from END to each label by right line: one row a head, condition, right line and line looked at (from 1)."""
    return pd.DataFrame(
        [
            {"head": f"{small.family} {head}", "labels": shown} | cell
            for small, heads in chosen
            for condition, shown in SHOWN.items()
            for matrices in [matrix_of(small, condition)]
            for head in heads
            for cell in _cells(matrices[head])
        ]
    )


def _cells(matrix: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"right": right + 1, "line": line + 1, "attention": round(float(value), 3)}
        for (right, line), value in np.ndenumerate(matrix)
    ]


def matrix_of(small: Small, condition: str, ranks: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Where every head looks, by right line ``[k, k]``, with the correct-letter heads compressed if ``ranks`` are given."""
    sheet = small.sheets[condition]
    edits = compress(small.model, sheet, small.subspaces, ranks) if ranks else ()
    matrices = gold_matrix(label_attention(small.model, sheet, edits=edits), sheet.gold)
    return {str(node): matrices[node.layer, node.head] for node in small.model.spec.heads}


def point_frame(chosen: Chosen, prompts: int = 16) -> pd.DataFrame:
    """Queries at END and keys at labels along the first two directions that A to D in order gave, one row a vector.

    ``line`` is the line that a query asks for or that a key stands in, ``letter`` its label. The columns for :data:`COLOURINGS`
    run from 0 to 3 and give the colour.
    """
    rows: list[dict[str, Any]] = []
    for small, heads in chosen:
        for condition, shown in SHOWN.items():
            sheet = small.sheets[condition]
            keep = np.random.default_rng(0).permutation(len(sheet))[:prompts].tolist()
            tables = head_vectors(small.model, sheet, heads)
            for head in heads:
                spaces = small.subspaces[head]
                query = spaces["q"].coordinates(tables[head]["q"], 2)  # [N, 2]
                key = spaces["k"].coordinates(tables[head]["k"], 2)  # [N, k, 2]
                common = {"head": f"{small.family} {head}", "labels": shown}
                for number in keep:
                    gold = int(sheet.gold[number])
                    letters = [WORDS[token - 1] for token in sheet.labels[number].tolist()]
                    points = [("query", gold, query[number])]
                    points += [("key", line, key[number, line]) for line in range(len(letters))]
                    rows += [
                        common | {"kind": kind, "prompt": number} | _point(at, line, gold, letters, condition)
                        for kind, line, at in points
                    ]
    return pd.DataFrame(rows)


def _point(at: torch.Tensor, line: int, gold: int, letters: Sequence[str], condition: str) -> dict[str, Any]:
    last = len(LETTERS) - 1 if condition == "random" else len(letters) - 1
    return {
        "x": round(float(at[0]), 2),
        "y": round(float(at[1]), 2),
        "line": line + 1,
        "letter": letters[line],
        "place": round(3 * line / (len(letters) - 1), 2),
        "by letter": round(3 * LETTERS.index(letters[line]) / last, 2),
        "right or wrong": 3.0 if line == gold else 0.0,
    }


def rank_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What :func:`attnlab.circuits.chinchilla_mcq_study.rank_rows` made, with the labels as the figure names them."""
    table = pd.DataFrame(rows)
    named = table.assign(labels=table.condition.map(SHOWN), accuracy=table.accuracy.round(1))
    return named[["model", "labels", "part", "rank", "accuracy"]]


def letter_map(cells: pd.DataFrame, points: pd.DataFrame, ranks: pd.DataFrame) -> alt.VConcatChart:
    """The chapter's figure: one head's matrix, its queries and keys, and accuracy against rank, under three kinds of labels.

    Radios choose the labels and what colours the points; a menu chooses the head. A click on a query or key lights up its prompt.
    """
    heads, kinds = list(dict.fromkeys(cells["head"])), list(SHOWN.values())
    labels = alt.param("labels", value=kinds[0], bind=alt.binding_radio(options=kinds, name="labels: "))
    colour = alt.param(
        "colour", value=COLOURINGS[0], bind=alt.binding_radio(options=list(COLOURINGS), name="colour points by: ")
    )
    head = alt.param("head", value=heads[0], bind=alt.binding_select(options=heads, name="head: "))
    mine = "datum.labels == labels && datum.head == head"
    matrix = _matrix(alt.Chart(cells).transform_filter(mine)).properties(
        width=130, height=130, title=_small(alt.expr("'Labels that head ' + head + ' looks at'"))
    )
    picked = alt.selection_point("picked", fields=["prompt"], on="click", empty=True, clear="dblclick")

    def scatter(kind: str, title: str) -> Any:
        return (
            alt.Chart(points)
            .transform_filter(f"{mine} && datum.kind == '{kind}'")
            .transform_calculate(shade="colour == 'letter' ? datum['by letter'] : datum[colour]")
            .mark_point(filled=True, size=45, stroke="currentColor", strokeWidth=0.3)
            .encode(
                x=alt.X("x:Q", title="direction 1", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=3)),
                y=alt.Y("y:Q", title="direction 2", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4)),
                color=alt.Color("shade:Q", scale=alt.Scale(domain=[0, 3], scheme="viridis"), legend=None),
                opacity=alt.condition(picked, alt.value(0.9), alt.value(0.06)),
                tooltip=["line:O", "letter:N", "prompt:Q"],
            )
            .properties(width=105, height=130, title=_small(title))
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection parameter")
        clouds = alt.hconcat(
            scatter("query", "queries at the end").add_params(picked),
            scatter("key", "keys at the labels").add_params(picked),
            spacing=8,
        )
    scale = alt.Scale(domain=list(PART_COLOURS), range=list(PART_COLOURS.values()))
    kept = (
        alt.Chart(ranks)
        .transform_filter("datum.labels == labels && indexof(head, datum.model) == 0")
        .mark_line(point=True, opacity=0.9)
        .encode(
            x=alt.X("rank:Q", title="directions kept", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("accuracy:Q", title="right answers, percent", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("part:N", scale=scale, legend=alt.Legend(title=None, orient="top", columns=2)),
            tooltip=["part:N", "rank:Q", alt.Tooltip("accuracy:Q", format=".1f")],
        )
        .properties(width=240, height=140, title=_small("Answers when the heads are compressed"))
    )
    stacked: alt.VConcatChart = alt.vconcat(matrix, clouds, kept, spacing=12)
    titled: alt.VConcatChart = stacked.properties(title="What does the head know?")
    return titled.add_params(labels, colour, head).resolve_scale(color="independent")


def _matrix(chart: alt.Chart) -> alt.Chart:
    """Attention by right line and line looked at."""
    return chart.mark_rect(stroke="currentColor", strokeOpacity=0.25).encode(
        x=alt.X("line:O", title="line looked at", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("right:O", title="right line"),
        color=alt.Color(
            "attention:Q",
            scale=alt.Scale(domain=[0, 1], scheme="blues"),
            legend=alt.Legend(title="attention", format="%", values=[0, 0.5, 1], gradientLength=90),
        ),
        tooltip=["right:O", "line:O", alt.Tooltip("attention:Q", format=".2f")],
    )


def looks_chart(rows: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Where the correct-letter heads of the taught model look by right line, mean over the models; numbers in the cells.

    Args:
        rows: of ``records/chinchilla-mcq-taught.json``, each with ``looks`` [k, k].
    """
    cells = pd.DataFrame(_cells(np.mean([row["looks"] for row in rows], axis=0)))
    numbers = (
        alt.Chart(cells)
        .mark_text(fontSize=12)
        .encode(
            x="line:O",
            y="right:O",
            text=alt.Text("attention:Q", format=".0%"),
            color=alt.condition("datum.attention > 0.4", alt.value("white"), alt.value("black")),
        )
    )
    chart: alt.LayerChart = _matrix(alt.Chart(cells)) + numbers
    return chart.properties(width=200, height=200, title="The taught SmolLM2 looks at the right label, or before it")


def _small(text: Any) -> alt.TitleParams:
    return alt.TitleParams(text=text, fontSize=13)


def histogram(said: Mapping[str, Sequence[int]], options: int = 4) -> alt.LayerChart:
    """How often each line is chosen, in percent, one row of bars a way of asking; the truth is level by construction."""
    rows = [
        {"asked": name, "line": line + 1, "percent": 100 * float(np.mean(np.asarray(chosen) == line))}
        for name, chosen in said.items()
        for line in range(options)
    ]
    bars = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(cornerRadius=2)
        .encode(
            x=alt.X("line:O", title="line that is chosen", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("asked:N", sort=list(said)),
            y=alt.Y("percent:Q", title="of the answers, percent", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color(
                "asked:N",
                sort=list(said),
                scale=alt.Scale(domain=list(said), range=[SOFTMAX, LINEAR, OURS][: len(said)]),
                legend=alt.Legend(title=None, orient="top", columns=1),
            ),
            tooltip=["asked:N", "line:O", alt.Tooltip("percent:Q", format=".0f")],
        )
    )
    level = alt.Chart(pd.DataFrame({"percent": [100 / options]})).mark_rule(
        strokeDash=[4, 4], color=PAPER, strokeWidth=2
    )
    chart: alt.LayerChart = bars + level.encode(y="percent:Q")
    return chart.properties(width=260, height=190, title="Which line does SmolLM2 choose?")


def effects_frame(direct: DirectEffects, total: Scores) -> pd.DataFrame:
    """Direct and total effect of the heads and MLPs that ``total`` has, in logits: ``node, direct, low, high, total``.

    A total effect is the fall of the metric when the node's output at END comes from another prompt.
    """
    rows = []
    for group, change in zip(total.groups, total.effect, strict=True):
        node = str(group[0])
        own = direct.values[direct.nodes.index(node)]
        low, high = bootstrap_mean(own)
        rows.append({"node": node, "direct": own.mean(), "low": low, "high": high, "total": -change.mean()})
    return pd.DataFrame(rows).round(3)


def effects_chart(frame: pd.DataFrame, letter_heads: Sequence[str]) -> alt.LayerChart:
    """Total against direct effect, one point a node; correct-letter heads are coloured."""
    kinds = ["correct-letter head", "other head", "MLP"]
    frame = frame.assign(
        kind=[
            kinds[0] if node in letter_heads else kinds[2] if node.startswith("m") else kinds[1] for node in frame.node
        ]
    )
    base = alt.Chart(frame)
    x = alt.X("direct:Q", title="direct effect, logits")
    y = alt.Y("total:Q", title="total effect, logits")
    points = base.mark_point(filled=True, size=110, opacity=0.9).encode(
        x=x,
        y=y,
        color=alt.Color(
            "kind:N",
            scale=alt.Scale(domain=kinds, range=[OURS, CONTROL, LINEAR]),
            legend=alt.Legend(title=None, orient="top", columns=2),
        ),
        tooltip=["node:N", alt.Tooltip("direct:Q", format=".2f"), alt.Tooltip("total:Q", format=".2f")],
    )
    names = (
        base.transform_filter("abs(datum.direct) > 0.5 || abs(datum.total) > 0.5")
        .mark_text(align="left", dx=8, dy=-6)
        .encode(x=x, y=y, text="node:N")
    )
    top = float(max(frame.direct.max(), frame.total.max()))
    diagonal = (
        alt.Chart(pd.DataFrame({"v": [0.0, top]})).mark_line(strokeDash=[4, 4], color=CONTROL).encode(x="v:Q", y="v:Q")
    )
    chart: alt.LayerChart = diagonal + points + names
    return chart.properties(width=270, height=230, title="Who writes the letter, and who acts through others?")


def compression_explorer(small: Small) -> Twin:
    """Widgets for labels, part and rank; shows where the strongest correct-letter head looks then, and the accuracy."""
    head = small.heads[0]
    size = small.model.spec.d_head

    def look(condition: str, part: str, rank: int) -> alt.Chart:
        ranks = dict.fromkeys(PARTS[part], rank)
        matrix = matrix_of(small, condition, ranks)[head]
        accuracy = small.accuracy(condition, None, ranks)
        chart = _matrix(alt.Chart(pd.DataFrame(_cells(matrix))))
        title = [
            f"head {head}: {part} in {rank} of {size} directions",
            f"{accuracy:.0f} percent right, labels: {SHOWN[condition]}",
        ]
        return chart.properties(width=150, height=150, title=title).properties(
            description=f"Attention of head {head} to the labels by right line, {part} in {rank} directions, {accuracy:.0f} percent right."
        )

    return twin(
        look,
        condition=ipywidgets.RadioButtons(
            options=[(shown, name) for name, shown in SHOWN.items()], value="random", description="labels"
        ),
        part=ipywidgets.Dropdown(options=list(PARTS), value="queries and keys", description="part"),
        rank=ipywidgets.IntSlider(value=2, min=0, max=6, description="rank"),
    )
