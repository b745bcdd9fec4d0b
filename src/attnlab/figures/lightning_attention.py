"""Figures of the chapter ``kernels/lightning-attention``: pure functions from decays and measurements to charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import ipywidgets
import pandas as pd

from attnlab.figures.palette import CONTROL, LINEAR, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.kernels.lightning_attention import decay_table
from attnlab.kernels.lightning_attention_runs import OURS as TNL
from attnlab.kernels.lightning_attention_runs import ROTARY, SCHEDULES
from attnlab.mixers.decays import Schedule

NAMES: dict[Schedule, str] = {"paper": "eq. 10, heads from 1", "fla": "eq. 10, heads from 0", "alibi": "released code"}
CODES = {name: schedule for schedule, name in NAMES.items()}


# ------------------------------------------------------------------------------------------------------- the decays


def half_life(log_decay: float) -> float:
    """Tokens after which half of a write is forgotten: ``log(1/2) / log_decay``; infinite without decay."""
    return math.inf if log_decay == 0 else math.log(0.5) / log_decay


def short(number: float) -> str:
    """A number of tokens in at most four characters: 0.69, 5.5, 177, 28k, 2M, and ∞."""
    if math.isinf(number):
        return "∞"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.0f}{unit}"
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2f}"


def decay_frame(layers: int, heads: int, schedules: Sequence[Schedule] = tuple(NAMES)) -> pd.DataFrame:
    """Every head of every schedule, one row each.

    Columns ``schedule`` (by its name in :data:`NAMES`), ``layer`` from 0, ``head`` from 1, ``log_decay``,
    ``half_life`` in tokens (infinite where nothing is forgotten, which a chart reads as null) and ``label``, the same in four characters.
    """
    rows = []
    for schedule in schedules:
        for layer, values in enumerate(decay_table(layers, heads, schedule).double().tolist()):
            for head, value in enumerate(values, start=1):
                tokens = half_life(value)
                row = {"schedule": NAMES[schedule], "layer": layer, "head": head, "log_decay": round(value, 9)}
                rows.append(row | {"half_life": tokens, "label": short(tokens)})
    return pd.DataFrame(rows)


def schedule_table(layers: int, heads: int) -> pd.DataFrame:
    """The shortest and the longest half-life of the first and the last layer, by schedule, as :func:`short` writes them."""
    rows: dict[str, dict[str, str]] = {}
    for schedule, name in NAMES.items():
        table = decay_table(layers, heads, schedule)
        for place, layer in (("first layer", 0), ("last layer", -1)):
            tokens = sorted(half_life(x) for x in table[layer].double().tolist())
            rows.setdefault(name, {}).update(
                {f"{place}, shortest": short(tokens[0]), f"{place}, longest": short(tokens[-1])}
            )
        beyond = sum(half_life(x) > 100 for x in table.double().flatten().tolist())
        rows[name]["heads over 100 tokens"] = f"{beyond} of {layers * heads}"
    return pd.DataFrame.from_dict(rows, orient="index")


def decay_map(
    layers: int = 12, heads: int = 8, schedule: str = NAMES["paper"], layer: int = 0, head: int = 1
) -> alt.HConcatChart:
    """Half-lives of all heads; a click on one draws its mask and how its layer forgets. A menu switches the schedule.

    Args:
        layers: L, at least 2.
        heads: H.
        schedule: one of the names in :data:`NAMES`, what the menu starts from.
        layer, head: what the click starts from, from 0 and from 1.
    """
    chosen = alt.param("schedule", value=schedule, bind=alt.binding_select(options=list(CODES), name="schedule: "))
    pick = alt.selection_point(
        "pick",
        fields=["layer", "head"],
        value=[{"layer": min(layer, layers - 1), "head": min(head, heads)}],
        on="click",
        toggle=False,
        empty=False,
    )
    base = alt.Chart(decay_frame(layers, heads)).transform_filter("datum.schedule == schedule")
    left: Any = _cells(base, layers, heads, pick) & _sentence(base)
    right: Any = _mask(base) & _profiles(base)
    chart: alt.HConcatChart = alt.hconcat(left, right, spacing=26).resolve_scale(color="independent")
    titled: alt.HConcatChart = chart.properties(title="How long does each head remember?")
    return titled.add_params(chosen)


_PICKED = "pick.layer && datum.layer == pick.layer[0] && datum.head == pick.head[0]"
_LAYER = "pick.layer && datum.layer == pick.layer[0]"


def _cells(base: alt.Chart, layers: int, heads: int, pick: Any) -> alt.LayerChart:
    """One cell a head, its half-life in it."""
    axis = alt.Axis(labelAngle=0, ticks=False, domain=False, grid=False)
    placed = base.encode(x=alt.X("head:O", title="head", axis=axis), y=alt.Y("layer:O", title="layer", axis=axis))
    colour = alt.Color(
        "half_life:Q",
        scale=alt.Scale(type="log", domain=[0.1, 1e5], scheme="viridis", clamp=True),
        legend=None,
    )
    cells = placed.mark_rect(stroke=None, cornerRadius=2).encode(
        color=alt.condition("datum.half_life === null", alt.value("#fde725"), colour),
        opacity=alt.condition(_PICKED, alt.value(1.0), alt.value(0.82)),
        tooltip=[
            alt.Tooltip("layer:O"),
            alt.Tooltip("head:O"),
            alt.Tooltip("label:N", title="half-life, tokens"),
            alt.Tooltip("log_decay:Q", title="log decay", format=".3~g"),
        ],
    )
    frame = (
        placed.transform_filter(_PICKED).mark_rect(fill=None, strokeWidth=2.5).encode(stroke=alt.value("currentColor"))
    )
    words = placed.mark_text(fontSize=11).encode(
        text="label:N",
        color=alt.condition(
            "datum.half_life === null || datum.half_life > 60", alt.value("#1b1b1b"), alt.value("#ffffff")
        ),
    )
    chart: Any = alt.layer(cells.add_params(pick), words, frame)
    title = alt.TitleParams("half-life in tokens; click a head", fontSize=13)
    return chart.properties(width=300, height=max(150, min(23 * layers, 300)), title=title)


def _sentence(base: alt.Chart) -> alt.Chart:
    """The picked head in words."""
    words = (
        "['Layer ' + datum.layer + ', head ' + datum.head + ' keeps ' + (datum.half_life === null ? 'everything:'"
        " : (datum.log_decay > -0.0005 ? '1 - ' + format(-datum.log_decay, '.1~e')"
        " : format(exp(datum.log_decay), '.3~f')) + ' a token:'),"
        " datum.half_life === null ? 'nothing is forgotten.' : 'half of a write is gone after ' + datum.label +"
        " (datum.label == '1.0' ? ' token.' : ' tokens.')]"
    )
    return (
        base.transform_filter(_PICKED)
        .transform_calculate(words=words)
        .mark_text(align="left", baseline="top", fontSize=13, lineHeight=18)
        .encode(x=alt.value(0), y=alt.value(0), text="words:N")
        .properties(width=300, height=38)
    )


def _mask(base: alt.Chart, size: int = 32) -> alt.Chart:
    """The picked head's decay matrix over ``size`` tokens, from its one number."""
    axis = alt.Axis(tickCount=4, grid=False)
    side = alt.Scale(domain=[0, size], nice=False)
    return (
        base.transform_filter(_PICKED)
        .transform_calculate(entry=f"sequence({size * size})")
        .transform_flatten(["entry"])
        .transform_calculate(t=f"floor(datum.entry / {size})", s=f"datum.entry % {size}")
        .transform_filter("datum.s <= datum.t")
        .transform_calculate(
            below="datum.t + 1", right="datum.s + 1", weight="exp(datum.log_decay * (datum.t - datum.s))"
        )
        .mark_rect(color=LINEAR, stroke=None)
        .encode(
            x=alt.X("s:Q", title="key, token s", scale=side, axis=axis),
            x2="right:Q",
            y=alt.Y(
                "t:Q", title="query, token t", scale=alt.Scale(domain=[0, size], nice=False, reverse=True), axis=axis
            ),
            y2="below:Q",
            opacity=alt.Opacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 1]), legend=None),
            tooltip=[alt.Tooltip("t:Q"), alt.Tooltip("s:Q"), alt.Tooltip("weight:Q", format=".2~g")],
        )
        .properties(width=170, height=170, title=alt.TitleParams("Its mask M", fontSize=13))
    )


