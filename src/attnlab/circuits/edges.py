"""The edges of a transformer: which writer feeds which reader, and scores for all of them in one matrix.

Every block reads a sum of everything written before it. So a circuit is a choice of edges ``source -> destination``: sources
are the embedding, the heads and the MLPs, destinations the query, key and value input of each head, the input of each MLP and
the final residual. Matrices ``[n_src, n_dst]`` hold scores and choices; names such as ``a7.h3->a9.h6<q>`` are for people.
The layout is that of Hanna et al. 2024 (arXiv:2403.17806).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from attnlab.circuits.model import Spec

#: the inputs of a head, in the order of the destinations of a layer
PORTS = ("q", "k", "v")


@dataclass(frozen=True)
class Wiring:
    """Sources, destinations and edges of a model whose every query head has a key and a value of its own.

    Sources are ordered as they write: ``input``, then layer by layer the heads ``a0.h0 ..`` and the MLP ``m0``; there are
    ``n_src = 1 + L (H + 1)``. Destinations are ordered as they read: layer by layer all ``a0.h0<q>``, all ``<k>``, all ``<v>``
    and ``m0``, last ``logits``; ``n_dst = L (3 H + 1) + 1``. A destination therefore reads a prefix of the sources.

    Args:
        n_layers: blocks ``L``.
        n_heads: query heads ``H`` of a block.
        parallel_blocks: the MLP of a block reads the same residual as its heads (as in Pythia), so it does not see them.

    Raises:
        ValueError: without a layer or a head.
    """

    n_layers: int
    n_heads: int
    parallel_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves no edges; give at least 1")

    @classmethod
    def of(cls, spec: Spec, parallel_blocks: bool = False) -> Wiring:
        """The wiring of a model. One with grouped keys and values is wired as its ungrouped copy would be."""
        return cls(spec.n_layers, spec.n_heads, parallel_blocks)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of all writers, ``n_src`` of them."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}"]
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of all readers, ``n_dst`` of them."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{port}>" for port in PORTS for head in range(self.n_heads)] + [f"m{layer}"]
        return (*names, "logits")

    @property
    def n_src(self) -> int:
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_dst(self) -> int:
        return self.n_layers * (3 * self.n_heads + 1) + 1

    def written_before(self, layer: int) -> int:
        """How many sources have written when the heads of ``layer`` read (``layer = L``: when the logits are read)."""
        return 1 + layer * (self.n_heads + 1)

    @cached_property
    def reads(self) -> Tensor:
        """How many sources each destination reads, ``[n_dst]``: always the first ones."""
        counts = []
        for layer in range(self.n_layers):
            before = self.written_before(layer)
            counts += [before] * (3 * self.n_heads) + [before if self.parallel_blocks else before + self.n_heads]
        return torch.tensor([*counts, self.n_src])

    @cached_property
    def valid(self) -> Tensor:
        """True where the source writes before the destination reads, bool ``[n_src, n_dst]``. Treat it as read-only."""
        return torch.arange(self.n_src)[:, None] < self.reads

    @property
    def n_edges(self) -> int:
        return int(self.reads.sum())

    def heads_of(self, layer: int) -> slice:
        """The sources that are heads of ``layer``."""
        start = self.written_before(layer)
        return slice(start, start + self.n_heads)

    def mlp_of(self, layer: int) -> int:
        """The source that is the MLP of ``layer``."""
        return self.written_before(layer) + self.n_heads

    def port(self, layer: int, port: str) -> slice:
        """The destinations of one kind in ``layer``: ``"q"``, ``"k"`` or ``"v"`` of all heads, or ``"mlp"``.

        Raises:
            ValueError: for another port.
        """
        start = layer * (3 * self.n_heads + 1)
        if port == "mlp":
            return slice(start + 3 * self.n_heads, start + 3 * self.n_heads + 1)
        if port not in PORTS:
            raise ValueError(f"port={port!r} is unknown; use 'q', 'k', 'v' or 'mlp'")
        start += PORTS.index(port) * self.n_heads
        return slice(start, start + self.n_heads)

    def source(self, name: str) -> int:
        """Row of a writer.

        Raises:
            ValueError: if the name is no writer of this model.
        """
        if name not in self._rows:
            raise ValueError(f"source {name!r} does not exist; use {self._source_names}, with {self._sizes}")
        return self._rows[name]

    def destination(self, name: str) -> int:
        """Column of a reader.

        Raises:
            ValueError: if the name is no reader of this model; for a head without its port, too.
        """
        if name not in self._columns:
            if re.fullmatch(r"a\d+\.h\d+", name):
                raise ValueError(f"destination {name!r} lacks its port; write '{name}<q>', '{name}<k>' or '{name}<v>'")
            raise ValueError(
                f"destination {name!r} does not exist; use 'a0.h0<q>' (or k, v), 'm0' or 'logits', with {self._sizes}"
            )
        return self._columns[name]

    def edge(self, name: str) -> tuple[int, int]:
        """Row and column of an edge such as ``"a7.h3->a9.h6<q>"``.

        Raises:
            ValueError: if the name is not understood or the source writes too late for the destination.
        """
        ends = name.split("->")
        if len(ends) != 2:
            raise ValueError(f"edge {name!r} is not understood; write 'source->destination', as in 'a7.h3->a9.h6<q>'")
        source, destination = self.source(ends[0].strip()), self.destination(ends[1].strip())
        self._check(source, destination)
        return source, destination

    def name(self, source: int, destination: int) -> str:
        """The name of an edge.

        Raises:
            ValueError: if there is no such edge.
        """
        for what, index, size in (("source", source, self.n_src), ("destination", destination, self.n_dst)):
            if not 0 <= index < size:
                raise ValueError(f"{what}={index} does not exist; indices run from 0 to {size - 1}")
        self._check(source, destination)
        return f"{self.sources[source]}->{self.destinations[destination]}"

    def _check(self, source: int, destination: int) -> None:
        if source >= (count := int(self.reads[destination])):
            raise ValueError(
                f"edge {self.sources[source]}->{self.destinations[destination]} runs backwards: {self.destinations[destination]} "
                f"reads what is written before it, {self.sources[0]} to {self.sources[count - 1]}"
            )

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.sources)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.destinations)}

    @property
    def _sizes(self) -> str:
        return f"layers 0 to {self.n_layers - 1} and heads 0 to {self.n_heads - 1}"

    @property
    def _source_names(self) -> str:
        return "'input', a head such as 'a0.h0' or an MLP such as 'm0'"


@dataclass
class EdgeScores:
    """A score for every edge of a model.

    Attributes:
        wiring: what the rows and columns are.
        values: ``[n_src, n_dst]`` floating, 0 where there is no edge.
        info: how the scores were made: model, data, metric, method, steps, direction and so on.

    Raises:
        ValueError: if the shape does not fit, a value is not finite, or a score stands where there is no edge.
    """

    wiring: Wiring
    values: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.wiring.n_src, self.wiring.n_dst)
        if tuple(self.values.shape) != shape:
            raise ValueError(f"values has shape {tuple(self.values.shape)}; the wiring needs {shape} (n_src, n_dst)")
        if not self.values.isfinite().all():
            bad = self.wiring.sources[int((~self.values.isfinite()).nonzero()[0, 0])]
            raise ValueError(f"values has NaN or infinite scores (first at source {bad}); check metric and weights")
        if (self.values[~self.wiring.valid.to(self.values.device)] != 0).any():
            raise ValueError("values scores pairs that are no edge; multiply by wiring.valid first")

    def of(self, edge: str) -> float:
        """The score of one edge, named as in ``"a7.h3->a9.h6<q>"``."""
        return float(self.values[self.wiring.edge(edge)])

    def order(self) -> Tensor:
        """All edges as flat indices ``source * n_dst + destination``, largest absolute score first; ties keep the layout's order."""
        edges = self.wiring.valid.flatten().nonzero()[:, 0]
        scores = self.values.cpu().flatten()[edges].abs()
        return edges[scores.argsort(descending=True, stable=True)]

    def top(self, n: int) -> list[tuple[str, float]]:
        """Names and scores of the ``n`` edges with the largest absolute score, largest first.

        Raises:
            ValueError: if ``n`` is negative or there are not that many edges.
        """
        if not 0 <= n <= self.wiring.n_edges:
            raise ValueError(f"n={n} edges cannot be had; the model has {self.wiring.n_edges}")
        ends = [divmod(int(index), self.wiring.n_dst) for index in self.order()[:n]]
        return [(self.wiring.name(*pair), float(self.values[pair])) for pair in ends]

    def node_scores(self) -> Tensor:
        """Sum over the outgoing edges of each source, ``[n_src]``."""
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row an edge in the layout's order: ``edge``, ``source``, ``destination`` (its node), ``port`` and ``score``.

        The port of an MLP and of the logits is ``"in"``.
        """
        rows, columns = self.wiring.valid.nonzero(as_tuple=True)
        ends = [self.wiring.destinations[column].rstrip(">").split("<") for column in columns.tolist()]
        sources = [self.wiring.sources[row] for row in rows.tolist()]
        return pd.DataFrame(
            {
                "edge": [
                    f"{source}->{self.wiring.destinations[c]}"
                    for source, c in zip(sources, columns.tolist(), strict=True)
                ],
                "source": sources,
                "destination": [end[0] for end in ends],
                "port": [end[1] if len(end) == 2 else "in" for end in ends],
                "score": self.values.detach().cpu()[rows, columns].numpy(),
            }
        )
