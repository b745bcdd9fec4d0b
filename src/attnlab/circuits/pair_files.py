"""Pairs of prompts from a file or from pasted text, CSV or JSON, checked completely before anything runs.

A table has the columns ``clean, corrupt, answer, foil``; other columns are ignored. In CSV a space in front of an answer
counts (``" Mary"`` and ``"Mary"`` are different tokens) and ``|`` separates several answers or foils. JSON is a list of objects
with the same keys, or such a list under the key ``pairs``; several answers are a list. Every problem is reported with its row, its
column and what would do, all of them together.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from attnlab.circuits.pairs import Pair, Pairs

COLUMNS = ("clean", "corrupt", "answer", "foil")
Kind = Literal["csv", "json"]
SUFFIXES: dict[str, Kind] = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".json": "json"}
#: what may separate the cells of a CSV; spreadsheets write ";" where a comma marks decimals
SEPARATORS = ",;\t"

#: eight pairs that every reader of these modules may start from: who is given the gift?
EXAMPLE = """\
clean,corrupt,answer,foil
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to", Mary, John
"When Tom and Sarah went to the garden, Sarah gave a book to","When Tom and Sarah went to the garden, Tom gave a book to", Tom, Sarah
"When Anna and David went to the school, Anna gave a ring to","When Anna and David went to the school, David gave a ring to", David, Anna
"When Paul and Alice went to the park, Paul gave a ball to","When Paul and Alice went to the park, Alice gave a ball to", Alice, Paul
"Then Mark and Kate had a long talk at the station. Afterwards Kate gave a letter to","Then Mark and Kate had a long talk at the station. Afterwards Mark gave a letter to", Mark, Kate
"Then Emma and Peter had a long talk at the office. Afterwards Emma gave a computer to","Then Emma and Peter had a long talk at the office. Afterwards Peter gave a computer to", Peter, Emma
"While Jane and Adam were working at the store, Adam handed a book to","While Jane and Adam were working at the store, Jane handed a book to", Jane, Adam
"While Henry and Laura were working at the park, Henry handed a drink to","While Henry and Laura were working at the park, Laura handed a drink to", Laura, Henry
"""


class Problem(NamedTuple):
    """What is wrong with one cell, one row (no ``column``) or the whole table (no ``row``). Rows count from 1, without the header."""

    text: str
    row: int | None = None
    column: str | None = None
    line: int | None = None  # of the file

    def __str__(self) -> str:
        place = [] if self.row is None else [f"row {self.row}" + (f" (line {self.line})" if self.line else "")]
        place += [] if self.column is None else [f"column {self.column}"]
        return (", ".join(place) + ": " if place else "") + self.text


class Row(NamedTuple):
    """One row as text; ``number`` counts from 1, ``line`` is where it begins in the file (0 in JSON)."""

    number: int
    line: int
    clean: str
    corrupt: str
    answers: tuple[str, ...]
    foils: tuple[str, ...]


class PairFileError(ValueError):
    """A table that cannot be used, with all that is wrong with it."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.name, self.problems = name, list(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__("\n".join([f"{name}: {count}, nothing was run", *(f"  {name}, {p}" for p in self.problems)]))


def load(path: Path | str, tokenizer: Any, context: int | None = None) -> Pairs:
    """Read, check and tokenise a file; the data set is called like the file without its suffix.

    Raises:
        PairFileError: with every problem of the file.
    """
    path = Path(path)
    text, kind = read(path)
    return from_text(text, tokenizer, path.stem, kind=kind, context=context, source=str(path))


def from_text(
    text: str,
    tokenizer: Any,
    name: str = "pasted pairs",
    *,
    kind: Kind | None = None,
    context: int | None = None,
    source: str | None = None,
) -> Pairs:
    """Check and tokenise a table.

    Args:
        text: CSV or JSON.
        tokenizer: of the model.
        name: of the data set.
        kind: ``"csv"`` or ``"json"``; looked for in the text if left out.
        context: the most tokens that the model reads.
        source: what messages call the table; its name if left out.

    Raises:
        PairFileError: with every problem of the table.
    """
    rows, problems = parse(text, kind)
    problems = sorted([*problems, *check(rows, tokenizer, context)], key=lambda problem: problem.row or 0)
    if problems:
        raise PairFileError(source or name, problems)
    return Pairs(name, tokenizer, [Pair(row.clean, row.corrupt, row.answers, row.foils) for row in rows])


# ------------------------------------------------------------------------------------------------------- text


