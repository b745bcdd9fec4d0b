"""Store figures of the chapter ``foundations/pavlovian``."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from attnlab.figures import pavlovian_store as plots
from attnlab.foundations import pavlovian as lab
from attnlab.foundations import pavlovian_capacity as store


def test_what_the_figure_adds_up_is_what_the_store_answers():
    grid, written = plots.store_frames(pairs=9, d_k=6, seed=2)
    cosine = torch.tensor(grid.pivot(index="i", columns="j", values="cosine").to_numpy())
    us = torch.tensor(written.us.to_numpy(), dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    for name, rule in plots.STORES.items():
        for n in (1, 4, 9):
            kept = plots.KEPT[name] ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
            added = cosine[:n, :n] @ (torch.tensor(written[name].to_numpy())[:n] * kept)
            answer = k[:n] @ lab.learn(rule, k[None, :n], us[None, :n])[0, -1]
            assert added.tolist() == pytest.approx(answer[:, 0].tolist(), abs=0.02)  # frames are rounded


def test_charts_are_valid_and_small():
    found = store.capacities((16, 32), (0,), draws=10)
    curves = store.failure_curve(16, draws=10).assign(d_k=16)
    heads = pd.DataFrame(
        [("independent keys", h, 1 / h, 1 / h) for h in (1, 2)], columns=["keys", "heads", "noise", "theory"]
    )
    depth = pd.concat(
        [store.chain(2, 4, how, 0, draws=2).assign(n=4, clean_up=how, bound=0.1) for how in store.CLEAN_UPS]
    )
    for chart in (
        plots.store_chart(pairs=6, d_k=4),
        plots.capacity_chart(found, curves),
        plots.heads_chart(heads),
        plots.depth_chart(depth),
    ):
        assert len(str(chart.to_dict())) < 120_000
        assert chart.title
