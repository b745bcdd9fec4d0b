"""Circuits as sets of edges: choosing them by score, cleaning them up, and comparing them.

A circuit is a :class:`~attnlab.circuits.edges.Wiring` and a mask ``[n_src, n_dst]`` of the edges that it keeps. How well it
does the task is measured by :mod:`attnlab.circuits.evaluate`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.model import INPUT, Node
from attnlab.circuits.overlap import chance, count

LOGITS = "logits"


@dataclass(frozen=True, eq=False)
class Graph:
    """A circuit: the edges of a wiring that are kept. All operations return a new graph.

    Args:
        wiring: sources and destinations.
        mask: bool ``[n_src, n_dst]``, True for an edge that belongs to the circuit. It is copied to the CPU.

    Raises:
        ValueError: if the mask is not boolean, has another shape, or marks a pair that is no edge.
    """

    wiring: Wiring
    mask: Tensor

    def __post_init__(self) -> None:
        shape = (self.wiring.n_src, self.wiring.n_dst)
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape:
            raise ValueError(
                f"mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; "
                f"the wiring needs torch.bool of {shape} (n_src, n_dst)"
            )
        mask = self.mask.detach().cpu().clone()
        if (wrong := mask & ~self.wiring.valid).any():
            source, destination = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"mask holds {self.wiring.sources[source]}->{self.wiring.destinations[destination]}, which is no edge; "
                "combine it with wiring.valid first"
            )
        object.__setattr__(self, "mask", mask)

    # ------------------------------------------------------------------------------------------------ making

    @classmethod
    def full(cls, wiring: Wiring) -> Graph:
        """Every edge: the model itself."""
        return cls(wiring, wiring.valid)

    @classmethod
    def empty(cls, wiring: Wiring) -> Graph:
        """No edge: everything ablated."""
        return cls(wiring, torch.zeros_like(wiring.valid))

    @classmethod
    def from_edges(cls, wiring: Wiring, edges: Iterable[str]) -> Graph:
        """The edges of these names, such as ``"a7.h3->a9.h6<q>"``.

        Raises:
            ValueError: for a name that is no edge of the wiring.
        """
        mask = torch.zeros_like(wiring.valid)
        for edge in edges:
            mask[wiring.edge(edge)] = True
        return cls(wiring, mask)

    @classmethod
    def of_nodes(cls, wiring: Wiring, nodes: Iterable[str | Node]) -> Graph:
        """Every edge between the given nodes, the input and the logits: all that a published list of heads allows.

        MLPs are kept only where they are named. Heads may be written ``"a9.h6"`` or ``"9.6"``.

        Raises:
            ValueError: for a node that the wiring does not have.
        """
        keep = torch.zeros(wiring.n_src + 1, dtype=torch.bool)  # the last entry is the logits
        keep[[0, wiring.n_src, *_rows(wiring, nodes)]] = True
        return cls(wiring, wiring.valid & keep[:-1, None] & keep[_owners(wiring)])

    @classmethod
    def top_n(cls, scores: EdgeScores, n: int, *, absolute: bool = True) -> Graph:
        """The ``n`` edges with the largest score, by absolute value or by value; ties keep the layout's order.

        Raises:
            ValueError: if ``n`` is negative or there are not that many edges.
        """
        _check_size(scores, n)
        edges = scores.wiring.valid.flatten().nonzero()[:, 0]
        order = _strength(scores, absolute).flatten()[edges].argsort(descending=True, stable=True)
        mask = torch.zeros(scores.wiring.n_src * scores.wiring.n_dst, dtype=torch.bool)
        mask[edges[order[:n]]] = True
        return cls(scores.wiring, mask.view_as(scores.wiring.valid))

    @classmethod
    def threshold(cls, scores: EdgeScores, tau: float, *, absolute: bool = True) -> Graph:
        """All edges whose score, by absolute value or by value, is at least ``tau``.

        Raises:
            ValueError: if ``tau`` is not a finite number.
        """
        if not math.isfinite(tau):
            raise ValueError(f"tau={tau} is no threshold; give a finite number in the units of the scores")
        return cls(scores.wiring, scores.wiring.valid & (_strength(scores, absolute) >= tau))

    @classmethod
    def greedy(cls, scores: EdgeScores, n: int, *, absolute: bool = True) -> Graph:
        """Grow a circuit from the logits: ``n`` times add the strongest edge into something already reached.

        Every edge of the result leads to the logits, unlike those of :meth:`top_n`; its source may still be cut off from the
        input, see :meth:`prune`. Source: Hanna et al. 2024 (arXiv:2403.17806).

        Raises:
            ValueError: if ``n`` is negative or there are not that many edges.
        """
        _check_size(scores, n)
        wiring, strength = scores.wiring, _strength(scores, absolute)
        columns: dict[int, list[int]] = {}
        for column, owner in enumerate(_owners(wiring).tolist()):
            columns.setdefault(owner, []).append(column)
        heap: list[tuple[float, int, int]] = []

        def reach(node: int) -> None:
            for column in columns.get(node, []):
                for row, value in enumerate(strength[: int(wiring.reads[column]), column].tolist()):
                    heapq.heappush(heap, (-value, row, column))

        mask, reached = torch.zeros_like(wiring.valid), {wiring.n_src}
        reach(wiring.n_src)
        for _ in range(n):
            _, row, column = heapq.heappop(heap)
            mask[row, column] = True
            if row not in reached:
                reached.add(row)
                reach(row)
        return cls(wiring, mask)

    # ------------------------------------------------------------------------------------------------ changing

    def prune(self) -> Graph:
        """Drop edges whose source the input does not reach or whose destination does not reach the logits.

        A head counts as reached through any of its ports. Idempotent.
        """
        n = self.wiring.n_src
        owners = _owners(self.wiring)
        links = torch.zeros(n, n + 1, dtype=torch.long).index_add_(1, owners, self.mask.long()) > 0  # node to node
        reached, useful = torch.zeros(2, n + 1, dtype=torch.bool)
        reached[0] = useful[n] = True
        for row in range(n):  # sources stand in the order in which they write, so one sweep each way is enough
            if reached[row]:
                reached |= links[row]
        for row in reversed(range(n)):
            useful[row] = (links[row] & useful).any()
        return Graph(self.wiring, self.mask & reached[:-1, None] & useful[owners])

    def without(self, *nodes: str | Node) -> Graph:
        """Drop every edge into or out of these nodes.

        Raises:
            ValueError: for a node that the wiring does not have.
        """
        gone = torch.zeros(self.wiring.n_src + 1, dtype=torch.bool)
        gone[_rows(self.wiring, nodes)] = True
        return Graph(self.wiring, self.mask & ~gone[:-1, None] & ~gone[_owners(self.wiring)])

    def __invert__(self) -> Graph:
        """The complement: all edges that are not in this graph."""
        return Graph(self.wiring, self.wiring.valid & ~self.mask)

    def __and__(self, other: Graph) -> Graph:
        return Graph(self.wiring, self.mask & self._same(other))

    def __or__(self, other: Graph) -> Graph:
        return Graph(self.wiring, self.mask | self._same(other))

    def __sub__(self, other: Graph) -> Graph:
        return Graph(self.wiring, self.mask & ~self._same(other))

    # ------------------------------------------------------------------------------------------------ asking

    def jaccard(self, other: Graph) -> float:
        """Shared edges over all edges of the two; 1 for two empty graphs."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def edges(self) -> list[str]:
        """Names of the edges, in the order of their sources."""
        return [self.wiring.name(row, column) for row, column in self.mask.nonzero().tolist()]

    def nodes(self) -> list[str]:
        """Names of all nodes that an edge touches, in the order in which they write; ``"logits"`` last."""
        touched = torch.zeros(self.wiring.n_src + 1, dtype=torch.bool)
        touched[:-1] = self.mask.any(1)
        touched[_owners(self.wiring)[self.mask.any(0)]] = True
        names = [*self.wiring.sources, LOGITS]
        return [names[row] for row in touched.nonzero()[:, 0].tolist()]

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str) and bool(self.mask[self.wiring.edge(edge)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self.wiring == other.wiring and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.wiring, self.mask.numpy().tobytes()))

    def __repr__(self) -> str:
        return f"Graph({len(self)} of {self.wiring.n_edges} edges, {len(self.nodes())} nodes)"

    def _same(self, other: Graph) -> Tensor:
        if self.wiring != other.wiring:
            raise ValueError(
                f"other is wired as {other.wiring}, this graph as {self.wiring}; compare circuits of one model"
            )
        return other.mask