def read(path: Path) -> tuple[str, Kind | None]:
    """The text of a file and what it is by its suffix.

    Raises:
        PairFileError: if there is no such file, it cannot be read, is empty, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise PairFileError(str(path), [Problem("there is no such file; check the name and the folder")]) from None
    except IsADirectoryError:
        raise PairFileError(str(path), [Problem("this is a folder; name a CSV or JSON file in it")]) from None
    except OSError as error:
        raise PairFileError(str(path), [Problem(f"it cannot be read ({error.strerror})")]) from error
    return decode(data, str(path)), SUFFIXES.get(path.suffix.lower())


def decode(data: bytes, name: str) -> str:
    """Bytes as text: UTF-8, with or without the mark that spreadsheets put in front.

    Raises:
        PairFileError: if they are empty or no UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {data[error.start]:#04x} in line {line}"
        message = f"it is not UTF-8 ({what}); save it again with the encoding UTF-8"
        raise PairFileError(name, [Problem(message)]) from error
    if "\0" in text:
        raise PairFileError(
            name, [Problem("it holds zero bytes, so it is no text; save the table as CSV, not as XLSX")]
        )
    if not text.strip():
        raise PairFileError(name, [Problem(f"it is empty; the first line of a CSV is {','.join(COLUMNS)}")])
    return text


def parse(text: str, kind: Kind | None = None) -> tuple[list[Row], list[Problem]]:
    """The complete rows of a table, and what is wrong with the others. Tokens are not looked at."""
    if not text.strip():
        return [], [Problem(f"there is nothing; the first line of a CSV is {','.join(COLUMNS)}")]
    if kind is None:
        kind = "json" if text.lstrip()[0] in "[{" else "csv"
    rows, problems = _json(text) if kind == "json" else _csv(text)
    first: dict[tuple[Any, ...], int] = {}
    for row in rows:
        same = first.setdefault(row[2:], row.number)
        if same != row.number:
            problems.append(Problem(f"it is the same as row {same}; remove one", row.number, None, row.line))
    if not rows and not problems:
        problems.append(Problem("it has no rows; put at least one pair below the header"))
    return rows, sorted(problems, key=lambda problem: problem.row or 0)


def _csv(text: str) -> tuple[list[Row], list[Problem]]:
    head = text.lstrip("\n\r").splitlines()[0]
    separator = max(SEPARATORS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines = _lines(reader)
    try:
        header = [name.strip().lower() for name in next(lines)[1]]
    except csv.Error as error:
        return [], [Problem(f"the header cannot be read ({error}); it should be {','.join(COLUMNS)}")]
    if problems := _columns(header):
        return [], problems
    rows, number = [], 0
    try:
        for line, cells in lines:
            number += 1
            if len(cells) != len(header):
                problems.append(
                    Problem(
                        f"it has {len(cells)} cells and the header {len(header)}; put quotes around a text that holds "
                        f"{separator!r}, and write a quote inside it twice",
                        number,
                        None,
                        line,
                    )
                )
                continue
            given = dict(zip(header, cells, strict=True))
            row = Row(
                number,
                line,
                given["clean"],
                given["corrupt"],
                tuple(given["answer"].split("|")),
                tuple(given["foil"].split("|")),
            )
            wrong = _empty(row)
            problems += wrong
            rows += [] if wrong else [row]
    except csv.Error as error:
        where = reader.line_num
        message = f"the quotes do not close ({error}); write a quote inside a quoted text twice"
        problems.append(Problem(message, number + 1, None, where))
    return rows, problems


def _lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold anything, with the line on which they begin."""
    before = 0
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield before + 1, cells
        before = reader.line_num


def _columns(header: list[str]) -> list[Problem]:
    problems = [Problem(f"column {name} occurs twice; keep one") for name in COLUMNS if header.count(name) > 1]
    for name in COLUMNS:
        if name not in header:
            others = [other for other in header if other and other not in COLUMNS]
            found = f"there are {', '.join(header)}"
            close = difflib.get_close_matches(name, others, n=1)
            remedy = f"did you mean {close[0]!r} to be it?" if close else "add it to the first line"
            problems.append(Problem(f"column {name} is missing ({found}); {remedy}"))
    return problems


def _empty(row: Row) -> list[Problem]:
    cells = {"clean": (row.clean,), "corrupt": (row.corrupt,), "answer": row.answers, "foil": row.foils}
    what = {"clean": "a prompt", "corrupt": "a prompt", "answer": "one token", "foil": "one token"}
    return [
        Problem(f"the cell is empty; write {what[name]}", row.number, name, row.line or None)
        for name, texts in cells.items()
        if not texts or any(not text if name in ("answer", "foil") else not text.strip() for text in texts)
    ]


def _json(text: str) -> tuple[list[Row], list[Problem]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        return [], [Problem(f"it is no JSON: {error.msg} in line {error.lineno}, column {error.colno}")]
    if isinstance(document, dict):
        document = document.get("pairs")
    if not isinstance(document, list):
        return [], [
            Problem('the JSON is no list of pairs; write [{"clean": ..., "corrupt": ..., "answer": ..., "foil": ...}]')
        ]
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, entry in enumerate(document, start=1):
        if not isinstance(entry, dict):
            problems.append(Problem(f"it is {_kind(entry)}; write an object with {', '.join(COLUMNS)}", number))
            continue
        wrong = [Problem(_missing(name, entry), number, name) for name in COLUMNS if name not in entry]
        wrong += [p for name in COLUMNS if name in entry and (p := _type_problem(number, name, entry[name]))]
        if not wrong:
            answers, foils = (
                tuple([entry[name]] if isinstance(entry[name], str) else entry[name]) for name in ("answer", "foil")
            )
            row = Row(number, 0, entry["clean"], entry["corrupt"], answers, foils)
            wrong = _empty(row)
            rows += [] if wrong else [row]
        problems += wrong
    return rows, problems


def _missing(name: str, entry: dict[str, Any]) -> str:
    return f"the key is missing (there are {', '.join(entry) or 'none'}); add it"


def _type_problem(number: int, name: str, value: Any) -> Problem | None:
    several = name in ("answer", "foil") and isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, str) or several:
        return None
    remedy = f"write {json.dumps(str(value))}" if isinstance(value, int | float) else "write a text in quotes"
    return Problem(f"the value is {_kind(value)}; {remedy}", number, name)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


# ----------------------------------------------------------------------------------------------------- tokens


def check(rows: Sequence[Row], tokenizer: Any, context: int | None = None) -> list[Problem]:
    """What the tokenizer of a model has against the rows; :class:`~attnlab.circuits.pairs.Pairs` takes those without a problem."""
    problems: list[Problem] = []
    for row in rows:

        def found(column: str, text: str, row: Row = row) -> None:
            problems.append(Problem(text, row.number, column, row.line or None))

        clean, corrupt = (_tokens(tokenizer, text) for text in (row.clean, row.corrupt))
        if clean == corrupt:
            found("corrupt", "it is the same prompt as clean; change one word, so that another answer is right")
        elif len(clean) != len(corrupt):
            found("corrupt", _lengths(tokenizer, clean, corrupt))
        if context is not None and max(len(clean), len(corrupt)) > context:
            found(
                "clean",
                f"{max(len(clean), len(corrupt))} tokens are more than the {context} that the model reads; shorten it",
            )
        tokens: dict[str, list[int]] = {"answer": [], "foil": []}
        for column, words in (("answer", row.answers), ("foil", row.foils)):
            for word in words:
                if wrong := _word_problem(tokenizer, word):
                    found(column, wrong)
                tokens[column] += _tokens(tokenizer, word)[:1]
        for word in row.foils:
            if word in row.answers or (_single(tokenizer, word) and _tokens(tokenizer, word)[0] in tokens["answer"]):
                found("foil", f"{word!r} is an answer too; choose a word that is wrong after the clean prompt")
                break
    return problems


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _single(tokenizer: Any, word: str) -> bool:
    return len(_tokens(tokenizer, word)) == 1


def _lengths(tokenizer: Any, clean: list[int], corrupt: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), min(len(clean), len(corrupt))
    )
    around = " / ".join(repr(tokenizer.decode(tokens[at : at + 3])) for tokens in (clean, corrupt))
    return (
        f"clean has {len(clean)} tokens and corrupt {len(corrupt)}, they part at token {at} ({around}); "
        "choose words of the same number of tokens"
    )


def _word_problem(tokenizer: Any, word: str) -> str:
    tokens = _tokens(tokenizer, word)
    if len(tokens) == 1:
        read = tokenizer.decode(tokens).strip()
        unknown = read.casefold() != word.strip().casefold()  # a tokenizer of whole words reads what it lacks as <unk>
        return (
            f"{word!r} is not in the model's vocabulary, which reads it as {read!r}; choose another word"
            if unknown
            else ""
        )
    pieces = ", ".join(repr(tokenizer.decode([token])) for token in tokens) or "none"
    other = f" {word}" if not word.startswith(" ") else word.strip()
    hint = f"; {other!r} would be one" if other and _single(tokenizer, other) else "; choose another word"
    return f"{word!r} is {len(tokens)} tokens ({pieces}) and metrics read one{hint}"
