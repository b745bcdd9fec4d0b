"""Exercises of the chapter ``circuits/preplan-anchor``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnlab.exercises.core import Exercise, Feedback, accept, reject

# ------------------------------------------------------------------------------------------- 1: WAAD without looking


def uniform_waad(t: int, window: int) -> float:
    """WAAD of token ``t`` (from 0) when it attends evenly to itself and all tokens before it."""
    return sum(min(distance, window) for distance in range(t + 1)) / (t + 1)


def _check_uniform(answer: Callable[[int, int], float]) -> Feedback:
    cases = [(0, 10), (1, 10), (4, 10), (10, 10), (25, 10), (99, 4)]
    got = {case: float(answer(*case)) for case in cases}
    exact = {case: uniform_waad(*case) for case in cases}
    if all(np.isclose(got[case], exact[case], rtol=1e-9) for case in cases):
        return accept(
            f"A token that looks nowhere in particular has a WAAD of {exact[25, 10]:.2f} at place 25: high WAAD alone is no plan. "
            "It rises from t/2 towards the window, so compare peaks within an answer, not levels."
        )
    if np.isclose(got[4, 10], 2.0) and np.isclose(got[25, 10], 12.5):
        return reject(
            "Right as long as the window does not cut: token 25 has places 11 to 25 tokens back, which count as 10."
        )
    if all(np.isclose(got[t, w], sum(min(d, w) for d in range(t + 1)) / max(t, 1)) for t, w in cases):
        return reject(
            "You share among the t tokens before. The token itself is attended to as well: t + 1 places, distance 0."
        )
    if np.isclose(got[25, 10], 10.0):
        return reject(
            "You clip the mean distance. Each distance is clipped before the mean, so near tokens still pull it down."
        )
    if all(np.isclose(got[t, w], uniform_waad(t - 1, w) if t else 0.0) for t, w in cases):
        return reject("You count from 1. Token t has t tokens before it: the first, t = 0, can look at itself only.")
    worst = max(cases, key=lambda case: abs(got[case] - exact[case]))
    return reject(
        f"uniform_waad{worst} should be {exact[worst]:.4g}, yours is {got[worst]:.4g}; write out t = 1 by hand."
    )


# ---------------------------------------------------------------------------------------------- 2: a null that is fair


def shift_p(first: np.ndarray, second: np.ndarray) -> float:
    """One-sided p of 'a peak of ``second`` at or up to two tokens after a peak of ``first``', over all circular shifts of ``second``."""

    def share(marked: np.ndarray) -> float:
        near = marked.copy()
        for j in (1, 2):
            near[:-j] |= marked[j:]
        return float(near[first].mean())

    shares = [share(np.roll(second, j)) for j in range(len(second))]  # j = 0 is what was measured, and counts
    return float(np.mean([x >= shares[0] for x in shares]))


def _marks(n: int, *at: int) -> np.ndarray:
    found = np.zeros(n, dtype=bool)
    found[list(at)] = True
    return found


#: two peaks, two followers; a follower near the end, so that a shift that is not circular loses it
_CASES = (
    (_marks(20, 3, 11), _marks(20, 4, 13)),
    (_marks(12, 1, 6), _marks(12, 2, 11)),
    (_marks(15, 5, 9), _marks(15, 3, 7)),
    (_marks(30, 2, 8, 20), _marks(30, 2, 9, 28, 29)),
    (_marks(9, 4), _marks(9, 4)),
)


def _backwards(first: np.ndarray, second: np.ndarray) -> float:
    return shift_p(first[::-1].copy(), second[::-1].copy())


def _without_itself(first: np.ndarray, second: np.ndarray) -> float:
    n = len(second)
    return (shift_p(first, second) * n - 1) / (n - 1)


def _cut_off(first: np.ndarray, second: np.ndarray) -> float:
    def shifted(j: int) -> np.ndarray:
        return np.concatenate([np.zeros(j, dtype=bool), second[: len(second) - j]])

    shares = []
    for j in range(len(second)):
        near = shifted(j)
        for k in (1, 2):
            near[:-k] |= shifted(j)[k:]
        shares.append(near[first].mean())
    return float(np.mean([x >= shares[0] for x in shares]))


def _shuffled(first: np.ndarray, second: np.ndarray) -> float:
    rng = np.random.default_rng(0)

    def share(marked: np.ndarray) -> float:
        near = marked.copy()
        for j in (1, 2):
            near[:-j] |= marked[j:]
        return float(near[first].mean())

    found = share(second)
    return float(np.mean([share(rng.permutation(second)) >= found for _ in range(200)]))


def _check_shift(answer: Callable[[np.ndarray, np.ndarray], float]) -> Feedback:
    got = [float(answer(first.copy(), second.copy())) for first, second in _CASES]
    exact = [shift_p(*case) for case in _CASES]
    if np.allclose(got, exact, atol=1e-9):
        return accept(
            "Every shift counts once, the measured one among them, so p is never below 1/N. For twenty answers, draw a shift for "
            "each, average the shares, and repeat: that is rhythm.shift_test of the chapter."
        )
    for wrong, what in (
        (
            _backwards,
            "You look for the second peak before the first one; 'follows' means at the token or at one of the two after.",
        ),
        (
            _without_itself,
            "You leave the measured alignment out of the count, so p can be 0. It is one of the N shifts; count it.",
        ),
        (_cut_off, "Your shift drops what leaves at the end. A circular shift brings it back at the front (np.roll)."),
    ):
        if np.allclose(got, [wrong(*case) for case in _CASES], atol=1e-9):
            return reject(what)
    if not np.allclose(got, [float(answer(first.copy(), second.copy())) for first, second in _CASES]) or any(
        abs(x * len(case[0]) - round(x * len(case[0]))) > 1e-6 for x, case in zip(got, _CASES, strict=True)
    ):
        return reject(
            "Your p is no multiple of 1/N, so you draw at random. There are only N circular shifts: try each of them. "
            "Free shuffling would break up neighbouring peaks as well, and call smooth series related."
        )
    worst = int(np.argmax(np.abs(np.subtract(got, exact))))
    first, second = _CASES[worst]
    return reject(
        f"For peaks at {np.flatnonzero(first).tolist()} and {np.flatnonzero(second).tolist()} of {len(first)} tokens p is "
        f"{exact[worst]:.3f}, yours is {got[worst]:.3f}. Count the shifts whose share is at least the measured one."
    )


# --------------------------------------------------------------------------------------------- 3: a control with the same dose


def fair_control(gamma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same weights on random tokens, with mean 1: same dose, same spread, no knowledge."""
    return np.asarray(rng.permutation(gamma) / gamma.mean())


