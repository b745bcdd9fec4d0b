"""The thirty papers of the book: who wrote what, where, and which piece of attention it changes.

The facts stand in ``papers.toml``, one table a paper, in the order of the book. Everything that prints a title, an
arXiv number or the map of related papers reads them here.
"""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("papers.toml")


@dataclass(frozen=True)
class Paper:
    """One paper of the book.

    Attributes:
        slug: the name of its notebook, module, claims file and bibliography key, such as ``circuit-reuse``.
        title: the paper's own title.
        authors: short form, such as ``Merullo, Eickhoff, Pavlick``.
        year: of the venue.
        venue: where it appeared.
        arxiv: the arXiv number, such as ``2310.08744``; empty when the paper is not there.
        part: the part of the book, such as ``circuits``.
        headline: the idea in at most nine words.
        idea: the idea in one sentence.
        related: slugs of the papers of this book that a reader should meet next.
        terms: the piece of attention that it changes, such as ``normaliser``.
    """

    slug: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    part: str
    headline: str
    idea: str
    related: tuple[str, ...]
    terms: str

    @property
    def module(self) -> str:
        """The slug as a Python name: ``circuit_reuse``."""
        return self.slug.replace("-", "_")


def get(slug: str) -> Paper:
    """The paper with this slug; an unknown one raises a ``ValueError`` that names close matches."""
    papers = _load(FILE)
    if slug not in papers:
        raise ValueError(f"slug: no paper {slug!r} in this book; {did_you_mean(slug, papers)}")
    return papers[slug]


def all() -> dict[str, Paper]:
    """Every paper by slug, in the order of the book."""
    return dict(_load(FILE))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: its close matches, or all names when nothing is close."""
    names = list(known)
    if not names:
        return "there is none yet"
    close = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there is {', '.join(map(repr, names))}"


@cache
def _load(file: Path) -> dict[str, Paper]:
    """Read and check one file of papers; a wrong field raises a ``ValueError`` that names the paper and the field."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    papers = {slug: _paper(slug, table) for slug, table in tables.items()}
    for paper in papers.values():
        for other in paper.related:
            if other == paper.slug or other not in papers:
                raise ValueError(f"{file.name}: {paper.slug}.related names {other!r}, which is no other paper here")
    return papers


def _paper(slug: str, table: dict[str, Any]) -> Paper:
    expected = {field.name for field in fields(Paper)} - {"slug"}
    if table.keys() != expected:
        wrong = ", ".join(sorted(table.keys() ^ expected))
        raise ValueError(
            f"papers.toml: [{slug}] must have exactly the fields of Paper; missing or superfluous: {wrong}"
        )
    return Paper(slug=slug, **{**table, "related": tuple(table["related"])})
