"""Files and other tools: round trips, refusals, and what networkx and Graphviz are told."""

from __future__ import annotations

import json
import re

import pytest
import torch

from attnlab.circuits import HookedLM
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.export import from_json, model_hash, to_dot, to_json, to_networkx
from attnlab.circuits.graph import Graph
from attnlab.circuits.ungroup import ungrouped
from attnlab.models.pretrained import tiny, tiny_gpt2

WIRING = Wiring(2, 2)


@pytest.fixture(scope="module")
def model():
    return HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16))


@pytest.fixture(scope="module")
def scores():
    values = torch.randn(WIRING.n_src, WIRING.n_dst, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return EdgeScores(WIRING, values * WIRING.valid, {"method": "EAP", "steps": 1})


@pytest.fixture
def graph(scores):
    return Graph.top_n(scores, 20)


def test_round_trip(model, graph, scores, pairs):
    text = to_json(
        graph, model, scores=scores, pairs=pairs, evaluation={"faithfulness": 0.83}, roles={"mover": ["1.1"]}
    )
    back = from_json(text, model)
    assert back.graph == graph
    assert torch.equal(back.scores.values, scores.values * graph.mask)
    assert back.scores.info == scores.info
    assert back.info["task"] == {"name": pairs.name, "n": len(pairs), "hash": pairs.digest}
    assert back.info["eval"] == {"n_edges": 20, "faithfulness": 0.83}
    (mover,) = [node for node in back.info["nodes"] if "role" in node]
    assert mover == {
        "id": "a1.h1",
        "kind": "head",
        "layer": 1,
        "head": 1,
        "role": "mover",
        "score": float(scores.node_scores()[WIRING.source("a1.h1")]),
    }
    assert to_json(back.graph, model, scores=scores, pairs=pairs) == to_json(graph, model, scores=scores, pairs=pairs)


def test_every_edge_keeps_all_scores(model, graph, scores):
    back = from_json(to_json(graph, model, scores=scores, every_edge=True), model)
    assert back.graph == graph
    assert torch.equal(back.scores.values, scores.values)


def test_a_bare_graph_round_trips(model):
    for graph in (Graph.empty(WIRING), Graph.full(WIRING)):
        back = from_json(to_json(graph, model), model)
        assert back.graph == graph
        assert back.scores is None
        assert back.info["task"] is None


def test_the_schema_is_the_documented_one(model, graph, scores):
    document = json.loads(to_json(graph, model, scores=scores))
    assert list(document) == ["schema", "model", "task", "method", "nodes", "edges", "eval"]
    assert document["model"]["spec"] == {
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_model": 16,
        "d_head": 8,
        "parallel_blocks": False,
    }
    assert {tuple(edge) for edge in document["edges"]} == {("src", "dst", "port", "score", "in")}
    assert {edge["port"] for edge in document["edges"]} <= {"q", "k", "v", "in"}


def test_the_hash_is_that_of_the_weights(model):
    assert model_hash(model) == model_hash(HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16)))
    assert model_hash(model) != model_hash(HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16, seed=1)))
    grouped = HookedLM(tiny(n_heads=4, d_model=16, n_kv_heads=2))
    assert model_hash(grouped) != model_hash(ungrouped(grouped))
    assert len(model_hash(model)) == 12


def test_files_of_another_model_or_schema_are_refused(model, graph):
    text = to_json(graph, model)
    other = HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16, seed=1))  # same name and sizes, other weights
    with pytest.raises(
        ValueError, match=rf"the file belongs to model tiny with hash {model_hash(model)}.*{model_hash(other)}"
    ):
        from_json(text, other)
    for broken, message in (
        ("{", "text is no JSON"),
        ("[1]", "schema None cannot be read"),
        (text.replace('"schema": 1', '"schema": 2'), "schema 2 cannot be read; this version reads 1"),
        ('{"schema": 1, "model": {}}', "the file lacks edges, nodes"),
        ('{"schema": 1, "model": {}, "nodes": [], "edges": []}', "the file is damaged .KeyError: 'id'."),
        (text.replace('"port": ', '"gate": '), "the file is damaged .KeyError: 'port'."),
        (text.replace('"port": "q"', '"port": "w"'), "destination 'a.*<w>' does not exist"),
        (text.replace('"src": "input"', '"src": "a7.h0"'), "source 'a7[.]h0' does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json(broken, model)


def test_bad_input_is_refused(model, graph, scores):
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        to_json(graph, model, evaluation={"faithfulness": float("nan")})
    with pytest.raises(ValueError, match=r"graph is wired as Wiring\(n_layers=3"):
        to_json(Graph.full(Wiring(3, 2)), model)
    with pytest.raises(ValueError, match=r"source 'a9[.]h9' does not exist"):
        to_json(graph, model, roles={"mover": ["9.9"]})
    for export in (to_networkx, to_dot):
        with pytest.raises(ValueError, match="give the scores of its model"):
            export(Graph.full(Wiring(3, 2)), scores)


def test_networkx(graph, scores):
    network = to_networkx(graph, scores)
    assert list(network.nodes) == graph.nodes()
    assert network.number_of_edges() == len(graph)
    for source, target, port, data in network.edges(keys=True, data=True):
        name = f"{source}->{target}" + ("" if port == "in" else f"<{port}>")
        assert name in graph
        assert data == {"score": scores.of(name)}
    assert to_networkx(Graph.full(WIRING)).nodes["a1.h0"] == {"kind": "head", "layer": 1, "head": 0}
    full = to_networkx(Graph.full(WIRING))
    import networkx as nx

    assert nx.is_directed_acyclic_graph(full)


def test_networkx_agrees_on_what_to_prune():
    import networkx as nx

    for seed in range(5):
        draw = torch.rand(WIRING.n_src, WIRING.n_dst, generator=torch.Generator().manual_seed(seed))
        graph = Graph(WIRING, WIRING.valid & (draw < 0.3))
        network = to_networkx(graph)
        network.add_nodes_from(["input", "logits"])
        alive = (nx.descendants(network, "input") | {"input"}) & (nx.ancestors(network, "logits") | {"logits"})
        kept = [edge for edge in network.edges(keys=True) if set(edge[:2]) <= alive]
        assert len(graph.prune()) == len(kept)


def test_dot(graph, scores):
    text = to_dot(graph, scores)
    assert text.startswith("digraph circuit {")
    arrows = re.findall(r'"([\w.]+)" -> "([\w.]+)"(?: \[label="(\w)")?', text)
    names = [f"{a}->{b}" + (f"<{port}>" if port else "") for a, b, port in arrows]
    assert names == graph.edges()
    assert text.count("style=dashed") == sum(scores.of(edge) < 0 for edge in graph.edges())
    assert "penwidth=4.00" in text  # the strongest edge
    assert "penwidth" not in to_dot(graph)
    assert "{rank=same;" in to_dot(Graph.full(WIRING))
