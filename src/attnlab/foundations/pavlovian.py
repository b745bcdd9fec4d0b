"""Understanding Transformers through the Lens of Pavlovian Conditioning (Qiao 2025, arXiv:2508.08289, version 1).

Taught in the chapter ``foundations/pavlovian``. A later version of the paper is titled *Attention as Conditioning: What Classical
Learning Theory Predicts About Linear Transformers*. Here stand the plasticity rules and the experiments of a conditioning
laboratory; what a store holds is in :mod:`attnlab.foundations.pavlovian_capacity`.

A store is a matrix S [K, V] of associative strengths. A cue is a key k [K] (the conditional stimulus, CS), a reinforcer a value
v [V] (the unconditional stimulus, US), and the conditioned response to a test stimulus q is ``q S``: the paper's row layout, and
that of :mod:`attnlab.mixers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from attnlab import mixers

# ---------------------------------------------------------------------------------------------------------------- the rules


def _share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1: it is a share")


@dataclass(frozen=True)
class Rule:
    """How one pairing changes the store.

    Attributes:
        rate: strength of a write, above 0 and at most 1.
    """

    rate: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(
                f"rate={self.rate} must lie above 0 and be at most 1: a larger write overshoots its own target"
            )

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        """The store after a pairing: S [..., K, V], cue k [..., K], reinforcer v [..., V], threshold theta [..., V] (BCM's)."""
        raise NotImplementedError


class Hebb(Rule):
    """What fires together wires together: linear attention (Definition 2)."""

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        return S + self.rate * outer(k, v)


@dataclass(frozen=True)
class TraceDecay(Rule):
    """Hebb on a fading trace: RetNet and the decay gates (Definition 7).

    Attributes:
        keep: share of every strength that a trial leaves, from 0 to 1.
    """

    keep: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(keep=self.keep)

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        return self.keep * S + self.rate * outer(k, v)


class Delta(Rule):
    """Write the surprise, what the store did not predict: DeltaNet (Definition 10), and Rescorla and Wagner's model."""

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        return S + self.rate * outer(k, v - recall(S, k))


class GatedDelta(TraceDecay):
    """The surprise on a fading trace: Gated DeltaNet; not in version 1."""

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        S = self.keep * S
        return S + self.rate * outer(k, v - recall(S, k))


class Oja(Rule):
    """Hebb, and all strengths into an output neuron shrink with its squared activity (Definition 11)."""

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        return S + self.rate * (outer(k, v) - v.square()[..., None, :] * S)


@dataclass(frozen=True)
class BCM(Rule):
    """Activity above a sliding threshold strengthens, activity below it weakens (Definition 12).

    Attributes:
        span: weight of the newest activity in the threshold's running mean. The paper gives no number; ours.
    """

    span: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(span=self.span)

    def write(self, S: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Tensor:
        return S + self.rate * outer(k, v * (v - theta))


RULES: dict[str, Rule] = {
    "Hebb": Hebb(),
    "Hebb, fading": TraceDecay(),
    "delta": Delta(),
    "delta, fading": GatedDelta(),
    "Oja": Oja(),
    "BCM": BCM(),
}


def outer(k: Tensor, v: Tensor) -> Tensor:
    """k [..., K] and v [..., V] to [..., K, V]."""
    return k[..., :, None] * v[..., None, :]


def recall(S: Tensor, q: Tensor) -> Tensor:
    """The response ``q S`` [..., V] of a store [..., K, V] to a test stimulus [..., K]."""
    return (q[..., None, :] @ S)[..., 0, :]


def learn(rule: Rule, k: Tensor, v: Tensor) -> Tensor:
    """The store before the first trial and after each, [B, T + 1, K, V]; cues k [B, T, K], reinforcers v [B, T, V].

    The threshold of a trial is the running mean of the reinforcers *before* it, 0 at first. In all rules the post-synaptic
    activity is the reinforcer, which drives the output while pairing; what the store would answer enters the delta rules alone.

    Raises:
        ValueError: shapes that do not fit, no trials, numbers that are not finite, or an Oja write that would diverge.
    """
    _check_pairs(rule, k, v)
    S = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
    theta = v.new_zeros(v.shape[0], v.shape[2])
    states = [S]
    for t in range(k.shape[1]):
        S = rule.write(S, k[:, t], v[:, t], theta)
        theta = theta + getattr(rule, "span", 0.0) * (v[:, t] - theta)
        states.append(S)
    return torch.stack(states, 1)


def as_mixer(rule: Rule, k: Tensor, v: Tensor) -> Tensor:
    """The store after the last trial, [B, K, V], computed by a mixer of :mod:`attnlab.mixers` in chunks.

    Oja's rule is gated linear attention with keys and values exchanged, since it fades by output and not by cue; BCM's is linear
    attention on other values, since its threshold never looks at the store.
    """
    _check_pairs(rule, k, v)
    key, value = k[:, :, None], v[:, :, None]  # one head: [B, T, 1, K] and [B, T, 1, V]
    strength = k.new_full((*k.shape[:2], 1), rule.rate)
    match rule:
        case GatedDelta(keep=keep):
            fade = strength.new_full(strength.shape, keep).log()
            state = mixers.gated_delta_rule(key, key, value, fade, strength)[1]
        case TraceDecay(keep=keep):
            state = mixers.lightning_attention(key, key, rule.rate * value, k.new_tensor([keep]).log())[1]
        case Delta():
            state = mixers.delta_rule(key, key, value, strength)[1]
        case Oja():
            fade = (1 - rule.rate * value.square()).log()
            state = mixers.gla(value, value, rule.rate * key, fade)[1].mT
        case BCM():
            state = _add_up(key, rule.rate * value * (value - thresholds(v, rule.span)[:, :, None]))
        case _:
            state = _add_up(key, rule.rate * value)
    return state[:, 0]


def thresholds(v: Tensor, span: float) -> Tensor:
    """BCM's threshold at each trial, [B, T, V]: the running mean of the reinforcers v [B, T, V] before it."""
    theta, found = torch.zeros_like(v[:, 0]), []
    for t in range(v.shape[1]):
        found.append(theta)
        theta = theta + span * (v[:, t] - theta)
    return torch.stack(found, 1)


def _add_up(key: Tensor, value: Tensor) -> Tensor:
    return mixers.linear_attention(key, key, value, feature_map=lambda x: x, normalise=False)[1]


def _check_pairs(rule: Rule, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, but [B, T, width] with at least one of each is wanted")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: holds NaN or infinite numbers; every cue and reinforcer must be finite")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"v: {tuple(v.shape[:2])} trials, but k has {tuple(k.shape[:2])}; every cue needs its reinforcer"
        )
    if isinstance(rule, Oja) and rule.rate * float(v.square().max()) > 2:
        raise ValueError(
            f"v: up to {v.abs().max():.3g} at rate={rule.rate} makes Oja's rule diverge; keep rate * v² below 2, or scale v"
        )


# ---------------------------------------------------------------------------------------------------------- the laboratory


class Phase(NamedTuple):
    """Trials of one kind: the cues presented together (``""``: none), the reinforcer's size, and how many."""

    cues: str
    us: float
    trials: int


N = 10  # trials of a phase
PAIRED, ABSENT = 1.0, 0.0

EXPERIMENTS: dict[str, tuple[Phase, ...]] = {
    "acquisition": (Phase("A", PAIRED, N),),
    "extinction": (Phase("A", PAIRED, N), Phase("A", ABSENT, N)),
    "extinction, control: nothing happens": (Phase("A", PAIRED, N), Phase("", ABSENT, N)),
    "blocking": (Phase("A", PAIRED, N), Phase("AB", PAIRED, N)),
    "blocking, control: another cue first": (Phase("C", PAIRED, N), Phase("AB", PAIRED, N)),
    "overshadowing": (Phase("AB", PAIRED, N),),
    "overshadowing, control: B alone": (Phase("B", PAIRED, N),),
}
CUES = "ABC"


def cue_vectors(seed: int | None = 0, width: int = 64, similarity: float = 0.0) -> dict[str, Tensor]:
    """Unit vectors [K] of the cues A, B and C, float64.

    Args:
        seed: random directions on the sphere; None: orthogonal ones.
        width: K, at least 3.
        similarity: cosine of A and B where the cues are orthogonal.

    Raises:
        ValueError: a width below 3, a similarity outside -1 to 1, or one for random directions.
    """
    if width < len(CUES):
        raise ValueError(f"width={width} holds no {len(CUES)} independent cues; use at least {len(CUES)}")
    if not -1 <= similarity <= 1 or (similarity and seed is not None):
        raise ValueError(f"similarity={similarity} must lie between -1 and 1, and needs seed=None")
    if seed is None:
        basis = torch.eye(len(CUES), width, dtype=torch.float64)
        basis[1] = similarity * basis[0] + (1 - similarity**2) ** 0.5 * basis[1]
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(len(CUES), width, generator=generator, dtype=torch.float64)
        basis = basis / basis.norm(dim=-1, keepdim=True)
    return dict(zip(CUES, basis, strict=True))


def present(phases: Sequence[Phase], cues: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys [1, T, K] and values [1, T, 1] of all trials; a compound is the *sum* of its cues.

    Raises:
        ValueError: no trials, a negative number of them, or a cue that nobody defined.
    """
    silence = torch.zeros_like(next(iter(cues.values())))
    keys, values = [], []
    for phase in phases:
        if phase.trials < 0:
            raise ValueError(f"trials={phase.trials} of phase {phase.cues!r} must be 0 or more")
        if unknown := set(phase.cues) - set(cues):
            raise ValueError(f"cues: {sorted(unknown)} of phase {phase.cues!r} are not among {sorted(cues)}")
        keys += [sum((cues[name] for name in phase.cues), silence)] * phase.trials
        values += [phase.us] * phase.trials
    if not keys:
        raise ValueError("phases: no trial at all; give at least one phase with trials")
    return torch.stack(keys)[None], silence.new_tensor(values)[None, :, None]


def responses(rule: Rule, phases: Sequence[Phase], cues: dict[str, Tensor]) -> pd.DataFrame:
    """Response to each cue alone before the first trial and after each: columns ``trial, A, B, C``."""
    states = learn(rule, *present(phases, cues))[0]  # [T + 1, K, 1]
    table = {name: (cue @ states)[:, 0].tolist() for name, cue in cues.items()}
    return pd.DataFrame({"trial": range(len(states))} | table)


def indices(rule: Rule, cues: dict[str, Tensor]) -> dict[str, float]:
    """What the rule does in the laboratory, each experiment against its control.

    ``acquisition`` is the response to A; the others are shares of it, 0 for no such effect. ``extinction``: how much more A lost
    when it came without the reinforcer than in equally many trials without any event. ``blocking``: how much less B earned beside
    a known A than beside a new one, after as many reinforcers. ``overshadowing``: how much less B earned beside A than alone.
    """
    last = {name: responses(rule, phases, cues).iloc[-1] for name, phases in EXPERIMENTS.items()}
    learned = float(last["acquisition"].A)

    def less(effect: str, control: str, cue: str) -> float:
        return float(last[control][cue] - last[effect][cue]) / learned

    return {
        "acquisition": learned,
        "extinction": less("extinction", "extinction, control: nothing happens", "A"),
        "blocking": less("blocking", "blocking, control: another cue first", "B"),
        "overshadowing": less("overshadowing", "overshadowing, control: B alone", "B"),
    }


def battery(seeds: Sequence[int], width: int = 64) -> pd.DataFrame:
    """Every rule in every experiment, with random cues of each seed: ``rule, seed`` and the :func:`indices`."""
    return pd.DataFrame(
        [
            {"rule": name, "seed": seed} | indices(rule, cue_vectors(seed, width))
            for name, rule in RULES.items()
            for seed in seeds
        ]
    )