def _check_control(answer: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Feedback:
    gamma = np.array([1.75, 1.0, 1.5, 1.0, 1.25, 1.0, 1.5, 1.0, 1.0, 1.5])
    rng = np.random.default_rng(0)
    drawn = [np.asarray(answer(gamma.copy(), rng), dtype=float) for _ in range(2000)]
    if any(x.shape != gamma.shape for x in drawn):
        return reject(f"One weight a token is wanted, shape {gamma.shape}; yours has shape {drawn[0].shape}.")
    means = np.array([x.mean() for x in drawn])
    if np.allclose(means, gamma.mean()):
        return reject(
            f"Your weights have mean {means[0]:.2f}: on positive advantages that is a {means[0]:.2f} times larger learning rate, "
            "whoever gets it. Divide by the mean, in both arms."
        )
    if not np.allclose(means, 1.0):
        return reject(
            f"The mean is 1 on average at best: it runs from {means.min():.2f} to {means.max():.2f} over responses. "
            "Then some responses count more than others; make it 1 in each."
        )
    spread = np.array([x.std() for x in drawn])
    wanted = float((gamma / gamma.mean()).std())
    if not np.allclose(spread, wanted, rtol=1e-6):
        return reject(
            f"Mean 1, but the spread is {spread.mean():.3f} where that of the rule is {wanted:.3f}. Uneven weights add noise to the "
            "gradient by themselves; a control needs as much of it."
        )
    places = np.mean(drawn, axis=0)
    if np.abs(places - 1).max() > 0.05:
        return reject(
            f"Token {int(np.abs(places - 1).argmax())} gets {places[np.abs(places - 1).argmax()]:.2f} on average, so your control "
            "still knows which tokens the rule chose. Put the weights anywhere."
        )
    return accept(
        "Same mean, same spread, no knowledge: what is left between the two arms is *where* the credit goes. The random arm of the "
        "chapter has mean 1 too, but two levels only; yours has the levels of the rule it is compared with."
    )


EXERCISES = [
    Exercise(
        number=1,
        title="WAAD of a head that looks nowhere in particular",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_uniform,
        solution=uniform_waad,
        wrong={
            "forgets the window": lambda t, window: t / 2,
            "forgets the token itself": lambda t, window: sum(min(d, window) for d in range(t + 1)) / max(t, 1),
            "clips the mean": lambda t, window: min(t / 2, window),
            "counts from one": lambda t, window: uniform_waad(t - 1, window) if t else 0.0,
        },
        hints=(
            "Token t gives 1/(t+1) to each of the places 0, 1, ..., t tokens back.",
            "sum(min(d, window) for d in range(t + 1)) is the clipped distance, summed.",
        ),
    ),
    Exercise(
        number=2,
        title="A null that keeps the rhythm",
        difficulty="medium",
        minutes=20,
        answer_is="function",
        checker=_check_shift,
        solution=shift_p,
        wrong={
            "looks backwards": _backwards,
            "leaves the measured alignment out": _without_itself,
            "shifts without coming round": _cut_off,
            "shuffles freely": _shuffled,
        },
        hints=(
            "np.roll(second, j) for j = 0 ... N - 1 are all shifts; j = 0 is what was measured.",
            "p is the share of these N shifts whose share of followed peaks is at least the measured one.",
        ),
    ),
    Exercise(
        number=3,
        title="A control with the same dose",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_control,
        solution=fair_control,
        wrong={
            "shuffles only": lambda gamma, rng: rng.permutation(gamma),
            "is right on average": lambda gamma, rng: 1 + 0.5 * ((rng.random(len(gamma)) < 0.4) - 0.4),
            "gives everyone the same": lambda gamma, rng: np.ones_like(gamma),
            "keeps the places": lambda gamma, rng: gamma / gamma.mean(),
            "draws two levels": lambda gamma, rng: rng.permutation(np.r_[np.full(4, 1.5), np.ones(6)]) / 1.2,
        },
        hints=(
            "E[gamma] = 1 + 0.4 * 0.5 = 1.2: the rule also raises the learning rate on positive advantages. Take that out first.",
            "Keep the very weights, so that mean and spread are those of the rule, and put them on random tokens.",
        ),
    ),
]
