"""Exercises of the chapter ``circuits/thinking-sparks``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab.circuits.thinking_sparks import TAU, effect
from attnlab.exercises.core import Exercise, Feedback, accept, reject

# ------------------------------------------------------------------------------------------------ 1: what E does not see

SHARES = ((0.02, 0.06), (0.002, 0.006))  # before, after


def both_effects() -> tuple[float, float]:
    """The effect of post-training on a head that grows from 2% to 6%, and on one that grows from 0.2% to 0.6%."""
    first, second = (float(effect(np.array(after), np.array(before))) for before, after in SHARES)
    return first, second


def _check_effects(answer: Any) -> Feedback:
    try:
        got = np.array([float(x) for x in answer])
    except TypeError:
        return reject("Hand over two numbers: E of the first head and E of the second.")
    if got.shape != (2,):
        return reject(f"Two heads are asked for; you handed over {got.size} number(s).")
    before, after = np.array(SHARES).T
    exact = (after - before) / (after + before)
    if np.allclose(got, exact, atol=2e-3):
        return accept(
            f"Both are {exact[0]:.1f}: E sees the ratio alone, and a head that carries next to nothing is as blue as one that "
            "carries a lot. So a threshold on the share comes first, and E is read among the heads that pass it."
        )
    if np.allclose(got, -exact, atol=2e-3):
        return reject("The sign is turned round: E is positive for a head that grows, (post - pre) / (post + pre).")
    if np.allclose(got, after - before, atol=1e-4):
        return reject("That is the numerator, post - pre. E divides it by post + pre, which is why it lies in [-1, 1].")
    if np.allclose(got, after / before, atol=2e-2) or np.allclose(got, after / before - 1, atol=2e-2):
        return reject("You divided by the base alone. E divides by post + pre, so that it cannot leave [-1, 1].")
    return reject(
        f"E of the two heads is not {got.round(4).tolist()}; put the shares into (post - pre) / (post + pre)."
    )


# ------------------------------------------------------------------------------------------------ 2: the floor of noise


def noise_between_halves(sizes: NDArray[np.float64], tau: float) -> float:
    """Heads that "emerge" between the first and the second half of the prompts of one model, the mean of both directions.

    ``sizes`` is ``|score|`` of each head on each prompt, ``[N, L, H]`` with N even; a head is in the circuit of a half if its share of
    that half's total is at least ``tau``.
    """
    half = len(sizes) // 2
    inside = []
    for part in (sizes[:half], sizes[half:]):
        total = part.sum(0)
        inside.append(total / total.sum() >= tau)
    one, other = inside
    return ((other & ~one).sum() + (one & ~other).sum()) / 2


def _check_noise(answer: Callable[[NDArray[np.float64], float], float]) -> Feedback:
    rng = np.random.default_rng(3)
    cases = [
        (rng.exponential(size=(n, layers, heads)) ** 3, TAU) for n, layers, heads in ((8, 3, 8), (12, 4, 9), (6, 2, 5))
    ]
    cases.append((cases[0][0] / 200, TAU))  # the same in other units
    lopsided = np.full((4, 1, 4), 0.25)
    lopsided[2:, 0, 1:] = 0.0  # three heads leave, none comes
    cases.append((lopsided, TAU))
    exact = [noise_between_halves(*case) for case in cases]
    got = [float(answer(sizes.copy(), tau)) for sizes, tau in cases]
    if np.allclose(got, exact):
        found = ", ".join(f"{x:g}" for x in exact[:3])
        return accept(
            f"Invented prompts that share one law give {found} heads. Nothing was trained: whatever a method brings in counts only "
            "beyond this floor, and measured on the same prompts as the base."
        )
    if np.allclose(got, [2 * x for x in exact]):
        return reject(
            "You counted both directions and did not halve: a head that is in one half only is one crossing, and a comparison "
            "with a trained model counts one direction."
        )
    if got[4] in (0.0, 3.0):
        way = "enter" if got[4] == 0 else "leave"
        return reject(
            f"You counted only heads that {way} from the first half to the second. Neither half comes first: take the mean of both "
            "directions."
        )
    if not np.isclose(got[3], got[0]):
        return reject(
            "Your count changes when all scores are divided by 200: divide by the total of the half before you compare with tau."
        )
    return reject(
        f"On 8 prompts of 24 heads the floor is {exact[0]:g}, yours is {got[0]:g}. Sum over a half, share, threshold, compare."
    )


def _one_direction(sizes: NDArray[np.float64], tau: float) -> float:
    half = len(sizes) // 2
    one, other = (part.sum(0) / part.sum() >= tau for part in (sizes[:half], sizes[half:]))
    return float((other & ~one).sum())


def _without_shares(sizes: NDArray[np.float64], tau: float) -> float:
    half = len(sizes) // 2
    one, other = (part.mean(0) >= tau for part in (sizes[:half], sizes[half:]))
    return float((one != other).sum()) / 2


# ------------------------------------------------------------------------------------------------ 3: at equal distance

Curve = Sequence[float]


def gap_at_equal_kl(sft_kl: Curve, sft_new: Curve, grpo_kl: Curve, grpo_new: Curve) -> float:
    """Emergent heads of SFT minus those of GRPO at the checkpoints nearest, in log KL, to the smaller of the two final divergences.

    Each list begins with the base, whose divergence is 0.
    """
    target = min(sft_kl[-1], grpo_kl[-1])
    at = [1 + int(np.abs(np.log(np.array(kl[1:]) / target)).argmin()) for kl in (sft_kl, grpo_kl)]
    return sft_new[at[0]] - grpo_new[at[1]]


_CASES = (
    # (sft kl, sft new, grpo kl, grpo new): SFT moves further, GRPO further, and one where log and plain distance differ
    ([0, 0.01, 0.1, 1.0], [0, 1, 2, 6], [0, 0.02, 0.05, 0.09], [0, 0, 1, 2]),
    ([0, 0.02, 0.05], [0, 1, 3], [0, 0.045, 0.3, 2.0], [0, 1, 4, 5]),
    ([0, 0.05, 0.17, 0.6], [0, 1, 4, 5], [0, 0.04, 0.1], [0, 2, 2]),
    ([0, 0.3, 0.9], [0, 2, 7], [0, 0.01, 0.1], [0, 0, 1]),
)


def _check_gap(answer: Callable[[Curve, Curve, Curve, Curve], float]) -> Feedback:
    got = [float(answer(*(list(part) for part in case))) for case in _CASES]
    exact = [float(gap_at_equal_kl(*case)) for case in _CASES]
    if np.allclose(got, exact):
        return accept(
            "Right. Now put in the runs of the record and compare with the gap at equal updates: what vanishes at equal KL was step "
            "size, not method."
        )
    last = [case[1][-1] - case[3][-1] for case in _CASES]
    if np.allclose(got, last):
        return reject(
            "You compare the last checkpoints, where one method has moved further than the other; that is the gap to be explained. "
            "(Matching at the larger of the two divergences comes to the same: the other run never gets there.)"
        )
    plain = [_nearest_in_kl(case) for case in _CASES]
    if np.allclose(got, plain):
        return reject(
            "Your nearest checkpoint is nearest in KL itself. Divergences span decades, so 0.17 is nearer to 0.1 than 0.05 is: compare logs."
        )
    if any(np.isnan(got)) or any(np.isinf(got)):
        return reject("The base has KL 0 and no logarithm; leave the first entry of each list out of the search.")
    wrong = next(i for i, (a, b) in enumerate(zip(got, exact, strict=True)) if a != b)
    return reject(
        f"For KL {_CASES[wrong][0]} and {_CASES[wrong][2]} the gap is {exact[wrong]:g}, yours is {got[wrong]:g}."
    )


def _nearest_in_kl(case: Any) -> float:
    """The same match with plain distances: a mistake to be named."""
    sft_kl, sft_new, grpo_kl, grpo_new = case
    target = min(sft_kl[-1], grpo_kl[-1])
    first, second = (1 + int(np.abs(np.array(kl[1:]) - target).argmin()) for kl in (sft_kl, grpo_kl))
    return float(sft_new[first] - grpo_new[second])


EXERCISES = [
    Exercise(
        number=1,
        title="What E does not see",
        difficulty="easy",
        minutes=5,
        answer_is="value",
        checker=_check_effects,
        solution=both_effects,
        wrong={
            "turned round": (-0.5, -0.5),
            "the difference": (0.04, 0.004),
            "the ratio": (3.0, 3.0),
            "relative growth": (2.0, 2.0),
            "one number": (0.5,),
        },
        hints=(
            "E = (post - pre) / (post + pre), with the small constant left out.",
            "For the first head: 0.04 / 0.08.",
        ),
    ),
    Exercise(
        number=2,
        title="How many heads emerge without any training?",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_noise,
        solution=noise_between_halves,
        wrong={
            "one direction": _one_direction,
            "not halved": lambda sizes, tau: 2 * noise_between_halves(sizes, tau),
            "no shares": _without_shares,
            "all prompts on both sides": lambda sizes, tau: float(len(sizes)),
        },
        hints=(
            "For each half: sum over its prompts, divide by the half's own total, compare with tau. That gives two boolean maps.",
            "A head that is in exactly one of the two maps is a crossing; half of all crossings is the mean of both directions.",
        ),
    ),
    Exercise(
        number=3,
        title="Is it the method, or how far it went?",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_gap,
        solution=gap_at_equal_kl,
        wrong={
            "the last checkpoints": lambda sft_kl, sft_new, grpo_kl, grpo_new: sft_new[-1] - grpo_new[-1],
            "plain distance": lambda *case: _nearest_in_kl(case),
            "no match at all": lambda *case: 100.0,
        },
        hints=(
            "Both runs pass the smaller of the two final divergences; only one reaches the larger.",
            "np.abs(np.log(np.array(kl[1:]) / target)).argmin() finds the checkpoint, counted from the first one after the base.",
        ),
    ),
]
