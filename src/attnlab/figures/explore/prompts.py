"""Where a reader puts pairs of prompts: a box to paste into, a file to load, and what is wrong beside each row."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as w

from attnlab.circuits import pair_files
from attnlab.circuits.pair_files import PairFileError, Problem, Row
from attnlab.circuits.pairs import Pairs

CELL = "padding: 2px 8px; vertical-align: top; text-align: left"


class PromptBox:
    """The text is never changed but by its writer, by loading a file, and by taking that back."""

    def __init__(self, on_pairs: Callable[[Pairs | None], None], text: str = pair_files.EXAMPLE) -> None:
        self.on_pairs = on_pairs
        self.tokenizer: Any = None
        self.context: int | None = None
        self.pairs: Pairs | None = None
        self.problems: list[Problem] = []
        self._before: str | None = None  # the text that a file replaced
        layout = w.Layout(width="100%", height="170px")
        self.text = w.Textarea(text, layout=layout, placeholder="clean,corrupt,answer,foil", continuous_update=False)
        self.upload = w.FileUpload(accept=".csv,.tsv,.txt,.json", multiple=False, description="Load a file")
        self.check_button = w.Button(description="Check the pairs", button_style="primary", icon="check")
        self.back = w.Button(description="Take the file back", disabled=True, icon="undo")
        self.example = w.Button(description="Example", icon="file")
        self.report = w.HTML()
        self.check_button.on_click(lambda _: self.check())
        self.back.on_click(lambda _: self._take_back())
        self.example.on_click(lambda _: self._replace(pair_files.EXAMPLE))
        self.upload.observe(self._uploaded, "value")
        buttons = w.HBox(
            [self.check_button, self.upload, self.back, self.example], layout=w.Layout(flex_flow="row wrap")
        )
        hint = w.HTML(
            "Paste CSV with the columns <code>clean, corrupt, answer, foil</code>, or JSON. A space before an answer counts."
        )
        self.widget = w.VBox([hint, self.text, buttons, self.report])

    def check(self) -> Pairs | None:
        """Read the box with the tokenizer of the model; tell what is wrong beside each row."""
        self.pairs = None
        rows, problems = pair_files.parse(self.text.value)
        if self.tokenizer is None:
            problems.append(Problem("no model is loaded, so tokens were not checked; load one above"))
        else:
            try:
                self.pairs = pair_files.from_text(self.text.value, self.tokenizer, context=self.context)
                problems = []
            except PairFileError as error:
                problems = error.problems
        self.problems = problems
        self.report.value = table(rows, problems)
        self.on_pairs(self.pairs)
        return self.pairs

    def _uploaded(self, change: dict[str, Any]) -> None:
        if not change["new"]:
            return
        file = change["new"][0]
        try:
            text = pair_files.decode(bytes(file["content"]), file["name"])
        except PairFileError as error:  # the box stays as it is
            self.problems = error.problems
            self.report.value = table(
                [], error.problems, f"{file['name']} was not loaded; the text above is as it was."
            )
            return
        finally:
            self.upload.value = ()  # so that the same file can be chosen again
        self._replace(text)

    def _replace(self, text: str) -> None:
        if text != self.text.value:
            self._before = self.text.value
            self.text.value = text
            self.back.disabled = False
        self.check()

    def _take_back(self) -> None:
        if self._before is not None:
            self.text.value, self._before = self._before, None
            self.back.disabled = True
            self.check()


def table(rows: list[Row], problems: list[Problem], note: str = "") -> str:
    """The rows with what is wrong beside each, as HTML."""
    general = [p for p in problems if p.row is None]
    numbers = sorted({row.number for row in rows} | {p.row for p in problems if p.row is not None})
    by_number = {row.number: row for row in rows}
    body = []
    for number in numbers:
        mine = [p for p in problems if p.row == number]
        row = by_number.get(number)
        cells = (
            ["", "", "", ""] if row is None else [row.clean, row.corrupt, "|".join(row.answers), "|".join(row.foils)]
        )
        shown = "".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in cells)
        if mine:
            said = "<br>".join(escape(f"{p.column}: {p.text}" if p.column else p.text) for p in mine)
            verdict = f'<td style="{CELL}; color: #a63d00"><b>✗</b> {said}</td>'
        else:
            verdict = f'<td style="{CELL}; color: #00664a"><b>✓</b></td>'
        body.append(f'<tr data-row="{number}"><td style="{CELL}">{number}</td>{verdict}{shown}</tr>')
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("row", "", *pair_files.COLUMNS))
    lines = [f"<p>{escape(note)}</p>"] if note else []
    lines += [f'<p style="color: #a63d00"><b>✗</b> {escape(p.text)}</p>' for p in general]
    if numbers:
        wrong = len({p.row for p in problems if p.row is not None})
        lines.append(f"<p>{len(numbers)} rows, {f'{wrong} to correct' if wrong else 'all can be used'}.</p>")
        lines.append(f'<div style="overflow-x: auto"><table><tr>{head}</tr>{"".join(body)}</table></div>')
    return "".join(lines)


def tokens_html(clean: list[str], corrupt: list[str]) -> str:
    """Both prompts of a pair token by token, with what differs marked."""

    def strip(words: list[str], others: list[str]) -> str:
        spans = [
            f'<span title="position {i}" style="display: inline-block; white-space: pre; margin: 1px; padding: 1px 3px; '
            f'border: 1px solid #8888; border-radius: 3px{"; background: #E69F0055" if word != other else ""}">'
            f"{escape(word.replace(chr(10), '↵'))}<sub>{i}</sub></span>"
            for i, (word, other) in enumerate(zip(words, others, strict=True))
        ]
        return "".join(spans)

    return (
        f'<div style="font-family: ui-monospace, monospace"><div><b>clean</b> {strip(clean, corrupt)}</div>'
        f"<div><b>corrupt</b> {strip(corrupt, clean)}</div></div>"
    )
