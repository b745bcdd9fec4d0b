r"""Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training (Park, Jeong, Kang 2025, arXiv:2509.25758).

The same circuit is extracted from a base model and from its descendants, and the heads are compared. A head is in the circuit
if it carries at least a share ``tau`` of what flows along the circuit's edges; it is *emergent* if it is in the circuit of
the descendant and not in that of the base. Taught in the chapter ``circuits/thinking-sparks``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnlab.circuits.eap import eap
from attnlab.circuits.edges import EdgeScores
from attnlab.circuits.graph import Graph
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pair, Pairs
from attnlab.circuits.post_training import Checkpoint, chain_probability, distance, divergence
from attnlab.data import chains
from attnlab.lab import progress

Shares = NDArray[np.float64]  # [..., L, H]

TOP_SHARE = 0.25  # of all edges: 200 of the 802 of three layers of eight heads
TAU = 0.03  # share of the importance from which on a head counts; 24 equal heads would have 0.042 each
TAUS = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05)
IG_STEPS = 5
EPSILON = 1e-6

# ------------------------------------------------------------------------------------------------------ definitions


def head_importance(scores: EdgeScores, circuit: Graph) -> Shares:
    """Share of each head in what flows along the edges of a circuit, ``[L, H]``, summing to 1 (eq. 6 and 7).

    The importance of a head is the sum of ``|score|`` over the edges of the circuit that leave it.

    Raises:
        ValueError: scores and circuit of different models, or a circuit through no head.
    """
    if scores.wiring != circuit.wiring:
        raise ValueError(f"circuit is wired as {circuit.wiring}, scores as {scores.wiring}; use those of one model")
    flow = (scores.values.abs().cpu() * circuit.mask).sum(1).double()  # [n_src]
    wiring = scores.wiring
    heads = np.stack([flow[wiring.heads_of(layer)].numpy() for layer in range(wiring.n_layers)])
    if not heads.sum() > 0:
        raise ValueError(f"circuit leads through no head ({len(circuit)} edges); keep more edges")
    return np.asarray(heads / heads.sum())


def effect(post: Shares, pre: Shares, eps: float = EPSILON) -> Shares:
    """How the importance of each head moved, from -1 (gone) to 1 (new): ``(post - pre) / (post + pre + eps)`` (eq. 8).

    Raises:
        ValueError: shapes that differ, or negative importances.
    """
    post, pre = np.asarray(post, dtype=float), np.asarray(pre, dtype=float)
    if post.shape != pre.shape:
        raise ValueError(f"post has shape {post.shape}, pre {pre.shape}; one importance a head of one model is wanted")
    if (post < 0).any() or (pre < 0).any():
        raise ValueError("post and pre must not be negative; hand over importances, not signed scores")
    return (post - pre) / (post + pre + eps)


def emergent(post: Shares, pre: Shares, tau: float = TAU) -> NDArray[np.bool_]:
    """Heads in the circuit of ``post`` and not in that of ``pre``. With the arguments swapped: heads that were lost."""
    if not 0 < tau < 1:
        raise ValueError(f"tau={tau} is no share; use one between 0 and 1, such as {TAU}")
    return np.asarray((np.asarray(post) >= tau) & (np.asarray(pre) < tau))


def noise_floor(one: Shares, other: Shares, tau: float = TAU) -> float:
    """Heads that "emerge" between two measurements of one model, the mean of both directions: what no training explains."""
    return float(emergent(one, other, tau).sum() + emergent(other, one, tau).sum()) / 2


def churn(shares: Shares, tau: float = TAU) -> NDArray[np.int64]:
    """Heads that entered or left the circuit from one checkpoint to the next: ``[K + 1, L, H]`` to ``[K]``."""
    inside = np.asarray(shares) >= tau
    return (inside[1:] != inside[:-1]).sum((1, 2))


def retention(shares: Shares, tau: float = TAU) -> tuple[int, int]:
    """Of the heads that had emerged at some checkpoint of the first half, how many are in the last circuit: ``(kept, emerged)``.

    ``shares`` is ``[K + 1, L, H]`` with the base first.
    """
    half = (len(shares) + 1) // 2
    seen = emergent(np.asarray(shares)[1:half].max(0), shares[0], tau)
    return int((seen & (shares[-1] >= tau)).sum()), int(seen.sum())


def cohorts(shares: Shares, updates: Sequence[int], tau: float = TAU) -> pd.DataFrame:
    """When each head of a circuit was first in it: columns ``updates, first, heads``, ``first`` 0 for heads of the base."""
    inside = np.asarray(shares) >= tau
    first = np.where(inside.any(0), inside.argmax(0), -1)
    rows = [
        {"updates": at, "first": updates[since], "heads": int((inside[k] & (first == since)).sum())}
        for k, at in enumerate(updates)
        for since in range(k + 1)
    ]
    return pd.DataFrame([row for row in rows if row["heads"]])


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of ``k`` samples is right, from ``n`` samples of which ``correct`` are: ``1 - C(n - c, k) / C(n, k)``.

    Unbiased. Source: Chen et al. 2021 (arXiv:2107.03374).

    Raises:
        ValueError: more right samples than samples, or ``k`` out of 1 to n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct={correct} of n={n} samples cannot be; use 0 to n")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} samples cannot be drawn; use 1 to n")
    return 1 - comb(n - correct, k) / comb(n, k)


# ------------------------------------------------------------------------------------------------------ the prompts


def step_pairs(tokenizer: Any, n: int, seed: int) -> Pairs:
    """``n`` problems for each of the three steps of a chain, in which the operand of that step is another digit.

    The prompt ends where the step's digit is due, after the right steps before; the answer is that digit, the foil the one that
    the changed operand would make it. Problems of different seeds are drawn independently.

    Raises:
        ValueError: no problems.
    """
    rng = np.random.default_rng([0x7370_6172, seed])
    pairs = []
    for step in range(3):
        batch = chains.sums(rng, n)
        shifts = rng.integers(1, 10, size=n)
        for prompt, chain, shift in zip(batch.prompts, batch.chains, shifts, strict=True):
            corrupt = prompt.copy()
            at = 2 * (step + 1)
            corrupt[at] = _shifted(prompt[at], shift)
            answer, before = chain[2 * step], chain[: 2 * step]
            foil = _words([_shifted(answer, shift)])
            pairs.append(Pair(_words([*prompt, *before]), _words([*corrupt, *before]), [_words([answer])], [foil]))
    return Pairs(f"steps-{seed}", tokenizer, pairs)


def _shifted(token: int, by: int) -> int:
    return chains.ZERO + (int(token) - chains.ZERO + int(by)) % 10


def _words(tokens: Sequence[int]) -> str:
    return " ".join(chains.WORDS[token - 1] for token in tokens)


# ------------------------------------------------------------------------------------------------------ measuring


def head_shares(model: HookedLM, pairs: Pairs, top_share: float = TOP_SHARE, steps: int = IG_STEPS) -> Shares:
    """The importance of every head in the circuit of a model, ``[L, H]``: EAP-IG, its strongest edges, pruned.

    Scores add up as ``|score|`` over pairs, so that pairs which use a head in opposite ways do not cancel.
    """
    scores = eap(model, pairs, steps=steps, total="absolute", batch_size=len(pairs))
    return head_importance(scores, Graph.top_n(scores, round(top_share * scores.wiring.n_edges)).prune())


@dataclass(frozen=True)
class Timeline:
    """What was measured along one run; arrays start with the base, ``K + 1`` checkpoints in all.

    Attributes:
        method: ``SFT``, ``GRPO`` or ``drift``.
        updates: ``[K + 1]``.
        shares: importance of the heads, ``[K + 1, L, H]``.
        right: chance of writing the right chain, ``[K + 1]``.
        kl: from the base, nats a token, ``[K + 1]``.
        distance: of the weights from the base, ``[K + 1]``.
        reward: mean reward since the checkpoint before, ``[K + 1]``; NaN for the base and for runs without rewards.
    """

    method: str
    updates: list[int]
    shares: Shares
    right: NDArray[np.float64]
    kl: NDArray[np.float64]
    distance: NDArray[np.float64]
    reward: NDArray[np.float64]

    def row(self) -> dict[str, Any]:
        """As JSON: a row of a record."""
        lists = {name: getattr(self, name).round(6).tolist() for name in ("right", "kl", "distance")}
        reward = [None if np.isnan(x) else round(float(x), 6) for x in self.reward]
        shares = self.shares.round(5).tolist()
        return {"impl": self.method, "updates": self.updates, "shares": shares, **lists, "reward": reward}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Timeline:
        """Back from JSON."""
        reward = np.array([np.nan if x is None else x for x in row["reward"]])
        shares, right, kl, distance = (np.array(row[name]) for name in ("shares", "right", "kl", "distance"))
        return cls(row["impl"], list(row["updates"]), shares, right, kl, distance, reward)


def timeline(
    method: str,
    run: Sequence[Checkpoint],
    pairs: Pairs,
    problems: chains.Sums,
    each: Callable[[int, HookedLM], None] | None = None,
) -> Timeline:
    """Measure every checkpoint of a run on the same prompts and problems.

    Args:
        method: the name of the run.
        run: of :func:`~attnlab.circuits.post_training.post_train`.
        pairs: of :func:`step_pairs`; they give the circuits.
        problems: of :func:`attnlab.data.chains.sums`; they give behaviour and distance.
        each: is shown each checkpoint, ready to be taken apart.
    """
    base = run[0].model
    shares = []
    for checkpoint in progress(run, f"circuits of {method}"):
        model = HookedLM(checkpoint.model.bridge())
        shares.append(head_shares(model, pairs))
        if each is not None:
            each(checkpoint.updates, model)
    return Timeline(
        method,
        [checkpoint.updates for checkpoint in run],
        np.stack(shares),
        np.array([chain_probability(checkpoint.model, problems) for checkpoint in run]),
        np.array([divergence(checkpoint.model, base, problems) for checkpoint in run]),
        np.array([distance(checkpoint.model, base) for checkpoint in run]),
        np.array([checkpoint.reward for checkpoint in run]),
    )
