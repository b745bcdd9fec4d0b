"""Figures of the chapter ``foundations/dsf``: one equation and six models, orders of the exponential, accuracies, gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnlab import data
from attnlab.figures.palette import BOTH, CONTROL, LINEAR, NEGATIVE, OURS, PAPER, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations import dsf_runs as runs
from attnlab.foundations.dsf import Recurrence
from attnlab.foundations.dsf_models import QLSTMCore, SoftmaxCore, Spec
from attnlab.models.training import seeded

LENGTH = 24
FLOOR = 1e-12  # of the logarithmic axes
KIND_COLOURS = {
    "softmax": SOFTMAX,
    "linear": LINEAR,
    "normalised": OURS,
    "S6": PAPER,
    "Mamba-2": BOTH,
    "qLSTM": CONTROL,
    "qLSTM, reversed": NEGATIVE,
}

# ------------------------------------------------------------------------------------------------------ what the figure shows


def sequence(length: int = LENGTH, seed: int = 5) -> tuple[Tensor, list[str]]:
    """One MQAR sequence: tokens [1, T], and what each of them is."""
    setting = runs.Setting()
    tokens = data.mqar(np.random.default_rng(seed), 1, setting.pairs, length, setting.vocab).tokens
    half = setting.vocab // 2
    words = ["." if t == 0 else f"key {t}" if t < half else f"value {t - half}" for t in tokens[0].tolist()]
    return torch.as_tensor(tokens), words


def parts(core: Any, x: Tensor) -> dict[str, Tensor]:
    """What a core does between tokens of x [1, T, D], averaged over channels.

    Returns:
        ``phi`` |Phi_ij|, ``content`` (what would be read if all transitions were 1) and ``kept`` (the share of it that the product
        of transitions lets through, weighted by the content) [T, T]; ``lam`` and its lowest and highest channel [T, 3].
    """
    with torch.no_grad():
        if isinstance(core, SoftmaxCore):
            return _softmax_parts(core, x.double())
        record = core.record(x.double())
    return _record_parts(record)


def figure_frames(specs: Sequence[Spec] = runs.SHOWN) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trained first layer of each model on one sequence; untrained where the models of the record are not there.

    Returns:
        cells ``mixer, i, j, phi, content, kept`` with j <= i, and tokens ``mixer, i, word, lam, low, high``.
    """
    tokens, words = sequence()
    cells, lams = [], []
    for spec in specs:
        model = runs.trained(spec) or seeded(lambda spec=spec: runs.Setting().model(spec), 0)  # type: ignore[misc]
        core, x = runs.cores(model.double(), tokens)[0]
        found = parts(core, x)
        cells.append(_cells(found).assign(mixer=label(spec)))
        lams.append(_tokens(found, words).assign(mixer=label(spec)))
    return pd.concat(cells, ignore_index=True), pd.concat(lams, ignore_index=True)


def label(spec: Spec) -> str:
    """A short name for the list of the figure."""
    return spec.kind.removesuffix(", long start")


def is_trained() -> bool:
    """Whether the models of the record are there."""
    return all(runs.trained(spec) is not None for spec in runs.SHOWN)


