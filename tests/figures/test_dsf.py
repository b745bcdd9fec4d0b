"""Figures of the chapter ``foundations/dsf``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from attnlab.figures import dsf as plots
from attnlab.foundations import dsf, dsf_runs
from attnlab.foundations.dsf_models import Spec
from attnlab.models.training import seeded


@pytest.mark.parametrize("spec", dsf_runs.SHOWN, ids=lambda spec: spec.name)
def test_the_parts_of_a_cell_are_those_of_the_transfer_matrix(spec):
    tokens, words = plots.sequence()
    model = seeded(lambda: dsf_runs.Setting().model(spec), 0).double()
    core, x = dsf_runs.cores(model, tokens)[-1]
    found = plots.parts(core, x)
    assert len(words) == plots.LENGTH
    assert words[0].startswith("key")
    with torch.no_grad():
        if spec.kind == "softmax":
            torch.testing.assert_close(found["phi"].sum(1), torch.ones(plots.LENGTH, dtype=torch.float64))
            torch.testing.assert_close(found["content"] * found["kept"] * found["phi"].gt(0), found["phi"])
            return
        record = core.record(x)
        phi = dsf.transfer(dsf.Recurrence(record.log_lam, record.b, record.c))[0, 0]
    torch.testing.assert_close(found["phi"], phi.abs().mean(0))
    lower = torch.ones_like(found["kept"]).tril().bool()
    assert (found["content"] * found["kept"])[lower].ge(found["phi"][lower] - 1e-12).all()  # signs only take away
    if spec.kind not in ("linear", "normalised"):
        assert found["kept"][lower].le(1 + 1e-12).all()


def test_charts_are_valid_and_small():
    cells, tokens = plots.figure_frames()
    assert len(cells) == 6 * 24 * 25 / 2
    assert set(cells.mixer) == {"softmax", "linear", "normalised", "S6", "Mamba-2", "qLSTM, reversed"}
    assert np.isfinite(cells.drop(columns="mixer").to_numpy()).all()
    rows = [
        {"case": "small", "impl": spec.name, "seed": seed, "counts": True, "accuracy": 0.5, "state_floats": 8}
        | {"parameters": 1, "lr": 1e-2}
        for spec in dsf_runs.SMALL
        for seed in range(3)
    ]
    orders = pd.DataFrame({"size": [1.0, 2.0], "seed": [0, 0], "order": [4, 6], "features": [15, 28]})
    heads = pd.DataFrame({"layer": [0], "head": [1], "size": [3.0], "order": [4], "log10 features": [5.0]})
    for chart in (
        plots.equation_chart(cells, tokens),
        plots.accuracy_chart(rows, 0.3),
        plots.gates_chart(
            [row | {"case": "gates", "curve": [0.1, 0.5, 1.0]} for row in rows if "qLSTM" in row["impl"]]
        ),
        plots.order_chart(orders),
        plots.head_chart(heads, 1000),
    ):
        assert len(str(chart.to_dict())) < 500_000
        assert chart.title


def test_the_twin_answers_at_every_setting():
    tried = plots.gate_twin().grid(8)
    assert {setting["gate"] for setting in tried} == {"plain", "reversed"}


def test_a_long_start_lets_the_last_output_see_the_first_token():
    def seen(keep, gate):
        cells, _ = plots.gate_frames(keep, gate, 0)
        return float(cells[(cells.i == plots.LENGTH - 1) & (cells.j == 0)].kept.iloc[0])

    for gate in ("plain", "reversed"):
        assert seen(0.5, gate) < 0.01 < 0.2 < seen(0.98, gate)


def test_models_have_short_names():
    assert plots.label(Spec("qLSTM, reversed, long start")) == "qLSTM, reversed"
