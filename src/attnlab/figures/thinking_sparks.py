"""Figures of the chapter ``circuits/thinking-sparks``: pure functions from measured runs to charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd

from attnlab.circuits.thinking_sparks import TAU, TAUS, Shares, Timeline, effect
from attnlab.circuits.thinking_sparks_runs import AGAIN as NOISE
from attnlab.figures.palette import CONTROL, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin

RUNS = {"SFT": SOFTMAX, "GRPO": NEGATIVE, "drift": OURS, NOISE: CONTROL}
#: heads of the base, then one colour a checkpoint, early to late
COHORTS = [
    "#7f7f7f",
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#e6c229",
]


def head_frame(
    lines: Mapping[str, Timeline],
    patched: Mapping[tuple[str, int], Shares],
    rows: Mapping[tuple[str, int], Shares],
) -> pd.DataFrame:
    """One row a run, checkpoint and head: ``run, updates, layer, h, head, share, before, E, drop, base_drop`` and attention ``a0 ..``.

    Args:
        lines: the runs by name.
        patched: for a run and its updates, what patching each head does, ``[L, H]``.
        rows: for a run and its updates, attention from the last token of one prompt, ``[L, H, T]``.
    """
    found = []
    for run, line in lines.items():
        base = line.shares[0]
        for k, updates in enumerate(line.updates):
            moved = effect(line.shares[k], base)
            for layer, h in np.ndindex(*base.shape):
                looks = {f"a{t}": round(float(x), 3) for t, x in enumerate(rows[run, updates][layer, h])}
                found.append(
                    {
                        "run": run,
                        "updates": updates,
                        "layer": layer,
                        "h": h,
                        "head": f"{layer}.{h}",
                        "share": round(float(line.shares[k, layer, h]), 4),
                        "before": round(float(base[layer, h]), 4),
                        "E": round(float(moved[layer, h]), 3),
                        "drop": round(float(patched[run, updates][layer, h]), 3),
                        "base_drop": round(float(patched[run, line.updates[0]][layer, h]), 3),
                        **looks,
                    }
                )
    return pd.DataFrame(found)


def spark_map(
    heads: pd.DataFrame, lines: Mapping[str, Timeline], words: Sequence[str], picked: str, at: int, run: str = "SFT"
) -> alt.VConcatChart:
    """The grid of heads with a slider over checkpoints and a choice of the run; cohorts and learning below; a click looks at one head.

    ``heads`` is a :func:`head_frame`, ``words`` the prompt whose attention it holds.
    """
    first = next(iter(lines.values()))
    step = first.updates[1] - first.updates[0]
    params = [
        alt.param("run", value=run, bind=alt.binding_radio(options=list(lines), name="after the base: ")),
        alt.param("at", value=at, bind=alt.binding_range(min=0, max=first.updates[-1], step=step, name="updates: ")),
        alt.param("tau", value=TAU, bind=alt.binding_range(min=TAUS[0], max=TAUS[-1], step=0.005, name="threshold: ")),
    ]
    pick = alt.selection_point("pick", fields=["head"], value=[{"head": picked}], on="click", toggle=False, empty=False)
    now = alt.Chart(heads).transform_filter("datum.run == run && datum.updates == at")
    grid = _grid(now, "tau", pick)
    counted = (
        now.transform_calculate(
            kept="datum.share >= tau ? 1 : 0",
            new="datum.share >= tau && datum.before < tau ? 1 : 0",
            gone="datum.share < tau && datum.before >= tau ? 1 : 0",
        )
        .transform_aggregate(kept="sum(kept)", new="sum(new)", gone="sum(gone)")
        .transform_calculate(
            line="datum.kept + ' heads in the circuit: ' + datum.new + ' new, ' + datum.gone + ' lost'"
        )
        .mark_text(align="left", x=0, y=8, fontWeight="bold")
        .encode(text="line:N")
        .properties(width=270, height=16)
    )
    stacked = alt.vconcat(
        grid, counted, _cohorts(heads, first.updates), _learning(lines), _looks(heads, words, pick), spacing=14
    )
    titled: alt.VConcatChart = stacked.properties(title="Which heads does post-training bring in?")
    return titled.add_params(*params).resolve_scale(color="independent", x="independent", y="independent")


def _grid(now: alt.Chart, tau: str, pick: alt.Parameter | None = None) -> Any:
    """Layers against heads: colour is the effect, an outline marks the circuit, + and − what came and went."""
    where = {
        "x": alt.X("h:O", title="head", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        "y": alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(ticks=False, domain=False)),
    }
    shade = alt.Color(
        "E:Q",
        scale=alt.Scale(domain=[-1, 0, 1], range=[NEGATIVE, "#d9d9d9", SOFTMAX]),
        legend=alt.Legend(title="effect E", orient="top", gradientLength=150, direction="horizontal"),
    )
    tooltip = [
        alt.Tooltip("head:N"),
        alt.Tooltip("share:Q", title="share now", format=".1%"),
        alt.Tooltip("before:Q", title="share in the base", format=".1%"),
        alt.Tooltip("E:Q", format="+.2f"),
    ]
    cells = now.mark_rect(cornerRadius=3).encode(**where, color=shade, tooltip=tooltip)
    if pick is not None:
        cells = cells.add_params(pick)
    circuit = (
        now.transform_filter(f"datum.share >= {tau}")
        .mark_rect(fill=None, strokeWidth=2.5, cornerRadius=3, tooltip=None)
        .encode(**where, stroke=alt.value("currentColor"))
    )
    signs = (
        now.transform_calculate(
            sign=f"datum.share >= {tau} && datum.before < {tau} ? '+' : datum.share < {tau} && datum.before >= {tau} ? '−' : ''"
        )
        .mark_text(fontSize=20, fontWeight="bold", tooltip=None, color="#111111")
        .encode(**where, text="sign:N")
    )
    layers: Any = alt.layer(cells, circuit, signs)
    return layers.properties(width=alt.Step(33), height=alt.Step(30))


def _time(last: int, title: str | None) -> alt.X:
    return alt.X("updates:Q", title=title, scale=alt.Scale(domain=[0, last], padding=8), axis=alt.Axis(tickCount=5))


def _rule() -> Any:
    return (
        alt.Chart(pd.DataFrame({"i": [0]}))
        .transform_calculate(updates="at")
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
        .encode(x="updates:Q")
    )


def _cohorts(heads: pd.DataFrame, updates: Sequence[int]) -> Any:
    """Heads in the circuit at each checkpoint, by the checkpoint at which they were first in it."""
    slim = heads[["run", "updates", "head", "share"]]
    bars = (
        alt.Chart(slim)
        .transform_filter("datum.run == run")
        .transform_calculate(since="datum.share >= tau ? datum.updates : 1e6")
        .transform_joinaggregate(first="min(since)", groupby=["head"])
        .transform_filter("datum.share >= tau")
        .transform_aggregate(heads="count()", groupby=["updates", "first"])
        .mark_bar(size=15)
        .encode(
            x=_time(updates[-1], None),
            y=alt.Y("heads:Q", title="heads in it", stack="zero", axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "first:O",
                scale=alt.Scale(domain=list(updates), range=COHORTS[: len(updates)]),
                legend=alt.Legend(title="first in it at update", orient="top", columns=6, symbolSize=60),
            ),
            order=alt.Order("first:Q"),
            tooltip=["updates:Q", alt.Tooltip("first:Q", title="first in it at"), "heads:Q"],
        )
    )
    layers: Any = bars + _rule()
    return layers.properties(width=270, height=110)


def _learning(lines: Mapping[str, Timeline]) -> Any:
    """Chance of the right chain along all runs; the chosen one is drawn thick."""
    table = pd.DataFrame(
        [
            {"run": run, "updates": at, "right": round(100 * float(right), 2)}
            for run, line in lines.items()
            for at, right in zip(line.updates, line.right, strict=True)
        ]
    )
    last = next(iter(lines.values())).updates[-1]
    drawn = (
        alt.Chart(table)
        .mark_line(point=True)
        .encode(
            x=_time(last, "updates after the base"),
            y=alt.Y("right:Q", title="right chains, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "run:N",
                scale=alt.Scale(domain=list(lines), range=[RUNS[run] for run in lines]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            opacity=alt.condition("datum.run == run", alt.value(1), alt.value(0.3)),
            tooltip=["run:N", "updates:Q", alt.Tooltip("right:Q", title="right chains, %", format=".1f")],
        )
    )
    layers: Any = drawn + _rule()
    return layers.properties(width=270, height=110)


def _looks(heads: pd.DataFrame, words: Sequence[str], pick: alt.Parameter) -> Any:
    """What the clicked head looks at now and in the base, and what the answer loses without it."""
    columns: list[Any] = [f"a{t}" for t in range(len(words))]
    labels = {f"a{t}": f"{t}: {word}" for t, word in enumerate(words)}
    named = alt.Chart(heads).transform_filter(pick).transform_filter("datum.run == run")
    lookup = "{" + ", ".join(f"'{column}': \"{label}\"" for column, label in labels.items()) + "}"

    def attention(condition: str) -> alt.Chart:
        folded = named.transform_filter(condition).transform_fold(columns, as_=["place", "attention"])
        return folded.transform_calculate(token=f"({lookup})[datum.place]")

    x = alt.X(
        "attention:Q",
        title="attention from the last token",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=4),
    )
    y = alt.Y("token:N", title=None, sort=list(labels.values()), axis=alt.Axis(labelOverlap=False))
    bars = (
        attention("datum.updates == at")
        .mark_bar(height=9, color=SOFTMAX)
        .encode(x=x, y=y, tooltip=["token:N", alt.Tooltip("attention:Q", format=".2f")])
    )
    base = attention("datum.updates == 0").mark_tick(color=PAPER, thickness=3, height=13).encode(x=x, y=y)
    said = named.transform_filter("datum.updates == at").transform_calculate(
        one="'Head ' + datum.head + ': ' + format(datum.share, '.1%') + ' of the flow (base ' + format(datum.before, '.1%') + ')'",
        two="'Swap it: ' + format(datum.drop, '.0%') + ' of the answer goes (base ' + format(datum.base_drop, '.0%') + ')'",
    )
    text: dict[str, Any] = {"align": "left", "x": 0}
    lines: Any = said.mark_text(**text, y=6, fontWeight="bold").encode(text="one:N") + said.mark_text(
        **text, y=24
    ).encode(text="two:N")
    panel: Any = bars + base
    subtitle = "bar: now, tick: in the base"
    shown = panel.properties(
        width=210, height=15 * len(words), title=alt.TitleParams(text="Where it looks", subtitle=subtitle, fontSize=13)
    )
    return alt.vconcat(lines.properties(width=270, height=30), shown, spacing=6)


def grid_chart(heads: pd.DataFrame, run: str, updates: int, tau: float = TAU) -> Any:
    """The grid of :func:`spark_map` at one setting."""
    now = heads[(heads.run == run) & (heads.updates == updates)]
    new, gone = (
        int(((now.share >= tau) & (now.before < tau)).sum()),
        int(((now.share < tau) & (now.before >= tau)).sum()),
    )
    title = alt.TitleParams(
        text=f"{run}, {updates} updates",
        subtitle=f"{int((now.share >= tau).sum())} heads in the circuit: {new} new, {gone} lost",
    )
    chart = _grid(alt.Chart(now), repr(float(tau))).properties(title=title)
    return chart.properties(
        description=f"Effect of every head after {updates} updates of {run}; {new} heads are new in the circuit at a threshold of {tau:g}, {gone} are lost."
    )


def panel(heads: pd.DataFrame) -> Twin:
    """Widgets over :func:`grid_chart`: run, checkpoint and threshold."""
    slim = heads[["run", "updates", "layer", "h", "head", "share", "before", "E"]]
    updates = sorted(set(heads.updates))

    def look(run: str, updates: int, tau: float) -> Any:
        return grid_chart(slim, run, updates, tau)

    return twin(
        look,
        run=ipywidgets.ToggleButtons(options=list(dict.fromkeys(heads.run)), description="run"),
        updates=ipywidgets.SelectionSlider(options=updates, value=updates[-1], description="updates"),
        tau=ipywidgets.SelectionSlider(options=list(TAUS), value=TAU, description="threshold"),
    )


def threshold_chart(counts: pd.DataFrame) -> alt.LayerChart:
    """Heads that came or went by threshold and method; a menu for the regime, another for what is counted.

    ``counts`` is :func:`attnlab.circuits.thinking_sparks_runs.head_counts`.
    """
    regimes = list(dict.fromkeys(counts.regime))
    table = counts.melt(["regime", "seed", "method", "tau"], ["emergent", "lost"], "what", "heads")
    params = [
        alt.param("regime", value=regimes[0], bind=alt.binding_radio(options=regimes, name="regime: ")),
        alt.param("what", value="emergent", bind=alt.binding_radio(options=["emergent", "lost"], name="heads: ")),
    ]
    chosen = alt.Chart(table).transform_filter("datum.regime == regime && datum.what == what")
    names = [name for name in RUNS if name in set(counts.method)]
    colour = alt.Color(
        "method:N",
        scale=alt.Scale(domain=names, range=[RUNS[name] for name in names]),
        legend=alt.Legend(title=None, orient="top", columns=2, symbolOpacity=1),
    )
    x = alt.X("tau:Q", title="threshold, share of the importance", axis=alt.Axis(format="%", tickCount=5))
    y = alt.Y("heads:Q", title="heads of 24", scale=alt.Scale(domainMin=0))
    tooltip = [
        "method:N",
        alt.Tooltip("tau:Q", format=".1%"),
        alt.Tooltip("heads:Q", title="heads, mean", format=".1f"),
    ]
    seeds = chosen.mark_point(size=18, opacity=0.45, filled=True).encode(
        x=x, y=y, color=colour, tooltip=["seed:N", "method:N", "heads:Q"]
    )
    means = chosen.transform_aggregate(heads="mean(heads)", groupby=["method", "tau"]).mark_line(
        strokeWidth=2.5, point=True
    )
    chart: alt.LayerChart = seeds + means.encode(x=x, y=y, color=colour, tooltip=tooltip)
    return chart.properties(width=270, height=220, title="Who brings in more new heads?").add_params(*params)


def distance_chart(moves: pd.DataFrame) -> Any:
    """Emergent heads against the KL divergence from the base, every checkpoint of every seed.

    ``moves`` has the columns ``regime, method, seed, updates, kl, emergent``.
    """
    regimes = list(dict.fromkeys(moves.regime))
    regime = alt.param("place", value=regimes[0], bind=alt.binding_radio(options=regimes, name="regime: "))
    names = [name for name in RUNS if name in set(moves.method)]
    pick = alt.selection_point("method_pick", fields=["method"], bind="legend")
    points = (
        alt.Chart(moves)
        .transform_filter("datum.regime == place")
        .transform_calculate(
            spread="datum.emergent + 0.05 * (datum.seed - 2)"
        )  # seeds side by side, not on top of each other
        .mark_point(filled=True, size=45)
        .encode(
            x=alt.X(
                "kl:Q",
                title="KL from the base, nats a token",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(tickCount=4),
            ),
            y=alt.Y("spread:Q", title="emergent heads of 24", axis=alt.Axis(tickMinStep=1, format="d")),
            color=alt.Color(
                "method:N",
                scale=alt.Scale(domain=names, range=[RUNS[name] for name in names]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            opacity=alt.condition(pick, alt.value(0.75), alt.value(0.06)),
            tooltip=["method:N", "seed:N", "updates:Q", alt.Tooltip("kl:Q", format=".3f"), "emergent:Q"],
        )
    )
    return points.add_params(pick, regime).properties(width=270, height=200, title="Did one method only move further?")


def mode_chart(shares: pd.DataFrame, tau: float) -> Any:
    """The importance of every head in two modes of one model, on logarithmic axes; dashed: the threshold.

    ``shares`` has a row a head: ``head, think, number``.
    """
    floor = tau / 50
    table = shares.assign(
        x=shares.think.clip(lower=floor),
        y=shares.number.clip(lower=floor),
        where=np.select(
            [(shares.think >= tau) & (shares.number >= tau), shares.think >= tau, shares.number >= tau],
            ["both", "think only", "number only"],
            "neither",
        ),
    ).round(5)
    names = ["both", "think only", "number only", "neither"]
    scale = alt.Scale(type="log", domain=[floor, float(max(table.x.max(), table.y.max()))])
    axis = alt.Axis(format="%", values=[0.0002, 0.001, 0.01, 0.05, 0.1])
    points = (
        alt.Chart(table)
        .mark_point(filled=True, size=55, opacity=0.8)
        .encode(
            x=alt.X("x:Q", title="share of the head, step by step", scale=scale, axis=axis),
            y=alt.Y("y:Q", title="share of the head, number only", scale=scale, axis=axis),
            color=alt.Color(
                "where:N",
                scale=alt.Scale(domain=names, range=[OURS, SOFTMAX, NEGATIVE, CONTROL]),
                legend=alt.Legend(title=None, orient="top", columns=2),
            ),
            tooltip=["head:N", alt.Tooltip("think:Q", format=".2%"), alt.Tooltip("number:Q", format=".2%")],
        )
    )
    line = pd.DataFrame({"tau": [tau]})
    dash: dict[str, Any] = {"strokeDash": [4, 4], "opacity": 0.6}
    rules = alt.Chart(line).mark_rule(**dash).encode(x="tau:Q") + alt.Chart(line).mark_rule(**dash).encode(y="tau:Q")
    both: Any = points + rules
    return both.properties(width=250, height=250, title="Which heads carry the answer in each mode?")
