"""One model asked for its steps, and asked for the number only: do different heads start the answer?

An illustration of the measurement on real weights, for the chapter ``circuits/thinking-sparks``: the model was never trained to switch
between two modes, so nothing here says what such training does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnlab.circuits.attribution import attribution_patch
from attnlab.circuits.metrics import Metric, Readout
from attnlab.circuits.model import HookedLM
from attnlab.circuits.pairs import Pair, Pairs
from attnlab.circuits.scores import Scores

MODES = {"think": "Let's think step by step.", "number": "Answer with the number only."}
TAU = 0.01  # share from which on one of 270 heads counts; equal heads would have 0.0037 each
QUESTION = "{name} has {a} {things}, finds {b} more and gives {c} away. How many {things} are left?"
NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Kate", "Jack", "Emma")
THINGS = ("apples", "books", "coins", "stamps")


def mode_pairs(tokenizer: Any, mode: str, n: int = 12, seed: int = 0) -> Pairs:
    """``n`` one-digit questions in the model's chat format, each with a twin whose second number is another digit.

    Equal seeds give equal questions in both modes. The answers are the two results; :func:`from_clean` does not look at them.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {', '.join(MODES)}")
    rng = np.random.default_rng([0x6D6F_6465, seed])
    pairs = []
    for i in range(n):
        a, c = int(rng.integers(2, 6)), int(rng.integers(1, 3))
        b, other = (int(x) for x in rng.choice(np.arange(1, 5), size=2, replace=False))
        words = {"name": NAMES[i % len(NAMES)], "things": THINGS[i // 2 % len(THINGS)], "a": a, "c": c}
        clean, corrupt = (_chat(tokenizer, f"{QUESTION.format(b=x, **words)} {MODES[mode]}") for x in (b, other))
        pairs.append(Pair(clean, corrupt, [str(a + b - c)], [str(a + other - c)]))
    return Pairs(f"mode-{mode}", tokenizer, pairs)


def _chat(tokenizer: Any, text: str) -> str:
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    )


def from_clean(model: HookedLM, pairs: Pairs) -> Metric:
    """A metric for these pairs: KL(clean run || this run) of the first token of the answer, in nats.

    It is 0 with gradient 0 at the clean run itself, so attribute from the corrupt side (``direction="denoise"``).
    """
    table: list[Tensor] = [torch.empty(0)] * len(pairs)
    with torch.no_grad():
        for batch in pairs.batches(size=16):
            logits = Readout(model, model.run(batch.clean).resid[model.spec.n_layers], batch).logits
            for number, row in zip(batch.index.tolist(), logits.log_softmax(-1), strict=True):
                table[number] = row
    stacked = torch.stack(table)  # [N, V]

    def kl_from_clean(end: Readout) -> Tensor:
        clean = end.tile(stacked[end.batch.index])
        return (clean.exp() * (clean - end.logits.log_softmax(-1))).sum(-1)

    return kl_from_clean


def mode_scores(model: HookedLM, n: int = 12, seed: int = 0) -> dict[str, Scores]:
    """Attribution of every head in both modes, on the same ``n`` questions."""
    scores = {}
    for mode in MODES:
        pairs = mode_pairs(model.tokenizer, mode, n, seed)
        scores[mode] = attribution_patch(model, pairs, metric=from_clean(model, pairs), direction="denoise")
    return scores


def node_shares(scores: Scores, pairs: slice = slice(None)) -> NDArray[np.float64]:
    """Share of each head in the mean ``|effect|`` over some of the pairs, ``[G]``, summing to 1."""
    sizes = np.abs(scores.effect[:, pairs]).mean(1)
    return np.asarray(sizes / sizes.sum())


def mode_table(scores: dict[str, Scores], tau: float = TAU) -> pd.DataFrame:
    """Heads in the circuit of each mode, those that the other mode lacks, and those that two halves of its own questions disagree on.

    Columns ``heads, alone, noise``, a row a mode; ``noise`` is the mean of both directions, ``heads`` and ``alone`` come from all
    questions.
    """
    rows = {}
    for mode, other in (tuple(MODES), tuple(MODES)[::-1]):
        mine, theirs = (node_shares(scores[name]) >= tau for name in (mode, other))
        half = scores[mode].effect.shape[1] // 2
        one, two = (node_shares(scores[mode], part) >= tau for part in (slice(half), slice(half, None)))
        rows[mode] = {
            "heads": int(mine.sum()),
            "alone": int((mine & ~theirs).sum()),
            "noise": float((one != two).sum()) / 2,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def mode_frame(scores: dict[str, Scores]) -> pd.DataFrame:
    """A row a head: ``head`` and its share in each mode."""
    first = next(iter(scores.values()))
    names = [str(group[0]) for group in first.groups]
    return pd.DataFrame({"head": names} | {mode: node_shares(found) for mode, found in scores.items()})
