"""Sums with a chain of thought: the smallest task on which a model can be made to reason step by step.

``7 + 5 + 9 + 4 =`` asks for a sum modulo 10, and ``2 ; 1 ; 5 E`` answers it: every step adds the next operand to the digit before.
Token numbers are those of :class:`attnlab.models.word_model.WordModel` over :data:`WORDS`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: word ``i`` is token ``i + 1``; token 0 is the end token of the model
WORDS = (*"0123456789", "+", "=", ";", "E")
_NUMBER = {word: i for i, word in enumerate(WORDS, start=1)}
ZERO, PLUS, EQUALS, STEP, STOP = (_NUMBER[word] for word in "0+=;E")


class Sums(NamedTuple):
    """Problems: ``prompts`` [N, P] with P = 2 n, ``chains`` [N, R] with R = 2 (n - 1) for n operands, ``answers`` [N].

    A prompt is ``a + b + c + d =``, a chain ``s2 ; s3 ; s4 E`` with s_k the sum of the first k operands modulo 10, an answer the
    token of the last sum.
    """

    prompts: NDArray[np.int64]
    chains: NDArray[np.int64]
    answers: NDArray[np.int64]


def sums(rng: np.random.Generator, n: int, operands: int = 4, slip: float = 0.0) -> Sums:
    """``n`` problems of ``operands`` random digits.

    Args:
        rng: draws the operands, then which steps slip and to what.
        n: problems.
        operands: digits to add, at least 2.
        slip: probability that a step writes a random digit (in one of ten cases the right one). The next step goes on from
            what is written, so a slip carries through to the end of the chain; ``answers`` stay right.

    Raises:
        ValueError: no problems, fewer than two operands, or a slip that is no probability.
    """
    if n < 1:
        raise ValueError(f"n: at least one problem is wanted, not {n}")
    if operands < 2:
        raise ValueError(f"operands: a sum needs at least 2, not {operands}")
    if not 0.0 <= slip <= 1.0:
        raise ValueError(f"slip: a probability from 0 to 1 is wanted, not {slip}")
    digits = rng.integers(10, size=(n, operands))  # [N, n]
    slips = rng.random((n, operands - 1)) < slip
    noise = rng.integers(10, size=(n, operands - 1))

    prompts = np.full((n, 2 * operands), PLUS, dtype=np.int64)
    prompts[:, 0::2] = ZERO + digits
    prompts[:, -1] = EQUALS
    chains = np.full((n, 2 * (operands - 1)), STEP, dtype=np.int64)
    chains[:, -1] = STOP
    written = digits[:, 0]
    for k in range(operands - 1):
        written = np.where(slips[:, k], noise[:, k], (written + digits[:, k + 1]) % 10)
        chains[:, 2 * k] = ZERO + written
    return Sums(prompts, chains, ZERO + digits.sum(1) % 10)


def answer_of(responses: Any) -> NDArray[np.int64]:
    """The last digit before the first ``E`` of each response ``[..., R]``, as a token ``[...]``; 0 where there is none.

    Takes arrays and tensors. A response that never says ``E`` has no answer, nor has one that starts with it.
    """
    tokens = np.asarray(responses.cpu() if hasattr(responses, "cpu") else responses)
    if tokens.ndim < 1 or not tokens.shape[-1]:
        raise ValueError(f"responses: tokens [..., R] with R of at least 1 are wanted, not shape {tokens.shape}")
    stops = tokens == STOP
    before = np.cumsum(stops, axis=-1) == 0
    digit = before & (tokens >= ZERO) & (tokens < ZERO + 10)
    last = tokens.shape[-1] - 1 - digit[..., ::-1].argmax(-1)
    found = np.take_along_axis(tokens, last[..., None], -1)[..., 0]
    return np.where(digit.any(-1) & stops.any(-1), found, 0).astype(np.int64)


def correct(batch: Sums, responses: Any) -> NDArray[np.float64]:
    """1 where a response ends in the right digit, ``[N * G]`` for ``G`` responses a problem, those of a problem side by side.

    Raises:
        ValueError: a number of responses that is no multiple of the number of problems.
    """
    given = answer_of(responses)
    if given.ndim != 1 or len(given) % len(batch.answers):
        raise ValueError(f"responses: [{len(batch.answers)} * G, R] are wanted, not answers of shape {given.shape}")
    return (given == np.repeat(batch.answers, len(given) // len(batch.answers))).astype(np.float64)
