"""Circuits as files and for other tools: JSON that remembers its model, networkx, Graphviz.

The JSON has one entry a node and one an edge::

    {"schema": 1,
     "model": {"id": "gpt2", "hash": "5b1e...", "spec": {"n_layers": 12, ...}},
     "task": {"name": "IOI", "n": 36, "hash": "0f3a..."},
     "method": {"method": "EAP-IG", "steps": 5, ...},
     "nodes": [{"id": "a9.h6", "kind": "head", "layer": 9, "head": 6, "role": "name mover", "score": 0.12}, ...],
     "edges": [{"src": "a7.h3", "dst": "a9.h6", "port": "q", "score": 0.04, "in": true}, ...],
     "eval": {"n_edges": 120, "metric": "logit_diff", "ablation": "resample", "faithfulness": 0.83, ...}}

An edge belongs to the circuit if ``in`` is true. The port of an MLP and of the logits is ``"in"``. Scores and roles are
there where they are known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.graph import LOGITS, Graph, node_name
from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Pairs

SCHEMA = 1


class CircuitFile(NamedTuple):
    """What a file holds: the circuit, scores (None if it has none) of the edges listed, and the rest as it stands there."""

    graph: Graph
    scores: EdgeScores | None
    info: dict[str, Any]  # task, method, nodes, eval


def model_hash(model: HookedLM) -> str:
    """A hash of all weights as float32: equal for copies in a wider type, different after any training.

    A model and its ungrouped copy have different hashes.
    """
    digest = hashlib.sha256()
    for parameter in model.bridge.parameters():
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(repr(tuple(values.shape)).encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:12]


def to_json(
    graph: Graph,
    model: HookedLM,
    *,
    scores: EdgeScores | None = None,
    pairs: Pairs | None = None,
    method: Mapping[str, Any] | None = None,
    roles: Mapping[str, Sequence[str | Node]] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    every_edge: bool = False,
    node_scores: Mapping[str, float] | None = None,
) -> str:
    """The circuit as text in the schema above.

    Args:
        graph: the circuit.
        model: the model it belongs to.
        scores: edge scores; nodes get the sum over their outgoing edges.
        pairs: the task.
        method: how the circuit was found; what the scores say about themselves if left out.
        roles: names of roles and their nodes, as in :class:`~attnlab.circuits.reference.ReferenceCircuit`.
        evaluation: what was measured, such as ``{"faithfulness": 0.83}``.
        every_edge: write the edges outside the circuit too, so that all scores are kept.
        node_scores: scores of nodes by name (``"a9.h6"``), for circuits that were found by scoring heads.

    Raises:
        ValueError: if graph, model and scores are not wired alike, a role names an unknown node, or a number is not finite.
    """
    wiring = graph.wiring
    _check_wiring(graph, model, scores)
    names = {
        wiring.sources[wiring.source(node_name(node))]: role for role, nodes in (roles or {}).items() for node in nodes
    }
    totals = None if scores is None else scores.node_scores().tolist()
    rows = {name: row for row, name in enumerate(wiring.sources)}

    def node(name: str) -> dict[str, Any]:
        entry = {"id": name, **_parts(name)}
        if name in names:
            entry["role"] = names[name]
        if totals is not None and name != LOGITS:
            entry["score"] = totals[rows[name]]
        elif node_scores is not None and name in node_scores:
            entry["score"] = float(node_scores[name])
        return entry

    listed = Graph.full(wiring) if every_edge else graph
    document = {
        "schema": SCHEMA,
        "model": {"id": model.spec.name, "hash": model_hash(model), "spec": _sizes(model, wiring)},
        "task": None if pairs is None else {"name": pairs.name, "n": len(pairs), "hash": pairs.digest},
        "method": dict(method) if method is not None else {} if scores is None else scores.info,
        "nodes": [node(name) for name in listed.nodes()],
        "edges": [
            {"src": src, "dst": dst, "port": port}
            | ({} if scores is None else {"score": float(scores.values[at])})
            | {"in": bool(graph.mask[at])}
            for at, src, dst, port in _edges(listed)
        ],
        "eval": {"n_edges": len(graph), **(evaluation or {})},
    }
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError("method or evaluation holds NaN or infinity, which JSON cannot; leave it out") from error


def from_json(text: str, model: HookedLM) -> CircuitFile:
    """Read what :func:`to_json` wrote, for the model that it was written for.

    Raises:
        ValueError: if the text is no such file, has another schema, or belongs to another model.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"text is no JSON ({error}); give the content of a file that to_json wrote") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise ValueError(
            f"schema {found!r} cannot be read; this version reads {SCHEMA}, write the file again with to_json"
        )
    if missing := {"model", "nodes", "edges"} - set(document):
        raise ValueError(f"the file lacks {', '.join(sorted(missing))}; write it again with to_json")
    try:
        return _circuit(document, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the file is damaged ({type(error).__name__}: {error}); write it again with to_json"
        ) from error


