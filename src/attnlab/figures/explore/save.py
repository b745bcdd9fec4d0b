"""Saving what a panel shows: figures, tables and the circuit, as a download and into a folder."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd

from attnlab.circuits.report import Report, write
from attnlab.figures.explore.canvas import FORMATS, exported

MIME = {"svg": "image/svg+xml", "png": "image/png", "html": "text/html", "csv": "text/csv", "json": "application/json"}


class SaveBox:
    """Choose one of the things that exist now and its format; nothing is overwritten unless that is asked for."""

    def __init__(self, things: Callable[[], dict[str, Any]]) -> None:
        self.things = things
        self.what = w.Dropdown(options=[], description="what")
        self.form = w.Dropdown(options=[], description="format")
        self.folder = w.Text(".", description="folder")
        self.replace = w.Checkbox(False, description="replace a file that exists")
        self.button = w.Button(description="Save", button_style="primary", icon="save", disabled=True)
        self.note = w.HTML()
        self.what.observe(lambda _: self._forms(), "value")
        self.button.on_click(lambda _: self.save())
        controls = w.HBox([self.what, self.form, self.folder, self.replace, self.button])
        controls.layout.flex_flow = "row wrap"
        self.widget = w.VBox([controls, self.note])

    def refresh(self) -> None:
        """Offer what there is now, keeping the choice if it still exists."""
        names, before = list(self.things()), self.what.value
        if names != list(self.what.options):
            self.what.options = names
            self.what.value = before if before in names else names[0] if names else None
            self._forms()
        self.button.disabled = not names

    def _forms(self) -> None:
        thing = self.things().get(self.what.value)
        names = [] if thing is None else formats(thing)
        self.form.options = names
        self.form.value = names[0] if names else None  # a list that replaces an empty one selects nothing by itself

    def save(self) -> Path | None:
        """Write the file and offer it as a download; say what went wrong if something did."""
        thing = self.things().get(self.what.value)
        if thing is None or not self.form.value:
            self.note.value = "<p>There is nothing to save yet.</p>"
            return None
        name = f"{self.what.value.replace(' ', '-')}.{self.form.value}"
        path = Path(self.folder.value).expanduser() / name
        try:
            data = content(thing, self.form.value)
            if path.exists() and not self.replace.value:
                raise FileExistsError(f"{path} exists; tick 'replace' or choose another folder")
            write(path, data)
        except (ValueError, OSError) as error:
            self.note.value = f'<p style="color: #a63d00">not saved: {escape(str(error))}</p>'
            return None
        link = f"data:{MIME.get(self.form.value, 'text/plain')};base64,{base64.b64encode(data).decode()}"
        self.note.value = (
            f"<p>saved as <code>{escape(str(path))}</code> ({len(data) / 1000:.0f} kB); "
            f'<a download="{escape(name)}" href="{link}">download it</a></p>'
        )
        return path


def formats(thing: Any) -> list[str]:
    """What a thing can be saved as."""
    if isinstance(thing, Report):
        return ["json", "dot", "csv"]
    return ["csv"] if isinstance(thing, pd.DataFrame) else list(FORMATS)


def content(thing: Any, form: str) -> bytes:
    """The bytes of the file."""
    if isinstance(thing, Report):
        return thing.text(form).encode()
    if isinstance(thing, pd.DataFrame):
        return thing.to_csv(index=False).encode()
    return exported(thing, form)
