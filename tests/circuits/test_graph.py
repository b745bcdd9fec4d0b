"""Circuits as graphs: selection against sorting by hand, pruning against path search, set algebra, overlap against chance."""

from __future__ import annotations

import pytest
import torch

from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.graph import Graph, edge_overlap_curve
from attnlab.circuits.overlap import chance, count

WIRING = Wiring(3, 2)


def scores_of(seed=0, wiring=WIRING):
    values = torch.randn(wiring.n_src, wiring.n_dst, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return EdgeScores(wiring, values * wiring.valid)


def random_graph(seed, share=0.15, wiring=WIRING):
    draw = torch.rand(wiring.n_src, wiring.n_dst, generator=torch.Generator().manual_seed(seed))
    return Graph(wiring, wiring.valid & (draw < share))


def owner(destination):
    return destination.split("<")[0]


def on_a_path(graph):
    """Reference: the edges that lie on some path from the input to the logits, by searching all paths."""
    links = {}
    for edge in graph.edges():
        source, destination = edge.split("->")
        links.setdefault(source, []).append((owner(destination), edge))
    found = set()

    def walk(node, path):
        if node == "logits":
            found.update(path)
        for target, edge in links.get(node, []):
            walk(target, [*path, edge])

    walk("input", [])
    return found


def test_full_and_empty():
    full, empty = Graph.full(WIRING), Graph.empty(WIRING)
    assert len(full) == WIRING.n_edges
    assert len(empty) == 0
    assert not empty
    assert full.nodes() == [*WIRING.sources, "logits"]
    assert empty.nodes() == []
    assert ~full == empty
    assert full.prune() == full
    assert empty.prune() == empty


@pytest.mark.parametrize("n", [0, 1, 17, WIRING.n_edges])
@pytest.mark.parametrize("absolute", [True, False])
def test_top_n_is_the_sorted_list(n, absolute):
    scores = scores_of()
    by_hand = sorted(
        (WIRING.name(s, d) for s, d in WIRING.valid.nonzero().tolist()),
        key=lambda edge: -abs(scores.of(edge)) if absolute else -scores.of(edge),
    )
    assert set(Graph.top_n(scores, n, absolute=absolute).edges()) == set(by_hand[:n])
    if absolute:
        assert set(Graph.top_n(scores, n).edges()) == {edge for edge, _ in scores.top(n)}


def test_ties_keep_the_order_of_the_layout():
    flat = EdgeScores(WIRING, WIRING.valid.double())
    assert Graph.top_n(flat, 5).edges() == Graph.full(WIRING).edges()[:5]


def test_threshold_keeps_what_is_at_least_tau():
    scores = scores_of()
    tau = abs(scores.top(9)[-1][1])
    assert Graph.threshold(scores, tau) == Graph.top_n(scores, 9)
    assert Graph.threshold(scores, 0.0) == Graph.full(WIRING)
    positive = Graph.threshold(scores, 1e-9, absolute=False)
    assert all(scores.of(edge) > 0 for edge in positive.edges())


def test_greedy_adds_the_strongest_edge_into_what_is_reached():
    scores = scores_of(4)
    edges = Graph.full(WIRING).edges()
    chosen, reached = [], {"logits"}
    for n in range(1, 30):
        open_edges = [e for e in edges if e not in chosen and owner(e.split("->")[1]) in reached]
        chosen.append(max(open_edges, key=lambda edge: abs(scores.of(edge))))
        reached.add(chosen[-1].split("->")[0])
        assert set(Graph.greedy(scores, n).edges()) == set(chosen)
    assert Graph.greedy(scores, WIRING.n_edges) == Graph.full(WIRING)


def test_greedy_leaves_no_dead_ends_towards_the_logits():
    graph = Graph.greedy(scores_of(5), 20)
    with_input = graph | Graph(WIRING, WIRING.valid & (torch.arange(WIRING.n_src) == 0)[:, None])
    assert graph - with_input.prune() == Graph.empty(WIRING)


@pytest.mark.parametrize("seed", range(12))
def test_prune_keeps_exactly_what_lies_on_a_path(seed):
    graph = random_graph(seed, share=0.08 + 0.02 * seed)
    pruned = graph.prune()
    assert set(pruned.edges()) == on_a_path(graph)
    assert pruned.prune() == pruned


def test_set_algebra():
    a, b, c = random_graph(1), random_graph(2), random_graph(3)
    assert a & b == b & a
    assert a & (b | c) == (a & b) | (a & c)
    assert ~(a | b) == ~a & ~b
    assert a - b == a & ~b
    assert (a - b) | (a & b) == a
    assert len(a) + len(~a) == WIRING.n_edges
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert hash(a) == hash(Graph.from_edges(WIRING, a.edges()))


def test_jaccard():
    a, b = random_graph(1), random_graph(2)
    assert a.jaccard(b) == len(set(a.edges()) & set(b.edges())) / len(set(a.edges()) | set(b.edges()))
    assert a.jaccard(a) == 1
    assert a.jaccard(~a) == 0
    assert Graph.empty(WIRING).jaccard(Graph.empty(WIRING)) == 1


def test_names_go_round():
    graph = Graph.from_edges(WIRING, ["input->a1.h0<q>", "a1.h0->logits"])
    assert graph.edges() == ["input->a1.h0<q>", "a1.h0->logits"]
    assert graph.nodes() == ["input", "a1.h0", "logits"]
    assert "input->a1.h0<q>" in graph
    assert "input->a1.h0<k>" not in graph
    assert repr(graph) == f"Graph(2 of {WIRING.n_edges} edges, 3 nodes)"


def test_of_nodes_keeps_the_edges_between_them():
    graph = Graph.of_nodes(WIRING, ["0.1", "a2.h0", "m1"])
    ends = {"input", "a0.h1", "m1", "a2.h0", "logits"}
    assert set(graph.nodes()) == ends
    by_hand = [e for e in Graph.full(WIRING).edges() if {e.split("->")[0], owner(e.split("->")[1])} <= ends]
    assert graph.edges() == by_hand
    assert Graph.of_nodes(WIRING, WIRING.sources) == Graph.full(WIRING)


def test_without_drops_both_sides_of_a_node():
    graph = Graph.full(WIRING).without("1.0", "m2")
    assert set(WIRING.sources) - set(graph.nodes()) == {"a1.h0", "m2"}
    assert graph == Graph.of_nodes(WIRING, [node for node in WIRING.sources if node not in ("a1.h0", "m2")])
    assert "logits" not in Graph.full(WIRING).without("logits").nodes()


def test_the_mask_is_a_copy():
    mask = WIRING.valid.clone()
    graph = Graph(WIRING, mask)
    mask[:] = False
    assert graph == Graph.full(WIRING)


def test_overlap_curve_counts_shared_edges_against_chance():
    a, b = scores_of(1), scores_of(2)
    curve = edge_overlap_curve(a, b, shares=(0.05, 0.3, 1.0), level=0.95)
    for row in curve.itertuples():
        first, second = ({e for e, _ in s.top(row.k)} for s in (a, b))
        assert row.k == count(WIRING.n_edges, row.share)
        assert row.overlap == len(first & second)
        assert row.fraction == row.overlap / row.k
        assert row.jaccard == len(first & second) / len(first | second)
        assert (row.chance, row.chance_high) == chance(WIRING.n_edges, row.k, 0.95)
    assert curve.overlap.iloc[-1] == WIRING.n_edges


def test_overlap_of_random_scores_is_chance_on_average():
    pairs = zip(range(0, 80, 2), range(1, 80, 2), strict=True)
    sizes = [edge_overlap_curve(scores_of(a), scores_of(b), shares=(0.2,)).overlap[0] for a, b in pairs]
    sizes = torch.tensor(sizes, dtype=torch.float64)
    k = count(WIRING.n_edges, 0.2)
    assert abs(sizes.mean() - chance(WIRING.n_edges, k)[0]) < 4 * sizes.std() / 40**0.5


def test_bad_input_is_refused():
    scores = scores_of()
    with pytest.raises(ValueError, match=r"mask is torch.float32 of shape"):
        Graph(WIRING, WIRING.valid.float())
    with pytest.raises(ValueError, match=r"shape \(3, 3\); the wiring needs torch.bool of"):
        Graph(WIRING, torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask holds a0.h0->a0.h0<q>, which is no edge"):
        Graph(WIRING, torch.ones_like(WIRING.valid))
    for choose in (Graph.top_n, Graph.greedy):
        for n in (-1, WIRING.n_edges + 1):
            with pytest.raises(ValueError, match=f"n={n} edges cannot be had; the model has {WIRING.n_edges}"):
                choose(scores, n)
    with pytest.raises(ValueError, match="tau=nan is no threshold"):
        Graph.threshold(scores, float("nan"))
    with pytest.raises(ValueError, match=r"source 'a7.h0' does not exist"):
        Graph.of_nodes(WIRING, ["7.0"])
    other = Graph.full(Wiring(2, 2))
    for combine in (Graph.__and__, Graph.__or__, Graph.__sub__, Graph.jaccard):
        with pytest.raises(ValueError, match="compare circuits of one model"):
            combine(Graph.full(WIRING), other)
    with pytest.raises(ValueError, match="compare scores of one model"):
        edge_overlap_curve(scores, scores_of(wiring=Wiring(2, 2)))
    with pytest.raises(ValueError, match=r"share=0 must lie in \(0, 1\]"):
        edge_overlap_curve(scores, scores, shares=[0])
