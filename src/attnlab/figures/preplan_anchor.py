"""Figures of the chapter ``circuits/preplan-anchor``: pure functions from readings, tests and runs to charts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnlab.circuits import credit, rhythm
from attnlab.circuits.chain_model import Forced
from attnlab.circuits.preplan_anchor import NAMES, SINKS, UNITS, Reading
from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin

WINDOWS = (4, 10, 30)
FAI_COLOUR, WAAD_COLOUR, ENTROPY_COLOUR = BOTH, OURS, CONTROL
WIDTH, ROW, LETTER = 284, 36, 6.7  # pixels: of a line of the strip, between lines, of a letter
RULE_COLOURS = {
    "uniform": CONTROL,
    "random": LINEAR,
    "entropy": PAPER,
    "local": OURS,
    "global": BOTH,
    "coupled": SOFTMAX,
}

# -------------------------------------------------------------------------------------------------- one answer as a strip


def token_boxes(words: Sequence[str], width: int = WIDTH) -> pd.DataFrame:
    """Where each token stands when the answer is set in lines: ``i, word, x, x2, y`` in pixels; a line break ends a line."""
    rows = []
    x, line = 0.0, 0
    for i, word in enumerate(words):
        shown = word.strip() or ("⏎" if "\n" in word else "·")
        size = LETTER * len(shown) + 5
        gap = 4 if word[:1] == " " and x else 0
        if x and x + gap + size > width:
            x, line, gap = 0.0, line + 1, 0
        rows.append({"i": i, "word": shown, "x": round(x + gap, 1), "x2": round(x + gap + size, 1), "y": ROW * line})
        x += gap + size
        if "\n" in word:
            x, line = 0.0, line + 1
    return pd.DataFrame(rows)


def token_frame(readings: Mapping[str, Reading], windows: Sequence[int] = WINDOWS) -> pd.DataFrame:
    """One row a token: its box, entropy, and for every treatment of the sink FAI, WAAD by window, and the credit weights.

    Columns are ``entropy``, ``fai <sink>``, ``waad <sink> <window>`` and ``<rule> <sink> <window>``.
    """
    if not readings:
        raise ValueError("readings is empty; give one reading for every treatment of the sink")
    first = next(iter(readings.values()))
    frame = token_boxes(first.words).assign(entropy=np.round(first.entropy["input"], 3))
    columns: dict[str, Any] = {}
    for sink, reading in readings.items():
        fai = reading.fai()
        columns[f"fai {sink}"] = [None if np.isnan(value) else round(100 * value, 3) for value in fai]
        for window in windows:
            waad = reading.waad(window)
            columns[f"waad {sink} {window}"] = np.round(waad, 2)
            for rule in ("local", "global", "coupled"):
                gamma = credit.weights(rule, torch.tensor(waad), torch.tensor(fai), credit.Credit(window=window))
                columns[f"{rule} {sink} {window}"] = gamma.numpy()
    return frame.assign(**columns)


def link_frame(readings: Mapping[str, Reading], most: int = 4) -> pd.DataFrame:
    """For every token ``i`` its strongest later readers (mean global head, 10 tokens on or more) and what it looks at (mean local head).

    One row a link: ``i, j, weight, kind, sink``, at most ``most`` of a kind.
    """
    rows: list[dict[str, Any]] = []
    for sink, reading in readings.items():
        start, n = reading.start, len(reading.words)
        far, local = (matrix[start:, start:].double().numpy() for matrix in (reading.far, reading.local))
        for i in range(n):
            later, earlier = np.zeros(n), np.zeros(n)
            later[i + rhythm.HORIZON[0] :] = far[i + rhythm.HORIZON[0] :, i]
            earlier[:i] = local[i, :i]
            for kind, weights in (("reads it later", later), ("it looks at", earlier)):
                rows += [
                    {"i": i, "j": int(j), "weight": round(float(weights[j]), 3), "kind": kind, "sink": sink}
                    for j in np.argsort(-weights, kind="stable")[:most]
                    if weights[j] > 0.004
                ]
    return pd.DataFrame(rows, columns=["i", "j", "weight", "kind", "sink"])


def rhythm_figure(tokens: pd.DataFrame, links: pd.DataFrame, picked: int, window: int = 10) -> alt.VConcatChart:
    """An answer as a strip of boxes, linked with its three series and with the weights of three credit rules.

    ``tokens`` is a :func:`token_frame`, ``links`` a :func:`link_frame`; ``picked`` is the token that is chosen at first.
    Fill: FAI. Bar below: WAAD. Dot: entropy. Pointing at a token, in the strip or in the lines, draws its links.
    """
    sink = alt.param("sink", value=SINKS[1], bind=alt.binding_radio(options=list(SINKS), name="attention sink: "))
    cut = alt.param("cut", value=window, bind=alt.binding_select(options=list(WINDOWS), name="WAAD window, tokens: "))
    at = alt.selection_point("at", fields=["i"], on="pointerover", value=[{"i": picked}], empty=False, clear=False)
    table = alt.Chart(tokens).transform_calculate(
        fai="datum['fai ' + sink]",
        waad="datum['waad ' + sink + ' ' + cut]",
    )
    strip = _strip(table, tokens, links, at)
    axis = alt.X("i:Q", title=None, scale=alt.Scale(domain=[0, len(tokens)], nice=False), axis=alt.Axis(labels=False))
    panels: list[Any] = []
    for field, title, colour in (
        ("waad", "WAAD, tokens", WAAD_COLOUR),
        ("fai", "FAI, %", FAI_COLOUR),
        ("entropy", "entropy, nats", ENTROPY_COLOUR),
    ):
        scale = alt.Scale(zero=field != "waad")
        y = alt.Y(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=3, titleFontSize=11))
        line = table.mark_line(color=colour, strokeWidth=1.5).encode(x=axis, y=y)
        panels.append(_touchable(table, line, at).properties(width=WIDTH - 14, height=52))
    panels.append(_weights_panel(table, at, len(tokens)))
    with warnings.catch_warnings():  # altair warns that views share a selection; that is what we want
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection parameter")
        stacked: alt.VConcatChart = alt.vconcat(strip, *panels, spacing=8)
    titled: alt.VConcatChart = stacked.properties(title="Who reads this token later, and where did it look?")
    return titled.add_params(sink, cut).resolve_scale(color="independent", opacity="independent", size="independent")


def _strip(table: alt.Chart, tokens: pd.DataFrame, links: pd.DataFrame, at: alt.Parameter) -> Any:
    height = int(tokens.y.max()) + ROW
    across, down = alt.Scale(domain=[0, WIDTH], nice=False), alt.Scale(domain=[height, 0], nice=False)
    x = alt.X("x:Q", scale=across, axis=None)
    placed = table.transform_joinaggregate(most="max(waad)").transform_calculate(
        top="datum.y + 6",
        bottom="datum.y + 23",
        low="datum.y + 24",
        deep="datum.y + 24 + 11 * pow(datum.waad / datum.most, 2)",  # squared, or bars of 4 and 6 tokens look alike
    )
    fill = alt.Opacity("fai:Q", scale=alt.Scale(type="pow", exponent=0.7, range=[0, 0.75]), legend=None)
    tip = [
        alt.Tooltip("word:N", title="token"),
        alt.Tooltip("fai:Q", title="FAI, %", format=".2f"),
        alt.Tooltip("waad:Q", title="WAAD, tokens", format=".2f"),
        alt.Tooltip("entropy:Q", title="entropy, nats", format=".2f"),
    ]
    edges: dict[str, Any] = {"x": x, "x2": "x2:Q", "y": alt.Y("top:Q", scale=down, axis=None), "y2": "bottom:Q"}
    boxes = placed.mark_rect(color=FAI_COLOUR, cornerRadius=2).encode(**edges, opacity=fill)
    bars = placed.mark_rect(color=WAAD_COLOUR).encode(
        x=x, x2="x2:Q", y=alt.Y("low:Q", scale=down, axis=None), y2="deep:Q"
    )
    dots = placed.mark_circle(color=ENTROPY_COLOUR, opacity=0.9).encode(
        x=alt.X("x2:Q", scale=across, axis=None),
        y=alt.Y("top:Q", scale=down, axis=None),
        size=alt.Size("entropy:Q", scale=alt.Scale(domain=[0, 4], range=[0, 45], clamp=True), legend=None),
    )
    words = placed.mark_text(align="left", baseline="top", dx=2, dy=3, font="monospace", fontSize=11).encode(
        x=x, y=alt.Y("top:Q", scale=down, axis=None), text="word:N"
    )
    hit = placed.mark_rect(opacity=0).encode(**edges, tooltip=tip).add_params(at)
    frame = placed.mark_rect(fill=None, strokeWidth=2, cornerRadius=2).encode(**edges, stroke=alt.value("currentColor"))
    return alt.layer(
        boxes, bars, *_links(tokens, links, at, across, down), words, dots, frame.transform_filter(at), hit
    ).properties(width=WIDTH, height=height)


def _links(
    tokens: pd.DataFrame, links: pd.DataFrame, at: alt.Parameter, across: alt.Scale, down: alt.Scale
) -> list[Any]:
    """Lines from the chosen token to its readers and to what it looks at, and frames around those."""
    places = tokens[["i", "x", "x2", "y"]]
    ends = alt.LookupData(places.rename(columns={"i": "j"}), "j", ["x", "x2", "y"])
    own = alt.LookupData(
        places.rename(columns={"x": "own_x", "x2": "own_x2", "y": "own_y"}), "i", ["own_x", "own_x2", "own_y"]
    )
    chosen = (
        alt.Chart(links)
        .transform_filter("datum.sink == sink")
        .transform_filter(at)
        .transform_lookup("j", from_=ends)
        .transform_lookup("i", from_=own)
        .transform_calculate(
            mx="(datum.x + datum.x2) / 2",
            my="datum.y + 14",
            ox="(datum.own_x + datum.own_x2) / 2",
            oy="datum.own_y + 14",
            top="datum.y + 6",
            bottom="datum.y + 23",
        )
    )
    kinds = alt.Scale(domain=["reads it later", "it looks at"], range=[FAI_COLOUR, WAAD_COLOUR])
    colour = alt.Color("kind:N", scale=kinds, legend=alt.Legend(title=None, orient="top"))
    strength = alt.StrokeWidth("weight:Q", scale=alt.Scale(domain=[0, 0.2], range=[1, 4], clamp=True), legend=None)
    apart = chosen.transform_filter("datum.y != datum.own_y")  # within a line it would strike the words through
    lines = apart.mark_rule(opacity=0.7).encode(
        x=alt.X("ox:Q", scale=across, axis=None),
        x2="mx:Q",
        y=alt.Y("oy:Q", scale=down, axis=None),
        y2="my:Q",
        color=colour,
        strokeWidth=strength,
    )
    frames = chosen.mark_rect(fill=None, strokeWidth=2, cornerRadius=2).encode(
        x=alt.X("x:Q", scale=across, axis=None),
        x2="x2:Q",
        y=alt.Y("top:Q", scale=down, axis=None),
        y2="bottom:Q",
        stroke=alt.Stroke("kind:N", scale=kinds, legend=None),
    )
    return [lines, frames]


def _touchable(table: alt.Chart, drawn: Any, at: alt.Parameter) -> Any:
    """A panel over token numbers with a line at the chosen token, and invisible columns that choose one."""
    here = table.transform_filter(at).mark_rule(strokeWidth=1.5).encode(x="i:Q")
    hit = table.transform_calculate(next="datum.i + 1").mark_rect(opacity=0).encode(x="i:Q", x2="next:Q").add_params(at)
    return alt.layer(drawn, here, hit)


def _weights_panel(table: alt.Chart, at: alt.Parameter, n: int) -> Any:
    """The weights of the three rules, before they are matched to a mean of 1: darker is more."""
    rules = ["local", "global", "coupled"]
    folded = table.transform_calculate(
        **{f"gamma_{rule}": f"datum['{rule} ' + sink + ' ' + cut]" for rule in rules}, next="datum.i + 1"
    ).transform_fold([f"gamma_{rule}" for rule in rules], as_=["folded", "gamma"])
    folded = folded.transform_calculate(rule="slice(datum.folded, 6)")
    bars = folded.mark_rect(color=SOFTMAX).encode(
        x=alt.X("i:Q", title="token of the answer", scale=alt.Scale(domain=[0, n], nice=False)),
        x2="next:Q",
        y=alt.Y("rule:N", sort=rules, title="weight γ", axis=alt.Axis(titleFontSize=11)),
        opacity=alt.Opacity("gamma:Q", scale=alt.Scale(domain=[1, 1.75], range=[0.05, 1]), legend=None),
        tooltip=["word:N", "rule:N", alt.Tooltip("gamma:Q", title="weight γ", format=".2f")],
    )
    return _touchable(table, bars, at).properties(width=WIDTH - 14, height=54)


# ------------------------------------------------------------------------------------------------------ heads and chance


def span_chart(spans: Mapping[str, Tensor], groups: Mapping[str, rhythm.Groups]) -> alt.LayerChart:
    """Mean span of every head with the sink and without it; colour: the group it belongs to without."""
    kept, removed = (spans[sink] for sink in SINKS)
    local, far = (set(group) for group in groups["removed"])
    before = [set(group) for group in groups["kept"]]

    def name(head: tuple[int, int], sets: Sequence[set[tuple[int, int]]]) -> str:
        return "local" if head in sets[0] else "global" if head in sets[1] else "neither"

    rows = []
    for layer, head in np.ndindex(*kept.shape):
        at = (layer, head)
        rows.append(
            {
                "head": f"{layer}.{head}",
                "kept": round(float(kept[at]), 2),
                "removed": round(float(removed[at]), 2),
                "group": name(at, (local, far)),
                "with the sink": name(at, before),
            }
        )
    domain = ["local", "global", "neither"]
    ticks = alt.Axis(values=[2, 5, 10, 20, 50, 100])
    points = (
        alt.Chart(pd.DataFrame(rows))
        .mark_circle(size=55, opacity=0.8)
        .encode(
            x=alt.X("kept:Q", title="mean span with the sink, tokens", scale=alt.Scale(type="log"), axis=ticks),
            y=alt.Y("removed:Q", title="mean span without, tokens", scale=alt.Scale(type="log"), axis=ticks),
            color=alt.Color(
                "group:N",
                scale=alt.Scale(domain=domain, range=[WAAD_COLOUR, FAI_COLOUR, CONTROL]),
                legend=alt.Legend(title="group without the sink", orient="top"),
            ),
            tooltip=["head:N", "kept:Q", "removed:Q", alt.Tooltip("group:N", title="without"), "with the sink:N"],
        )
    )
    ends = pd.DataFrame({"kept": [2.0, 80.0], "removed": [2.0, 80.0]})
    equal = alt.Chart(ends).mark_line(strokeDash=[4, 4], color=CONTROL).encode(x="kept:Q", y="removed:Q")
    chart: alt.LayerChart = equal + points
    return chart.properties(width=270, height=230, title="The sink decides which heads look far")


def null_chart(shifted: Mapping[str, rhythm.ShiftTest], shuffled: Mapping[str, rhythm.ShiftTest]) -> alt.VConcatChart:
    """What chance gives for both statistics, by circular shifts and by free shuffling, and what was measured."""
    panels = []
    kinds = {"circular shifts": SOFTMAX, "free shuffling": LINEAR}
    for name in shifted:
        unit = UNITS[name]
        drawn = [(kind, tests[name].null) for kind, tests in zip(kinds, (shifted, shuffled), strict=True)]
        edges = np.histogram_bin_edges(np.concatenate([unit * null for _, null in drawn]), bins=40)
        rows = []
        for kind, null in drawn:
            density, _ = np.histogram(unit * null, bins=edges)
            rows += [
                {"from": a, "to": b, "share": 100 * count / len(null), "null": kind}
                for a, b, count in zip(edges[:-1], edges[1:], density, strict=True)
            ]
        table = pd.DataFrame(rows).round(4)
        bars = (
            alt.Chart(table)
            .mark_area(interpolate="step-after", opacity=0.35, line=True)
            .encode(
                x=alt.X("from:Q", title=NAMES[name], scale=alt.Scale(zero=False)),
                y=alt.Y("share:Q", title="draws, %", stack=None),
                color=alt.Color(
                    "null:N",
                    scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
                    legend=alt.Legend(title=None, orient="top"),
                ),
                tooltip=["null:N", alt.Tooltip("from:Q", format=".3f"), alt.Tooltip("share:Q", format=".1f")],
            )
        )
        mark = pd.DataFrame({"value": [unit * shifted[name].value]})
        found = alt.Chart(mark).mark_rule(color=NEGATIVE, strokeWidth=3).encode(x="value:Q")
        told = found.mark_text(align="left", dx=5, dy=-4, fontWeight="bold", color=NEGATIVE).encode(
            x="value:Q", y=alt.value(10), text=alt.value("measured")
        )
        panels.append(alt.layer(bars, found, told).properties(width=270, height=110))
    chart: alt.VConcatChart = alt.vconcat(*panels, spacing=14)
    return chart.properties(title="Is the rhythm more than chance?")


# --------------------------------------------------------------------------------------------- the small model and credit


def anchor_chart(forced: Forced, fai: np.ndarray, uniform: np.ndarray) -> alt.VConcatChart:
    """By place in the chain: how often a wrong word changes the answer, and FAI of the trained model beside uniform attention."""
    n = len(forced.sums)
    kind = ["partial sum" if here else "separator" for here in forced.sums]
    rows = pd.DataFrame(
        {
            "place": np.arange(1, n + 1),
            "kind": kind,
            "changed": 100 * forced.changed.mean(0),
            "FAI": 100 * fai[:, :n].mean(0),
            "uniform": 100 * uniform[:n],
        }
    ).round(3)
    x = alt.X("place:O", title="token of the chain", axis=alt.Axis(labelAngle=0))
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=["partial sum", "separator"], range=[FAI_COLOUR, CONTROL]),
        legend=alt.Legend(title=None, orient="top"),
    )
    tip = ["place:O", "kind:N", "changed:Q", "FAI:Q", alt.Tooltip("uniform:Q", title="FAI of uniform attention")]
    answers = (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            x=x,
            y=alt.Y("changed:Q", title="answers changed, %", scale=alt.Scale(domain=[0, 100])),
            color=colour,
            tooltip=tip,
        )
        .properties(width=270, height=110)
    )
    scores = alt.Chart(rows).mark_bar().encode(x=x, y=alt.Y("FAI:Q", title="FAI, %"), color=colour, tooltip=tip)
    flat = alt.Chart(rows).mark_tick(color=NEGATIVE, thickness=2.5, width=16).encode(x=x, y="uniform:Q")
    lower = alt.layer(scores, flat).properties(width=270, height=110)
    chart: alt.VConcatChart = alt.vconcat(answers, lower, spacing=10)
    return chart.properties(title="Which tokens decide the answer, and does FAI know?")


def curves_chart(rows: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Mean reward over the iterations for every rule, one thin line a seed, one thick line for their mean."""
    table = pd.DataFrame(
        [
            {"rule": row["impl"], "seed": row["seed"], "iteration": i, "reward": reward}
            for row in rows
            for i, reward in enumerate(row["curve"], start=1)
        ]
    )
    rules = [rule for rule in RULE_COLOURS if rule in set(table.rule)]
    pick = alt.selection_point("rule", fields=["rule"], bind="legend")
    colour = alt.Color(
        "rule:N",
        scale=alt.Scale(domain=rules, range=[RULE_COLOURS[rule] for rule in rules]),
        legend=alt.Legend(title="credit", orient="top", columns=3),
    )
    x = alt.X("iteration:Q", title="iteration of GRPO")
    base = alt.Chart(table)
    seeds = base.mark_line(strokeWidth=1).encode(
        x=x,
        y=alt.Y("reward:Q", title="right answers, %", scale=alt.Scale(zero=False)),
        color=colour,
        detail="seed:N",
        opacity=alt.condition(pick, alt.value(0.35), alt.value(0.03)),
    )
    means = base.mark_line(strokeWidth=3).encode(
        x=x, y="mean(reward):Q", color=colour, opacity=alt.condition(pick, alt.value(1.0), alt.value(0.08))
    )
    chart: alt.LayerChart = seeds.add_params(pick) + means
    return chart.properties(width=270, height=230, title="Does coupled credit teach faster?")


