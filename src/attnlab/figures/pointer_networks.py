"""Figures of the chapter ``foundations/pointer-networks``: watch a network point, its measures by size, its learning, its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt
import ipywidgets
import numpy as np
import pandas as pd
import torch

from attnlab.figures.palette import BOTH, CONTROL, NEGATIVE, OURS, SOFTMAX
from attnlab.figures.twin import Twin, twin
from attnlab.foundations import geometry, pointer_tasks
from attnlab.foundations.pointer_decoding import greedy
from attnlab.foundations.pointer_networks import Solver

KIND_COLOURS = {
    pointer_tasks.SET: BOTH,
    pointer_tasks.POINTER: OURS,
    pointer_tasks.ATTENTION: SOFTMAX,
    pointer_tasks.SOFTMAX: CONTROL,
}
STATES = {"said now": NEGATIVE, "said before": SOFTMAX, "not yet": "#bbbbbb"}
MEASURES = {"exact": "exact hulls", "simple": "simple polygons", "area": "area of the hull (of simple ones)"}

# ----------------------------------------------------------------------------------------------------------- watch it point


def watch_frame(solvers: Mapping[str, Solver], points: np.ndarray) -> pd.DataFrame:
    """One row a network, step and symbol while it answers points [n, 2] without a mask.

    Columns ``network, step, symbol`` (0 is stop), ``x, y`` (NaN for stop), ``chance`` (of the symbol at this step),
    ``state`` and ``said``, the place in the answer at which the symbol was last said, 0 if never.
    """
    rows = []
    for name, solver in solvers.items():
        like = next(solver.parameters())
        said, chances = greedy(solver, torch.as_tensor(points[None]).to(like), len(points) + 2)
        answer = said[0].tolist()
        end = answer.index(0) + 1 if 0 in answer else len(answer)
        for step in range(1, end + 1):
            for symbol in range(len(points) + 1):
                before = [place for place in range(1, step + 1) if answer[place - 1] == symbol]
                state = "said now" if answer[step - 1] == symbol else "said before" if before else "not yet"
                x, y = points[symbol - 1] if symbol else (np.nan, np.nan)
                chance = round(float(chances[0, step - 1, symbol]), 4)
                rows.append((name, step, symbol, round(x, 4), round(y, 4), chance, state, max(before, default=0)))
    columns = ["network", "step", "symbol", "x", "y", "chance", "state", "said"]
    return pd.DataFrame(rows, columns=columns)


def path_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The points in the order in which they were said: ``network, place, x, y`` (and ``instance`` if the frame has it)."""
    keys = [key for key in ("instance", "network") if key in frame]
    now = frame[(frame.state == "said now") & (frame.symbol > 0)]
    return now[[*keys, "step", "x", "y"]].rename(columns={"step": "place"}).reset_index(drop=True)


