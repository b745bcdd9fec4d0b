"""Figures of the chapter ``kernels/lightning-attention-2``: pure functions from counts and timings to charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import ipywidgets
import pandas as pd

from attnlab.figures.palette import COLOURS, CONTROL, LINEAR, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.kernels.lightning_attention_2 import H200, cost, launch, tiles

INSIDE, THROUGH, SUM = "inside its tile", "through the state", "both together"
FORM_COLOURS = {"tiled": LINEAR, "softmax": SOFTMAX, "masked product": CONTROL}
CHUNKS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS = (16, 32, 64)


# ------------------------------------------------------------------------------------------------------- the tiles


def tile_frame(length: int = 64, chunks: Sequence[int] = CHUNKS) -> pd.DataFrame:
    """Two bars a token and chunk size: which keys it meets through the state, and which inside its own tile.

    Columns ``chunk, t, tile, start, end, how, first, last``: keys [first, last) are met in the way ``how``.
    """
    rows = []
    for chunk in chunks:
        for row in tiles(length, chunk):
            t, start = row["t"], row["start"]
            rows.append({"chunk": chunk, **row, "how": INSIDE, "first": start, "last": t + 1})
            if start > 0:
                rows.append({"chunk": chunk, **row, "how": THROUGH, "first": 0, "last": start})
    return pd.DataFrame(rows)


def cost_frame(length: int = 64, chunks: Sequence[int] = CHUNKS, widths: Sequence[int] = WIDTHS) -> pd.DataFrame:
    """Operations a token (in thousands) of the two parts and their sum, and the steps of a whole sequence, by chunk size and width."""
    rows = []
    for width in widths:
        through = cost("recurrent", length, width).flops / length
        for chunk in chunks:
            whole = cost("tiled", length, width, chunk_size=chunk)
            parts = {THROUGH: through, INSIDE: whole.flops / length - through, SUM: whole.flops / length}
            for part, flops in parts.items():
                row = {"width": width, "chunk": chunk, "steps": whole.steps}
                rows.append({**row, "part": part, "kFLOP": flops / 1000})
    return pd.DataFrame(rows)


def tile_map(length: int = 64, chunk: int = 16, width: int = 32, row: int = 37) -> alt.HConcatChart:
    """The causal matrix coloured by how each entry is computed, and what that costs; a click picks a row.

    Args:
        length: tokens; the largest chunk size offered is 64.
        chunk, width, row: what the controls and the click start from.
    """
    size = alt.param("chunk", value=chunk, bind=alt.binding_select(options=list(CHUNKS), name="tokens a tile, C: "))
    head = alt.param("width", value=width, bind=alt.binding_select(options=list(WIDTHS), name="head width, K = V: "))
    pick = alt.selection_point("pick", fields=["t"], value=[{"t": row}], on="click", toggle=False, empty=False)
    frame = tile_frame(length)
    left: Any = _matrix(frame, length, pick) & _sentence(frame)
    right: Any = _operations() & _steps()
    chart: alt.HConcatChart = alt.hconcat(left, right, spacing=30).resolve_scale(color="independent")
    titled: alt.HConcatChart = chart.properties(title="Which part of the causal matrix is never formed?")
    return titled.add_params(size, head)


_PICKED = "pick.t && datum.t == pick.t[0]"
_HOW = alt.Color(
    "how:N",
    scale=alt.Scale(domain=[THROUGH, INSIDE], range=[LINEAR, CONTROL]),
    legend=alt.Legend(title=None, orient="top", columns=2),
)


def _matrix(frame: pd.DataFrame, length: int, pick: Any) -> alt.LayerChart:
    """Rows are queries, columns keys; the frame is what the picked row's tile reads as one state."""
    bars = alt.Chart(frame).transform_filter("datum.chunk == chunk").transform_calculate(below="datum.t + 1")
    side = alt.Scale(domain=[0, length], nice=False)
    ticks = alt.Axis(tickCount=4, grid=False)
    y = alt.Y("t:Q", title="query, token t", scale=alt.Scale(domain=[0, length], nice=False, reverse=True), axis=ticks)
    cells = (
        bars.mark_rect(stroke=None)
        .encode(
            x=alt.X("first:Q", title="key, token s", scale=side, axis=ticks),
            x2="last:Q",
            y=y,
            y2="below:Q",
            color=_HOW,
            opacity=alt.condition(_PICKED, alt.value(1.0), alt.value(0.6)),
            tooltip=[
                alt.Tooltip("t:Q", title="query"),
                alt.Tooltip("tile:Q", title="tile"),
                alt.Tooltip("how:N", title="these keys are met"),
                alt.Tooltip("first:Q", title="from key"),
                alt.Tooltip("last:Q", title="to before key"),
            ],
        )
        .add_params(pick)
    )
    past = (
        bars.transform_filter(_PICKED)
        .transform_filter(f"datum.how == '{THROUGH}'")
        .mark_rect(fill=None, strokeWidth=2)
        .encode(x="first:Q", x2="last:Q", y="start:Q", y2="end:Q", stroke=alt.value("currentColor"))
    )
    layers: Any = alt.layer(cells, past)
    return layers.properties(width=300, height=300)


