"""The book's colours: one meaning each, the same in every chapter, told apart by colour-blind readers (Okabe-Ito)."""

from __future__ import annotations

SOFTMAX = "#0072B2"
LINEAR = "#E69F00"
OURS = "#009E73"
CONTROL = "#7f7f7f"
PAPER = "#CC79A7"
NEGATIVE = "#D55E00"
BOTH = "#7B4FA3"

COLOURS: dict[str, str] = {
    "softmax": SOFTMAX,
    "linear": LINEAR,
    "ours": OURS,
    "control": CONTROL,
    "paper": PAPER,
    "negative": NEGATIVE,
    "both": BOTH,
}

CATEGORIES: list[str] = [SOFTMAX, LINEAR, OURS, PAPER, NEGATIVE, BOTH, CONTROL]
"""The order for series that have no fixed meaning."""


def colours(*names: str) -> list[str]:
    """Return the colours of ``names`` in their order, for a scale's ``range``.

    Raises ``ValueError`` for a name that the book gives no colour.
    """
    unknown = [name for name in names if name not in COLOURS]
    if unknown:
        raise ValueError(f"names: no colour for {unknown}; the book knows {list(COLOURS)}")
    return [COLOURS[name] for name in names]
