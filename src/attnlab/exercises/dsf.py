"""Exercises of the chapter ``foundations/dsf``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.foundations import dsf, dsf_builders

# ------------------------------------------------------------------------------------------------ 1: the gate in disguise


def plain_twin(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a plain gate ``sigmoid(W x + b)`` that equals ``exp(-softplus(weight x + bias))``."""
    return -weight, -bias


def _check_twin(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(3)
    weight, bias, x = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 6), (4,), (50, 6)))
    kept = weight.clone(), bias.clone()
    found = answer(weight, bias)
    if not isinstance(found, tuple | list) or len(found) != 2:
        return reject("Return a pair: the weight [V, D] and the bias [V] of the plain gate.")
    if not (torch.equal(weight, kept[0]) and torch.equal(bias, kept[1])):
        return reject("Your function changed its arguments in place; return new tensors.")
    reversed_gate = torch.exp(-torch.nn.functional.softplus(x @ weight.T + bias))
    for name, (w, b) in {
        "": found,
        "the weight is negated, the bias is not": (found[0], -found[1]),
        "the bias is negated, the weight is not": (-found[0], found[1]),
        "that is the reversed gate itself: the plain one opens where it closes": (-found[0], -found[1]),
    }.items():
        if torch.allclose(torch.sigmoid(x @ w.T + b), reversed_gate, rtol=0, atol=1e-12):
            if not name:
                return accept(
                    "exp(-softplus(z)) = sigmoid(-z). With exponent 1 the reversed gate is the plain one with all signs of its "
                    "weights turned, and weights drawn symmetrically do not know the difference."
                )
            return reject(f"Nearly: {name}.")
    error = float((torch.sigmoid(x @ found[0].T + found[1]) - reversed_gate).abs().max())
    return reject(f"The two gates differ by up to {error:.2g}. Write exp(-softplus(z)) as a sigmoid first.")


# --------------------------------------------------------------------------------------------------- 2: a window as a state


