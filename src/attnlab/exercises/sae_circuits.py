"""Exercises of the chapter ``circuits/sae-circuits``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnlab.circuits.reference import roc
from attnlab.circuits.sae_circuits import mutual_information, softmax
from attnlab.exercises.core import Exercise, Feedback, accept, reject

# ------------------------------------------------------------------------------------------------ 1: an area by counting


def auc_by_pairs(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of (member, other) pairs in which the member has the larger score; a tie counts one half."""
    members, others = scores[truth][:, None], scores[~truth][None]
    return float(((members > others) + 0.5 * (members == others)).mean())


def _check_auc(answer: Callable[[np.ndarray, np.ndarray], float]) -> Feedback:
    truth = np.array([True, False, True, False, False, True])
    cases = {
        "distinct scores": np.array([3.0, 1.0, 5.0, 4.0, 0.0, 2.0]),
        "ties": np.array([2.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
        "all equal": np.zeros(6),
    }
    got = {name: float(answer(scores, truth)) for name, scores in cases.items()}
    exact = {name: roc(scores, truth).auc for name, scores in cases.items()}
    if not np.isclose(got["distinct scores"], exact["distinct scores"]):
        if np.isclose(got["distinct scores"], 1 - exact["distinct scores"]):
            return reject("Upside down: you counted pairs in which the other head is ahead of the member.")
        return reject(
            f"Without ties the area should be {exact['distinct scores']:.3f}, yours is {got['distinct scores']:.3f}."
        )
    if not np.isclose(got["all equal"], 0.5):
        return reject(
            f"With all scores equal nothing is known, so the area is 0.5; yours is {got['all equal']:.2f}. "
            "A tie counts one half, and many heads tie at 0 new codes."
        )
    if not np.isclose(got["ties"], exact["ties"]):
        return reject(f"With ties the area should be {exact['ties']:.3f}, yours is {got['ties']:.3f}.")
    if any(not np.isclose(answer(softmax(scores), truth), exact[name]) for name, scores in cases.items()):
        return reject("Your area changes under a softmax, so it depends on more than the order of the scores.")
    return accept(
        "Only comparisons occur in it, and a strictly monotone map keeps every comparison: the softmax that the paper's code "
        "puts before the curve changes nothing."
    )


# --------------------------------------------------------------------------------------------- 2: codes without training


def random_codes(values: np.ndarray, m: int, seed: int) -> np.ndarray:
    """The nearest of ``m`` random directions for every write: ``[E, N, d] -> [E, N]``."""
    directions = np.random.default_rng(seed).normal(size=(m, values.shape[-1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray((values @ directions.T).argmax(-1))


def _per_head(values: np.ndarray, m: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    heads = rng.normal(size=(values.shape[1], m, values.shape[2]))
    heads /= np.linalg.norm(heads, axis=2, keepdims=True)
    return np.asarray(np.einsum("ehd,hmd->ehm", values, heads).argmax(-1))


def _not_unit(values: np.ndarray, m: int, seed: int) -> np.ndarray:
    return np.asarray((values @ np.random.default_rng(seed).normal(size=(values.shape[-1], m))).argmax(-1))


def _either_sign(values: np.ndarray, m: int, seed: int) -> np.ndarray:
    directions = np.random.default_rng(seed).normal(size=(m, values.shape[-1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(np.abs(values @ directions.T).argmax(-1))


def _check_random(answer: Callable[[np.ndarray, int, int], np.ndarray]) -> Feedback:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(7, 1, 5)), 3, axis=1)  # three heads that write the same
    codes = np.asarray(answer(values, 11, 4))
    if codes.shape != (7, 3) or codes.dtype.kind not in "iu":
        return reject(
            f"One integer a prompt and head is wanted, [7, 3] here; you return {codes.dtype} of shape {codes.shape}."
        )
    if codes.min() < 0 or codes.max() > 10:
        return reject(f"With m = 11 codes run from 0 to 10; yours reach from {codes.min()} to {codes.max()}.")
    if not np.array_equal(codes, answer(values, 11, 4)):
        return reject("The same seed gives other codes the second time; draw from np.random.default_rng(seed).")
    if (codes != codes[:, :1]).any():
        return reject(
            "Three heads that write the same get different codes: you drew directions for each head. One encoder serves all heads."
        )
    if np.array_equal(codes, np.asarray(answer(-values, 11, 4))):
        return reject(
            "A write and its negative get the same code: take the largest activation, not the largest absolute one."
        )
    if not np.array_equal(codes, np.asarray(answer(10 * values, 11, 4))):
        return reject("Codes change with the length of a write; leave out the bias, so that only its direction counts.")
    angles = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None]
    used = len(np.unique(answer(circle, 40, 1)))
    if used < 36:
        return reject(
            f"Of 40 directions in the plane only {used} are ever the largest: the long ones win everywhere. Give rows unit norm."
        )
    return accept(
        "This encoder has seen no prompt at all. Put its codes into sae_circuits.unique_codes, ten seeds, and compare with the "
        "trained one: what is left of the difference is what training did."
    )


# -------------------------------------------------------------------------------------- 3: every prompt counts, above chance


def information(codes: np.ndarray, positive: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """Bits that a head's code tells about the class, ``[N]``, minus the mean over the shuffled classes ``[D, E]``."""

    def bits(side: np.ndarray) -> np.ndarray:
        total = np.zeros(codes.shape[1])
        for head, column in enumerate(codes.T):
            for code in np.unique(column):
                for label in (True, False):
                    joint = ((column == code) & (side == label)).mean()
                    if joint > 0:
                        total[head] += joint * np.log2(joint / ((column == code).mean() * (side == label).mean()))
        return total

    return np.asarray(bits(positive) - np.mean([bits(side) for side in shuffled], axis=0))


def _check_information(answer: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Feedback:
    rng = np.random.default_rng(0)
    positive = np.arange(30) < 15
    noise = rng.integers(0, 12, size=(30, 5))
    clean = np.where(positive, 3, 7)
    half = np.where(positive & (np.arange(30) % 2 == 0), 3, 7)
    codes = np.column_stack([noise, clean, half, np.full(30, 4)])
    shuffled = np.stack([rng.permutation(positive) for _ in range(9)])
    got = np.asarray(answer(codes, positive, shuffled), dtype=float)
    if got.shape != (8,):
        return reject(f"One number a head is wanted, [8] here; you return shape {got.shape}.")
    plain = mutual_information(codes, positive)
    chance = np.mean([mutual_information(codes, side) for side in shuffled], axis=0)
    if np.allclose(got, plain - chance, atol=1e-9):
        return accept(
            f"A head with a perfect code keeps {got[5]:.2f} bits, one with twelve random codes falls from {plain[:5].mean():.2f} "
            f"to {got[:5].mean():+.2f}. Now repeat the prompt-count study of the chapter with it."
        )
    if np.allclose(got, (plain - chance) * np.log(2), atol=1e-9):
        return reject("These are nats: the natural logarithm is too small by ln 2. Bits want log2.")
    if np.allclose(got, plain, atol=1e-9):
        return reject(
            f"You left out the null: five heads with random codes get {plain[:5].mean():.2f} bits, more than the head that is right half "
            "of the time. Subtract the mean over the shuffled classes."
        )
    if np.allclose(got, plain - np.max([mutual_information(codes, side) for side in shuffled], axis=0), atol=1e-9):
        return reject("You took off the largest of the shuffles; their mean is what chance brings.")
    if abs(got[7]) > 1e-9:
        return reject(
            f"A head with one code on all prompts tells nothing about the class; yours tells {got[7]:.2f} bits."
        )
    return reject(
        f"A head whose code gives the class away should score {(plain - chance)[5]:.3f}; yours gets {got[5]:.3f}."
    )


EXERCISES = [
    Exercise(
        number=1,
        title="The area under the curve by counting pairs",
        difficulty="easy",
        minutes=8,
        answer_is="function",
        checker=_check_auc,
        solution=auc_by_pairs,
        wrong={
            "a tie counts nothing": lambda s, t: float((s[t][:, None] > s[~t][None]).mean()),
            "a tie counts whole": lambda s, t: float((s[t][:, None] >= s[~t][None]).mean()),
            "upside down": lambda s, t: 1 - auc_by_pairs(s, t),
            "the difference of the means": lambda s, t: float(s[t].mean() - s[~t].mean()),
        },
        hints=(
            "scores[truth][:, None] against scores[~truth][None] compares every member with every other head at once.",
            "Add one half where the two are equal, and take the mean.",
        ),
    ),
    Exercise(
        number=2,
        title="Codes from an encoder that was never trained",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_random,
        solution=random_codes,
        wrong={
            "an encoder for each head": _per_head,
            "rows of any length": _not_unit,
            "the largest absolute activation": _either_sign,
            "another draw at every call": lambda values, m, seed: np.random.default_rng().integers(
                0, m, values.shape[:2]
            ),
            "activations instead of codes": lambda values, m, seed: values,
        },
        hints=(
            "Draw one matrix [m, d], divide each row by its norm, multiply, and take the argmax over the m activations.",
            "One matrix for all heads and all prompts: codes of different heads must mean the same direction.",
        ),
    ),
    Exercise(
        number=3,
        title="Let every prompt count: mutual information above chance",
        difficulty="hard",
        minutes=35,
        answer_is="function",
        checker=_check_information,
        solution=information,
        wrong={
            "nats": lambda c, p, s: information(c, p, s) * np.log(2),
            "without the null": lambda c, p, s: mutual_information(c, p),
            "the largest shuffle": lambda c, p, s: (
                mutual_information(c, p) - np.max([mutual_information(c, side) for side in s], axis=0)
            ),
            "one number for all heads": lambda c, p, s: float(information(c, p, s).mean()),
            "number of codes": lambda c, p, s: np.array([len(np.unique(column)) for column in c.T]),
        },
        hints=(
            "For one head: sum over codes and classes of P(code, class) log2 of P(code, class) / (P(code) P(class)).",
            "Do the same with each row of `shuffled` in place of `positive`, and subtract the mean.",
        ),
    ),
]