def gate_frames(keep: float, gate: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same for an untrained quasi-LSTM whose transitions begin at ``keep``."""
    tokens, words = sequence()
    model = seeded(lambda: runs.Setting().model(Spec("qLSTM")), seed).double()
    _, x = runs.cores(model, tokens)[-1]

    def core() -> QLSTMCore:
        made = QLSTMCore(runs.Setting().width, gate, keep)  # type: ignore[arg-type]
        torch.nn.init.normal_(made.gates.weight, std=runs.Setting().width ** -0.5)
        torch.nn.init.zeros_(made.gates.bias)
        made.init_weights()
        return made.double()

    found = parts(seeded(core, seed), x)
    return _cells(found).assign(mixer=gate), _tokens(found, words).assign(mixer=gate)


# ---------------------------------------------------------------------------------------------------------------- the charts


def equation_chart(cells: pd.DataFrame, tokens: pd.DataFrame, row: int | None = None) -> alt.VConcatChart:
    """Phi as a heat map, Lambda along the sequence, and the product of transitions for the clicked row."""
    names, last = list(dict.fromkeys(cells.mixer)), int(cells.i.max())
    mixer = alt.param(name="equation_mixer", value=names[0], bind=alt.binding_select(options=names, name="mixer "))
    first = {"i": last - 1 if row is None else row, "j": 1}
    cell = alt.selection_point("equation_cell", fields=["i", "j"], value=[first], on="click", toggle=False, empty=False)
    axis = alt.Axis(values=list(range(0, last + 1, 4)), labelAngle=0)
    width = 262
    base = alt.Chart(cells).transform_filter("datum.mixer == equation_mixer")
    heat = (
        base.mark_rect()
        .encode(
            x=alt.X("j:O", title="token j", axis=axis),
            y=alt.Y("i:O", title="output i", axis=axis),
            color=alt.Color(
                "phi:Q",
                title="|Φ|, largest 1",
                scale=alt.Scale(type="sqrt", domain=[0, 1], range=["#f2f2f2", "#9ecae1", SOFTMAX]),
                legend=alt.Legend(
                    orient="none",
                    legendX=128,
                    legendY=4,
                    direction="horizontal",
                    gradientLength=120,
                    values=[0, 0.1, 1],
                ),
            ),
            stroke=alt.condition(cell, alt.value(NEGATIVE), alt.value(None)),
            strokeWidth=alt.value(2),
            tooltip=[
                alt.Tooltip("i:O", title="output"),
                alt.Tooltip("j:O", title="token"),
                alt.Tooltip("phi:Q", format=".2f"),
            ],
        )
        .add_params(cell)
        .properties(width=width, height=width)
    )
    told = (
        base.transform_filter(cell)
        .transform_calculate(
            one="'token ' + datum.j + ' → output ' + datum.i",
            two="'C·B ' + format(datum.content, '.2~g') + '  ×  ∏Λ ' + format(datum.kept, '.2~g') + '  →  ' + format(datum.content * datum.kept, '.2~g')",
        )
        .mark_text(align="left", fontSize=12, x=0)
    )
    words = alt.layer(told.encode(text="one:N", y=alt.value(8)), told.encode(text="two:N", y=alt.value(26))).properties(
        width=width, height=32
    )
    along = alt.Chart(tokens).transform_filter("datum.mixer == equation_mixer")
    lam_y = alt.Y("lam:Q", title="Λ of token i", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=3, format="~g"))
    x = alt.X("i:O", title="token", axis=axis)
    lam = alt.layer(
        along.mark_bar(color=LINEAR, opacity=0.35, size=5).encode(
            x=x, y=alt.Y("low:Q", title="Λ of token i"), y2="high:Q"
        ),
        along.mark_line(color=LINEAR).encode(x=x, y=lam_y),
        along.mark_circle(color=LINEAR, size=30).encode(
            x=x,
            y=lam_y,
            tooltip=[alt.Tooltip("i:O", title="token"), "word:N", alt.Tooltip("lam:Q", format=".3~g", title="Λ")],
        ),
    ).properties(width=width, height=80)
    kept = (
        base.transform_filter("datum.i == equation_cell.i[0]")
        .mark_line(color=OURS, point=alt.OverlayMarkDef(color=OURS, size=25))
        .encode(
            x=alt.X(
                "j:O",
                title="token j, seen from the clicked output",
                axis=axis,
                scale=alt.Scale(domain=list(range(last + 1))),
            ),
            y=alt.Y("kept:Q", title="∏Λ", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=3, format="~g")),
            tooltip=[alt.Tooltip("j:O", title="token"), alt.Tooltip("kept:Q", format=".3~g", title="∏Λ")],
        )
        .properties(width=width, height=80)
    )
    chart: alt.VConcatChart = alt.vconcat(heat, words, lam, kept, spacing=10).add_params(mixer)
    return chart.properties(title="One equation, six models" if len(names) > 1 else "A gate at its start")


def gate_chart(keep: float, gate: str, seed: int) -> alt.VConcatChart:
    """An untrained quasi-LSTM that begins with this transition."""
    return equation_chart(*gate_frames(keep, gate, seed))


def gate_twin() -> Twin:
    """How far a quasi-LSTM looks back before it has learned anything."""
    return twin(
        gate_chart,
        keep=ipywidgets.SelectionSlider(options=[0.5, 0.8, 0.9, 0.98], value=0.5, description="Λ at start"),
        gate=ipywidgets.Dropdown(options=["plain", "reversed"], value="plain", description="gate"),
        seed=ipywidgets.IntSlider(value=0, min=0, max=2, description="seed"),
        alt="The transfer matrix of an untrained quasi-LSTM, its transitions along a sequence, and their product from the last output.",
        caption="At 0.5 the last output cannot see the pairs at the start. The form of the gate changes nothing of that.",
    )


def order_chart(frame: pd.DataFrame) -> alt.LayerChart:
    """The order that cut softmax needs against the size of the logits, all seeds."""
    base = alt.Chart(frame).encode(
        x=alt.X(
            "size:Q",
            title="largest logit",
            scale=alt.Scale(type="log", base=2),
            axis=alt.Axis(values=sorted(set(frame["size"])), format="~g"),
        ),
        y=alt.Y("order:Q", title="order needed for 1 %"),
    )
    points = base.mark_circle(size=70, color=SOFTMAX, opacity=0.7).encode(
        tooltip=[
            alt.Tooltip("size:Q", title="largest logit"),
            "seed:N",
            "order:Q",
            alt.Tooltip("features:Q", format=","),
        ]
    )
    line = base.mark_line(color=SOFTMAX).encode(y=alt.Y("mean(order):Q", title="order needed for 1 %"))
    chart: alt.LayerChart = line + points
    return chart.properties(width=270, height=190, title="Larger logits, more state")


def head_chart(frame: pd.DataFrame, cache: float) -> alt.LayerChart:
    """Every head of a real model: numbers of a finite state against the size of its logits; the rule is the cache."""
    points = (
        alt.Chart(frame)
        .mark_circle(size=45, color=SOFTMAX, opacity=0.6)
        .encode(
            x=alt.X("size:Q", title="largest logit, rows centred"),
            y=alt.Y("log10 features:Q", title="features needed (power of ten)", scale=alt.Scale(domain=[0, 32])),
            tooltip=[
                alt.Tooltip("layer:Q"),
                alt.Tooltip("head:Q"),
                alt.Tooltip("order:Q"),
                alt.Tooltip("size:Q", format=".1f"),
                alt.Tooltip("log10 features:Q", format=".1f"),
            ],
        )
    )
    level = pd.DataFrame({"y": [float(np.log10(cache))], "text": ["numbers in the cache of this text"]})
    rule = alt.Chart(level).mark_rule(strokeDash=[5, 4]).encode(y="y:Q")
    words = alt.Chart(level).mark_text(align="right", dy=-8).encode(y="y:Q", x=alt.value(264), text="text:N")
    chart: alt.LayerChart = points + rule + words
    return chart.properties(width=270, height=220, title="The heads of SmolLM2-135M")


def accuracy_chart(rows: Sequence[dict[str, Any]], blind: float, case: str = "small") -> alt.LayerChart:
    """Accuracy of every model and seed that counts against the numbers of state a layer keeps."""
    frame = pd.DataFrame([row for row in rows if row.get("counts") and row["case"] == case])
    frame = frame.assign(percent=100 * frame.accuracy)[["impl", "seed", "percent", "state_floats", "parameters", "lr"]]
    order = list(dict.fromkeys(frame.impl))
    points = (
        alt.Chart(frame)
        .mark_circle(size=75, opacity=0.75)
        .encode(
            y=alt.Y("impl:N", sort=order, title=None),
            x=alt.X("percent:Q", title="accuracy, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "state_floats:Q",
                title="numbers of state",
                scale=alt.Scale(type="log", scheme="viridis", reverse=True),
                legend=alt.Legend(orient="bottom", gradientLength=150, tickCount=3),
            ),
            tooltip=[
                alt.Tooltip("impl:N", title="model"),
                "seed:N",
                alt.Tooltip("percent:Q", format=".1f"),
                alt.Tooltip("state_floats:Q", title="numbers of state a layer", format=","),
                alt.Tooltip("parameters:Q", format=","),
                alt.Tooltip("lr:Q", title="rate"),
            ],
        )
    )
    rule = alt.Chart(pd.DataFrame({"blind": [100 * blind]})).mark_rule(strokeDash=[5, 4]).encode(x="blind:Q")
    chart: alt.LayerChart = points + rule
    return chart.properties(width=150, height=21 * len(order), title="Recall, all blocks equal")


def gates_chart(rows: Sequence[dict[str, Any]], steps: int = runs.GATES.steps) -> alt.LayerChart:
    """Held-out accuracy of the four quasi-LSTMs while they learn to wait, every seed a line."""
    points = [
        {
            "updates": steps * (at + 1) // len(row["curve"]),
            "percent": 100 * accuracy,
            "seed": row["seed"],
            "gate": "reversed" if "reversed" in row["impl"] else "plain",
            "start": "0.98" if "long" in row["impl"] else "0.5",
        }
        for row in rows
        if row.get("counts") and row["case"] == runs.GATES.name
        for at, accuracy in enumerate(row["curve"])
    ]
    base = alt.Chart(pd.DataFrame(points)).encode(
        x=alt.X("updates:Q", title="updates", axis=alt.Axis(tickCount=4)),
        y=alt.Y("percent:Q", title="accuracy, %", scale=alt.Scale(domain=[0, 100])),
        color=alt.Color(
            "start:N",
            title="Λ at start",
            scale=alt.Scale(domain=["0.5", "0.98"], range=[CONTROL, OURS]),
            legend=alt.Legend(orient="top", symbolType="stroke"),
        ),
        strokeDash=alt.StrokeDash(
            "gate:N",
            title="gate",
            scale=alt.Scale(domain=["plain", "reversed"], range=[[1, 0], [5, 3]]),
            legend=alt.Legend(orient="top", symbolType="stroke"),
        ),
        detail="seed:N",
    )
    tooltip = ["gate:N", alt.Tooltip("start:N", title="Λ at start"), "seed:N", alt.Tooltip("percent:Q", format=".1f")]
    chart: alt.LayerChart = base.mark_line(opacity=0.8) + base.mark_circle(size=35, opacity=0.8).encode(tooltip=tooltip)
    return chart.properties(width=270, height=200, title="Learning to wait")


# -------------------------------------------------------------------------------------------------------------------- inside


def _softmax_parts(core: SoftmaxCore, x: Tensor) -> dict[str, Tensor]:
    q, k = core.qk(x)[0].chunk(2, -1)  # [T, n]
    scores = q @ k.T * q.shape[-1] ** -0.5
    above = torch.ones_like(scores, dtype=torch.bool).triu(1)
    log_eta = scores.masked_fill(above, -torch.inf).logsumexp(-1)
    phi = (scores - log_eta[:, None]).masked_fill(above, -torch.inf).exp()
    lam = torch.cat([torch.ones_like(log_eta[:1]), (log_eta[:-1] - log_eta[1:]).exp()])
    return {
        "phi": phi,
        "content": (scores - log_eta[None, :]).exp(),
        "kept": (log_eta[None, :] - log_eta[:, None]).exp(),
        "lam": lam[:, None].expand(-1, 3),
    }


def _record_parts(record: Recurrence) -> dict[str, Tensor]:
    c, b, passed = (x[0, :, 0] for x in (record.c, record.b, record.log_lam.cumsum(1)))  # [T, K|1, V|1]
    above = torch.ones(len(c), len(c), dtype=torch.bool).triu(1)[..., None, None]
    product = (passed[:, None] - passed[None]).masked_fill(above, -torch.inf).exp()  # [T, T, K|1, V|1]
    terms = c[:, None] * b[None]
    numbers = record.size[0]
    read = (terms * product).expand(*terms.shape[:2], numbers, -1)
    content = terms.abs().expand(*terms.shape[:2], numbers, -1).sum(2).mean(-1)
    kept = read.abs().sum(2).mean(-1) / content.clamp_min(1e-300)
    lam = record.lam[0, :, 0].flatten(1)
    return {
        "phi": read.sum(2).abs().mean(-1),
        "content": content,
        "kept": kept,
        "lam": torch.stack([lam.mean(1), lam.amin(1), lam.amax(1)], 1),
    }


def _cells(found: dict[str, Tensor]) -> pd.DataFrame:
    length = len(found["phi"])
    i, j = torch.tril_indices(length, length)
    largest = found["phi"].max()
    columns = {"phi": found["phi"] / largest, "content": found["content"], "kept": found["kept"].clamp_min(FLOOR)}
    values = {name: [float(f"{v:.3g}") for v in x[i, j].tolist()] for name, x in columns.items()}
    return pd.DataFrame({"i": i.tolist(), "j": j.tolist(), **values})


def _tokens(found: dict[str, Tensor], words: list[str]) -> pd.DataFrame:
    lam = found["lam"].clamp_min(FLOOR)
    values = {name: [float(f"{v:.3g}") for v in lam[:, at].tolist()] for at, name in enumerate(("lam", "low", "high"))}
    return pd.DataFrame({"i": range(len(words)), "word": words, **values})
