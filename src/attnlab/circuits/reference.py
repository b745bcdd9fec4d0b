"""Circuits that others found by hand, and how well a ranking finds them again.

A published circuit is somebody's careful reading of one model on one task, not a ground truth: lists differ between
sources (the differences are kept as ``variants``), heads with small effects are left out, and finding the heads says
nothing about whether the circuit does the task. Report :func:`roc` beside
:func:`~attnlab.circuits.faithfulness.faithfulness`, not in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from attnlab.circuits.edges import Wiring
from attnlab.circuits.graph import Graph
from attnlab.circuits.model import Node


class Variant(NamedTuple):
    """Another list of the same circuit: what it adds and leaves out, and where it stands."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class ReferenceCircuit:
    """A published circuit as a list of heads by role.

    Attributes:
        model: its Hugging Face id, or a description.
        task: what it does.
        citation: who found it, where.
        n_layers: blocks of the model.
        n_heads: heads of a block.
        roles: what the authors call them, and which heads they are (``"9.6"``: layer 9, head 6).
        mlps: the MLPs that belong to the circuit, None where the authors did not look at MLPs.
        note: what to know before comparing with it.
        variants: other lists of the same circuit by name.
    """

    model: str
    task: str
    citation: str
    n_layers: int
    n_heads: int
    roles: Mapping[str, tuple[str, ...]]
    mlps: tuple[str, ...] | None = None
    note: str = ""
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def heads(self, variant: str | None = None) -> frozenset[Node]:
        """All heads of the circuit, or of one of its variants.

        Raises:
            ValueError: for an unknown variant.
        """
        found = {Node.parse(head) for heads in self.roles.values() for head in heads}
        if variant is None:
            return frozenset(found)
        if variant not in self.variants:
            raise ValueError(f"variant={variant!r} is unknown; use None or one of {sorted(self.variants)}")
        change = self.variants[variant]
        return frozenset(found - set(map(Node.parse, change.removed)) | set(map(Node.parse, change.added)))

    def role(self, head: str | Node) -> str | None:
        """What the authors call a head; None for one that is not in their circuit."""
        wanted = Node.parse(head)
        return next((role for role, heads in self.roles.items() if wanted in map(Node.parse, heads)), None)

    def labels(self, nodes: Iterable[str | Node], variant: str | None = None) -> np.ndarray:
        """Which of these heads belong to the circuit, bool in the order given: the truth for :func:`roc`."""
        heads = self.heads(variant)
        return np.array([Node.parse(node) in heads for node in nodes])

    def graph(self, wiring: Wiring, variant: str | None = None) -> Graph:
        """Every edge between the circuit's heads, its MLPs (all, if the authors did not look), the input and the logits.

        The authors claim fewer edges than that: it is the largest graph that their list of nodes allows.

        Raises:
            ValueError: for a wiring of another size, or an unknown variant.
        """
        if (wiring.n_layers, wiring.n_heads) != (self.n_layers, self.n_heads):
            raise ValueError(
                f"wiring has {wiring.n_layers} x {wiring.n_heads} heads; the circuit is one of {self.model} "
                f"with {self.n_layers} x {self.n_heads}"
            )
        mlps = [f"m{layer}" for layer in range(self.n_layers)] if self.mlps is None else self.mlps
        return Graph.of_nodes(wiring, [*sorted(self.heads(variant)), *mlps])