def _sentence(frame: pd.DataFrame) -> alt.Chart:
    """What the picked row does, in words."""
    words = (
        "['Token ' + datum.t + ' reads ' + (datum.start > 0 ? 'state ' + datum.tile + ', the sum of ' + datum.start + "
        "(datum.start > 1 ? ' tokens,' : ' token,') : 'no state: its tile is the first,'),"
        "'and meets ' + (datum.t - datum.start + 1) + (datum.t > datum.start ? ' keys' : ' key') + ' of tile ' + datum.tile + ' one by one.']"
    )
    return (
        alt.Chart(frame)
        .transform_filter("datum.chunk == chunk")
        .transform_filter(f"datum.how == '{INSIDE}'")
        .transform_filter(_PICKED)
        .transform_calculate(words=words)
        .mark_text(align="left", baseline="top", fontSize=13, lineHeight=18)
        .encode(x=alt.value(0), y=alt.value(0), text="words:N")
        .properties(width=300, height=38)
    )


def _operations() -> alt.LayerChart:
    """The two parts in the colours of the matrix, and their sum."""
    lines, chosen = _costs("kFLOP", "thousand operations a token", 34)
    named = lines.transform_filter(f"datum.part == '{SUM}' && datum.chunk == {max(CHUNKS)}")
    label = named.mark_text(align="right", dx=-8, dy=-6, fontSize=12).encode(text="part:N")
    chart: Any = alt.layer(lines.mark_line(strokeWidth=2.5), chosen, label)
    return chart.properties(width=230, height=150, title=alt.TitleParams("Larger tiles: more work", fontSize=13))


def _steps() -> alt.LayerChart:
    """What must happen one after the other."""
    lines, chosen = _costs("steps", "steps in a row", 68)
    lines, chosen = (part.transform_filter(f"datum.part == '{SUM}'") for part in (lines, chosen))
    label = chosen.mark_text(align="left", dx=8, dy=-6, fontSize=12).encode(text="steps:Q")
    chart: Any = alt.layer(lines.mark_line(strokeWidth=2.5), chosen, label)
    return chart.properties(width=230, height=110, title=alt.TitleParams("Smaller tiles: more waiting", fontSize=13))


def _costs(column: str, title: str, reach: float) -> tuple[alt.Chart, alt.Chart]:
    """A column of :func:`cost_frame` over chunk sizes from 0 to ``reach``, and its points at the chosen size."""
    x = alt.X(
        "chunk:Q", title="tokens a tile, C", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=list(CHUNKS))
    )
    y = alt.Y(f"{column}:Q", title=title, scale=alt.Scale(domain=[0, reach]), axis=alt.Axis(tickCount=4))
    colour = alt.Color(
        "part:N", scale=alt.Scale(domain=[THROUGH, INSIDE, SUM], range=[LINEAR, CONTROL, OURS]), legend=None
    )
    lines = alt.Chart(cost_frame()).transform_filter("datum.width == width").encode(x=x, y=y, color=colour)
    tooltip = [
        alt.Tooltip("part:N"),
        alt.Tooltip("chunk:Q", title="C"),
        alt.Tooltip(f"{column}:Q", title=title, format=".3~g"),
    ]
    chosen = lines.transform_filter("datum.chunk == chunk").mark_point(filled=True, size=90, opacity=1)
    return lines, chosen.encode(tooltip=tooltip)


# ------------------------------------------------------------------------------------------------------- timings