def to_networkx(graph: Graph, scores: EdgeScores | None = None) -> Any:
    """A ``networkx.MultiDiGraph``: nodes have ``kind``, ``layer``, ``head``; edges their port as key, and their ``score``.

    Raises:
        ValueError: if the scores are of another wiring.
    """
    import networkx as nx  # type: ignore[import-untyped]  # torch brings it along

    _check_wiring(graph, None, scores)
    network = nx.MultiDiGraph()
    network.add_nodes_from((name, _parts(name)) for name in graph.nodes())
    for at, src, dst, port in _edges(graph):
        network.add_edge(src, dst, key=port, **({} if scores is None else {"score": float(scores.values[at])}))
    return network


def to_dot(graph: Graph, scores: EdgeScores | None = None) -> str:
    """The circuit in the language of Graphviz, input below and logits on top, one rank for the heads of a layer.

    With scores, wide edges are strong ones and dashed ones are negative.

    Raises:
        ValueError: if the scores are of another wiring.
    """
    _check_wiring(graph, None, scores)
    shapes = {"input": "box", "head": "ellipse", "mlp": "box", "logits": "box"}
    nodes = {name: _parts(name) for name in graph.nodes()}
    lines = ["digraph circuit {", "  rankdir=BT;"]
    lines += [f'  "{name}" [shape={shapes[parts["kind"]]}];' for name, parts in nodes.items()]
    for layer in range(graph.wiring.n_layers):
        heads = [f'"{n}"' for n, parts in nodes.items() if parts["kind"] == "head" and parts["layer"] == layer]
        if len(heads) > 1:
            lines.append(f"  {{rank=same; {'; '.join(heads)}}}")
    largest = 0.0 if scores is None else float((scores.values.cpu().abs() * graph.mask).max())
    for at, src, dst, port in _edges(graph):
        looks = [] if port == "in" else [f'label="{port}"']
        if scores is not None and largest:
            value = float(scores.values[at])
            looks.append(f"penwidth={0.5 + 3.5 * abs(value) / largest:.2f}")
            looks += ["style=dashed"] if value < 0 else []
        lines.append(f'  "{src}" -> "{dst}"' + (f" [{', '.join(looks)}];" if looks else ";"))
    return "\n".join([*lines, "}", ""])


def _circuit(document: dict[str, Any], model: HookedLM) -> CircuitFile:
    wrote, name, mine = document["model"], model.spec.name, model_hash(model)
    if (wrote["id"], wrote["hash"]) != (name, mine):
        raise ValueError(
            f"the file belongs to model {wrote['id']} with hash {wrote['hash']}, the model given is {name} with {mine}; "
            "load that one (its ungrouped copy, if the circuit was found on that)"
        )
    wiring = Wiring.of(model.spec, parallel_blocks=wrote["spec"]["parallel_blocks"])
    mask, values, scored = torch.zeros_like(wiring.valid), torch.zeros(wiring.valid.shape, dtype=torch.float64), False
    for edge in document["edges"]:
        port = "" if edge["port"] == "in" else f"<{edge['port']}>"
        at = wiring.edge(f"{edge['src']}->{edge['dst']}{port}")
        mask[at] = edge["in"]
        if "score" in edge:
            values[at], scored = edge["score"], True
    info = {key: document.get(key) for key in ("task", "method", "nodes", "eval")}
    scores = EdgeScores(wiring, values, dict(document.get("method") or {})) if scored else None
    return CircuitFile(Graph(wiring, mask), scores, info)


def _edges(graph: Graph) -> Iterator[tuple[tuple[int, int], str, str, str]]:
    """Row and column, source, node of the destination, and port of every edge."""
    for row, column in graph.mask.nonzero().tolist():
        node, _, port = graph.wiring.destinations[column].rstrip(">").partition("<")
        yield (row, column), graph.wiring.sources[row], node, port or "in"


def _parts(name: str) -> dict[str, Any]:
    """Kind, layer and head of a node, as far as it has them."""
    if name in ("input", LOGITS):
        return {"kind": name}
    layer, head = Node.parse(name)
    return {"kind": "mlp", "layer": layer} if head is None else {"kind": "head", "layer": layer, "head": head}


def _sizes(model: HookedLM, wiring: Wiring) -> dict[str, Any]:
    spec = asdict(model.spec)
    del spec["name"]  # stands as the id
    return spec | {"parallel_blocks": wiring.parallel_blocks}


def _check_wiring(graph: Graph, model: HookedLM | None, scores: EdgeScores | None) -> None:
    wiring = graph.wiring
    if model is not None and (wiring.n_layers, wiring.n_heads) != (model.spec.n_layers, model.spec.n_heads):
        raise ValueError(
            f"graph is wired as {wiring}, model {model.spec.name} as {Wiring.of(model.spec)}; give the graph's model"
        )
    if scores is not None and scores.wiring != wiring:
        raise ValueError(f"scores are wired as {scores.wiring}, the graph as {wiring}; give the scores of its model")
