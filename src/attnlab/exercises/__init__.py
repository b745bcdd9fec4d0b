"""Exercises with checkers and tested solutions, one module a paper.

In a chapter: ``exercises.check("<slug>/<number>", answer)`` gives feedback, ``exercises.solution("<slug>/<number>")``
shows the solution's source behind a fold.
"""

import html
import importlib
import pkgutil
from dataclasses import dataclass, replace
from typing import Any

from attnlab import lab, papers
from attnlab.exercises.core import Exercise, Feedback, accept, reject

__all__ = ["Exercise", "Feedback", "Solution", "accept", "check", "get", "load", "reject", "slugs", "solution"]


def check(name: str, answer: Any = None) -> Feedback:
    """Feedback on an answer to the exercise ``slug/number``.

    Args:
        name: such as ``circuit-reuse/1``.
        answer: what the exercise asks for; None, ``...`` or a function without a body is not there yet.

    Raises:
        ValueError: no such exercise. What the answer itself raises becomes feedback.
    """
    exercise = get(name)
    return replace(exercise.check(answer), exercise=f"{name}: {exercise.title}")


def solution(name: str) -> "Solution":
    """The tested solution of the exercise ``slug/number``; an unknown one raises a ``ValueError``."""
    exercise = get(name)
    return Solution(f"{name}: {exercise.title}", lab.source(exercise.solution))


@dataclass(frozen=True)
class Solution:
    """A solution's source, folded in a notebook until the reader opens it."""

    exercise: str
    source: lab.Source

    def __repr__(self) -> str:
        return repr(self.source)

    def _repr_html_(self) -> str:
        return (
            '<details class="attnlab-solution"><summary>Solution of '
            f"{html.escape(self.exercise)}</summary>{self.source._repr_html_()}</details>"
        )


def get(name: str) -> Exercise:
    """The exercise ``slug/number``; an unknown one raises a ``ValueError`` that says what exists."""
    slug, _, number = name.partition("/")
    exercises = load(slug)
    if number not in map(str, exercises):
        raise ValueError(f"exercise: {name!r} does not exist; {slug} has {', '.join(map(str, exercises))}")
    return exercises[int(number)]


def load(slug: str) -> dict[int, Exercise]:
    """The exercises of one paper by number; its module is imported now."""
    if slug not in slugs():
        raise ValueError(f"exercise: {slug!r} has no exercises; {papers.did_you_mean(slug, slugs())}")
    module = importlib.import_module(f"{__name__}.{slug.replace('-', '_')}")
    exercises = {exercise.number: exercise for exercise in module.EXERCISES}
    if list(exercises) != list(range(1, len(module.EXERCISES) + 1)):
        given = ", ".join(str(exercise.number) for exercise in module.EXERCISES)
        raise ValueError(f"EXERCISES: {slug} must number its exercises 1, 2, 3, ... in order, not {given}")
    return exercises


def slugs() -> list[str]:
    """The papers that have exercises, sorted; nothing is imported."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in names if name != "core")