def chunk_chart(frame: pd.DataFrame, width: int) -> alt.LayerChart:
    """Milliseconds against chunk size; ``frame`` has columns ``chunk`` and ``ms``, one row a measurement."""
    best = frame.groupby("chunk", as_index=False).ms.median()
    x = alt.X(
        "chunk:Q", title="tokens a tile, C", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=list(best.chunk))
    )
    y = _logs("ms", "milliseconds", frame.ms)
    tooltip = [alt.Tooltip("chunk:Q", title="C"), alt.Tooltip("ms:Q", format=".1f")]
    line = alt.Chart(best).mark_line(color=LINEAR, strokeWidth=2.5).encode(x=x, y=y)
    points = (
        alt.Chart(frame).mark_point(filled=True, color=LINEAR, size=45, opacity=0.7).encode(x=x, y=y, tooltip=tooltip)
    )
    mark = alt.Chart(pd.DataFrame({"chunk": [width], "text": ["C = K"]}))
    rule = mark.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="chunk:Q")
    label = mark.mark_text(align="left", dx=5, baseline="top").encode(x="chunk:Q", y=alt.value(2), text="text:N")
    chart: Any = alt.layer(rule, line, points, label)
    return chart.properties(width=360, height=200, title="Few operations or few steps: where is the clock happiest?")


def speed_chart(frame: pd.DataFrame, crossing: float | None) -> alt.LayerChart:
    """Tokens a second against length, all rounds and their medians; ``frame`` as of ``time_lengths``.

    Args:
        crossing: the length at which the tiled form overtakes softmax, marked if there is one.
    """
    shown = frame.rename(columns={"tokens/s": "speed"})
    middle = shown.groupby(["form", "length"], as_index=False).speed.median()
    lengths = sorted(shown.length.unique())
    domain = [name for name in FORM_COLOURS if name in set(shown.form)]
    colour = alt.Color(
        "form:N", scale=alt.Scale(domain=domain, range=[FORM_COLOURS[name] for name in domain]), legend=None
    )
    x = alt.X(
        "length:Q",
        title="tokens in a sequence (1k = 1,024)",
        scale=alt.Scale(type="log", base=2, domain=[lengths[0], 5 * lengths[-1]], nice=False),
        axis=_lengths(lengths),
    )
    y = _logs("speed", "tokens a second", shown.speed, "~s")
    ends = middle.loc[middle.groupby("form").length.idxmax()]
    whole, cut = (alt.Chart(ends[mask]) for mask in (ends.length == lengths[-1], ends.length < lengths[-1]))
    tooltip = ["form:N", alt.Tooltip("length:Q", format=","), alt.Tooltip("speed:Q", title="tokens/s", format=",.0f")]
    layers = [
        alt.Chart(middle).mark_line(strokeWidth=2.5).encode(x=x, y=y, color=colour),
        alt.Chart(shown).mark_point(filled=True, size=35, opacity=0.6).encode(x=x, y=y, color=colour, tooltip=tooltip),
        whole.mark_text(align="left", dx=8, fontSize=13).encode(x=x, y=y, color=colour, text="form:N"),
        cut.mark_text(dy=18, fontSize=13).encode(x=x, y=y, color=colour, text="form:N"),
        *_crossing(crossing),
    ]
    chart: Any = alt.layer(*layers)
    return chart.properties(width=420, height=280, title="Who keeps the speed when sequences grow?")


def _lengths(lengths: Sequence[int]) -> alt.Axis:
    """Ticks at powers of two, written 512, 1k, 2k."""
    return alt.Axis(
        values=[int(n) for n in lengths], labelExpr="datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value"
    )


def _logs(column: str, title: str, values: pd.Series, form: str = "~g") -> alt.Y:
    """A logarithmic axis with a little room around the values, and ticks at 1, 2 and 5 times the powers of ten."""
    low, high = 0.8 * float(values.min()), 1.25 * float(values.max())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.Y(
        f"{column}:Q",
        title=title,
        scale=scale,
        axis=alt.Axis(values=[x for x in ticks if low <= x <= high], format=form),
    )


def _crossing(length: float | None) -> list[alt.Chart]:
    """A dashed line at a length, with its number; nothing for none."""
    if length is None:
        return []
    mark = alt.Chart(pd.DataFrame({"length": [length], "text": [f"overtakes at {length:,.0f}"]}))
    return [
        mark.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="length:Q"),
        mark.mark_text(align="left", dx=5, baseline="bottom").encode(
            x="length:Q", y=alt.value("height"), text="text:N"
        ),
    ]


