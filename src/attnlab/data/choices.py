"""Lettered multiple choice in words: a question, lines of a label and a text, and the label of the right line as the answer.

``? France A Rome B Paris C Oslo D Lima =`` asks for ``B``; so does ``? France Rome Paris Oslo Lima A B C D =``. What stands for the lines (``A B C D``, the same letters shuffled, random
letters, digits) is chosen apart from what is asked, so that knowing the answer and saying its label can be told apart.
Token numbers are those of :class:`attnlab.models.word_model.WordModel` over :data:`WORDS`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FACTS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Cuba Havana,
Cyprus Nicosia, Denmark Copenhagen, Egypt Cairo, England London, Estonia Tallinn, Finland Helsinki,
France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest, India Delhi, Iraq Baghdad,
Iran Tehran, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Latvia Riga, Lebanon Beirut,
Libya Tripoli, Mali Bamako, Nepal Kathmandu, Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon,
Russia Moscow, Serbia Belgrade, Spain Madrid, Sweden Stockholm, Syria Damascus, Turkey Ankara
"""
#: question and right text: countries and their capitals, one word each
FACTS: tuple[tuple[str, str], ...] = tuple(
    (country, capital) for country, capital in (fact.split() for fact in _FACTS.split(","))
)
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
DIGITS = tuple("12345678")
#: word ``i`` is token ``i + 1``; token 0 is the end token of the model
WORDS = (*(q for q, _ in FACTS), *(a for _, a in FACTS), *LETTERS, *DIGITS, "?", "=")
_NUMBER = {word: i for i, word in enumerate(WORDS, start=1)}
QUESTION, TEXT, LETTER, DIGIT = (_NUMBER[first] for first in (FACTS[0][0], FACTS[0][1], "A", "1"))
ASK, EQUALS = _NUMBER["?"], _NUMBER["="]
#: where the labels stand: each before its text, or all of them behind all texts
LAYOUTS = ("lines", "list")
#: how the lines are labelled
CONDITIONS = ("ABCD", "shuffled", "random", "gap", "digits")


class Choices(NamedTuple):
    """Prompts of one length T = 2 k + 3.

    ``tokens`` [N, T], ``labels`` [N, k] the label of each line, ``gold`` [N] the line that is right, counted from 0; ``label_at``
    and ``text_at`` [k] are the positions of the labels and of the texts.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    gold: NDArray[np.int64]
    label_at: NDArray[np.int64]
    text_at: NDArray[np.int64]

    @property
    def answers(self) -> NDArray[np.int64]:
        """The label of the right line, ``[N]``."""
        return self.labels[np.arange(len(self.gold)), self.gold]

    def words(self, number: int) -> list[str]:
        """One prompt as words."""
        return [WORDS[token - 1] for token in self.tokens[number]]


def choices(
    rng: np.random.Generator,
    n: int,
    condition: str | Mapping[str, float] = "ABCD",
    options: int = 4,
    balanced: bool = False,
    layout: str = "lines",
) -> Choices:
    """``n`` prompts with ``options`` lines.

    Args:
        rng: draws questions, texts, lines and labels.
        n: prompts.
        condition: one of :data:`CONDITIONS`, or a mixture of them by weight. ``ABCD``: the first letters in order; ``shuffled``: the
            same in random order; ``random``: different letters of the alphabet in any order; ``gap``: in order, one letter left out; ``digits``: 1, 2, 3, ...
        options: lines, from 2 to 8.
        layout: one of :data:`LAYOUTS`.
        balanced: every line is right equally often (``n`` must be a multiple of ``options``), instead of by chance.

    Raises:
        ValueError: no prompts, an unknown condition or layout, a number of lines or a balance that cannot be.
    """
    if n < 1:
        raise ValueError(f"n: at least one prompt is wanted, not {n}")
    if not 2 <= options <= len(DIGITS):
        raise ValueError(f"options: from 2 to {len(DIGITS)} lines are wanted, not {options}")
    if balanced and n % options:
        raise ValueError(f"n: balanced needs a multiple of {options} prompts, not {n}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {' or '.join(LAYOUTS)} is wanted, not {layout!r}")
    weights = {condition: 1.0} if isinstance(condition, str) else dict(condition)
    if unknown := [name for name in weights if name not in CONDITIONS]:
        raise ValueError(f"condition: {', '.join(CONDITIONS)} are known, not {unknown[0]!r}")
    if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ValueError(f"condition: weights that are not negative and have a positive sum are wanted, not {weights}")
    facts = np.argsort(rng.random((n, len(FACTS))), axis=1)[:, :options]  # different facts, [n, k]
    gold = np.tile(np.arange(options), n // options) if balanced else rng.integers(options, size=n)
    shares = np.array(list(weights.values())) / sum(weights.values())
    which = rng.choice(len(weights), size=n, p=shares)
    labels = np.stack([_labels(rng, n, name, options) for name in weights])[which, np.arange(n)]
    tokens = np.full((n, 2 * options + 3), EQUALS, dtype=np.int64)
    tokens[:, 0], tokens[:, 1] = ASK, QUESTION + facts[np.arange(n), gold]
    lines = np.arange(options)
    label_at, text_at = (2 + 2 * lines, 3 + 2 * lines) if layout == "lines" else (2 + options + lines, 2 + lines)
    tokens[:, label_at], tokens[:, text_at] = labels, TEXT + facts
    return Choices(tokens, labels, gold, label_at, text_at)


def _labels(rng: np.random.Generator, n: int, condition: str, options: int) -> NDArray[np.int64]:
    """Label tokens of each line, ``[n, options]``."""
    if condition == "digits":
        return np.tile(DIGIT + np.arange(options), (n, 1))
    if condition == "random":
        return LETTER + np.argsort(rng.random((n, len(LETTERS))), axis=1)[:, :options]
    if condition == "shuffled":
        return LETTER + np.argsort(rng.random((n, options)), axis=1)
    if condition == "gap":
        missing = rng.integers(options, size=(n, 1))
        return LETTER + np.arange(options) + (np.arange(options) >= missing)
    return np.tile(LETTER + np.arange(options), (n, 1))