def window_system(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Lambda [w, w], B [w, 1], C [1, w]) whose output is the mean of the last w inputs (zeros before the first)."""
    lam = torch.diag(torch.ones(width - 1, dtype=torch.float64), -1)  # every slot hands its number to the next
    b = torch.zeros(width, 1, dtype=torch.float64)
    b[0] = 1
    return lam, b, torch.full((1, width), 1 / width, dtype=torch.float64)


def _check_window(answer: Callable[..., Any]) -> Feedback:
    for width in (1, 2, 5):
        found = answer(width)
        if not isinstance(found, tuple | list) or len(found) != 3:
            return reject("Return three matrices: Lambda, B, C.")
        lam, b, c = (torch.as_tensor(x, dtype=torch.float64) for x in found)
        states = lam.shape[0]
        if lam.ndim != 2 or lam.shape != (states, states) or b.shape != (states, 1) or c.shape != (1, states):
            return reject(
                f"Shapes {tuple(lam.shape)}, {tuple(b.shape)}, {tuple(c.shape)} do not make a system: [N, N], [N, 1], [1, N] are wanted."
            )
        u = torch.randn(20, 1, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        n = len(u)
        system = dsf.Dense(
            lam.expand(n, -1, -1), b.expand(n, -1, -1), c.expand(n, -1, -1), torch.zeros(n, 1, 1, dtype=torch.float64)
        )
        y = system.outputs(u)[:, 0]

        def mean_of(w: int, u: Tensor = u) -> Tensor:
            return torch.stack([u[max(0, i - w + 1) : i + 1].sum() / max(w, 1) for i in range(len(u))])

        if torch.allclose(y, mean_of(width), rtol=0, atol=1e-10):
            continue
        where = f"With a window of {width}: "
        if torch.allclose(y * width, mean_of(width), rtol=0, atol=1e-10) or torch.allclose(
            y, width * mean_of(width), rtol=0, atol=1e-10
        ):
            return reject(where + "the right inputs, wrongly weighed: each of them counts 1 / width.")
        for other in (width - 1, width + 1):
            if other > 0 and torch.allclose(y * width, mean_of(other) * other, rtol=0, atol=1e-10):
                return reject(where + f"you read {other} inputs. The newest one is in the window too.")
        if torch.equal(lam, torch.diag(lam.diagonal())):
            return reject(
                where
                + "your Lambda is diagonal, so every number of the state fades at its own rate and none is ever dropped at once. "
                "Let the numbers move instead."
            )
        return reject(where + f"outputs are off by up to {float((y - mean_of(width)).abs().max()):.2g}.")
    return accept(
        "A shift register. Lambda^w = 0, which no diagonal matrix but zero can do: a window is linear and time-invariant, and "
        "still outside the paper's frame of diagonal transitions."
    )


# ---------------------------------------------------------------------------------------------- 3: attention as a selective SSM


def s6_of_attention(phi: Tensor, eta: Tensor, a: float) -> tuple[Tensor, Tensor] | None:
    """Steps dt [T] and vectors b [T, K] with which S6 is attention on features ``phi`` [T, K] with normaliser ``eta`` [T]; none if it cannot be."""
    ratio = eta[1:] / eta[:-1]
    if bool((ratio <= 1).any()):
        return None  # a step is at least 0, so the transition is at most 1; and a step of 0 cannot write
    dt = torch.cat([torch.ones_like(eta[:1]), ratio.log() / a])
    return dt, phi / (eta * dt)[:, None]


def _check_s6(answer: Callable[..., Any]) -> Feedback:
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 9, 1, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    u = torch.randn(1, 9, 1, 1, generator=generator, dtype=torch.float64)
    phi, psi = k.exp(), q.exp()
    growing = 1 + torch.rand(9, generator=generator, dtype=torch.float64).cumsum(0)
    falling = growing.clone()
    falling[6] = growing[4]
    for a in (1.0, 0.5, 4.0):
        found = answer(phi[0, :, 0], growing, a)
        if found is None:
            return reject(
                "You return None although eta grows at every token: then eta_{i-1} / eta_i is below 1, as exp(-a dt) is."
            )
        dt, b = (torch.as_tensor(x, dtype=torch.float64) for x in found)
        if dt.shape != (9,) or b.shape != (9, 4):
            return reject(f"Shapes {tuple(dt.shape)} and {tuple(b.shape)}; dt [T] and b [T, K] are wanted.")
        if bool((dt < 0).any()):
            return reject(
                f"A step is negative ({float(dt.min()):.3g}), but dt is a softplus. Mind the sign of the logarithm."
            )
        wanted = dsf.matrix(dsf_builders.separable(psi, phi, growing.log()[None, :, None]), u)
        rates = torch.full((1,), a, dtype=torch.float64)
        y = dsf.matrix(dsf_builders.s6(dt[None, :, None, None], rates, b[None, :, None], psi), u)
        if torch.allclose(y, wanted, rtol=0, atol=1e-9):
            continue
        where = f"With a = {a:g}: "
        transitions, ratio = (-a * dt[1:]).exp(), growing[:-1] / growing[1:]
        if not torch.allclose(transitions, ratio, rtol=0, atol=1e-9):
            if torch.allclose((-dt[1:]).exp(), ratio, rtol=0, atol=1e-9):
                return reject(where + "your steps are right for a = 1; the transition is exp(-a dt).")
            return reject(where + "exp(-a dt_i) is not eta_{i-1} / eta_i.")
        if torch.allclose(b, phi[0, :, 0], rtol=0, atol=1e-9):
            return reject(where + "the transitions are right. But S6 writes dt_i b_i, and attention phi(k_i) / eta_i.")
        return reject(where + "the transitions are right, but dt_i b_i is not phi(k_i) / eta_i.")
    if answer(phi[0, :, 0], falling, 1.0) is not None:
        return reject(
            "Where eta falls the transition must exceed 1, and exp(-a dt) with dt >= 0 cannot. Return None in that case."
        )
    flat = growing.clone()
    flat[5] = flat[4]
    if answer(phi[0, :, 0], flat, 1.0) is not None:
        return reject(
            "Where eta stays the same the step is 0, and then S6 writes 0 b = 0. Return None in that case too."
        )
    return accept(
        "S6 is attention whose normaliser grows at every token. Linear attention with one fixed query has such a normaliser; "
        "with a query of its own for each token, eta may fall, and S6 cannot follow."
    )


EXERCISES: list[Exercise] = [
    Exercise(
        number=1,
        title="the gate in disguise",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_twin,
        solution=plain_twin,
        wrong={
            "the same weights": lambda weight, bias: (weight, bias),
            "the bias forgotten": lambda weight, bias: (-weight, bias),
        },
        hints=(
            "softplus(z) = log(1 + e^z), so exp(-softplus(z)) = 1 / (1 + e^z).",
            "1 / (1 + e^z) = sigmoid(-z). Which weights give -z?",
        ),
    ),
    Exercise(
        number=2,
        title="a window as a state",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_window,
        solution=window_system,
        wrong={
            "a diagonal transition": lambda width: (
                (1 - 1 / width) * torch.eye(1, dtype=torch.float64),
                torch.full((1, 1), 1 / width, dtype=torch.float64),
                torch.ones(1, 1, dtype=torch.float64),
            ),
            "a sum, not a mean": lambda width: (*window_system(width)[:2], torch.ones(1, width, dtype=torch.float64)),
        },
        hints=(
            "The state must hold the last w inputs themselves: N = w.",
            "At every token each number moves one place on, and the newest enters at place 0. Lambda has ones below its diagonal.",
        ),
    ),
    Exercise(
        number=3,
        title="attention as a selective state space",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_s6,
        solution=s6_of_attention,
        wrong={
            "keys as they are": lambda phi, eta, a: (
                torch.cat([torch.ones_like(eta[:1]), (eta[1:] / eta[:-1]).log() / a]),
                phi,
            ),
            "never impossible": lambda phi, eta, a: (
                dt := torch.cat([torch.ones_like(eta[:1]), (eta[1:] / eta[:-1]).log().abs() / a]),
                phi / (eta * dt)[:, None],
            ),
        },
        hints=(
            "Match the transitions first: exp(-a dt_i) = eta_{i-1} / eta_i. The first transition multiplies a zero state, so dt_0 is free.",
            "Then match what is written: dt_i b_i = phi(k_i) / eta_i.",
            "Which dt_i does a softplus never reach? And what can a step of 0 write?",
        ),
    ),
]