def record_chart(rows: pd.DataFrame) -> alt.VConcatChart:
    """Milliseconds of a constant number of tokens against length, for every implementation of a GPU record.

    A menu switches between the passes; a click on an entry of the list dims all others.

    Args:
        rows: what ``law`` of the runs module gives: columns ``impl, kind, pass, T, ms, floor_ms``.
    """
    shown = rows[["impl", "kind", "pass", "T", "ms"]].assign(ms=rows.ms.astype(float).round(4))
    floors = rows[rows.kind == "ours"][["pass", "T", "floor_ms"]]
    ways, names, kinds = (list(dict.fromkeys(shown[column])) for column in ("pass", "impl", "kind"))
    way = alt.param("way", value=ways[0], bind=alt.binding_select(options=ways, name="time of: "))
    only = alt.selection_point("only", fields=["impl"], on="click", toggle=False)
    base = alt.Chart(shown).transform_filter("datum.pass == way")
    look: dict[str, Any] = {
        "color": alt.Color(
            "kind:N", scale=alt.Scale(domain=kinds, range=[COLOURS[kind] for kind in kinds]), legend=None
        ),
        "opacity": alt.condition(only, alt.value(1.0), alt.value(0.12)),
    }
    shape = alt.Shape("impl:N", scale=alt.Scale(domain=names), legend=None)
    x = alt.X(
        "T:Q",
        title="tokens in a sequence (1k = 1,024)",
        scale=alt.Scale(type="log", base=2),
        axis=_lengths(sorted(shown["T"].unique())),
    )
    y = _logs("ms", "milliseconds", pd.concat([shown.ms, floors.floor_ms]))
    floor = alt.Chart(floors).transform_filter("datum.pass == way").encode(x=x, y=alt.Y("floor_ms:Q"))
    tooltip = [alt.Tooltip("impl:N"), alt.Tooltip("T:Q", format=","), alt.Tooltip("ms:Q", format=".3f")]
    plot = alt.layer(
        floor.mark_line(strokeDash=[4, 4], color=CONTROL),
        floor.transform_filter(f"datum.T == {shown['T'].min()}")
        .mark_text(align="left", dx=8, dy=-8, color=CONTROL)
        .encode(text=alt.value("memory floor")),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, detail="impl:N", **look),
        base.mark_point(filled=True, size=70).encode(x=x, y=y, shape=shape, tooltip=tooltip, **look),
    ).properties(width=420, height=280)
    entry = alt.Y(
        "impl:N", title=None, sort=names, axis=alt.Axis(labelLimit=260, orient="right", ticks=False, domain=False)
    )
    listed = (
        base.transform_aggregate(kind="min(kind)", groupby=["impl"])
        .mark_point(filled=True, size=110)
        .encode(y=entry, shape=shape, **look)
        .add_params(only)
        .properties(width=14, height=20 * len(names))
    )
    chart: alt.VConcatChart = alt.vconcat(plot, listed, spacing=10)
    titled: alt.VConcatChart = chart.properties(title="The same number of tokens, in ever longer sequences")
    return titled.add_params(way)


# ------------------------------------------------------------------------------------------------------- the twin


def launch_table(tokens: int, length: int, heads: int, width: int, chunk: int) -> pd.DataFrame:
    """What one forward sweep over ``tokens`` in sequences of ``length`` asks of an H200, in words and numbers."""
    found = launch(max(1, tokens // length), length, heads, width, chunk_size=chunk)
    programs = found["programs"]
    rows = {
        "sequences in the batch": f"{max(1, tokens // length):,}",
        "programs, one a sequence, head and slice": f"{programs:,}",
        f"multiprocessors with work, of {H200.processors}": f"{min(programs, H200.processors):,}",
        "tiles that each program walks": f"{found['steps']:,}",
        "operations": f"{found['GFLOP']:,.1f} GFLOP",
        "bytes, inputs and outputs once": f"{found['MB']:,.0f} MB",
        "operations a byte": f"{found['FLOP/byte']:.0f}",
        "least time of the products": f"{found['ms of products']:.2f} ms",
        "least time of the memory": f"{found['ms of memory']:.2f} ms",
    }
    return pd.DataFrame({"one forward sweep": rows})


def launch_explorer() -> Twin:
    """Controls over :func:`launch_table`: tokens, length, heads, head width and chunk size."""
    powers = [2**n for n in range(8, 17)]
    return twin(
        launch_table,
        tokens=ipywidgets.SelectionSlider(value=2**16, options=[2**n for n in range(12, 18)], description="tokens"),
        length=ipywidgets.SelectionSlider(value=2**16, options=powers, description="length"),
        heads=ipywidgets.SelectionSlider(value=16, options=[4, 8, 16, 32], description="heads"),
        width=ipywidgets.Dropdown(value=128, options=[32, 64, 128, 256], description="K = V"),
        chunk=ipywidgets.Dropdown(value=64, options=[16, 32, 64, 128, 256], description="C"),
    )
