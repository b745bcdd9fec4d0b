"""Figures of the flowformer chapter, from drawn heads, invented trainings and invented costs."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from attnlab.figures import flowformer as plots
from attnlab.kernels.flowformer import ARMS, evenness_table, running_means


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    return plots.network_frames(*plots.example())


def test_what_is_fixed_is_drawn_as_one_and_the_other_side_sums_to_it() -> None:
    _, nodes = frames()
    flows = nodes.set_index(["step", "side", "node"]).flow.sort_index()
    assert flows["sinks fixed", "sinks"].tolist() == pytest.approx([1] * 6)
    assert flows["sources fixed", "sources"].tolist() == pytest.approx([1] * 8)
    sums = nodes.groupby(["step", "side"]).flow.sum()
    assert sums["sinks fixed"].tolist() == pytest.approx([6, 6], abs=1e-3)
    assert sums["sources fixed"].tolist() == pytest.approx([8, 8], abs=1e-3)
    for step in plots.STEPS:
        assert sums[step, "sinks"] == pytest.approx(sums[step, "sources"], abs=1e-3)


def test_bands_fill_their_nodes_and_overlap_nowhere() -> None:
    edges, nodes = frames()
    for side, key, x in (("sources", "source", 0.0), ("sinks", "sink", 1.0)):
        ends = edges[edges.x == x]
        for (step, name), bands in ends.groupby(["step", key]):
            node = nodes[(nodes.step == step) & (nodes.node == name)].iloc[0]
            assert node.side == side
            stack = bands.sort_values("low")
            assert stack.low.iloc[0] == pytest.approx(node.low, abs=1e-3)
            assert stack.high.iloc[-1] == pytest.approx(node.high, abs=1e-3)
            assert stack.low.iloc[1:].tolist() == pytest.approx(stack.high.iloc[:-1].tolist(), abs=1e-3)


def test_edges_carry_what_passes_a_node() -> None:
    edges, nodes = frames()
    carried = edges[edges.x == 0.0].groupby(["step", "source"]).flow.sum()
    for (step, source), flow in carried.items():
        node = nodes[(nodes.step == step) & (nodes.node == source)]
        assert flow == pytest.approx(node.flow.item(), abs=1e-3)


def trained(**more: float) -> pd.DataFrame:
    rows = [
        {"arm": arm, "seed": seed, "loss": 0.01 * (n + 1) + 0.001 * seed, "accuracy": 0.9 - 0.1 * n, **more}
        for n, arm in enumerate(ARMS)
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def costs() -> list[dict[str, object]]:
    return [
        {"impl": impl, "shape": {"T": length}, "ms": length * factor, "memory_mb": 3.0 * length}
        for impl, factor in (("softmax", 0.02), ("flow", 0.003), ("flow, causal kernel", 0.004))
        for length in (256, 512, 1024)
    ]


def means() -> pd.DataFrame:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return pd.concat([running_means(q, k).assign(tokens=tokens) for tokens in ("alike", "louder")])


def test_charts_are_valid_and_fit_a_page() -> None:
    both = pd.concat([trained().assign(case="recall"), trained().assign(case="text")])
    for chart in (
        plots.network_chart(*frames(), step="competition"),
        plots.evenness_chart(evenness_table(draws=2)),
        plots.running_chart(means(), 6),
        plots.arms_chart(trained(), "accuracy", "Who recalls?", "accuracy", chance=0.125),
        plots.arms_chart(trained(), "loss", "Who learns?", "nats", log=True),
        plots.scale_chart(both),
        plots.cost_chart(costs(), {"ms": "milliseconds", "memory_mb": "megabytes"}),
    ):
        spec = chart.to_dict()
        assert len(str(spec)) < 200_000
        assert "'title'" in str(spec)


def test_a_run_that_diverged_is_left_out_of_the_chart_at_scale() -> None:
    frame = trained().assign(case="recall")
    frame.loc[0, "loss"] = float("nan")
    values = plots.scale_chart(frame).to_dict()["datasets"].values()
    assert [len(rows) for rows in values] == [3 * len(ARMS) - 1]


@pytest.mark.parametrize(("losses", "log"), [((0.01, 0.3), True), ((1.9, 2.1), False), ((0.0, 0.3), False)])
def test_losses_at_scale_are_logarithmic_where_they_differ_tenfold(losses: tuple[float, float], log: bool) -> None:
    frame = trained().assign(case="recall")
    frame["loss"] = [losses[i % 2] for i in range(len(frame))]
    spec = str(plots.scale_chart(frame).to_dict())
    assert ("'type': 'log'" in spec) is ("(log scale)" in spec) is log


def test_running_means_draw_the_normal_form_once() -> None:
    (rows,) = plots.running_chart(means(), 6).to_dict()["datasets"].values()
    lines = pd.DataFrame(rows).groupby("line").size()
    assert lines.to_dict() == {"normal form, every prefix anew": 24, "causal, alike": 24, "causal, louder": 24}


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.02, 0.3], [0.01, 0.1, 1.0]),
        ([1.0, 1.0], [1.0, 10.0]),
        ([0.0004, 70.0], [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0]),
    ],
)
def test_decades_hold_all_values(values: list[float], ticks: list[float]) -> None:
    low, high, found = plots._decades(pd.Series(values))
    assert found == pytest.approx(ticks)
    assert (low, high) == (found[0], found[-1])


def test_the_panel_answers_every_setting() -> None:
    assert len(plots.network_panel().grid(16)) == 16
