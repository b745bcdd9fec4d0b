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

from attnlab.circuits.chinchilla_mcq import DirectEffects, gold_matrix
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


def cell_frame(small: Small, heads: Sequence[str]) -> pd.DataFrame:
    """Attention from END to each label by right line: one row a head, condition, right line and line looked at (from 1)."""
    rows = []
    for condition, shown in SHOWN.items():
        sheet = small.sheets[condition]
        matrices = matrix_of(small, condition)
        lines = range(sheet.labels.shape[1])
        rows += [
            {
                "head": head,
                "labels": shown,
                "right": right + 1,
                "line": line + 1,
                "attention": round(float(matrices[head][right, line]), 3),
            }
            for head in heads
            for right in lines
            for line in lines
        ]
    return pd.DataFrame(rows)


def matrix_of(small: Small, condition: str, ranks: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Where every head looks, by right line ``[k, k]``, with the correct-letter heads compressed if ``ranks`` are given."""
    sheet, model = small.sheets[condition], small.model
    edits = compress(model, sheet, small.subspaces, ranks) if ranks else ()
    with torch.no_grad():
        pattern = model.run(sheet.tokens, edits, capture=("pattern",)).stack("pattern")[:, :, :, -1]  # [L, N, H, T]
    index = sheet.label_at[None, :, None].expand(len(pattern), -1, pattern.shape[2], -1)
    matrices = gold_matrix(pattern.gather(-1, index).transpose(1, 2).double().numpy(), sheet.gold)
    return {str(node): matrices[node.layer, node.head] for node in model.spec.heads}


def point_frame(small: Small, heads: Sequence[str], prompts: int = 32) -> pd.DataFrame:
    """Queries at END and keys at labels along the first two directions that A to D in order gave, one row a vector.

    ``line`` is the line that a query asks for or that a key stands in, ``letter`` its label; ``by place`` and ``by letter`` run
    from 0 to 3 and give the colour.
    """
    rows: list[dict[str, Any]] = []
    for condition, shown in SHOWN.items():
        sheet = small.sheets[condition]
        keep = np.random.default_rng(0).permutation(len(sheet))[:prompts]
        last = 3.0 / (len(LETTERS) - 1 if condition == "random" else sheet.labels.shape[1] - 1)
        tables = head_vectors(small.model, sheet, heads)
        for head in heads:
            spaces = small.subspaces[head]
            query = spaces["q"].coordinates(tables[head]["q"], 2)  # [N, 2]
            key = spaces["k"].coordinates(tables[head]["k"], 2)  # [N, k, 2]
            for number in keep.tolist():
                gold = int(sheet.gold[number])
                vectors = [("query", gold, query[number])]
                vectors += [("key", line, key[number, line]) for line in range(key.shape[1])]
                for kind, line, (x, y) in vectors:
                    letter = WORDS[int(sheet.labels[number, line]) - 1]
                    rows.append(
                        {
                            "head": head,
                            "labels": shown,
                            "kind": kind,
                            "prompt": number,
                            "x": round(float(x), 2),
                            "y": round(float(y), 2),
                            "line": line + 1,
                            "letter": letter,
                            "by place": float(line) * 3.0 / (key.shape[1] - 1),
                            "by letter": round(LETTERS.index(letter) * last, 2),
                        }
                    )
    return pd.DataFrame(rows)


def rank_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Mean, lowest and highest accuracy over seeds against rank, one row a condition, part and rank."""
    table = pd.DataFrame(rows)
    table["labels"] = table.condition.map(SHOWN)
    grouped = table.groupby(["labels", "part", "rank"], sort=False).accuracy
    return grouped.agg(accuracy="mean", low="min", high="max").round(1).reset_index()


def letter_map(cells: pd.DataFrame, points: pd.DataFrame, ranks: pd.DataFrame) -> alt.VConcatChart:
    """The chapter's figure: one head's matrix, its queries and keys, and accuracy against rank, under three kinds of labels.

    Radios choose the labels and what colours the points; a menu chooses the head. A click on a query or key lights up its prompt.
    """
    heads = list(dict.fromkeys(cells["head"]))
    labels = alt.param(
        "labels",
        value=next(iter(SHOWN.values())),
        bind=alt.binding_radio(options=list(SHOWN.values()), name="labels: "),
    )
    colour = alt.param(
        "colour", value="by place", bind=alt.binding_radio(options=["by place", "by letter"], name="colour points: ")
    )
    head = alt.param("head", value=heads[0], bind=alt.binding_select(options=heads, name="head: "))
    now = "datum.labels == labels"
    mine = f"{now} && datum.head == head"
    lines = int(cells["line"].max())

    matrix = (
        alt.Chart(cells)
        .transform_filter(mine)
        .mark_rect(stroke="currentColor", strokeOpacity=0.25)
        .encode(
            x=alt.X("line:O", title="line looked at", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("right:O", title="right line"),
            color=alt.Color(
                "attention:Q",
                scale=alt.Scale(domain=[0, 1], scheme="blues"),
                legend=alt.Legend(title="attention", format="%", values=[0, 0.5, 1], gradientLength=90),
            ),
            tooltip=["head:N", "right:O", "line:O", alt.Tooltip("attention:Q", format=".2f")],
        )
        .properties(
            width=34 * lines,
            height=34 * lines,
            title=alt.TitleParams(text=alt.expr("'Where head ' + head + ' looks, labels: ' + labels"), fontSize=13),
        )
    )
    picked = alt.selection_point("picked", fields=["prompt"], on="click", empty=True, clear="dblclick")

    def scatter(kind: str, title: str) -> Any:
        return (
            alt.Chart(points)
            .transform_filter(f"{mine} && datum.kind == '{kind}'")
            .transform_calculate(shade="datum[colour]")
            .mark_point(filled=True, size=45, stroke="currentColor", strokeWidth=0.3)
            .encode(
                x=alt.X("x:Q", title="direction 1", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=3)),
                y=alt.Y("y:Q", title="direction 2", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4)),
                color=alt.Color("shade:Q", scale=alt.Scale(domain=[0, 3], scheme="viridis"), legend=None),
                opacity=alt.condition(picked, alt.value(0.9), alt.value(0.06)),
                tooltip=["line:O", "letter:N", "prompt:Q"],
            )
            .properties(width=112, height=130, title=alt.TitleParams(text=title, fontSize=13))
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection parameter")
        clouds = alt.hconcat(
            scatter("query", "queries at the end").add_params(picked),
            scatter("key", "keys at the labels").add_params(picked),
            spacing=10,
        )
    curves = alt.Chart(ranks).transform_filter(now)
    scale = alt.Scale(domain=list(PART_COLOURS), range=list(PART_COLOURS.values()))
    x = alt.X("rank:Q", title="directions kept", axis=alt.Axis(tickMinStep=1))
    band = curves.mark_area(opacity=0.15).encode(x=x, y="low:Q", y2="high:Q", color=alt.Color("part:N", scale=scale))
    line = curves.mark_line(point=True).encode(
        x=x,
        y=alt.Y("accuracy:Q", title="right answers, percent", scale=alt.Scale(domain=[0, 100])),
        color=alt.Color("part:N", scale=scale, legend=alt.Legend(title=None, orient="top", columns=2)),
        tooltip=["part:N", "rank:Q", alt.Tooltip("accuracy:Q", format=".1f"), "low:Q", "high:Q"],
    )
    kept = (band + line).properties(
        width=250, height=150, title=alt.TitleParams(text="What is left when the heads are compressed", fontSize=13)
    )
    stacked: alt.VConcatChart = alt.vconcat(matrix, clouds, kept, spacing=14)
    titled: alt.VConcatChart = stacked.properties(title="Does the head know the place or the letter?")
    return titled.add_params(labels, colour, head).resolve_scale(color="independent")


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
        lines = len(matrix)
        table = pd.DataFrame(
            [
                {"right": g + 1, "line": i + 1, "attention": round(float(matrix[g, i]), 3)}
                for g in range(lines)
                for i in range(lines)
            ]
        )
        chart = (
            alt.Chart(table)
            .mark_rect(stroke="currentColor", strokeOpacity=0.25)
            .encode(
                x=alt.X("line:O", title="line looked at", axis=alt.Axis(labelAngle=0)),
                y=alt.Y("right:O", title="right line"),
                color=alt.Color(
                    "attention:Q", scale=alt.Scale(domain=[0, 1], scheme="blues"), legend=alt.Legend(title="attention")
                ),
                tooltip=["right:O", "line:O", alt.Tooltip("attention:Q", format=".2f")],
            )
        )
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