def edge_overlap_curve(
    a: EdgeScores,
    b: EdgeScores,
    shares: Sequence[float] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    level: float = 0.99,
) -> pd.DataFrame:
    """Edges in both top lists against their length, and by chance; as :func:`~attnlab.circuits.overlap.overlap_curve`.

    Columns ``share, k, overlap, fraction, jaccard, chance, chance_high``. By chance every edge is as likely as any other.
    Edges into late nodes have more rivals than edges into early ones, so compare with a control task as well.

    Raises:
        ValueError: if a share is out of (0, 1] or the two tables are of models that are wired differently.
    """
    if a.wiring != b.wiring:
        raise ValueError(f"a is wired as {a.wiring}, b as {b.wiring}; compare scores of one model")
    n, rows = a.wiring.n_edges, []
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must lie in (0, 1]; 0.02 means the top 2%")
        k = count(n, share)
        mean, high = chance(n, k, level)
        first, second = Graph.top_n(a, k), Graph.top_n(b, k)
        shared = len(first & second)
        rows.append(
            {
                "share": share,
                "k": k,
                "overlap": shared,
                "fraction": shared / k,
                "jaccard": first.jaccard(second),
                "chance": mean,
                "chance_high": high,
            }
        )
    return pd.DataFrame(rows)


def node_name(node: str | Node) -> str:
    """The name of a node in a wiring: ``"9.6"`` becomes ``"a9.h6"``.

    Raises:
        ValueError: if the text is not understood.
    """
    found = Node.parse(node)
    if found == INPUT:
        return "input"
    return f"m{found.layer}" if found.head is None else f"a{found.layer}.h{found.head}"


def _owners(wiring: Wiring) -> Tensor:
    """Row of the node that each destination belongs to, ``[n_dst]``; the logits get ``n_src``."""
    layers = [
        torch.tensor(3 * list(range(heads.start, heads.stop)) + [wiring.mlp_of(layer)])
        for layer, heads in ((layer, wiring.heads_of(layer)) for layer in range(wiring.n_layers))
    ]
    return torch.cat([*layers, torch.tensor([wiring.n_src])])


def _rows(wiring: Wiring, nodes: Iterable[str | Node]) -> list[int]:
    """Rows of nodes, the logits as ``n_src``."""
    return [wiring.n_src if node == LOGITS else wiring.source(node_name(node)) for node in nodes]


def _strength(scores: EdgeScores, absolute: bool) -> Tensor:
    values = scores.values.detach().cpu()
    return values.abs() if absolute else values


def _check_size(scores: EdgeScores, n: int) -> None:
    if not 0 <= n <= scores.wiring.n_edges:
        raise ValueError(f"n={n} edges cannot be had; the model has {scores.wiring.n_edges}")