REFERENCE_CIRCUITS: dict[str, ReferenceCircuit] = {
    "ioi/gpt2-small": ReferenceCircuit(
        model="gpt2",
        task="indirect object identification",
        citation="Wang, Variengien, Conmy, Shlegeris & Steinhardt 2022, Interpretability in the Wild, arXiv:2211.00593",
        n_layers=12,
        n_heads=12,
        roles={
            "name mover": ("9.9", "10.0", "9.6"),
            "backup name mover": ("9.0", "9.7", "10.1", "10.2", "10.6", "10.10", "11.2", "11.9"),
            "negative name mover": ("10.7", "11.10"),
            "S-inhibition": ("7.3", "7.9", "8.6", "8.10"),
            "induction": ("5.5", "5.8", "5.9", "6.9"),
            "duplicate token": ("0.1", "0.10", "3.0"),
            "previous token": ("2.2", "4.11"),
        },
        note="The authors counted no MLP; the list is that of the ACDC code.",
        variants={
            "sae-circuits": Variant(("11.3",), ("9.0",), "O'Neill & Bui 2024, arXiv:2405.12522, code of the paper"),
        },
    ),
    "greater-than/gpt2-small": ReferenceCircuit(
        model="gpt2",
        task="greater-than",
        citation="Hanna, Liu & Variengien 2023, How does GPT-2 compute greater-than?, arXiv:2305.00586",
        n_layers=12,
        n_heads=12,
        roles={
            "reads the year": ("0.1", "0.3", "0.5"),
            "moves the year to the end": ("5.5", "6.1", "6.9", "7.10", "8.11", "9.1"),
        },
        mlps=("m0", "m1", "m2", "m3", "m8", "m9", "m10", "m11"),
        note="Head list of the ACDC code; the names of the two groups are ours.",
        variants={
            "authors' code": Variant(
                ("5.1", "8.8"), ("6.1",), "circuit_discovery.py of the authors' repository hannamw/gpt2-greater-than"
            ),
        },
    ),
    "docstring/attn-only-4l": ReferenceCircuit(
        model="attn-only-4l (4 layers, attention only, width 512, trained on text and code)",
        task="name the next argument in a Python docstring",
        citation=(
            "Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer, "
            "alignmentforum.org/posts/u6KXXmKFbXfWzoAXn"
        ),
        n_layers=4,
        n_heads=8,
        roles={"circuit": ("0.5", "1.2", "1.4", "2.0", "3.0", "3.6")},
        mlps=(),
        note="Head list of the ACDC code, without roles: 1.4 does different things at different positions.",
        variants={
            "sae-circuits": Variant(("1.0",), ("1.2",), "O'Neill & Bui 2024, arXiv:2405.12522, code of the paper"),
            "final check": Variant(
                ("0.1", "0.2", "0.4", "1.0", "2.3"),
                (),
                "heads kept in the post's last experiment, as listed in the auto-circuit code",
            ),
        },
    ),
}


class Roc(NamedTuple):
    """The curve and the area under it.

    ``points`` has one row a threshold: ``threshold, false_positive_rate, true_positive_rate``.
    """

    points: pd.DataFrame
    auc: float


def roc(scores: Sequence[float] | np.ndarray, truth: Sequence[bool] | np.ndarray) -> Roc:
    """How well scores rank the members of a circuit above the rest; the area is 0.5 by chance and for all scores equal.

    Only the order counts. Pass absolute values where a strong negative score should count as found.

    Args:
        scores: one a head or an edge, ``[n]``.
        truth: whether it belongs to the circuit, ``[n]``, as :meth:`ReferenceCircuit.labels` gives it or a mask of edges.

    Raises:
        ValueError: if lengths differ, a score is not finite, or there is nothing to tell apart.
    """
    values, members = np.asarray(scores, dtype=float), np.asarray(truth)
    if values.ndim != 1 or values.shape != members.shape:
        raise ValueError(f"scores has shape {values.shape} and truth {members.shape}; give two lists of equal length")
    if members.dtype != bool:
        raise ValueError(f"truth is of type {members.dtype}; give booleans, True for members of the circuit")
    if not np.isfinite(values).all():
        raise ValueError(
            f"scores[{int(np.flatnonzero(~np.isfinite(values))[0])}] is not finite; leave it out or score it"
        )
    if members.all() or not members.any():
        raise ValueError(f"truth has {members.sum()} members among {len(members)}; a curve needs members and others")
    from sklearn.metrics import roc_auc_score, roc_curve  # slow to import, and needed here only

    false, true, thresholds = roc_curve(members, values, drop_intermediate=False)
    points = pd.DataFrame({"threshold": thresholds, "false_positive_rate": false, "true_positive_rate": true})
    return Roc(points, float(roc_auc_score(members, values)))