def gains_chart(rows: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> alt.LayerChart:
    """Gain of every rule over random credit: a point a seed, their mean and two standard errors. ``table``: of ``credit_table``."""
    scores = {(row["impl"], row["seed"]): row["score"] for row in rows}
    points = pd.DataFrame(
        [
            {"rule": rule, "seed": seed, "gain": round(score - scores["random", seed], 3)}
            for (rule, seed), score in scores.items()
            if rule != "random"
        ]
    )
    spans = table.drop(index="random").rename_axis("rule").reset_index()
    order = list(spans.rule)
    y = alt.Y("rule:N", title=None, sort=order)
    zero = alt.Chart(pd.DataFrame({"gain": [0.0]})).mark_rule(strokeDash=[4, 4], color=CONTROL).encode(x="gain:Q")
    each = (
        alt.Chart(points)
        .mark_tick(color=CONTROL, thickness=2, height=14)
        .encode(
            x=alt.X("gain:Q", title="reward, points above random credit"),
            y=y,
            tooltip=["rule", "seed", "gain"],
        )
    )
    ends = alt.Chart(spans).mark_rule(color=SOFTMAX, strokeWidth=2.5).encode(x="from:Q", x2="to:Q", y=y)
    means = (
        alt.Chart(spans)
        .mark_point(filled=True, size=90, color=SOFTMAX, opacity=1)
        .encode(x="over random credit:Q", y=y)
    )
    chart: alt.LayerChart = zero + each + ends + means
    return chart.properties(width=230, height=34 * len(order), title="Every rule against the fair control")


# ---------------------------------------------------------------------------------------------------------------- the twin


def peaks_chart(
    reading: Reading, window: int, horizon: tuple[int, int | None], quantile: float, title: str
) -> alt.VConcatChart:
    """WAAD, FAI and entropy of one answer with the peaks above a quantile; the subtitle counts which peaks are followed."""
    waad, fai = reading.waad(window), reading.fai(horizon)
    some = np.isfinite(fai)
    marks = {"WAAD, tokens": rhythm.peaks(waad, quantile), "FAI, %": rhythm.peaks(fai, quantile)}
    pair = rhythm.peaks(waad[some], quantile), rhythm.peaks(fai[some], quantile)
    test = rhythm.shift_test([pair], rhythm.follows, draws=400)
    entropy = reading.entropy["input"]
    lift = rhythm.lift(marks["WAAD, tokens"], entropy)
    series = {"WAAD, tokens": waad, "FAI, %": 100 * fai, "entropy, nats": entropy}
    colours = (WAAD_COLOUR, FAI_COLOUR, ENTROPY_COLOUR)
    panels = []
    for (name, values), colour in zip(series.items(), colours, strict=True):
        peak = marks.get(name, marks["WAAD, tokens"])
        table = pd.DataFrame({"token": np.arange(len(values)), "word": reading.words, "value": values, "peak": peak})
        table = table[np.isfinite(values)].round(3)
        x = alt.X("token:Q", title=None if name != "entropy, nats" else "token of the answer")
        line = alt.Chart(table).mark_line(color=colour, strokeWidth=1.5).encode(x=x, y=alt.Y("value:Q", title=name))
        dots = (
            alt.Chart(table[table.peak])
            .mark_point(filled=True, size=45, color=NEGATIVE, opacity=1)
            .encode(x=x, y="value:Q", tooltip=["token", "word", "value"])
        )
        panels.append((line + dots).properties(width=WIDTH - 14, height=70))
    told = [
        f"{100 * test.value:.0f}% of the WAAD peaks are followed, {100 * test.band()[0]:.0f}% when shifted",
        f"entropy at WAAD peaks: {lift:+.2f} nats against the mean",
    ]
    chart: alt.VConcatChart = alt.vconcat(*panels, spacing=6)
    return chart.properties(title=alt.TitleParams(title, subtitle=told)).properties(
        description=f"{title}: WAAD, FAI and entropy by token with their peaks. {told[0]}; {told[1]}."
    )


def rhythm_explorer(readings: Mapping[str, Sequence[Reading]], problems: Sequence[str]) -> Twin:
    """Widgets for the answer, the window of WAAD, the horizon of FAI, the quantile of a peak and the sink."""
    horizons: list[tuple[str, tuple[int, int | None]]] = [
        ("10 tokens to the end", (10, None)),
        ("10 to 50 tokens", (10, 50)),
        ("2 to 10 tokens", (2, 10)),
    ]

    def look(answer: int, window: int, horizon: tuple[int, int | None], quantile: float, sink: str) -> alt.VConcatChart:
        words = problems[answer].split()
        title = " ".join(words[:6]) + " ..."
        return peaks_chart(readings[sink][answer], window, tuple(horizon), quantile, title)  # type: ignore[arg-type]

    return twin(
        look,
        answer=ipywidgets.IntSlider(value=0, min=0, max=len(problems) - 1, description="answer"),
        window=ipywidgets.IntSlider(value=10, min=2, max=40, description="WAAD window"),
        horizon=ipywidgets.Dropdown(options=horizons, description="FAI horizon"),
        quantile=ipywidgets.FloatSlider(value=0.8, min=0.5, max=0.95, step=0.05, description="peak quantile"),
        sink=ipywidgets.RadioButtons(options=list(SINKS), value="removed", description="sink"),
    )