def _profiles(base: alt.Chart) -> alt.LayerChart:
    """What is left of a write after so many tokens: the picked head, and in grey the others of its layer."""
    curves = (
        base.transform_filter(_LAYER)
        .transform_calculate(step="sequence(41)")
        .transform_flatten(["step"])
        .transform_calculate(distance="pow(2, datum.step / 4)")
        .transform_calculate(weight="exp(datum.log_decay * datum.distance)")
        .encode(
            x=alt.X(
                "distance:Q",
                title="tokens ago",
                scale=alt.Scale(type="log", base=2, domain=[1, 1024]),
                axis=alt.Axis(values=[1, 4, 16, 64, 256], grid=False),
            ),
            y=alt.Y("weight:Q", title="share left", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=3)),
        )
    )
    others = curves.mark_line(color=CONTROL, strokeWidth=1, opacity=0.6).encode(detail="head:N")
    own = curves.transform_filter(_PICKED).mark_line(color=LINEAR, strokeWidth=3)
    chart: Any = alt.layer(others, own)
    return chart.properties(width=170, height=110, title=alt.TitleParams("It and its layer", fontSize=13))


def decay_explorer() -> Twin:
    """Controls over :func:`decay_map`: layers, heads and the schedule; two layers and four heads are the chapter's models."""
    return twin(
        decay_map,
        alt="Half-lives of all heads of a model, and mask and forgetting curve of one of them.",
        layers=ipywidgets.SelectionSlider(value=2, options=[2, 6, 24], description="layers"),
        heads=ipywidgets.SelectionSlider(value=4, options=[4, 6, 8], description="heads"),
        schedule=ipywidgets.Dropdown(value=NAMES["alibi"], options=list(CODES), description="schedule"),
    )