def watch_chart(solvers: Mapping[str, Solver], instances: Mapping[str, np.ndarray], largest: int) -> alt.VConcatChart:
    """A network's answer step by step, on the plane and as a distribution over symbols.

    Args:
        solvers: by name, two or more.
        instances: points [n, 2] by name.
        largest: points that fixed dictionaries have a symbol for.
    """
    frame = pd.concat(
        [watch_frame(solvers, points).assign(instance=name) for name, points in instances.items()], ignore_index=True
    )
    last = int(frame.step.max())
    frame = frame.merge(frame.groupby(["instance", "network"]).step.max().rename("end").reset_index())
    paths = path_frame(frame)
    step = alt.param(name="ptr_step", value=3, bind=alt.binding_range(min=1, max=last, step=1, name="step "))
    network = alt.param(
        name="ptr_network", value=next(iter(solvers)), bind=alt.binding_radio(options=list(solvers), name="network ")
    )
    which = alt.param(
        name="ptr_instance",
        value=next(iter(instances)),
        bind=alt.binding_radio(options=list(instances), name="input "),
    )
    chosen = "datum.network == ptr_network && datum.instance == ptr_instance"
    # past the stop the last step stays
    base = alt.Chart(frame).transform_filter(f"{chosen} && datum.step == min(ptr_step, datum.end)")
    colour = alt.Color(
        "state:N",
        title=None,
        scale=alt.Scale(domain=list(STATES), range=list(STATES.values())),
        legend=alt.Legend(orient="bottom", direction="horizontal"),
    )
    tooltip = [
        alt.Tooltip("symbol:O", title="point"),
        alt.Tooltip("chance:Q", format=".1%", title="probability"),
        alt.Tooltip("state:N"),
    ]
    axis: dict[str, Any] = {"scale": alt.Scale(domain=[-0.04, 1.06], nice=False), "axis": alt.Axis(values=[0, 0.5, 1])}
    line = (
        alt.Chart(paths)
        .transform_filter(f"{chosen} && datum.place <= ptr_step")
        .mark_line(color=SOFTMAX, opacity=0.6)
        .encode(x=alt.X("x:Q", **axis), y=alt.Y("y:Q", **axis), order="place:Q")
    )
    dots = (
        base.transform_filter("datum.symbol > 0")
        .mark_circle(opacity=0.85)
        .encode(
            x=alt.X("x:Q", title="x", **axis),
            y=alt.Y("y:Q", title="y", **axis),
            size=alt.Size("chance:Q", scale=alt.Scale(domain=[0, 1], range=[30, 700]), legend=None),
            color=colour,
            tooltip=tooltip,
        )
    )
    names = (
        base.transform_filter("datum.symbol > 0")
        .mark_text(fontSize=10, dx=9, dy=-8)
        .encode(x="x:Q", y="y:Q", text="symbol:O")
    )
    symbols = (
        base.transform_calculate(label="datum.symbol == 0 ? 'stop' : datum.symbol")
        .mark_bar()
        .encode(
            x=alt.X(
                "symbol:O",
                title=f"symbol (0 stops); a fixed dictionary ends at {largest}",
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y(
                "chance:Q",
                title="probability",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", tickCount=3),
            ),
            color=colour,
            tooltip=tooltip,
        )
    )
    plane: Any = (line + dots + names).properties(width=290, height=250)
    chart: alt.VConcatChart = alt.vconcat(plane, symbols.properties(width=290, height=90), spacing=12)
    return chart.add_params(step, network, which).properties(title="Where does it point next?")


# --------------------------------------------------------------------------------------------------------- measures by size


def sizes_chart(rows: pd.DataFrame, largest: int) -> alt.LayerChart:
    """A chosen measure against the number of points, every seed a dot and the mean a line, by network.

    Args:
        rows: columns ``updates`` (text), ``kind, seed, n`` and the measures of hulls.
        largest: points that training saw, at most.
    """
    long = rows.melt(["updates", "kind", "seed", "n"], list(MEASURES), "measure", "share")
    long["measure"] = long.measure.map(MEASURES)
    updates = list(dict.fromkeys(rows.updates))
    after = alt.param(name="ptr_updates", value=updates[-1], bind=alt.binding_radio(options=updates, name="training "))
    measure = alt.param(
        name="ptr_measure",
        value=MEASURES["exact"],
        bind=alt.binding_select(options=list(MEASURES.values()), name="measure "),
    )
    base = alt.Chart(long).transform_filter("datum.updates == ptr_updates && datum.measure == ptr_measure")
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=list(KIND_COLOURS), range=list(KIND_COLOURS.values())),
        legend=alt.Legend(orient="bottom", columns=2),
    )
    x = alt.X(
        "n:Q",
        title="points",
        scale=alt.Scale(type="log", domain=[4.5, max(rows.n) * 1.1], nice=False),
        axis=alt.Axis(values=sorted(set(rows.n))),
    )
    y = alt.Y(
        "share:Q",
        title="share of answers, or of the area",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=5),
    )
    lines = base.mark_line(strokeWidth=2).encode(x=x, y=alt.Y("mean(share):Q"), color=colour)
    dots = base.mark_circle(size=45, opacity=0.7).encode(
        x=x, y=y, color=colour, tooltip=["kind", "seed", "n", alt.Tooltip("share:Q", format=".1%")]
    )
    edge = alt.Chart(pd.DataFrame({"n": [largest]})).mark_rule(strokeDash=[5, 4]).encode(x="n:Q")
    chart: alt.LayerChart = (lines + dots + edge).add_params(after, measure)
    return chart.properties(width=290, height=230, title="What happens beyond the dashed line?")


def learning_chart(curves: pd.DataFrame) -> alt.Chart:
    """Loss against updates, one line a network and seed: columns ``kind, seed, update, loss``."""
    pick = alt.selection_point("ptr_kind", fields=["kind"], bind="legend")
    chart: alt.Chart = (
        alt.Chart(curves)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X("update:Q", title="updates", axis=alt.Axis(tickCount=5)),
            y=alt.Y("loss:Q", title="loss, nats a symbol"),
            color=alt.Color(
                "kind:N",
                title="click a name",
                scale=alt.Scale(domain=list(KIND_COLOURS), range=list(KIND_COLOURS.values())),
                legend=alt.Legend(orient="bottom", columns=2),
            ),
            detail="seed:N",
            opacity=alt.condition(pick, alt.value(0.85), alt.value(0.08)),
            tooltip=["kind", "seed", "update", alt.Tooltip("loss:Q", format=".2f")],
        )
        .add_params(pick)
        .properties(width=290, height=220, title="Is it only speed?")
    )
    return chart


