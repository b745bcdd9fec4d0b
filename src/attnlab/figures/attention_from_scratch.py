"""Figures of the chapter ``foundations/attention-from-scratch``: weights of real tokens, spread, cost, and the map of terms."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt
import ipywidgets
import pandas as pd
import torch

from attnlab import papers
from attnlab.figures.palette import BOTH, CONTROL, LINEAR, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin

MASKS = {
    "causal": "datum.s <= datum.t",
    "last four tokens": "datum.s <= datum.t && datum.s > datum.t - 4",
    "none": "true",
}
PIECE_COLOURS = {"prefill": SOFTMAX, "fused prefill": BOTH, "decode": OURS, "projections": CONTROL}

# -------------------------------------------------------------------------------------------- weights of a real sentence


def score_frame(maps: torch.Tensor, heads: Mapping[str, str]) -> pd.DataFrame:
    """One row a pair of tokens and head: ``head`` (its label), ``t, s`` and ``score`` before any mask.

    Args:
        maps: [L, H, T, T].
        heads: labels by head, such as ``{"16.0": "16.0: the token before"}``.
    """
    rows = []
    for head, label in heads.items():
        layer, number = map(int, head.split("."))
        for t, line in enumerate(maps[layer, number].tolist()):
            rows += [{"head": label, "t": t, "s": s, "score": round(score, 2)} for s, score in enumerate(line)]
    return pd.DataFrame(rows)


def weights_figure(
    maps: torch.Tensor,
    words: Sequence[str],
    heads: Mapping[str, str],
    *,
    query: int = -1,
    mask: str = "causal",
    sharpness: float = 1.0,
    bound: bool = True,
) -> alt.VConcatChart:
    """The pattern of a head over a sentence and the row of one query; head, mask and sharpness can be chosen.

    The softmax runs in the chart: scores times ``sharpness``, minus the largest of the row, exponentials, divided by their sum.

    Args:
        maps, heads: as for :func:`score_frame`; the first head is shown at first.
        words: of the T tokens.
        query: whose row is shown at first; negative numbers count from the end.
        sharpness: factor of the scores; 1 is the trained model.
        bound: offer controls below the chart; without them the arguments hold.
    """
    labels = list(heads.values())

    def choice(name: str, value: Any, binding: Any) -> Any:
        return alt.param(name, value=value, bind=binding) if bound else alt.param(name, value=value)

    head = choice("head", labels[0], alt.binding_select(options=labels, name="head "))
    seen = choice("mask", mask, alt.binding_select(options=list(MASKS), name="mask "))
    sharp = choice("sharpness", sharpness, alt.binding_range(min=0, max=4, step=0.25, name="sharpness "))
    start = query % len(words)
    pick = alt.selection_point(
        "pick", fields=["t"], value=[{"t": start}], on="click", toggle=False, empty=False, clear=False
    )
    allowed = " : ".join(f"mask == '{name}' ? ({test})" for name, test in MASKS.items()) + " : true"
    base: Any = (
        alt.Chart(score_frame(maps, heads))
        .transform_filter("datum.head == head")
        .transform_calculate(x=f"({allowed}) ? sharpness * datum.score : -1e9")
        .transform_joinaggregate(top="max(x)", groupby=["t"])
        .transform_calculate(e="datum.x < -1e8 ? 0 : exp(datum.x - datum.top)")
        .transform_joinaggregate(all="sum(e)", groupby=["t"])
        .transform_calculate(weight="datum.e / datum.all", key=_word("s", words), reader=_word("t", words))
        .transform_calculate(nats="datum.weight > 0 ? -datum.weight * log(datum.weight) : 0")
    )
    chart: alt.VConcatChart = alt.vconcat(
        _row_in_words(base), _bars(base, words), _grid(base, words, pick), spacing=6
    ).add_params(head, seen, sharp)
    return chart.properties(title="Where does a token look?").resolve_scale(color="independent")


def _word(field: str, words: Sequence[str]) -> str:
    """An expression for the word at ``datum.<field>``."""
    return f"{[word.strip() or '␣' for word in words]!r}[datum.{field}]"


def _tokens(channel: Any, field: str, words: Sequence[str], title: str, **axis: Any) -> Any:
    look = alt.Axis(labelExpr=_word("value", words), grid=False, labelOverlap=False, ticks=False, **axis)
    return channel(f"{field}:O", title=title, axis=look)


_PICKED = "isArray(pick.t) && datum.t == pick.t[0]"


def _row_in_words(base: Any) -> alt.Chart:
    chart: alt.Chart = (
        base.transform_filter(_PICKED)
        .transform_aggregate(nats="sum(nats)", largest="argmax(weight)", groupby=["reader"])
        .transform_calculate(
            words="['“' + datum.reader + '” reads most from “' + datum.largest.key + '”: ' + format(datum.largest.weight, '.0%'),"
            "'effective keys: ' + format(exp(datum.nats), '.1f')]"
        )
        .mark_text(align="left", baseline="top", fontSize=13, lineHeight=18)
        .encode(x=alt.value(0), y=alt.value(0), text="words:N")
        .properties(width=420, height=38)
    )
    return chart


def _bars(base: Any, words: Sequence[str]) -> alt.Chart:
    chart: alt.Chart = (
        base.transform_filter(_PICKED)
        .mark_bar(color=SOFTMAX)
        .encode(
            x=_tokens(alt.X, "s", words, "", labels=False, domain=False),
            y=alt.Y("weight:Q", title="weight", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(values=[0, 0.5, 1])),
            tooltip=[alt.Tooltip("key:N"), alt.Tooltip("score:Q"), alt.Tooltip("weight:Q", format=".3f")],
        )
        .properties(width=420, height=90)
    )
    return chart


def _grid(base: Any, words: Sequence[str], pick: Any) -> alt.LayerChart:
    cells = base.encode(
        x=_tokens(alt.X, "s", words, "key: the token that is read", labelAngle=-50, domain=False),
        y=_tokens(alt.Y, "t", words, "query: the token that reads", domain=False),
    )
    weight = alt.Color(
        "weight:Q",
        title="weight",
        scale=alt.Scale(domain=[0, 1], range=["#0072B20A", SOFTMAX]),
        legend=None,
    )
    tooltip = [
        alt.Tooltip("reader:N", title="query"),
        alt.Tooltip("key:N"),
        alt.Tooltip("score:Q"),
        alt.Tooltip("weight:Q", format=".3f"),
    ]
    chart: Any = alt.layer(
        cells.mark_rect(cursor="pointer").encode(color=weight, tooltip=tooltip).add_params(pick),
        cells.transform_filter(_PICKED).mark_rect(filled=False, stroke=LINEAR, strokeWidth=2, tooltip=False),
    )
    return chart.properties(width=420, height=300)


def weights_explorer(maps: torch.Tensor, words: Sequence[str]) -> Twin:
    """Controls over every head of the model: layer, head, query, mask, sharpness."""
    layers, heads = maps.shape[:2]
    return twin(
        partial(_one_head, maps, tuple(words)),
        alt="The attention pattern of one head over the sentence, and the weights of one query above it.",
        caption="Walk through the layers of one head. Which heads leave the first token when the mask is taken away?",
        layer=ipywidgets.IntSlider(value=layers // 2, min=0, max=layers - 1, description="layer"),
        head=ipywidgets.IntSlider(value=0, min=0, max=heads - 1, description="head"),
        query=ipywidgets.Dropdown(
            options=[(f"{t} {word.strip()}", t) for t, word in enumerate(words)],
            value=len(words) - 1,
            description="query",
        ),
        mask=ipywidgets.Dropdown(options=list(MASKS), description="mask"),
        sharpness=ipywidgets.FloatSlider(value=1.0, min=0.0, max=4.0, step=0.25, description="sharpness"),
    )


def _one_head(
    maps: torch.Tensor, words: Sequence[str], layer: int, head: int, query: int, mask: str, sharpness: float
) -> alt.VConcatChart:
    name = f"{layer}.{head}"
    chart = weights_figure(maps, words, {name: name}, query=query, mask=mask, sharpness=sharpness, bound=False)
    return chart.properties(title=f"Head {name}")


# ------------------------------------------------------------------------------------------------------ spread and cost


def spread_chart(table: pd.DataFrame, keys: int) -> alt.LayerChart:
    """Effective keys against the width of a head, with and without the scale; a rule stands at ``keys`` e^(-1/2)."""
    colour = alt.Color(
        "scale:N",
        scale=alt.Scale(domain=["K ** -0.5", "none"], range=[SOFTMAX, CONTROL]),
        legend=alt.Legend(title="scale", orient="top", symbolOpacity=1),
    )
    base = alt.Chart(table).encode(
        x=alt.X(
            "width:Q",
            title="width K of a head",
            scale=alt.Scale(type="log", base=2),
            axis=alt.Axis(values=sorted(set(table.width))),
        ),
        y=alt.Y("effective:Q", title=f"effective keys, of {keys}", scale=alt.Scale(domain=[0, keys], nice=False)),
        color=colour,
        tooltip=[
            "width:Q",
            "scale:N",
            *(alt.Tooltip(f"{name}:Q", format=".3g") for name in ("std", "effective", "slope")),
        ],
    )
    law = alt.Chart(
        pd.DataFrame({"y": [keys * 2.718281828**-0.5], "x": [max(table.width)], "name": ["predicted: N e^(−1/2)"]})
    )
    chart: Any = alt.layer(
        law.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(y="y:Q"),
        law.mark_text(align="right", baseline="bottom", dy=-9).encode(x="x:Q", y="y:Q", text="name:N"),
        base.mark_line(strokeWidth=2.5),
        base.mark_point(filled=True, size=50, opacity=1),
    )
    return chart.properties(title="What does softmax make of wide heads?", width=420, height=230)


def cost_chart(times: pd.DataFrame) -> alt.LayerChart:
    """Milliseconds against tokens for each piece of a layer, both logarithmic, with guides of slope 1 and 2."""
    lengths = sorted(set(times.length))
    low, high = float(times.ms.min()), float(times.ms.max())
    guides = pd.DataFrame(
        [
            {"guide": f"slope {slope}", "length": n, "ms": 0.4 * low * (n / lengths[0]) ** slope}
            for slope in (1, 2)
            for n in lengths
        ]
    )
    guides = guides[guides.ms <= 1.5 * high]
    x = alt.X(
        "length:Q", title="tokens", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=lengths[::2], format=",")
    )
    y = alt.Y("ms:Q", title="milliseconds", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=5))
    colour = alt.Color(
        "piece:N",
        scale=alt.Scale(domain=list(PIECE_COLOURS), range=list(PIECE_COLOURS.values())),
        legend=alt.Legend(title=None, orient="top", columns=2, symbolOpacity=1),
    )
    base = alt.Chart(times).encode(x=x, y=y, color=colour)
    tooltip = ["piece:N", alt.Tooltip("length:Q", format=","), alt.Tooltip("ms:Q", format=".3g")]
    ends = guides.loc[guides.groupby("guide").length.idxmax()]
    chart: Any = alt.layer(
        alt.Chart(guides).mark_line(strokeDash=[3, 4], color=CONTROL, opacity=0.7).encode(x=x, y=y, detail="guide:N"),
        alt.Chart(ends).mark_text(align="right", baseline="bottom", dx=-6, dy=-4).encode(x=x, y=y, text="guide:N"),
        base.mark_line(strokeWidth=2.5),
        base.mark_point(filled=True, size=45, opacity=1).encode(tooltip=tooltip),
    )
    return chart.properties(title="What does twice the text cost?", width=420, height=280)


# ------------------------------------------------------------------------------------------------------ the map of terms

#: what a paper changes: how the term is written in the equation, its place there (line, left, right of 100), and what it decides
TERMS: dict[str, tuple[str, tuple[int, int, int], str]] = {
    "routing": ("Σ s ∈ N(t)", (0, 13, 43), "Which tokens meet at all: everybody, a cluster, a few regions, an expert."),
    "values": ("vₛ", (0, 57, 72), "What is moved, and whether an average of it is the answer."),
    "scores": (
        "qₜ·kₛ / √K",
        (1, 28, 60),
        "How much one token matters to another: learned, frozen, shared, or not a product.",
    ),
    "positions": ("bₜₛ", (1, 67, 80), "What the places of two tokens say before their content does."),
    "normaliser": ("ηₜ", (1, 88, 100), "What makes weights comparable: their sum, a flow, or a norm afterwards."),
    "memory": ("keep kₛ, vₛ", (2, 0, 31), "What is kept of the past: all of it, or a state of fixed size."),
    "hardware": ("compute it", (2, 35, 65), "The same function in another order, on other devices, at other costs."),
    "analysis": ("read it", (2, 69, 100), "Nothing changes: trained heads are looked at, or used to explain."),
}
GLYPHS = [("oₜ  =", 0, 6), ("aₜₛ", 0, 50), ("aₜₛ  =  exp(", 1, 14), ("+", 1, 63.5), (") ÷", 1, 84)]
COLUMNS = (("foundations", "circuits", "hybrids"), ("kernels", "vision", "accelerators"))
LINE, ROW, TOP, BELOW = 58, 19, 12, 262  # pixels: a line of the equation, a name, the margin, the panel of words
WRAP = 46  # letters a line that fit a phone


def map_frame(book: Mapping[str, papers.Paper]) -> pd.DataFrame:
    """Everything that can be clicked: one row a term (``slug`` empty) and one a paper, with its box in the drawing."""
    rows: list[dict[str, Any]] = []
    for term, (text, (line, left, right), _) in TERMS.items():
        top = TOP + LINE * line
        rows.append({"term": term, "slug": "", "text": text, "x": left, "x2": right, "y": top, "y2": top + 30})
    for paper, column, top in _places(book):
        box = {"x": 50 * column, "x2": 50 * column + 49, "y": top, "y2": top + ROW}
        rows.append({"term": paper.terms, "slug": paper.slug, "text": _name(paper), **box})
    return pd.DataFrame(rows)


def _places(book: Mapping[str, papers.Paper]) -> list[tuple[papers.Paper, int, int]]:
    """Every paper with its column and the upper edge of its line in the list."""
    found = []
    for column, parts in enumerate(COLUMNS):
        top = _list_top()
        for part in parts:
            top += ROW  # the part's name
            for paper in (paper for paper in book.values() if paper.part == part):
                found.append((paper, column, top))
                top += ROW
    return found


def _list_top() -> int:
    return TOP + 3 * LINE + 6


def map_words(book: Mapping[str, papers.Paper]) -> pd.DataFrame:
    """The lines of the panel below the names: each belongs to the pick ``of_term, of_slug`` and stands on its ``line``.

    ``term, slug`` are what a click on the line picks; ``strong`` marks a heading.
    """
    rows: list[dict[str, Any]] = []

    def add(of: tuple[str, str], lines: list[tuple[str, bool, str]]) -> None:
        for number, (text, strong, slug) in enumerate(lines):
            pick = {"of_term": of[0], "of_slug": of[1], "term": of[0], "slug": slug}
            rows.append({**pick, "line": number, "text": text, "strong": strong})

    for term, (_, _, decides) in TERMS.items():
        members = [paper for paper in book.values() if paper.terms == term]
        lines = [(f"{term}: {len(members)} of {len(book)} papers", True, ""), *_wrapped(decides, "")]
        for paper in members:
            lines += [(f"{_name(paper)} ({paper.part})", True, paper.slug), (paper.headline, False, paper.slug)]
        add((term, ""), lines)
        for paper in members:
            heading = (f"{_name(paper)} ({paper.part}) changes: {term}", True, paper.slug)
            lines = [heading, *_wrapped(f"{paper.headline}.", paper.slug), *_wrapped(paper.idea, paper.slug)]
            add((term, paper.slug), lines)
    return pd.DataFrame(rows)


def _name(paper: papers.Paper) -> str:
    return paper.slug.replace("-", " ")


def _wrapped(text: str, slug: str) -> list[tuple[str, bool, str]]:
    return [(line, False, slug) for line in textwrap.wrap(text, WRAP)]


def term_map(book: Mapping[str, papers.Paper] | None = None, term: str = "scores", slug: str = "") -> alt.LayerChart:
    """The equation with clickable terms above the thirty papers; a term lights up its papers, a paper its term.

    Args:
        book: papers by slug; those of this book unless given.
        term, slug: what is picked at first; a paper's slug needs its own term, an empty one picks the term.
    """
    book = papers.all() if book is None else book
    if term not in TERMS:
        raise ValueError(f"term: {term!r} is no term of the equation; {papers.did_you_mean(term, TERMS)}")
    frame, words, list_top = map_frame(book), map_words(book), _list_top()
    bottom = int(frame.y2.max()) + 16
    height = bottom + BELOW
    start = [{"term": term, "slug": slug}]
    pick = alt.selection_point(
        "pick", fields=["term", "slug"], value=start, on="click", toggle=False, empty=False, clear=False
    )
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, 100], nice=False, zero=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[height, 0], nice=False, zero=False))
    now_term, now_slug = "(isArray(pick.term) ? pick.term[0] : '')", "(isArray(pick.slug) ? pick.slug[0] : '')"
    lit = f"datum.term === {now_term} && (datum.slug === '' || {now_slug} === '' || datum.slug === {now_slug})"
    boxes = alt.Chart(frame[frame.slug == ""]).encode(x=x, x2="x2:Q", y=y, y2="y2:Q")
    middle = {"x": alt.X("middle:Q", axis=None), "y": y}
    terms = frame[frame.slug == ""].assign(middle=lambda f: (f.x + f.x2) / 2)
    glyphs = pd.DataFrame(
        [{"text": t, "middle": at, "y": TOP + LINE * line + 15, "term": "", "slug": ""} for t, line, at in GLYPHS]
    )
    names = frame[frame.slug != ""].assign(y=lambda f: (f.y + f.y2) / 2, x=lambda f: f.x + 1)
    parts = _part_names(book, list_top)
    shown = alt.Chart(words).transform_filter(f"datum.of_term === {now_term} && datum.of_slug === {now_slug}")
    shown = shown.transform_calculate(x="0", y=f"{bottom} + 17 * datum.line")
    text: dict[str, Any] = {"baseline": "middle", "tooltip": False}
    chart: Any = alt.layer(
        boxes.mark_rect(cornerRadius=6, strokeWidth=1.5, tooltip=False).encode(
            stroke=alt.value(SOFTMAX),
            fill=alt.value(SOFTMAX),
            fillOpacity=alt.condition(lit, alt.value(1), alt.value(0.08)),
        ),
        alt.Chart(terms.assign(y=terms.y + 15))
        .mark_text(fontSize=15, **text)
        .encode(**middle, text="text:N", color=alt.condition(lit, alt.value("white"), alt.value("currentColor"))),
        alt.Chart(terms.assign(y=terms.y2 + 10)).mark_text(fontSize=11, **text).encode(**middle, text="term:N"),
        alt.Chart(glyphs).mark_text(fontSize=15, **text).encode(**middle, text="text:N"),
        alt.Chart(parts)
        .mark_text(align="left", fontSize=12, fontWeight="bold", **text)
        .encode(x=x, y=y, text="text:N"),
        alt.Chart(names)
        .mark_text(align="left", fontSize=12, fontWeight=alt.ExprRef(f"{lit} ? 'bold' : 'normal'"), **text)
        .encode(x=x, y=y, text="text:N", opacity=alt.condition(lit, alt.value(1), alt.value(0.6))),
        *(
            shown.transform_filter(f"datum.strong === {'true' if strong else 'false'}")
            .mark_text(align="left", fontSize=13, fontWeight="bold" if strong else "normal", **text)
            .encode(x=x, y=y, text="text:N")
            for strong in (True, False)
        ),
        alt.Chart(frame)
        .mark_rect(opacity=0.001, cursor="pointer")
        .encode(x=x, x2="x2:Q", y=y, y2="y2:Q", tooltip=alt.Tooltip("text:N", title="pick"))
        .add_params(pick),
    )
    return chart.properties(width=640, height=height, title="Which paper changes which term?")


def _part_names(book: Mapping[str, papers.Paper], top: int) -> pd.DataFrame:
    rows = []
    for column, parts in enumerate(COLUMNS):
        y = top
        for part in parts:
            rows.append({"text": part, "x": 50 * column, "y": y + ROW / 2, "term": "", "slug": ""})
            y += ROW * (1 + sum(paper.part == part for paper in book.values()))
    return pd.DataFrame(rows)


def map_explorer() -> Twin:
    """The map with the picked term as a control."""
    return twin(
        _term,
        alt="The equation of softmax attention with one term picked, and the papers of the book that change it.",
        caption="Take the terms one after the other: which of them do no two parts share?",
        term=ipywidgets.Dropdown(options=list(TERMS), description="term"),
    )


def _term(term: str) -> alt.LayerChart:
    return term_map(term=term)