# ------------------------------------------------------------------------------------------------------- measurements


def _colour(model: str) -> str:
    """TNL green, softmax blue, the schedules orange, TNL without a part grey."""
    if model.startswith("Transformer"):
        return SOFTMAX
    return OURS if model == TNL else LINEAR if model in SCHEDULES else CONTROL


def loss_chart(frame: pd.DataFrame, title: str) -> alt.LayerChart:
    """Validation losses of all runs, one line a model, best first, over the range of TNL; ``frame`` as of ``compare``."""
    means = frame.groupby("model")["loss"].mean().sort_values().reset_index()
    names = means.model.tolist()
    ours = frame[frame.model == TNL].loss
    band = alt.Chart(pd.DataFrame({"low": [ours.min()], "high": [ours.max()]}))
    low, high = float(frame.loss.min()), float(frame.loss.max())
    room = 0.06 * (high - low)
    scale = alt.Scale(domain=[low - room, high + 2 * room], nice=False)
    x = alt.X("loss:Q", title="loss, nats a character", scale=scale, axis=alt.Axis(tickCount=6))
    y = alt.Y("model:N", title=None, sort=names, axis=alt.Axis(ticks=False, domain=False))
    colour = alt.Color("model:N", scale=alt.Scale(domain=names, range=[_colour(name) for name in names]), legend=None)
    tooltip = [alt.Tooltip("model:N"), alt.Tooltip("seed:Q"), alt.Tooltip("loss:Q", format=".4f")]
    ticks = alt.Chart(means).encode(x=x, y=y)
    chart: Any = alt.layer(
        band.mark_rect(color=OURS, opacity=0.15).encode(x=alt.X("low:Q", scale=scale), x2="high:Q"),
        alt.Chart(frame).mark_point(filled=True, size=60, opacity=0.75).encode(x=x, y=y, color=colour, tooltip=tooltip),
        ticks.mark_tick(thickness=2.5, size=18).encode(color=colour),
        ticks.mark_text(dy=-14, fontSize=11).encode(text=alt.Text("loss:Q", format=".3f")),
    )
    return chart.properties(width=330, height=36 * len(names), title=title)


