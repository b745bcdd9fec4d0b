"""Exercises of the chapter ``foundations/attention-from-scratch``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.foundations.attention_from_scratch import attention, causal, share

# ------------------------------------------------------------------------------- 1: a prompt that may look both ways


def prefix_mask(length: int, prefix: int) -> Tensor:
    """[T, T] boolean: the first ``prefix`` tokens read each other both ways, the rest is causal."""
    mask = causal(length)
    mask[:, :prefix] = True
    return mask


def _check_prefix(answer: Callable[[int, int], Any]) -> Feedback:
    for length, prefix in ((6, 3), (5, 0), (4, 4), (1, 1)):
        found, right = answer(length, prefix), prefix_mask(length, prefix)
        where = f"With {length} tokens and a prefix of {prefix}: "
        if not isinstance(found, Tensor) or found.shape != right.shape:
            return reject(where + f"a tensor of shape {tuple(right.shape)} is wanted, row = query, column = key.")
        if found.dtype != torch.bool:
            return reject(where + f"your mask is {found.dtype}; masks here are boolean, True where a query may read.")
        if torch.equal(found, right):
            continue
        if torch.equal(found, ~right):
            return reject(where + "your True means forbidden. Here True means: may be read.")
        if torch.equal(found, right.T):
            return reject(where + "rows and columns are swapped. A row belongs to the query, the token that reads.")
        if not found.diagonal().all():
            return reject(where + "a token cannot read itself in your mask: the diagonal is False.")
        if (found & ~right)[:prefix, prefix:].any():
            return reject(where + "tokens of the prefix read what comes after it, so the answer leaks into the prompt.")
        if (found & ~right).any():
            return reject(where + "a token after the prefix reads its own future.")
        if torch.equal(found, causal(length)):
            return reject(where + "that is the plain causal mask. Inside the prefix everybody reads everybody.")
        if (right & ~found)[prefix:, :prefix].any():
            return reject(where + "tokens after the prefix have lost sight of part of it.")
        return reject(where + f"{int((found != right).sum())} places differ; draw the {length} by {length} square.")
    return accept("One column block is all it takes: a prefix that is read by everybody, itself included.")


# ------------------------------------------------------------------------------------------ 2: shared keys, not copied


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Outputs [B, T, H, V] of grouped-query attention without copies of k [B, S, Hkv, K] and v [B, S, Hkv, V]."""
    q = q.unflatten(2, (k.shape[2], -1))  # [B, T, Hkv, G, K]: head h = group h // G, member h % G
    s = torch.einsum("btngk,bsnk->bngts", q, k) * q.shape[-1] ** -0.5
    pattern = s.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bngts,bsnv->btngv", pattern, v).flatten(2, 3)


