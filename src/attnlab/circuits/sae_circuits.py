r"""Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models (O'Neill & Bui 2024, arXiv:2405.12522).

Taught in the chapter ``circuits/sae-circuits``. The method in three steps: what every head writes on prompts that can be answered
(positive) and on twins that cannot (negative); one integer, a *code*, for each head and prompt; a score for each head from its
codes. Codes come from an autoencoder (:mod:`attnlab.circuits.sae`) or from the controls that the paper lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.model import HookedLM, Node
from attnlab.circuits.pairs import Pairs
from attnlab.circuits.sae import Autoencoder, Kind, dead_share, fit_autoencoder
from attnlab.lab import progress

Pool = Literal["mean", "last", "mean_without_first"]
POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True)
class HeadWrites:
    """What every head wrote on every prompt, pooled over positions.

    Attributes:
        values: ``[E, N, d_model]``, E prompts of N heads.
        positive: ``[E]`` bool: whether the prompt can be answered. As many prompts can as cannot.
        heads: the N heads.

    Raises:
        ValueError: if there are no prompts, shapes disagree, or one class has more prompts than the other.
    """

    values: Tensor
    positive: np.ndarray
    heads: Sequence[Node]

    def __post_init__(self) -> None:
        check_classes(self.positive)
        if self.values.ndim != 3 or self.values.shape[:2] != (len(self.positive), len(self.heads)):
            raise ValueError(
                f"values has shape {tuple(self.values.shape)}; {len(self.positive)} prompts and {len(self.heads)} heads want "
                f"[{len(self.positive)}, {len(self.heads)}, d_model]"
            )

    def normalised(self) -> HeadWrites:
        """Divided by the root of the mean squared entry, so that a typical write has norm sqrt(d_model).

        The loss averages squared errors over entries and sums activations: at norm 1 its L1 term would be sqrt(d_model) times
        as heavy as at norm sqrt(d_model), and most features would die.
        """
        return replace(self, values=self.values / self.values.pow(2).mean().sqrt())

    def first(self, per_class: int) -> HeadWrites:
        """Only the first prompts of each class.

        Raises:
            ValueError: if there are fewer.
        """
        have = int(self.positive.sum())
        if not 0 < per_class <= have:
            raise ValueError(f"per_class={per_class} must lie between 1 and {have}, the prompts of a class")
        rows = np.concatenate([np.flatnonzero(self.positive)[:per_class], np.flatnonzero(~self.positive)[:per_class]])
        return HeadWrites(self.values[torch.as_tensor(rows)], self.positive[rows], self.heads)


def head_writes(model: HookedLM, pairs: Pairs, pools: Sequence[Pool] = ("mean",)) -> dict[Pool, HeadWrites]:
    """Head writes :math:`z_{h,t} W_O^h` on the clean (positive) and the corrupt (negative) prompts, for each way of pooling.

    Pairs are never padded, so prompts may differ in length and no padding leaks into a mean. ``"mean"`` is what the paper's
    code uses, ``"last"`` its option; ``"mean_without_first"`` leaves out token 0, on which idle heads rest.

    Raises:
        ValueError: for an unknown pool.
    """
    if unknown := [pool for pool in pools if pool not in POOLS]:
        raise ValueError(f"pools holds {unknown[0]!r}; use {', '.join(map(repr, POOLS))}")
    spec = model.spec
    z = torch.empty(len(pools), 2 * len(pairs), spec.n_layers, spec.n_heads, spec.d_head)
    with torch.no_grad():
        for batch in progress(list(pairs.batches()), f"head writes, {pairs.name}"):
            for side, tokens in enumerate((batch.clean, batch.corrupt)):
                run = model.run(tokens, capture=("z",))
                for number, pool in enumerate(pools):
                    kept = {"mean": slice(None), "last": slice(-1, None), "mean_without_first": slice(1, None)}[pool]
                    pooled = run.stack("z")[:, :, kept].mean(2)  # [L, B, H, d_head]
                    z[number, side * len(pairs) + batch.index] = pooled.transpose(0, 1).cpu().to(z.dtype)
        writes = torch.einsum("pelhk,lhkd->pelhd", z, model.W_O.cpu().to(z.dtype)).flatten(2, 3)
    positive = np.arange(2 * len(pairs)) < len(pairs)
    return {pool: HeadWrites(writes[number], positive, spec.heads) for number, pool in enumerate(pools)}


# ------------------------------------------------------------------------------------------------------------- codes


def training_prompts(positive: np.ndarray, n: int, seed: int, stratified: bool = True) -> np.ndarray:
    """Which ``n`` prompts an encoder is fitted on: half of each class, or, as in the paper's code, any.

    Raises:
        ValueError: for more prompts than there are, or fewer than one.
    """
    if not 1 <= n <= len(positive):
        raise ValueError(f"n={n} training prompts of {len(positive)}; choose between 1 and {len(positive)}")
    rng = np.random.default_rng(seed)
    if not stratified:
        return rng.permutation(len(positive))[:n]
    yes, no = (rng.permutation(np.flatnonzero(side)) for side in (positive, ~positive))
    return np.concatenate([yes[: (n + 1) // 2], no[: n // 2]])


@dataclass(frozen=True)
class Codes:
    """One integer a prompt and head, ``[E, N]``; the encoder that gave it, and the share of writes on which nothing was active."""

    values: np.ndarray
    dead: float = 0.0
    encoder: Autoencoder | None = None


def sae_codes(
    writes: HeadWrites,
    m: int = 200,
    n: int = 10,
    seed: int = 0,
    *,
    kind: Kind = "paper",
    l1: float = 0.02,
    epochs: int = 500,
    stratified: bool = True,
) -> Codes:
    """Fit an autoencoder on the writes of ``n`` prompts, all heads pooled; the code of a write is its most active feature.

    ``epochs=0`` is the first control: the same encoder before training, a random projection.
    """
    rows = training_prompts(writes.positive, n, seed, stratified)
    x = writes.values[torch.as_tensor(rows)].flatten(0, 1)  # [n * N, d_model]
    encoder, _ = fit_autoencoder(x, m, kind=kind, l1=l1, epochs=epochs, seed=seed)
    activations = torch.stack([encoder.encode(prompt) for prompt in writes.values])  # [E, N, m]
    return Codes(activations.argmax(-1).numpy(), dead_share(activations), encoder)


def kmeans_codes(writes: HeadWrites, m: int = 200, n: int = 10, seed: int = 0) -> Codes:
    """The second control: the nearest of ``m`` centres of the same training writes. Clusters, no sparsity."""
    from sklearn.cluster import KMeans  # slow to import, and needed here only

    rows = training_prompts(writes.positive, n, seed)
    x = writes.values[torch.as_tensor(rows)].flatten(0, 1).numpy()
    fitted = KMeans(min(m, len(x)), n_init=1, max_iter=50, random_state=seed).fit(x)
    codes = fitted.predict(writes.values.flatten(0, 1).numpy())
    return Codes(codes.reshape(writes.values.shape[:2]).astype(np.int64))


# ------------------------------------------------------------------------------------------------------------ scores


def unique_codes(codes: np.ndarray, positive: np.ndarray, normalise: bool = False) -> np.ndarray:
    r"""The paper's score of a head: how many codes it has on positive prompts and on no negative one, ``[N]``.

    :math:`s_h = |S^+_h \setminus S^-_h|` with :math:`S^\pm_h` the set of codes of head h; ``normalise`` divides by
    :math:`|S^+_h \cup S^-_h|`.

    Raises:
        ValueError: if codes and classes disagree or the classes differ in size.
    """
    _check_codes(codes, positive)
    scores = np.empty(codes.shape[1])
    for head, column in enumerate(codes.T):
        yes, no = set(column[positive].tolist()), set(column[~positive].tolist())
        scores[head] = len(yes - no) / (len(yes | no) if normalise else 1)
    return scores


def pair_scores(codes: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The same for pairs of heads, ``[N, N]``: pairs of codes that occur together on a positive prompt and on no negative one.

    Sets of pairs, not the dense table of ``m * m`` counts: 270 heads with 200 codes would need 2.9e9 entries. The diagonal is 0.
    """
    _check_codes(codes, positive)
    _, compact = np.unique(codes, return_inverse=True)
    compact = compact.reshape(codes.shape)
    both = compact[:, :, None] * (compact.max() + 1) + compact[:, None, :]  # [E, N, N]
    yes, no = both[positive], both[~positive]
    scores = np.zeros(both.shape[1:])
    for number, row in enumerate(yes):
        known = (no == row).any(0) | (yes[:number] == row).any(0)  # a pair of codes counts once
        scores += ~known
    np.fill_diagonal(scores, 0.0)
    return scores


