"""Figures of the chapter ``circuits/sae-circuits``: pure functions from codes, scores and rows to charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd

from attnlab.circuits.model import Node
from attnlab.circuits.reference import roc
from attnlab.circuits.sae_circuits import unique_codes
from attnlab.figures.palette import CONTROL, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin

Settings = tuple[int, int]  # features m, training prompts n
LINES = {"new codes": SOFTMAX, "information": OURS}


def barcode_frame(
    codes: Mapping[Settings, np.ndarray],
    positive: np.ndarray,
    heads: Sequence[Node],
    truth: np.ndarray,
    shown: int = 20,
) -> pd.DataFrame:
    """One row a setting and head: its codes on ``shown`` prompts of each class, which of them are new, score, membership, AUC.

    Scores and AUC are those of all prompts. ``new`` marks a code on a positive prompt that the head has on no negative one.
    """
    rows = []
    kept = np.concatenate([np.flatnonzero(side)[:shown] for side in (positive, ~positive)])
    for (m, n), table in codes.items():
        scores = unique_codes(table, positive)
        auc = round(roc(scores, truth).auc, 3)
        for head, node in enumerate(heads):
            known = set(table[~positive, head].tolist())
            row = table[kept, head].tolist()
            rows.append(
                {
                    "m": m,
                    "n": n,
                    "head": str(node),
                    "code": row,
                    "new": [
                        int(code not in known and yes) for code, yes in zip(row, positive[kept].tolist(), strict=True)
                    ],
                    "prompt": list(range(len(kept))),
                    "score": int(scores[head]),
                    "member": bool(truth[head]),
                    "auc": auc,
                }
            )
    return pd.DataFrame(rows)


def barcode(frame: pd.DataFrame, m: int, n: int, theta: int = 3) -> alt.VConcatChart:
    """The codes of all heads on all prompts, and the ROC curve on which the threshold moves a point.

    Args:
        frame: a :func:`barcode_frame`; menus offer its settings if there are several.
        m: features at first.
        n: training prompts at first.
        theta: threshold at first: heads with as many new codes or more are kept.
    """
    features, prompts = sorted(set(frame.m.tolist())), sorted(set(frame.n.tolist()))
    params = [
        alt.param(
            "theta", value=theta, bind=alt.binding_range(min=1, max=12, step=1, name="keep heads from new codes: ")
        )
    ]
    if len(features) > 1 or len(prompts) > 1:
        params.append(alt.param("m_", value=m, bind=alt.binding_select(options=features, name="features m: ")))
        params.append(alt.param("n_", value=n, bind=alt.binding_select(options=prompts, name="training prompts n: ")))
        here = alt.Chart(frame).transform_filter("datum.m == m_ && datum.n == n_")
    else:
        here = alt.Chart(frame)
    chart: Any = alt.vconcat(_cells(here, frame), alt.hconcat(_curve(here), _sentence(here), spacing=12), spacing=12)
    titled: alt.VConcatChart = chart.properties(title=["Which heads use new codes", "on prompts that can be answered?"])
    return titled.add_params(*params).resolve_scale(color="independent")


def _cells(here: alt.Chart, frame: pd.DataFrame) -> alt.LayerChart:
    """The barcode: heads by score, positive prompts at the left; marks for members and the score at the right."""
    columns = len(frame.prompt.iloc[0])
    half, step = columns // 2, 5 if columns > 24 else 8
    by_score = alt.EncodingSortField("score", op="max", order="descending")
    y = alt.Y(
        "head:N", title="head (layer.head), most new codes on top", sort=by_score, axis=alt.Axis(labelOverlap=False)
    )
    x = alt.X(
        "prompt:O",
        title=f"{half} positive prompts, then {half} negative",
        axis=alt.Axis(labels=False, ticks=False, domain=False),
    )
    cells = (
        here.transform_flatten(["code", "new", "prompt"])
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color("code:N", scale=alt.Scale(scheme="tableau20"), legend=None),
            opacity=alt.condition("datum.new == 1", alt.value(1.0), alt.value(0.22)),
            tooltip=[
                "head:N",
                alt.Tooltip("code:N", title="code"),
                alt.Tooltip("score:Q", title="new codes of the head"),
            ],
        )
    )
    border = alt.Chart(pd.DataFrame({"at": [half * step]})).mark_rule(strokeWidth=2).encode(x=alt.value(half * step))
    end = columns * step
    scores = here.mark_text(align="left", fontSize=11).encode(
        x=alt.value(end + 6),
        y=y,
        text="score:Q",
        opacity=alt.condition("datum.score >= theta", alt.value(1.0), alt.value(0.35)),
    )
    marks = (
        here.transform_filter("datum.member")
        .mark_point(filled=True, size=55, color=OURS, opacity=1)
        .encode(x=alt.value(end + 30), y=y, tooltip=["head:N"])
    )
    layers: Any = alt.layer(cells, border, scores, marks)
    done: alt.LayerChart = layers.properties(width=end, height=alt.Step(14))
    return done


def _counts(here: alt.Chart) -> alt.Chart:
    """What the threshold keeps, as one row: ``tpr, fpr, hits, members, false, auc``."""
    return (
        here.transform_calculate(
            hit="datum.member && datum.score >= theta ? 1 : 0",
            wrong="!datum.member && datum.score >= theta ? 1 : 0",
            inside="datum.member ? 1 : 0",
        )
        .transform_aggregate(
            hits="sum(hit)", wrong="sum(wrong)", members="sum(inside)", heads="count()", auc="max(auc)", groupby=[]
        )
        .transform_calculate(tpr="datum.hits / datum.members", fpr="datum.wrong / (datum.heads - datum.members)")
    )


def _curve(here: alt.Chart) -> alt.LayerChart:
    """The ROC curve of the shown setting: true against false positive rate of every threshold, and the point of this one."""
    rate = alt.Scale(domain=[0, 1])
    axis = alt.Axis(format="%", tickCount=3)
    x = alt.X("fpr:Q", title="other heads kept", scale=rate, axis=axis)
    y = alt.Y("tpr:Q", title="circuit heads kept", scale=rate, axis=axis)
    stairs = (
        here.transform_calculate(inside="datum.member ? 1 : 0", outside="datum.member ? 0 : 1")
        .transform_aggregate(inside="sum(inside)", outside="sum(outside)", groupby=["score"])
        .transform_window(
            hits="sum(inside)", wrong="sum(outside)", sort=[alt.SortField("score", "descending")], frame=[None, 0]
        )
        .transform_joinaggregate(members="sum(inside)", others="sum(outside)")
        .transform_calculate(tpr="datum.hits / datum.members", fpr="datum.wrong / datum.others")
        .mark_line(strokeWidth=2.5, color=SOFTMAX, point=alt.OverlayMarkDef(size=25, color=SOFTMAX))
        .encode(x=x, y=y, order=alt.Order("score:Q", sort="descending"))
    )
    chance = (
        alt.Chart(pd.DataFrame({"fpr": [0, 1], "tpr": [0, 1]}))
        .mark_line(strokeDash=[4, 4], color=CONTROL)
        .encode(x=x, y=y)
    )
    point = _counts(here).mark_point(filled=True, size=160, color=NEGATIVE, opacity=1).encode(x=x, y=y)
    layers: Any = alt.layer(chance, stairs, point)
    done: alt.LayerChart = layers.properties(width=120, height=120)
    return done


def _sentence(here: alt.Chart) -> alt.LayerChart:
    """The threshold in words."""
    counted = _counts(here)
    style: dict[str, Any] = {"align": "left", "x": 0}
    lines = [
        counted.transform_calculate(line=text)
        .mark_text(**(style | {"y": 20 + 20 * i, "fontWeight": weight}))
        .encode(text="line:N")
        for i, (text, weight) in enumerate(
            [
                ("'AUC ' + format(datum.auc, '.2f')", "bold"),
                ("datum.hits + ' of ' + datum.members + ' circuit heads'", "normal"),
                ("'and ' + datum.wrong + ' others kept'", "normal"),
            ]
        )
    ]
    layers: Any = alt.layer(*lines)
    done: alt.LayerChart = layers.properties(width=130, height=70)
    return done


def barcode_explorer(frame: pd.DataFrame, m: int | None = None, n: int | None = None) -> Twin:
    """Widgets over the settings of a :func:`barcode_frame`; draws the same :func:`barcode` for one of them, first (m, n)."""
    features, prompts = sorted(set(frame.m.tolist())), sorted(set(frame.n.tolist()))

    def look(m: int, n: int, theta: int) -> alt.VConcatChart:
        chosen = frame[(frame.m == m) & (frame.n == n)]
        return barcode(chosen, m, n, theta).properties(
            description=f"Codes of {len(chosen)} heads with {m} features from {n} training prompts; AUC {chosen.auc.iloc[0]:.2f}."
        )

    return twin(
        look,
        m=ipywidgets.SelectionSlider(options=features, value=m or features[0], description="features m"),
        n=ipywidgets.SelectionSlider(options=prompts, value=n or prompts[0], description="prompts n"),
        theta=ipywidgets.IntSlider(value=3, min=1, max=12, description="threshold"),
    )


def auc_chart(rows: Iterable[Mapping[str, Any]], title: str, what: str = "model") -> alt.LayerChart:
    """AUC of every method, one dot a model (or task, mean over its fits), a tick for the mean; 0.5 is chance."""
    table = pd.DataFrame(list(rows))
    table = table.assign(method=table.impl + ", " + table.statistic)
    dots = table.groupby(["method", "model"], sort=False, as_index=False).auc.mean()
    means = dots.groupby("method", sort=False, as_index=False).auc.mean().sort_values("auc", ascending=False)
    y = alt.Y("method:N", title=None, sort=means.method.tolist(), axis=alt.Axis(labelLimit=210))
    x = alt.X("auc:Q", title="ROC AUC", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1]))
    colour = alt.condition("test(/^SAE/, datum.method)", alt.value(SOFTMAX), alt.value(CONTROL))
    points = (
        alt.Chart(dots)
        .mark_point(filled=True, size=55, opacity=0.75)
        .encode(
            x=x,
            y=y,
            color=colour,
            tooltip=["method:N", alt.Tooltip("model:N", title=what), alt.Tooltip("auc:Q", format=".2f")],
        )
    )
    ticks = alt.Chart(means).mark_tick(thickness=3, height=16, color=OURS).encode(x=x, y=y)
    chance = (
        alt.Chart(pd.DataFrame({"auc": [0.5]}))
        .mark_rule(strokeDash=[4, 4], color=PAPER, strokeWidth=2)
        .encode(x="auc:Q")
    )
    chart: Any = alt.layer(chance, points, ticks)
    done: alt.LayerChart = chart.properties(width=150, height=alt.Step(20), title=title)
    return done


def count_chart(rows: Iterable[Mapping[str, Any]], count: str, x_title: str, title: str) -> alt.LayerChart:
    """AUC of both statistics against a number of prompts: one thin line a model, a thick one for the mean."""
    table = pd.DataFrame(list(rows)).groupby(["statistic", "model", count], as_index=False).auc.mean()
    means = table.groupby(["statistic", count], as_index=False).auc.mean()
    x = alt.X(
        f"{count}:Q",
        title=x_title,
        scale=alt.Scale(type="log", domain=[int(table[count].min()), int(table[count].max())], nice=False, padding=8),
        axis=alt.Axis(values=sorted(set(table[count].tolist()))),
    )
    y = alt.Y("auc:Q", title="ROC AUC", scale=alt.Scale(domain=[0, 1]))
    colour = alt.Color(
        "statistic:N",
        scale=alt.Scale(domain=list(LINES), range=list(LINES.values())),
        legend=alt.Legend(title=None, orient="top"),
    )
    thin = alt.Chart(table).mark_line(opacity=0.3).encode(x=x, y=y, color=colour, detail="model:N")
    thick = (
        alt.Chart(means)
        .mark_line(strokeWidth=3.5, point=alt.OverlayMarkDef(size=70))
        .encode(x=x, y=y, color=colour, tooltip=["statistic:N", f"{count}:Q", alt.Tooltip("auc:Q", format=".2f")])
    )
    chance = alt.Chart(pd.DataFrame({"auc": [0.5]})).mark_rule(strokeDash=[4, 4], color=PAPER).encode(y="auc:Q")
    chart: Any = alt.layer(chance, thin, thick)
    done: alt.LayerChart = chart.properties(width=250, height=200, title=title)
    return done


def curve_chart(curves: pd.DataFrame, title: str) -> alt.LayerChart:
    """Share of the task that is left when only the first heads of a ranking run free: columns ``ranking, kept, faithfulness``."""
    names = list(dict.fromkeys(curves.ranking))
    palette = [OURS, SOFTMAX, CONTROL, PAPER, NEGATIVE][: len(names)]
    x = alt.X("kept:Q", title="heads kept", scale=alt.Scale(type="symlog", constant=10))
    y = alt.Y("faithfulness:Q", title="faithfulness", axis=alt.Axis(format="%"))
    colour = alt.Color(
        "ranking:N",
        scale=alt.Scale(domain=names, range=palette),
        legend=alt.Legend(title=None, orient="top", columns=1),
    )
    lines = (
        alt.Chart(curves)
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=55))
        .encode(x=x, y=y, color=colour, tooltip=["ranking:N", "kept:Q", alt.Tooltip("faithfulness:Q", format=".0%")])
    )
    whole = alt.Chart(pd.DataFrame({"faithfulness": [1]})).mark_rule(strokeDash=[4, 4]).encode(y="faithfulness:Q")
    chart: Any = alt.layer(whole, lines)
    done: alt.LayerChart = chart.properties(width=250, height=220, title=title)
    return done