def _check_grouped(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Feedback:
    generator = torch.Generator().manual_seed(0)
    for H, Hkv in ((6, 2), (4, 4), (3, 1)):
        q = torch.randn(2, 7, H, 8, generator=generator, dtype=torch.float64)
        k = torch.randn(2, 7, Hkv, 8, generator=generator, dtype=torch.float64)
        v = torch.randn(2, 7, Hkv, 5, generator=generator, dtype=torch.float64)
        mask = causal(7)
        right = attention(q, share(k, H), share(v, H), mask)[0]
        found = answer(q.clone(), k.clone(), v.clone(), mask)
        where = f"With {H} query heads on {Hkv} key-value heads: "
        if not isinstance(found, Tensor) or found.shape != right.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            return reject(where + f"outputs [B, T, H, V] = {tuple(right.shape)} are wanted, yours are {shape}.")
        if (found - right).abs().max() < 1e-10:
            continue
        mistakes = {
            "neighbouring query heads do not share in your answer: head h must read group h // G, yours reads h % Hkv.": (
                attention(q, k.repeat(1, 1, H // Hkv, 1), v.repeat(1, 1, H // Hkv, 1), mask)[0]
            ),
            "the scores are not scaled by K ** -0.5.": attention(q, share(k, H), share(v, H), mask, scale=1.0)[0],
            "the mask is ignored: early tokens have read later ones.": attention(q, share(k, H), share(v, H))[0],
        }
        for mistake, wrong in mistakes.items():
            if (found - wrong).abs().max() < 1e-10:
                return reject(where + mistake)
        return reject(
            where + f"outputs differ by up to {(found - right).abs().max():.1e}. Does the softmax run over keys?"
        )
    return accept(
        "Equal to the version with copies, in float64, and k and v are read once a group: G times fewer bytes."
    )


# --------------------------------------------------------------------------------- 3: how many keys fit into two numbers


TARGET = 0.99  # weight that every key must give to itself


def lookup_table(n: int) -> tuple[Tensor, float]:
    """Keys [n, 2] of length 1 and the smallest sharpness at which every key gives itself a weight of 0.99."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    keys = torch.stack([angle.cos(), angle.sin()], -1)  # evenly on a circle: the nearest neighbour is as far as can be
    low, high = 0.0, 1.0
    while _own_weight(keys, high) < TARGET:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _own_weight(keys, middle) >= TARGET else (middle, high)
    return keys, high


def _own_weight(keys: Tensor, sharpness: float) -> float:
    """The smallest weight that a key gives to itself when it is the query."""
    return (sharpness * keys @ keys.T).softmax(-1).diagonal().min().item()


def _check_table(answer: Callable[[int], Any]) -> Feedback:
    for n in (3, 10, 200):
        found = answer(n)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return reject("Return a pair: keys [n, 2] and the sharpness.")
        keys, sharpness = torch.as_tensor(found[0]).double(), float(found[1])
        if keys.shape != (n, 2):
            return reject(f"For n = {n} keys of shape ({n}, 2) are wanted; yours have shape {tuple(keys.shape)}.")
        if ((keys.norm(dim=-1) - 1).abs() > 1e-9).any():
            return reject("Keys have length 1 here; longer keys would hide a larger sharpness in their length.")
        own, least = _own_weight(keys, sharpness), lookup_table(n)[1]
        if own < TARGET - 1e-9:
            pair = (keys @ keys.T).fill_diagonal_(-1).max().item()
            if pair > 1 - 1e-9:
                return reject(f"For n = {n} two of your keys are the same, so no sharpness can tell them apart.")
            return reject(f"For n = {n} some key keeps only {own:.3f} for itself at your sharpness {sharpness:.4g}.")
        if sharpness > 1.05 * least:
            return reject(
                f"For n = {n} it works at sharpness {sharpness:.4g}, but {least:.4g} would do: spread the keys evenly, or lower it."
            )
    ratio = lookup_table(200)[1] / lookup_table(100)[1]
    return accept(
        f"Two numbers hold any number of keys, if scores may grow: twice the keys ask for {ratio:.2f} times the sharpness. "
        "A softmax lookup is limited by precision, not by width; the linear memory of the chapter pavlovian is limited by width."
    )


def _half_circle(n: int) -> tuple[Tensor, float]:
    angle = torch.linspace(0, math.pi, n, dtype=torch.float64)
    keys = torch.stack([angle.cos(), angle.sin()], -1)
    sharpness = 1.0
    while _own_weight(keys, sharpness) < TARGET:
        sharpness *= 1.1
    return keys, sharpness


def _closed_circle(n: int) -> tuple[Tensor, float]:
    angle = torch.linspace(0, 2 * math.pi, n, dtype=torch.float64)  # the last angle is the first again
    return torch.stack([angle.cos(), angle.sin()], -1), 1e6


EXERCISES = [
    Exercise(
        number=1,
        title="A prompt that may look both ways",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_prefix,
        solution=prefix_mask,
        wrong={
            "plain causal": lambda length, prefix: causal(length),
            "forbidden is True": lambda length, prefix: ~prefix_mask(length, prefix),
            "transposed": lambda length, prefix: prefix_mask(length, prefix).T,
            "numbers": lambda length, prefix: prefix_mask(length, prefix).float(),
            "no diagonal": lambda length, prefix: prefix_mask(length, prefix) & ~torch.eye(length, dtype=torch.bool),
            "prefix reads all": lambda length, prefix: causal(length) | (torch.arange(length) < prefix)[:, None],
        },
        hints=(
            "Start from causal(length). Which places of the square must become True?",
            "Every query may read every key of the prefix: those are whole columns.",
        ),
    ),
    Exercise(
        number=2,
        title="Shared keys, not copied",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_grouped,
        solution=grouped,
        wrong={
            "the wrong neighbours": lambda q, k, v, mask: attention(
                q, k.repeat(1, 1, q.shape[2] // k.shape[2], 1), v.repeat(1, 1, q.shape[2] // k.shape[2], 1), mask
            )[0],
            "no scale": lambda q, k, v, mask: attention(q, share(k, q.shape[2]), share(v, q.shape[2]), mask, scale=1.0)[
                0
            ],
            "no mask": lambda q, k, v, mask: attention(q, share(k, q.shape[2]), share(v, q.shape[2]))[0],
            "one group": lambda q, k, v, mask: grouped(q[:, :, : k.shape[2]], k, v, mask),
            "softmax over queries": lambda q, k, v, mask: torch.einsum(
                "bhts,bshv->bthv",
                torch.einsum("bthk,bshk->bhts", q, share(k, q.shape[2])).masked_fill(~mask, -1e9).softmax(-2),
                share(v, q.shape[2]),
            ),
        },
        hints=(
            "Give the queries one more axis: H heads are Hkv groups of G members. Tensor.unflatten does it.",
            'The scores are einsum("btngk,bsnk->bngts", q, k): n is the group, g the member.',
            "The mask broadcasts over [..., T, S] as it is. At the end flatten groups and members into H again.",
        ),
    ),
    Exercise(
        number=3,
        title="How many keys fit into two numbers?",
        difficulty="hard",
        minutes=25,
        answer_is="function",
        checker=_check_table,
        solution=lookup_table,
        wrong={
            "half a circle": _half_circle,
            "the first key twice": _closed_circle,
            "sharper than needed": lambda n: (lookup_table(n)[0], 2 * lookup_table(n)[1]),
            "not sharp enough": lambda n: (lookup_table(n)[0], 0.8 * lookup_table(n)[1]),
            "long keys": lambda n: (10 * lookup_table(n)[0], lookup_table(n)[1] / 100),
        },
        hints=(
            "Keys of length 1 in two dimensions lie on a circle. Which places keep the nearest neighbours furthest apart?",
            "The weight of a key on itself is 1 / (1 + sum over the others of exp(-sharpness (1 - cos angle))).",
            "That weight grows with the sharpness, so bisect: double until it is enough, then halve the interval.",
        ),
    ),
]
