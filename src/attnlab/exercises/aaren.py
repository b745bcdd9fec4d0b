"""Exercises of the chapter ``kernels/aaren``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.mixers import aaren

# ------------------------------------------------------------------------------------------- 1: what a stream must keep


def numbers_kept(width: int, heads: int, layers: int, tokens: int) -> tuple[int, int]:
    """Numbers that a model keeps of ``tokens`` tokens: (with Aaren layers, with softmax attention and a KV cache)."""
    return layers * (width + 2 * heads), layers * 2 * width * tokens


def _check_numbers(answer: Callable[[int, int, int, int], Any]) -> Feedback:
    for case in ((32, 4, 2, 24), (64, 8, 3, 1000), (12, 1, 1, 1)):
        width, heads, layers, tokens = case
        found = answer(*case)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return reject("Return a pair: the numbers kept by Aaren, then those kept in a KV cache.")
        ours, cache = (int(x) for x in found)
        right = numbers_kept(*case)
        where = f"With width {width}, {heads} heads, {layers} layers and {tokens} tokens "
        if (ours, cache) == right:
            continue
        if cache != right[1]:
            if cache * 2 == right[1]:
                return reject(where + "your cache holds half of what it must: keys and values are both kept.")
            if cache == right[1] * heads:
                return reject(where + "you count the heads twice: together they share the width.")
            return reject(
                where + f"a cache keeps {right[1]} numbers, a key and a value a token and layer; you say {cache}."
            )
        mistakes = {
            layers
            * (
                width + 2
            ): "A layer has one m and one u, you say; but every head has scores of its own, hence an m and a u of its own.",
            layers * width: "You keep the numerators w only. Without m and u the next token cannot be merged.",
            layers * heads * (width + 2): "You give every head the whole width; a head's w has width / heads channels.",
            layers * tokens * (width + 2 * heads): "You keep a summary for every token; only the latest is needed.",
            width + 2 * heads: "That is one layer; every layer keeps a summary of its own.",
        }
        return reject(
            where
            + mistakes.get(ours, f"Aaren keeps {right[0]} numbers; you say {ours}. Count m, u and w of one head first.")
        )
    return accept(
        "D + 2H numbers a layer, however many tokens came. The cache passes that with its first token: even one key and value are 2D numbers."
    )


# ------------------------------------------------------------------------------------------------ 2: the gate of the RNN


def gates(s: Tensor) -> Tensor:
    """Gates g [T] with ``o_t = (1 - g_t) o_{t-1} + g_t v_t``, from scores [T]."""
    return (s - s.logcumsumexp(0)).exp()


def _check_gates(answer: Callable[[Tensor], Any]) -> Feedback:
    generator = torch.Generator().manual_seed(0)
    for spread in (1.0, 2000.0):
        s = spread * torch.randn(37, generator=generator, dtype=torch.float64)
        v = torch.randn(37, 5, generator=generator, dtype=torch.float64)
        found = torch.as_tensor(answer(s.clone()))
        if found.shape != s.shape:
            return reject(f"One gate a token is wanted, shape (37,); yours have shape {tuple(found.shape)}.")
        if spread == 1 and (mistake := _wrong_gates(found.double(), s)) is not None:
            return reject(mistake)
        if not bool(torch.isfinite(found).all()):
            return reject(
                "Right in exact arithmetic, but with scores of a few thousands your gates are no numbers: exp(s) has left float64. "
                "Form the difference of logarithms before you take its exponential."
            )
        wanted = aaren(s[None, :, None], v[None, :, None])[0][0, :, 0]
        got = _run(found.double(), v)
        if not torch.allclose(got, wanted, atol=1e-9):
            t = int((got - wanted).abs().amax(1).gt(1e-9).int().argmax()) + 1
            return reject(
                f"Up to token {t - 1} your gated RNN gives the outputs of softmax attention; at token {t} it does not."
            )
    return accept(
        "g_t = exp(s_t - lse_t): the share of the newest token in the softmax of its prefix. With equal scores it is 1/t, a plain mean. The "
        "gate has seen all scores so far, and what it lets in early is diluted but never forgotten on purpose: that is what a GRU adds."
    )


def _run(g: Tensor, v: Tensor) -> Tensor:
    o, outputs = torch.zeros_like(v[0]), []
    for gate, value in zip(g, v, strict=True):
        o = (1 - gate) * o + gate * value
        outputs.append(o)
    return torch.stack(outputs)


def _wrong_gates(g: Tensor, s: Tensor) -> str | None:
    """The mistake behind gates of ordinary size, or None."""
    if torch.allclose(g, s.sigmoid()):
        return "A sigmoid of the score alone cannot know how much weight the past has. Compare the new weight with the sum of all so far."
    if torch.allclose(g, s.softmax(0)):
        return "You divide by the sum over all tokens, later ones included. Token t has not seen them: use the sum up to t."
    if torch.allclose(g, 1 - gates(s)):
        return "These are the shares of the past, 1 - g. The gate multiplies the new value."
    if torch.allclose(g, torch.cat([g[:1], (s[1:] - s.logcumsumexp(0)[:-1]).exp()])) and not torch.allclose(
        g, gates(s)
    ):
        return "You compare the new weight with the sum before it. The new token is in the sum, too; otherwise a gate can exceed 1."
    return None


# ----------------------------------------------------------------------------------------------- 3: a merge that forgets

Piece = tuple[Tensor, Tensor, Tensor, Tensor]
ForgettingMerge = Callable[[Piece, Piece, float], Piece]


def merge_forgetting(a: Piece, b: Piece, gamma: float) -> Piece:
    """Merge (n, m, u, w) of an earlier piece and a later one, where a token's score falls by ``gamma`` with each step.

    n is the number of tokens; m, u and w are those of the plain merge, as seen from the last token of the piece.
    """
    (n_a, m_a, u_a, w_a), (n_b, m_b, u_b, w_b) = a, b
    m_a = m_a - gamma * n_b  # the earlier piece has aged by the tokens of the later one
    m = torch.maximum(m_a, m_b)
    of_a, of_b = (m_a - m).exp(), (m_b - m).exp()
    return n_a + n_b, m, of_a * u_a + of_b * u_b, of_a[..., None] * w_a + of_b[..., None] * w_b


def _with(
    ages: Callable[[Tensor, Tensor], tuple[Any, Any]], count: Callable[[Tensor, Tensor], Tensor]
) -> ForgettingMerge:
    """:func:`merge_forgetting` with other ages of the two pieces and another number of tokens, from both lengths."""

    def merged(a: Piece, b: Piece, gamma: float) -> Piece:
        old, young = ages(a[0], b[0])
        zero = torch.zeros_like(a[0])
        _, m, u, w = merge_forgetting((zero, a[1] - gamma * old, *a[2:]), (zero, b[1] - gamma * young, *b[2:]), 0.0)
        return count(a[0], b[0]), m, u, w

    return merged


_WRONG_MERGES: dict[str, ForgettingMerge] = {
    "no forgetting": _with(lambda a, b: (0, 0), lambda a, b: a + b),
    "one step a merge": _with(lambda a, b: (1, 0), lambda a, b: a + b),
    "ages by its own length": _with(lambda a, b: (a, 0), lambda a, b: a + b),
    "the later piece ages": _with(lambda a, b: (0, a), lambda a, b: a + b),
    "lengths do not add": _with(lambda a, b: (b, 0), lambda a, b: b),
}

_WHY = {
    "no forgetting": "Nothing is forgotten: this is the plain merge. Lower m of the earlier piece by gamma for every token of the later one.",
    "one step a merge": "The earlier piece ages by one step a merge. That is right if the later piece is one token, and wrong in a tree: it ages by "
    "all tokens of the later piece.",
    "ages by its own length": "The earlier piece ages by its own length. Its last token is as far from the new end as the later piece is long.",
    "the later piece ages": "You let the later piece age. Its last token is the end from which everything is seen; the earlier piece ages.",
    "lengths do not add": "The merged piece must know its length: n of both pieces add. It is needed when the piece is merged again.",
}


def _check_forgetting(answer: ForgettingMerge) -> Feedback:
    s, v, gamma = *_tokens(23), 0.3
    wanted = _by_hand(s, v, gamma)
    for shape in ("one by one", "a tree", "from the right"):
        found = _fold(answer, s, v, gamma, shape)
        if not isinstance(found, tuple | list) or len(found) != 4:
            return reject("Return the four numbers of the merged piece: (n, m, u, w).")
        if torch.allclose(found[3] / found[2][..., None], wanted, atol=1e-10) and float(found[0]) == len(s):
            continue
        for name, merged in _WRONG_MERGES.items():
            same = zip(found, _fold(merged, s, v, gamma, shape), strict=True)
            if all(torch.allclose(got, wrong, atol=1e-10) for got, wrong in same):
                return reject(_WHY[name])
        return reject(
            f"Merged {shape}, 23 tokens give {_show(found[3] / found[2][..., None])} instead of {_show(wanted)}. Try two tokens first."
        )
    sharp = _fold(answer, 1000 * s, v, gamma, "a tree")
    if not bool(torch.isfinite(sharp[3] / sharp[2][..., None]).all()):
        return reject(
            "Right for moderate scores, but with scores of a thousand the output is no number: subtract the larger m before exp."
        )
    return accept(
        "Associative still, no longer commutative: order now matters. Softmax with gamma is ALiBi with one query, and the factor "
        "exp(-gamma n) is the decay of linear attention; only the scan's order had to be right all along."
    )


def _tokens(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(length, generator=generator, dtype=torch.float64), torch.randn(
        length, 2, generator=generator, dtype=torch.float64
    )


def _by_hand(s: Tensor, v: Tensor, gamma: float) -> Tensor:
    """The output at the last token."""
    age = torch.arange(len(s) - 1, -1, -1)
    return (s - gamma * age).softmax(0) @ v


def _fold(answer: ForgettingMerge, s: Tensor, v: Tensor, gamma: float, shape: str) -> Any:
    """All tokens merged, bracketed in one of three ways."""
    one = torch.ones((), dtype=s.dtype)
    pieces: list[Any] = [(one, score, one, value) for score, value in zip(s, v, strict=True)]
    while len(pieces) > 1:
        if shape == "one by one":
            pieces = [answer(pieces[0], pieces[1], gamma), *pieces[2:]]
        elif shape == "from the right":
            pieces = [*pieces[:-2], answer(pieces[-2], pieces[-1], gamma)]
        else:
            paired = [answer(a, b, gamma) for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
            pieces = paired + pieces[2 * len(paired) :]
    return pieces[0]


def _show(x: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in x.flatten().tolist()) + "]"


EXERCISES = [
    Exercise(
        number=1,
        title="What must a stream keep?",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_numbers,
        solution=numbers_kept,
        wrong={
            "one m and u a layer": lambda width, heads, layers, tokens: (
                layers * (width + 2),
                layers * 2 * width * tokens,
            ),
            "numerators only": lambda width, heads, layers, tokens: (layers * width, layers * 2 * width * tokens),
            "keys only": lambda width, heads, layers, tokens: (layers * (width + 2 * heads), layers * width * tokens),
            "every head is as wide as the layer": lambda width, heads, layers, tokens: (
                layers * heads * (width + 2),
                layers * 2 * width * heads * tokens,
            ),
            "one layer": lambda width, heads, layers, tokens: (width + 2 * heads, layers * 2 * width * tokens),
            "a summary a token": lambda width, heads, layers, tokens: (
                layers * tokens * (width + 2 * heads),
                layers * 2 * width * tokens,
            ),
        },
        hints=(
            "One head keeps m, u and w. How many numbers is w, if H heads share the width D?",
            "A cache keeps the key and the value of every token in every layer.",
        ),
    ),
    Exercise(
        number=2,
        title="Find the gate",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_gates,
        solution=gates,
        wrong={
            "a sigmoid of the score": lambda s: s.sigmoid(),
            "softmax over all tokens": lambda s: s.softmax(0),
            "the share of the past": lambda s: 1 - gates(s),
            "raw exponentials": lambda s: s.exp() / s.exp().cumsum(0),
            "against the sum before": lambda s: torch.cat(
                [torch.ones_like(s[:1]), (s[1:] - s.logcumsumexp(0)[:-1]).exp()]
            ),
        },
        hints=(
            "Write o_t = w_t / u_t, and w_t and u_t from those before, all in one unit. Which factor stands before v_t?",
            "It is exp(s_t) over the sum of exp(s_1) to exp(s_t).",
            "torch has the running logarithm of such a sum: logcumsumexp.",
        ),
    ),
    Exercise(
        number=3,
        title="Teach the merge to forget",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_forgetting,
        solution=merge_forgetting,
        wrong=dict(_WRONG_MERGES),
        hints=(
            "Each piece is seen from its own last token. What changes for the earlier piece when the later one is put behind it?",
            "All its tokens age by the same number of steps, so its u and w stay as they are and only m moves.",
            "m of the earlier piece becomes m - gamma * n of the later piece. Then merge as before, and add the lengths.",
        ),
    ),
]
