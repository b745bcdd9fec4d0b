"""Heads in few dimensions: the subspaces in which queries, keys and values vary, and what is left of a head inside them.

Lieberum et al. (2023) compress the heads that pick the letter of a multiple choice in this way and ask what the remaining directions
stand for. Taught in the chapter ``circuits/chinchilla-mcq``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.circuits.chinchilla_mcq import Sheet
from attnlab.circuits.model import Edit, HookedLM, Node


@dataclass(frozen=True)
class Subspace:
    """Directions in which vectors of one kind vary, the strongest first.

    ``mean`` [d] of the vectors, ``basis`` [d, d] orthonormal rows, ``explained`` [d] share of the variance of each.
    """

    mean: Tensor
    basis: Tensor
    explained: Tensor

    def project(self, x: Tensor, rank: int) -> Tensor:
        """``x`` [..., d] moved to the nearest point of the mean plus the first ``rank`` directions; ``rank = d`` changes nothing."""
        size = len(self.basis)
        if not 0 <= rank <= size:
            raise ValueError(f"rank: from 0 to {size} directions are there, not {rank}")
        mean, kept = self.mean.to(x), self.basis[:rank].to(x)
        return mean + (x - mean) @ kept.T @ kept

    def coordinates(self, x: Tensor, rank: int = 3) -> Tensor:
        """Where ``x`` [..., d] lies along the first directions, ``[..., rank]``."""
        return (x - self.mean.to(x)) @ self.basis[:rank].to(x).T


def fit_subspace(vectors: Tensor) -> Subspace:
    """The centred singular value decomposition of ``vectors`` [n, d].

    Raises:
        ValueError: fewer than ``4 d`` vectors (the directions would describe the sample), or vectors that are all the same.
    """
    n, size = vectors.shape
    if n < 4 * size:
        raise ValueError(f"vectors: {n} are too few for {size} dimensions; give at least 4 d = {4 * size}")
    mean = vectors.mean(0)
    _, values, basis = torch.linalg.svd((vectors - mean).double(), full_matrices=False)
    variance = values.square()
    if not float(variance.sum()) > 0:
        raise ValueError("vectors: all are the same, so nothing varies; take them from different prompts")
    return Subspace(mean, basis.to(vectors), (variance / variance.sum()).to(vectors))


def random_subspace(like: Subspace, seed: int) -> Subspace:
    """Random orthonormal directions around the same mean: what a subspace of this rank keeps by being there."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(like.basis.shape, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square)[0].T.to(like.basis)
    return Subspace(like.mean, basis, torch.full_like(like.explained, float("nan")))


#: subspaces by head and part: ``{"2.2": {"q": ..., "k": ..., "v": ...}}``
Subspaces = Mapping[str, Mapping[str, Subspace]]


def head_vectors(model: HookedLM, sheet: Sheet, heads: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Queries at END ``[N, d_head]``, keys and values at the labels ``[N, k, d_head]``, before any rotation, by head and part.

    Raises:
        ValueError: a head that the model does not have, or one that shares its keys with others (see
            :func:`attnlab.circuits.ungroup.ungrouped`).
    """
    nodes = _own_keys(model, heads)
    rows = torch.arange(len(sheet))[:, None]
    with torch.no_grad():
        run = model.run(sheet.tokens, capture=("q", "k", "v"))
    return {
        str(node): {
            "q": run.acts["q", node.layer][:, -1, node.head],
            "k": run.acts["k", node.layer][rows, sheet.label_at, node.head],
            "v": run.acts["v", node.layer][rows, sheet.label_at, node.head],
        }
        for node in nodes
    }


def fit_heads(model: HookedLM, sheet: Sheet, heads: Sequence[str]) -> dict[str, dict[str, Subspace]]:
    """The subspaces of queries, keys and values of some heads on the prompts of ``sheet``."""
    tables = head_vectors(model, sheet, heads)
    return {
        head: {part: fit_subspace(rows.flatten(0, -2)) for part, rows in parts.items()}
        for head, parts in tables.items()
    }


def compress(model: HookedLM, sheet: Sheet, subspaces: Subspaces, ranks: Mapping[str, int]) -> list[Edit]:
    """Edits that move queries at END, keys and values at the labels of some heads into the first directions of their subspaces.

    Args:
        model: whose heads they are.
        sheet: the prompts that will run.
        subspaces: from :func:`fit_heads`.
        ranks: how many directions each part keeps; a part that is not named is left alone.
    """
    if unknown := sorted(set(ranks) - {"q", "k", "v"}):
        raise ValueError(f"ranks: the parts are q, k and v, not {unknown[0]!r}")
    rows = torch.arange(len(sheet))[:, None]
    edits = []
    for node in _own_keys(model, list(subspaces)):
        for part, rank in ranks.items():
            space = subspaces[str(node)][part]

            def change(
                act: Tensor, first: int, node: Node = node, part: str = part, space: Subspace = space, rank: int = rank
            ) -> Tensor:
                act = act.clone()
                where = (slice(None), -1) if part == "q" else (rows, sheet.label_at - first)
                act[(*where, node.head)] = space.project(act[(*where, node.head)], rank)
                return act

            edits.append(Edit(part, node.layer, change))
    return edits


def _own_keys(model: HookedLM, heads: Sequence[str]) -> list[Node]:
    nodes = [model.spec.check(head) for head in heads]
    if others := [str(node) for node in nodes if node.head is None]:
        raise ValueError(f"heads: {others[0]} has no queries and keys; name heads such as '2.1'")
    if model.spec.n_kv_heads != model.spec.n_heads:
        raise ValueError(
            f"model: {model.spec.name} shares a key between {model.spec.n_heads // model.spec.n_kv_heads} heads; "
            "give each its own with attnlab.circuits.ungroup.ungrouped(model)"
        )
    return nodes


def two_factor_shares(vectors: Tensor, place: Tensor, letter: Tensor) -> dict[str, float]:
    """Shares of the variance of ``vectors`` [n, d] that go with the place in the list, with the letter, and with neither.

    The model is ``vector = mean + a[place] + b[letter]``; every place must meet every letter equally often, so that the
    two sums of squares do not overlap.

    Raises:
        ValueError: a design that is not balanced, such as A-D in order, in which place and letter are one thing.
    """
    places, rows = torch.unique(place, return_inverse=True)
    letters, columns = torch.unique(letter, return_inverse=True)
    counts = torch.zeros(len(places), len(letters), dtype=torch.long)
    counts.index_put_((rows, columns), torch.ones_like(rows), accumulate=True)
    if len(counts.unique()) != 1:
        raise ValueError(
            f"place, letter: every place must meet every letter equally often, but the counts run from {int(counts.min())} to "
            f"{int(counts.max())}; in this design the two cannot be told apart"
        )
    shares = {"place": share_of(vectors, rows), "letter": share_of(vectors, columns)}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def share_of(vectors: Tensor, groups: Tensor) -> float:
    """Share of the variance of ``vectors`` [n, d] that lies between the means of the ``groups`` [n]."""
    x = (vectors - vectors.mean(0)).double()
    names, rows = torch.unique(groups, return_inverse=True)
    counts = torch.bincount(rows, minlength=len(names))[:, None]
    means = torch.zeros(len(names), x.shape[1], dtype=x.dtype).index_add_(0, rows, x) / counts
    return float((means.square() * counts).sum() / x.square().sum())