def head_counts(scores: np.ndarray, items: int | None = None) -> np.ndarray:
    """How often each head stands in the strongest pairs, ``[N]``: the paper's "edge" prediction, which is about heads as well.

    The pairs are sorted by score and written out as one list of heads; the first ``items`` of it are counted (N^2 / 2).
    """
    n = len(scores)
    order = np.argsort(-scores, axis=None, kind="stable")
    pairs = np.stack(np.divmod(order, n), axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    listed = pairs.reshape(-1)[: n * n // 2 if items is None else items]
    return np.bincount(listed, minlength=n).astype(float)


def mutual_information(codes: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Bits that a head's code tells about the class of the prompt, ``[N]``: every prompt counts, not only new codes.

    The plug-in estimate: too large when there are many codes and few prompts. :func:`information_above_chance` corrects it.
    """
    _check_codes(codes, positive)
    _, compact = np.unique(codes, return_inverse=True)
    compact = compact.reshape(codes.shape)
    size, heads = compact.max() + 1, codes.shape[1]
    table = np.zeros((2, heads, size))
    for side, rows in enumerate((compact[positive], compact[~positive])):
        np.add.at(table[side], (np.arange(heads)[None].repeat(len(rows), 0), rows), 1)
    joint = table / len(codes)  # [2, N, codes]
    expected = joint.sum(0) / 2  # the classes are equally large
    terms = np.where(joint > 0, joint * np.log2(np.where(joint > 0, joint, 1) / np.where(expected > 0, expected, 1)), 0)
    return np.maximum(terms.sum((0, 2)), 0.0)


def information_above_chance(
    codes: np.ndarray, positive: np.ndarray, draws: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mutual information minus its mean under shuffled classes, in bits, and in standard deviations of the shuffles, ``[N]`` each."""
    rng = np.random.default_rng(seed)
    shuffled = np.stack([mutual_information(codes, rng.permutation(positive)) for _ in range(draws)])
    excess = mutual_information(codes, positive) - shuffled.mean(0)
    return excess, excess / np.maximum(shuffled.std(0), 1e-9)


def mean_difference(writes: HeadWrites) -> np.ndarray:
    """The third control, and the plainest: distance between a head's mean write on the two classes, ``[N]``."""
    side = torch.as_tensor(writes.positive)
    return (writes.values[side].mean(0) - writes.values[~side].mean(0)).norm(dim=-1).double().numpy()


#: where codes come from: writes, features m, training prompts n and a seed to codes
Encoder = Callable[[HeadWrites, int, int, int], Codes]
ENCODERS: dict[str, Encoder] = {
    "SAE (paper)": sae_codes,
    "SAE (standard)": lambda writes, m, n, seed: sae_codes(writes, m, n, seed, kind="standard"),
    "untrained encoder": lambda writes, m, n, seed: sae_codes(writes, m, n, seed, epochs=0),
    "k-means": kmeans_codes,
}
#: what becomes of them: codes and classes to a score a head
STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "new codes": unique_codes,
    "pairs": lambda codes, positive: head_counts(pair_scores(codes, positive)),
    "information": lambda codes, positive: information_above_chance(codes, positive)[0],
}


def softmax(scores: np.ndarray) -> np.ndarray:
    """What the paper's code does to the scores before it draws a ROC curve; strictly monotone, so the curve is the same."""
    shifted = np.exp(scores - scores.max())
    return np.asarray(shifted / shifted.sum())


def rank_heads(scores: np.ndarray, heads: Sequence[Node]) -> list[Node]:
    """Heads by score, largest first; ties keep the order of the heads."""
    return [heads[i] for i in np.argsort(-np.asarray(scores), kind="stable")]


def members(values: Iterable[float], share: float | None = None, count: int | None = None) -> np.ndarray:
    """The ground truth from exact scores: heads above a ``share`` of the gap, or the ``count`` strongest; bool ``[N]``.

    Raises:
        ValueError: unless exactly one of the two is given and some, but not all, heads are members.
    """
    strength = np.abs(np.asarray(list(values), dtype=float))
    if (share is None) == (count is None):
        raise ValueError("give either share (of the gap) or count (of heads)")
    if share is not None:
        chosen = strength > share
    else:
        chosen = np.argsort(np.argsort(-strength, kind="stable"), kind="stable") < int(count or 0)
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"{int(chosen.sum())} of {len(chosen)} heads are members; choose a share or count that splits them"
        )
    return chosen


def check_classes(positive: np.ndarray) -> None:
    """Refuse classes that a set difference cannot compare.

    Raises:
        ValueError: for no prompts, labels that are no booleans, or classes of different size.
    """
    if positive.dtype != bool or positive.ndim != 1:
        raise ValueError(f"positive is {positive.dtype} of shape {positive.shape}; give one boolean a prompt")
    yes, no = int(positive.sum()), int((~positive).sum())
    if yes == 0 or yes != no:
        raise ValueError(f"positive marks {yes} prompts and leaves {no}; give as many of each class, at least one")


def _check_codes(codes: np.ndarray, positive: np.ndarray) -> None:
    check_classes(positive)
    if codes.ndim != 2 or len(codes) != len(positive):
        raise ValueError(f"codes has shape {codes.shape}; {len(positive)} prompts want [{len(positive)}, heads]")