def speed_chart(frame: pd.DataFrame, title: str) -> alt.LayerChart:
    """Tokens a second of both models against length, all rounds and their medians; ``frame`` as of ``speed``."""
    shown = frame.rename(columns={"tokens/s": "rate"})
    middle = shown.groupby(["model", "length"], as_index=False).rate.median()
    lengths = [int(n) for n in sorted(shown.length.unique())]
    colour = alt.Color("model:N", scale=alt.Scale(domain=[TNL, ROTARY], range=[OURS, SOFTMAX]), legend=None)
    x = alt.X(
        "length:Q",
        title="tokens in a sequence (1k = 1,024)",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(values=lengths, labelExpr="datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value"),
    )
    y = alt.Y("rate:Q", title="tokens a second", scale=alt.Scale(domainMin=0), axis=alt.Axis(format="~s", tickCount=5))
    tooltip = ["model:N", alt.Tooltip("length:Q", format=","), alt.Tooltip("rate:Q", title="tokens/s", format=",.0f")]
    ends = alt.Chart(middle[middle.length == lengths[-1]])  # where the curves are furthest apart
    chart: Any = alt.layer(
        alt.Chart(middle).mark_line(strokeWidth=2.5).encode(x=x, y=y, color=colour),
        alt.Chart(shown).mark_point(filled=True, size=35, opacity=0.6).encode(x=x, y=y, color=colour, tooltip=tooltip),
        *(
            ends.transform_filter(alt.datum.model == model)
            .mark_text(align="right", dx=-6, dy=dy, fontSize=13)
            .encode(x=x, y=y, color=colour, text="model:N")
            for model, dy in ((TNL, -14), (ROTARY, 16))  # below a line that falls
        ),
    )
    return chart.properties(width=380, height=240, title=title)


def saturation_chart(frame: pd.DataFrame, width: int) -> alt.LayerChart:
    """Share of pairs recalled against their number, all seeds and their means; ``frame`` as of ``saturation``."""
    middle = frame.groupby(["reader", "pairs"], as_index=False).recalled.mean()
    pairs = [int(n) for n in sorted(frame.pairs.unique())]
    colour = alt.Color("reader:N", scale=alt.Scale(domain=["state", "softmax"], range=[LINEAR, SOFTMAX]), legend=None)
    x = alt.X("pairs:Q", title="pairs written", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=pairs))
    y = alt.Y(
        "recalled:Q",
        title="share recalled",
        scale=alt.Scale(domain=[0, 1.16]),
        axis=alt.Axis(values=[0, 0.5, 1], format="%"),
    )
    mark = alt.Chart(pd.DataFrame({"pairs": [width], "text": [f"d = {width}"]}))
    ends = alt.Chart(middle[middle.pairs == pairs[-1]])
    state, softmax = (ends.transform_filter(f"datum.reader == '{name}'") for name in ("state", "softmax"))
    chart: Any = alt.layer(
        mark.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="pairs:Q"),
        mark.mark_text(align="left", dx=5, baseline="bottom").encode(x="pairs:Q", y=alt.value(236), text="text:N"),
        alt.Chart(middle).mark_line(strokeWidth=2.5).encode(x=x, y=y, color=colour),
        alt.Chart(frame).mark_point(filled=True, size=35, opacity=0.6).encode(x=x, y=y, color=colour),
        state.mark_text(align="right", dx=-6, dy=16, fontSize=13).encode(x=x, y=y, text=alt.value("one d × d state")),
        softmax.mark_text(align="right", dx=-6, dy=-14, fontSize=13).encode(
            x=x, y=y, text=alt.value("softmax over all keys")
        ),
    )
    return chart.properties(width=380, height=240, title="How many pairs does a state of fixed size give back?")