def curve_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a record as ``kind, seed, update, loss``."""
    return pd.DataFrame(
        [
            {"kind": row["impl"], "seed": row["seed"], "update": update, "loss": round(loss, 4)}
            for row in rows
            for update, loss in row["curve"]
        ]
    )


# ------------------------------------------------------------------------------------------------------ try other instances


def answer_chart(network: str, task: str, n: int, instance: int, *, solvers: Mapping[tuple[str, str], Solver]) -> Any:
    """One answer beside the exact one, on an instance of its own number.

    Args:
        solvers: by (network, task).
    """
    points = geometry.uniform_points(np.random.default_rng([instance, n]), 1, n)
    solver, asked = solvers[network, task], pointer_tasks.TASKS[task]
    like = next(solver.parameters())
    said, _ = greedy(solver, torch.as_tensor(points).to(like), asked.longest(n), asked.rule)
    answer = [symbol for symbol in said[0].tolist() if symbol]
    exact: Sequence[int]
    if task == "hull":
        exact = [symbol for symbol in asked.targets(points)[0].tolist() if symbol > 0]
        truth = "exact hull"
    else:
        order = geometry.tours(points) if n <= pointer_tasks.SOLVED else geometry.nearest_neighbour(points)
        exact = [*(order[0] + 1).tolist(), int(order[0, 0]) + 1]
        answer = [*answer, answer[0]]
        truth = "shortest tour" if n <= pointer_tasks.SOLVED else "nearest neighbour"
    rows = [
        (name, place, *points[0, symbol - 1].round(4))
        for name, symbols in ((truth, exact), ("network", answer))
        for place, symbol in enumerate(symbols)
    ]
    paths = pd.DataFrame(rows, columns=["answer", "place", "x", "y"])
    axis: dict[str, Any] = {"scale": alt.Scale(domain=[-0.04, 1.06], nice=False), "axis": alt.Axis(values=[0, 0.5, 1])}
    lines = (
        alt.Chart(paths)
        .mark_line(strokeWidth=2.5)
        .encode(
            x=alt.X("x:Q", **axis),
            y=alt.Y("y:Q", **axis),
            order="place:Q",
            color=alt.Color(
                "answer:N",
                title=None,
                scale=alt.Scale(domain=[truth, "network"], range=[CONTROL, OURS]),
                legend=alt.Legend(orient="bottom"),
            ),
            strokeDash=alt.condition("datum.answer == 'network'", alt.value([1, 0]), alt.value([6, 4])),
        )
    )
    dots = alt.Chart(pd.DataFrame(points[0].round(4), columns=["x", "y"])).mark_circle(size=40, color="#888888")
    chart: Any = (lines + dots.encode(x="x:Q", y="y:Q")).properties(width=290, height=260)
    return chart.properties(title=f"{measured(points, said.numpy(), task)}, {n} points")


def measured(points: np.ndarray, said: np.ndarray, task: str) -> str:
    """What an answer is worth, in a few words."""
    scores = {name: float(x[0]) for name, x in pointer_tasks.TASKS[task].score(points, said).items()}
    if task == "hull":
        if scores["exact"]:
            return "exact"
        return f"{scores['area']:.1%} of the area" if scores["simple"] else "no simple polygon"
    if "excess" in scores:
        return f"{scores['excess']:.1%} above the optimum"
    return f"{scores['over nearest']:+.1%} against the nearest neighbour"


def answer_twin(solvers: Mapping[tuple[str, str], Solver]) -> Twin:
    """Other instances, other sizes, both pointers, hulls and tours."""
    networks, tasks = (list(dict.fromkeys(name[i] for name in solvers)) for i in (0, 1))
    return twin(
        partial(answer_chart, solvers=solvers),
        network=ipywidgets.Dropdown(options=networks, description="network"),
        task=ipywidgets.Dropdown(options=tasks, description="task"),
        n=ipywidgets.IntSlider(value=12, min=5, max=40, step=1, description="points"),
        instance=ipywidgets.IntSlider(value=1, min=1, max=20, description="instance"),
        alt="Points in the unit square, the network's answer as a solid line and the exact one dashed.",
        caption="Raise the number of points beyond 10, which is the most that training saw.",
    )
