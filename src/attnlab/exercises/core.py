"""What an exercise is, and how an answer becomes feedback.

A paper's module (``attnlab/exercises/<slug_with_underscores>.py``) holds ``EXERCISES``, a list of :class:`Exercise`.
Its checkers return :func:`accept` or :func:`reject`; everything that can go wrong around them is handled here, once.
"""

import dis
import html
import inspect
import linecache
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Literal

Status = Literal["accepted", "rejected", "nothing yet"]
Difficulty = Literal["easy", "medium", "hard"]

MARKS: dict[Status, str] = {"accepted": "✓", "rejected": "✗", "nothing yet": "…"}
HEADINGS: dict[Status, str] = {"accepted": "Accepted", "rejected": "Not yet", "nothing yet": "Nothing to check yet"}


@dataclass(frozen=True)
class Feedback:
    """What a checker has to say; the last line of a cell shows it.

    Attributes:
        status: ``accepted``, ``rejected`` or ``nothing yet``.
        text: what was seen; of a rejected answer, the mistake by its name.
        exercise: which exercise this is about, as ``slug/number: title``.
        hints: offered while the answer is not accepted, each behind a fold.
    """

    status: Status
    text: str
    exercise: str = ""
    hints: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the exercise is solved."""
        return self.status == "accepted"

    def __bool__(self) -> bool:
        raise TypeError("feedback is to be read, not tested for truth; ask for feedback.accepted")

    def __repr__(self) -> str:
        head = f"{MARKS[self.status]} {HEADINGS[self.status]}" + (f" ({self.exercise})" if self.exercise else "")
        offer = [f"  {len(self.hints)} hint(s): feedback.hints"] if self.hints else []
        return "\n".join([head, f"  {self.text}", *offer])

    def _repr_html_(self) -> str:
        exercise = f" <small>{html.escape(self.exercise)}</small>" if self.exercise else ""
        hints = "\n".join(
            f"<details><summary>Hint {number}</summary><p>{html.escape(hint)}</p></details>"
            for number, hint in enumerate(self.hints, start=1)
        )
        return (
            f'<section class="attnlab-feedback" data-status="{self.status.replace(" ", "-")}">\n'
            f"<p><strong>{MARKS[self.status]} {HEADINGS[self.status]}</strong>{exercise}</p>\n"
            f"<p>{html.escape(self.text)}</p>\n{hints}\n</section>"
        )


def accept(text: str) -> Feedback:
    """The answer is right; ``text`` says what that shows."""
    return Feedback("accepted", text)


def reject(text: str) -> Feedback:
    """The answer is not right; ``text`` names the mistake and what it did, never only "incorrect"."""
    return Feedback("rejected", text)


@dataclass(frozen=True)
class Exercise:
    """One exercise of a chapter.

    Attributes:
        number: its place in the chapter, from 1.
        title: what is to be done, in a few words.
        difficulty: ``easy`` (a prediction or a one-line change), ``medium`` (a step that the chapter used), ``hard``
            (an open question with a measurable answer).
        minutes: how long it takes.
        answer_is: ``function`` if the reader hands over a function (or class), ``value`` if it is data.
        checker: looks at an answer and returns :func:`accept` or :func:`reject`.
        solution: a function; it is itself the right answer, or, if ``answer_is`` is ``value``, it returns one.
        wrong: plausible wrong answers by the name of their mistake; at least one.
        hints: from gentle to plain.
    """

    number: int
    title: str
    difficulty: Difficulty
    minutes: int
    answer_is: Literal["function", "value"]
    checker: Callable[[Any], Feedback]
    solution: Callable[..., Any]
    wrong: Mapping[str, Any] = field(repr=False)
    hints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.difficulty not in ("easy", "medium", "hard"):
            raise ValueError(f"difficulty: easy, medium or hard is wanted, not {self.difficulty!r}")
        if self.answer_is not in ("function", "value"):
            raise ValueError(f"answer_is: function or value is wanted, not {self.answer_is!r}")
        if self.minutes <= 0:
            raise ValueError(f"minutes: a positive number is wanted, not {self.minutes!r}")
        if not self.wrong:
            raise ValueError(f"wrong: exercise {self.number} needs a wrong answer that its checker is tested with")

    def solved(self) -> Any:
        """The right answer: what :attr:`checker` must accept."""
        return self.solution if self.answer_is == "function" else self.solution()

    def check(self, answer: Any) -> Feedback:
        """Feedback on ``answer``. Nothing that the answer does is raised out of here."""
        feedback = self._check(answer)
        return feedback if feedback.accepted else replace(feedback, hints=self.hints)

    def _check(self, answer: Any) -> Feedback:
        if is_stub(answer):
            return Feedback("nothing yet", f"Write your answer and run this cell again (about {self.minutes} minutes).")
        if self.answer_is == "function" and not callable(answer):
            return reject(f"This exercise wants a function, not {_brief(answer)}. Hand it over without calling it.")
        if self.answer_is == "value" and isinstance(answer, FunctionType):
            return reject(
                f"This exercise wants a value, but {answer.__name__} is a function. Hand over what it returns."
            )
        try:
            return self.checker(answer)
        except NotImplementedError:
            return Feedback("nothing yet", "Your function still raises NotImplementedError.")
        except Exception as error:  # whatever the reader's code raises is feedback for the reader
            return reject(self._explain(error, answer))

    def _explain(self, error: Exception, answer: Any) -> str:
        """The error's message and the reader's line that led to it."""
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        line = _line_in(_files_of(answer), error, beside=self.checker) if self.answer_is == "function" else None
        if line is None:
            return f"The checker could not work with your answer ({_brief(answer)}). {message}"
        return f"Your code raised {message}, in {line}"


def is_stub(answer: Any) -> bool:
    """Whether nothing was written yet: None, ``...``, or a function that does nothing but return one of them."""
    if answer is None or answer is ...:
        return True
    if not isinstance(answer, FunctionType):
        return False
    return all(
        step.opname in _IDLE and (step.opname not in _CONSTANTS or step.argval is None or step.argval is ...)
        for step in dis.get_instructions(answer)
    )


_CONSTANTS = {"LOAD_CONST", "RETURN_CONST"}
_IDLE = _CONSTANTS | {"RESUME", "NOP", "COPY_FREE_VARS", "RETURN_VALUE"}


def _files_of(answer: Any) -> set[str]:
    """The files, or notebook cells, in which a function or the methods of a class were written."""
    function = inspect.unwrap(getattr(answer, "func", answer))  # a partial wraps its function as ``func``
    if hasattr(function, "__code__"):
        return {function.__code__.co_filename}
    members = vars(function if inspect.isclass(function) else type(function)).values()
    return {member.__code__.co_filename for member in members if isinstance(member, FunctionType)}


def _line_in(files: set[str], error: Exception, beside: Callable[..., Any]) -> str | None:
    """The innermost line of ``files`` on the error's way, except in the function ``beside``; None if there is none."""
    place = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename in files and code is not getattr(beside, "__code__", None):
            place = f"line {number} of {code.co_name}: {linecache.getline(code.co_filename, number).strip()}"
    return place


def _brief(answer: Any) -> str:
    shape = getattr(answer, "shape", None)
    return f"{type(answer).__name__}" if shape is None else f"{type(answer).__name__} of shape {tuple(shape)}"
