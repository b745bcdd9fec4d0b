"""How much a Hebbian store holds, and how errors travel: the second half of the chapter ``foundations/pavlovian``.

Theorems and their numbers are those of version 1 of the paper; what is ours says so. Stores are batched over draws, [R, n, K].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

EPSILON, DELTA = 0.1, 0.5  # tolerated failure probability and noise power of all experiments here
D_V = 64
PATTERN = 128  # channels of the patterns in a chain

# ------------------------------------------------------------------------------------------------------------- one store


def sphere(generator: torch.Generator, *shape: int) -> Tensor:
    """Vectors uniform on the unit sphere, along the last axis of ``shape``."""
    x = torch.randn(*shape, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def crosstalk(k: Tensor, v: Tensor) -> Tensor:
    """What the other pairs add when cue m is presented, for each m: ``sum_{j != m} (k_m . k_j) v_j``.

    k [..., n, K] of unit norm, v [..., n, V] -> [..., n, V].

    Raises:
        ValueError: no pairs, numbers that are not finite, or keys that are not unit vectors: then norms would be measured,
            not cross-talk.
    """
    if k.ndim < 2 or 0 in k.shape:
        raise ValueError(f"k: shape {tuple(k.shape)}, but [..., n, K] with at least one pair is wanted")
    for name, x in (("k", k), ("v", v)):  # NaN is below every limit, so a failed retrieval would pass for a success
        if wrong := int((~x.isfinite()).sum()):
            raise ValueError(f"{name}: {wrong} of {x.numel()} numbers are NaN or infinite; leave such pairs out")
    if float((k.norm(dim=-1) - 1).abs().max()) > 1e-3:
        raise ValueError(f"k: norms up to {k.norm(dim=-1).max():.3g}, but unit keys are wanted; divide by their norms")
    return (k @ k.mT) @ v - v


def noise_power(k: Tensor, v: Tensor) -> Tensor:
    """Squared norm of the cross-talk of each pair, [..., n]; a retrieval *fails* where it reaches delta (the paper's criterion).

    Raises:
        ValueError: what :func:`crosstalk` refuses.
    """
    return crosstalk(k, v).square().sum(-1)


def guaranteed(d_k: float, epsilon: float = EPSILON, delta: float = DELTA) -> float:
    """Theorem 6.2: below ``sqrt(epsilon delta d_k)`` pairs, all are retrieved with probability above 1 - epsilon.

    Markov's inequality bounds each failure by ``(n - 1) / (delta d_k)``, and a union bound adds up n of them.
    """
    _positive(d_k=d_k, epsilon=epsilon, delta=delta)
    return math.sqrt(epsilon * delta * d_k)


def average_case(d_k: float, delta: float = DELTA) -> float:
    """Theorem 6.1: below ``1 + delta d_k`` pairs the *mean* noise power ``(n - 1) / d_k`` is below delta; gamma = 1 / delta."""
    _positive(d_k=d_k, delta=delta)
    return 1 + delta * d_k


def failure_probability(n: int, d_k: int, d_v: int = D_V, delta: float = DELTA) -> float:
    """Probability that one retrieval fails, from the noise's distribution instead of its mean alone (ours).

    Given the cosines c, the cross-talk is close to a normal vector of variance ``sum c^2 / d_v``; ``d_k sum c^2`` is close to
    chi-squared with n - 1 degrees of freedom.
    """
    if n < 2:
        return 0.0
    total = stats.chi2(n - 1).ppf((torch.arange(200).numpy() + 0.5) / 200) / d_k  # quantiles of sum c^2
    return float(stats.chi2(d_v).sf(delta * d_v / total).mean())


def predicted(d_k: int, d_v: int = D_V, epsilon: float = EPSILON, delta: float = DELTA) -> int:
    """Pairs n up to which a union bound over :func:`failure_probability` stays below epsilon (ours)."""
    n = 1
    while (n + 1) * failure_probability(n + 1, d_k, d_v, delta) < epsilon:
        n += 1
    return n


def random_pairs(seed: int, draws: int, n: int, d_k: int, d_v: int = D_V) -> tuple[Tensor, Tensor]:
    """Unit keys [R, n, K] and values [R, n, V], uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    return sphere(generator, draws, n, d_k), sphere(generator, draws, n, d_v)


def failing_draws(k: Tensor, v: Tensor, n: int, delta: float = DELTA) -> float:
    """Share of the draws, k [R, N, K] and v [R, N, V], in which any of the first n of the N pairs fails.

    Raises:
        ValueError: n below 1 or above N, or what :func:`crosstalk` refuses.
    """
    if not 1 <= n <= k.shape[1]:
        raise ValueError(f"n={n}: from 1 to {k.shape[1]} pairs are there; draw more, or ask for fewer")
    return float((noise_power(k[:, :n], v[:, :n]) >= delta).any(-1).float().mean())


def capacity(
    d_k: int, seed: int, *, draws: int = 200, d_v: int = D_V, epsilon: float = EPSILON, delta: float = DELTA
) -> int:
    """Most pairs n at which all are retrieved in more than ``1 - epsilon`` of the draws: the paper's criterion, measured.

    Unit keys and values, uniform on the sphere. The first n pairs of the same draws serve for every n.
    """
    _positive(d_k=d_k, draws=draws, d_v=d_v)
    most = int(average_case(d_k, delta)) + 2  # beyond the mean's own limit most draws fail
    k, v = random_pairs(seed, draws, most, d_k, d_v)
    low, high = 1, most  # n = 1 has no cross-talk
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if failing_draws(k, v, middle, delta) < epsilon else (low, middle)
    return low


def adversarial_capacity(d_k: int, seed: int, draws: int = 50) -> int:
    """Most pairs n at which no choice of signs lets cross-talk outweigh a +-1 response, in half of the draws (ours).

    The worst sum is ``max_m sum_{j != m} |k_m . k_j|``: here a root of d_k is a property of the memory.
    """
    generator = torch.Generator().manual_seed(seed)
    most = 4 * math.isqrt(d_k) + 4
    k = sphere(generator, draws, most, d_k)
    cosine = (k @ k.mT).abs()
    worst = [float((cosine[:, :n, :n].sum(-1).amax(-1) - 1).median()) for n in range(1, most + 1)]
    return sum(w < 1 for w in worst)  # the median worst case grows with n


def capacities(widths: Sequence[int], seeds: Sequence[int], draws: int = 200) -> pd.DataFrame:
    """Measured and adversarial capacity for each width and seed: ``d_k, seed, criterion, n``."""
    rows = []
    for d_k in widths:
        for seed in seeds:
            rows.append((d_k, seed, "all retrieved", capacity(d_k, seed, draws=draws)))
            rows.append((d_k, seed, "worst signs", adversarial_capacity(d_k, seed)))
    return pd.DataFrame(rows, columns=["d_k", "seed", "criterion", "n"])


def slopes(found: pd.DataFrame, criterion: str, smallest: int = 32) -> list[float]:
    """Exponent of n in d_k for each seed: least squares on logarithms, from ``smallest`` on."""
    table = found[(found.criterion == criterion) & (found.d_k >= smallest)]
    table = table.assign(x=table.d_k.map(math.log), y=table.n.map(math.log))
    return [float(stats.linregress(rows.x, rows.y).slope) for _, rows in table.groupby("seed")]


def failure_curve(d_k: int, seed: int = 0, draws: int = 200, points: int = 24) -> pd.DataFrame:
    """Share of draws in which any of n retrievals fails against n: ``n, measured, bound``, the bound being that of Theorem 6.2."""
    most = int(average_case(d_k))
    k, v = random_pairs(seed, draws, most, d_k)
    sizes = sorted({round(most ** (i / (points - 1))) for i in range(points)} | {n for n in (2, 3) if n <= most})
    rows = [(n, failing_draws(k, v, n), min(1.0, n * (n - 1) / (DELTA * d_k))) for n in sizes]
    return pd.DataFrame(rows, columns=["n", "measured", "bound"]).query("n > 1")


def failure_rate(d_k: int, n: int, seed: int, draws: int = 400) -> float:
    """Share of draws in which any of n retrievals fails."""
    return failing_draws(*random_pairs(seed, draws, n, d_k), n)


def noise_ratio(n: int, d_k: int, seed: int, features: Literal["none", "elu + 1"] = "none", draws: int = 200) -> float:
    """Mean noise power over the theory's ``(n - 1) / d_k``; with positive features similarities no longer cancel."""
    k, v = random_pairs(seed, draws, n, d_k)
    if features == "elu + 1":
        k = torch.nn.functional.elu(k * d_k**0.5) + 1
        k = k / k.norm(dim=-1, keepdim=True)
    return float(noise_power(k, v).mean()) * d_k / (n - 1)


def softmax_failures(pairs: Sequence[int], scales: Sequence[float], d_k: int = 64, seed: int = 0) -> pd.DataFrame:
    """Share of retrievals that fail under the paper's criterion, the linear head and softmax heads on the same pairs.

    Columns: ``pairs, head, failed``. ``scale`` multiplies the cosines before the softmax.
    """
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for n in pairs:
        draws = max(1, 2048 // n)
        k, v = sphere(generator, draws, n, d_k), sphere(generator, draws, n, D_V)
        cosine = k @ k.mT
        heads = {"linear": cosine} | {f"softmax, scale {scale:g}": (scale * cosine).softmax(-1) for scale in scales}
        for head, weights in heads.items():
            power = (weights @ v - v).square().sum(-1)
            rows.append((n, head, float((power >= DELTA).float().mean())))
    return pd.DataFrame(rows, columns=["pairs", "head", "failed"])


# ------------------------------------------------------------------------------------------------------- heads and depth


def error_bound(depth: int, heads: int, n: int, d_k: int, delta: float = DELTA) -> float:
    """Theorem 9: ``1 - (1 - (n / (delta d_k))^H)^L``, near ``L (n / (delta d_k))^H`` where that is small.

    It supposes independent heads of which one good one is enough, and layers that succeed independently.

    Raises:
        ValueError: sizes below 1, or ``n >= delta d_k``, where the bound on one head says nothing.
    """
    _positive(depth=depth, heads=heads, n=n, d_k=d_k, delta=delta)
    if n >= delta * d_k:
        raise ValueError(f"n={n} must be below delta * d_k = {delta * d_k:g}: beyond it the bound on a head exceeds 1")
    return 1 - (1 - (n / (delta * d_k)) ** heads) ** depth


class HeadFailures(NamedTuple):
    """Shares of failed retrievals, one number a draw [R]: of one head, of all heads at once, of their average."""

    one: Tensor
    all: Tensor
    average: Tensor


def head_failures(n: int, heads: int, seed: int, *, d_k: int = 64, draws: int = 400) -> HeadFailures:
    """Heads that hold the same n pairs under independent keys, under the paper's criterion."""
    generator = torch.Generator().manual_seed(seed)
    k, v = sphere(generator, draws, heads, n, d_k), sphere(generator, draws, 1, n, D_V)
    noise = crosstalk(k, v)  # [R, H, n, V]
    failed = noise.square().sum(-1) >= DELTA
    averaged = noise.mean(1).square().sum(-1) >= DELTA
    return HeadFailures(*(x.float().mean(-1) for x in (failed[:, 0], failed.all(1), averaged)))


def averaged_noise(heads: int, d_model: int | None, seed: int, *, n: int = 64, d_k: int = 64, draws: int = 40) -> float:
    """Mean noise power of the average of ``heads`` stores.

    Args:
        heads: H.
        d_model: width of the tokens that all heads project to their keys; None: keys that know nothing of each other.
        seed: of keys, projections and values.
        n, d_k, draws: pairs, width of a key, repetitions.
    """
    generator = torch.Generator().manual_seed(seed)
    v = sphere(generator, draws, 1, n, D_V)
    if d_model is None:
        k = sphere(generator, draws, heads, n, d_k)
    else:
        tokens = sphere(generator, draws, 1, n, d_model)
        k = tokens @ torch.randn(draws, heads, d_model, d_k, generator=generator)
        k = k / k.norm(dim=-1, keepdim=True)
    return float(crosstalk(k, v).mean(1).square().sum(-1).mean())


def averaged_noise_theory(heads: int, d_model: int | None, n: int = 64, d_k: int = 64) -> float:
    """``(n - 1) (1 / d_model + 1 / (H d_k))``: averaging removes only what the heads do not share (ours)."""
    return (n - 1) * ((0 if d_model is None else 1 / d_model) + 1 / (heads * d_k))


CleanUp = Literal["none", "norm", "sign"]
CLEAN_UPS: tuple[CleanUp, ...] = ("none", "norm", "sign")
LOADS = (8, 16, 32, 48)


def chain(
    depth: int,
    n: int,
    clean_up: CleanUp,
    seed: int,
    *,
    d: int = PATTERN,
    heads: int = 0,
    d_k: int = 64,
    draws: int = 40,
) -> pd.DataFrame:
    """Chained stores: what one layer answers is the cue of the next. Patterns of n ideas are random signs over sqrt(d).

    Args:
        depth, n: layers and pairs a layer.
        clean_up: what happens between layers: nothing, the output norm of Definition 4 (unit length), or the sign of every number.
        seed: of patterns and projections.
        d: width of the patterns.
        heads: 0 stores the patterns themselves; H averages H stores whose keys are random projections of them to ``d_k`` channels.
        d_k, draws: width of a projected key; repetitions.

    Returns:
        One row a layer, with ``layer``, ``noise`` (mean squared distance to the right pattern), ``failed`` (share of chains in which a
        read-out up to here had a noise power of at least delta, before any clean-up), ``found`` (share whose nearest pattern
        is right).
    """
    _positive(depth=depth, n=n, d=d)
    if clean_up not in CLEAN_UPS:
        raise ValueError(f"clean_up={clean_up!r} is unknown; use one of {', '.join(CLEAN_UPS)}")
    generator = torch.Generator().manual_seed(seed)
    patterns = (torch.randint(2, (depth + 1, draws, n, d), generator=generator) * 2 - 1) / math.sqrt(d)
    cue, failed, rows = patterns[0], torch.zeros(draws, n, dtype=torch.bool), []
    for layer in range(depth):
        stored, right = patterns[layer], patterns[layer + 1]
        if heads:
            maps = torch.randn(draws, d, heads * d_k, generator=generator) / (heads * d_k) ** 0.5  # averages the heads
            answer = ((cue @ maps) @ (stored @ maps).mT) @ right
        else:
            answer = (cue @ stored.mT) @ right  # q S with S = K^T V
        if clean_up == "norm":
            answer = answer / answer.norm(dim=-1, keepdim=True)
        power = (answer - right).square().sum(-1)
        failed |= power >= DELTA
        nearest = (answer @ right.mT).argmax(-1)
        found = (nearest == torch.arange(n)).float().mean()
        rows.append((layer + 1, float(power.mean()), float(failed.float().mean()), float(found)))
        cue = answer.sign() / math.sqrt(d) if clean_up == "sign" else answer
    return pd.DataFrame(rows, columns=["layer", "noise", "failed", "found"])


def chain_noise_theory(layer: int, n: int, d: int = PATTERN) -> float:
    """Noise power after ``layer`` stores without clean-up, ``(1 + (n - 1) / d)^layer - 1`` (ours).

    Layer by layer the weights of the n patterns are multiplied by a Gram matrix ``I + N`` whose off-diagonal entries have variance
    1 / d, so their squared sum grows by that factor: near ``layer (n - 1) / d`` while small, exponential afterwards.
    """
    return (1 + (n - 1) / d) ** layer - 1


def chains(loads: Sequence[int], seeds: Sequence[int], depth: int = 8) -> pd.DataFrame:
    """All chains: ``n, clean_up, seed``, the columns of :func:`chain`, and ``bound`` of Theorem 9 with one head."""
    frames = []
    for n in loads:
        for clean_up in CLEAN_UPS:
            for seed in seeds:
                found = chain(depth, n, clean_up, seed).assign(n=n, clean_up=clean_up, seed=seed)
                found["bound"] = [error_bound(layer, 1, n, PATTERN) for layer in found.layer]
                frames.append(found)
    return pd.concat(frames, ignore_index=True)


def excess(found: pd.DataFrame, clean_up: CleanUp) -> list[float]:
    """Largest excess of ``failed`` over ``bound`` among loads and depths, one number a seed."""
    rows = found[found.clean_up == clean_up]
    return [float((part.failed - part.bound).max()) for _, part in rows.groupby("seed")]


def _positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if not size > 0 or not math.isfinite(size):
            raise ValueError(f"{name}={size} must be a positive number")
