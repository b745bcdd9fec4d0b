"""Counts, names and order of edges against independent counts; edge scores that add up and refuse what is no edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import HookedLM
from attnlab.circuits.edges import EdgeScores, Wiring

SIZES = [(2, 2, 46), (3, 8, 802), (12, 12, 32_491), (24, 16, 231_877), (30, 9, 123_211)]


@pytest.fixture(scope="module")
def wiring() -> Wiring:
    return Wiring(3, 4)


@pytest.fixture(scope="module")
def scores(wiring: Wiring) -> EdgeScores:
    values = torch.randn(wiring.n_src, wiring.n_dst, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return EdgeScores(wiring, values * wiring.valid, {"method": "noise"})


@pytest.mark.parametrize(("layers", "heads", "edges"), SIZES)
def test_edge_counts_of_known_models(layers, heads, edges):
    wiring = Wiring(layers, heads)
    before = [1 + layer * (heads + 1) for layer in range(layers + 1)]
    assert wiring.n_edges == edges
    assert edges == sum(3 * heads * n + n + heads for n in before[:-1]) + before[-1]
    assert wiring.valid.shape == (wiring.n_src, wiring.n_dst) == (len(wiring.sources), len(wiring.destinations))
    assert int(wiring.valid.sum()) == edges


@pytest.mark.parametrize("parallel", [False, True])
def test_an_edge_runs_from_an_earlier_writer_to_a_later_reader(parallel):
    """Times from the names: heads write at 2 l, MLPs at 2 l + 1, and a reader sees what is written before its own time."""
    wiring = Wiring(3, 2, parallel)

    def time(name: str) -> int:
        if name in ("input", "logits"):
            return -1 if name == "input" else 99
        return 2 * int(name[1]) + (name[0] == "m" and not parallel)

    for row, source in enumerate(wiring.sources):
        for column, destination in enumerate(wiring.destinations):
            assert bool(wiring.valid[row, column]) == (time(source) < time(destination)), (source, destination)


def test_names_are_ordered_as_the_layout_says():
    wiring = Wiring(2, 2)
    assert wiring.sources == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert wiring.destinations[:8] == (
        *("a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>"),
        *("m0", "a1.h0<q>"),
    )
    assert wiring.destinations[-2:] == ("m1", "logits")


def test_every_edge_keeps_its_name(wiring):
    for row, column in wiring.valid.nonzero().tolist():
        name = wiring.name(row, column)
        assert wiring.edge(name) == (row, column)
        assert name == f"{wiring.sources[row]}->{wiring.destinations[column]}"
    assert wiring.edge(" a0.h1 -> m2 ") == (wiring.source("a0.h1"), wiring.destination("m2"))


def test_slices_are_those_of_the_names(wiring):
    for layer in range(3):
        heads = [f"a{layer}.h{head}" for head in range(4)]
        assert list(wiring.sources[wiring.heads_of(layer)]) == heads
        assert wiring.sources[wiring.mlp_of(layer)] == f"m{layer}"
        for port in "qkv":
            assert list(wiring.destinations[wiring.port(layer, port)]) == [f"{head}<{port}>" for head in heads]
        assert wiring.destinations[wiring.port(layer, "mlp")] == (f"m{layer}",)


def test_wiring_of_a_model(lm: HookedLM):
    assert Wiring.of(lm.spec) == Wiring(3, 6)  # six heads, though only two groups of keys
    assert Wiring.of(lm.spec, parallel_blocks=True).n_edges == Wiring(3, 6).n_edges - 3 * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.source("a3.h0"), r"source 'a3.h0' does not exist; .*layers 0 to 2 and heads 0 to 3"),
        (lambda w: w.source("logits"), "source 'logits' does not exist"),
        (lambda w: w.destination("a1.h2"), r"'a1.h2' lacks its port; write 'a1.h2<q>'"),
        (lambda w: w.destination("a1.h2<z>"), r"destination 'a1.h2<z>' does not exist"),
        (lambda w: w.destination("input"), "destination 'input' does not exist"),
        (lambda w: w.edge("a0.h1"), "edge 'a0.h1' is not understood"),
        (lambda w: w.edge("a2.h1->a1.h0<q>"), "a2.h1->a1.h0<q> runs backwards: .* reads .* input to m0"),
        (lambda w: w.edge("m1->m1"), "m1->m1 runs backwards"),
        (lambda w: w.name(0, 99), "destination=99 does not exist; indices run from 0 to 39"),
        (lambda w: w.name(-1, 0), "source=-1 does not exist"),
        (lambda w: w.name(1, 0), "runs backwards"),
        (lambda w: w.port(0, "z"), "port='z' is unknown; use 'q', 'k', 'v' or 'mlp'"),
        (lambda w: Wiring(0, 2), "n_layers=0 leaves no edges"),
        (lambda w: Wiring(2, 0), "n_heads=0 leaves no edges"),
    ],
)
def test_wrong_names_say_what_would_do(wiring, call, message):
    with pytest.raises(ValueError, match=message):
        call(wiring)


# ------------------------------------------------------------------------------------------------------- scores


def test_top_edges_are_the_largest_in_size(scores):
    frame = scores.to_frame()
    expected = frame.loc[frame.score.abs().sort_values(ascending=False).index[:7]]
    assert scores.top(7) == list(zip(expected.edge, expected.score, strict=True))
    assert scores.top(0) == []
    assert len(scores.top(scores.wiring.n_edges)) == scores.wiring.n_edges


def test_ties_keep_the_order_of_the_layout(wiring):
    even = EdgeScores(wiring, wiring.valid.double())
    assert [name for name, _ in even.top(3)] == ["input->a0.h0<q>", "input->a0.h1<q>", "input->a0.h2<q>"]


def test_frame_and_single_scores_agree(scores):
    frame = scores.to_frame()
    assert len(frame) == scores.wiring.n_edges
    assert set(frame.port) == {"q", "k", "v", "in"}
    assert set(frame.destination) == {*(f"a{i}.h{j}" for i in range(3) for j in range(4)), "m0", "m1", "m2", "logits"}
    for row in frame.sample(20, random_state=0).itertuples():
        assert scores.of(row.edge) == row.score
        assert row.edge.startswith(f"{row.source}->{row.destination}")


def test_node_scores_are_sums_of_outgoing_edges(scores):
    sums = scores.to_frame().groupby("source").score.sum()
    np.testing.assert_allclose(scores.node_scores(), sums[list(scores.wiring.sources)], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, w: v[:-1], r"values has shape \(15, 40\); the wiring needs \(16, 40\)"),
        (lambda v, w: v.masked_fill(w.valid & (w.reads == 1), torch.nan), "NaN or infinite scores .*source input"),
        (lambda v, w: v + 1, "values scores pairs that are no edge"),
    ],
)
def test_wrong_scores_are_refused(wiring, change, message):
    with pytest.raises(ValueError, match=message):
        EdgeScores(wiring, change(torch.zeros(wiring.n_src, wiring.n_dst), wiring))
