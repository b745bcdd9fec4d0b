"""A place in a panel that shows a chart, and what is left of a chart as a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import altair as alt
import ipywidgets as w

from attnlab.figures.twin import static_html
from attnlab.lab import in_book

FORMATS = ("svg", "png", "html")


class Canvas:
    """Shows one chart at a time: with mouse-over and clicks where the notebook can do that, else as a picture."""

    def __init__(self) -> None:
        self.chart: Any = None
        self.widget = w.VBox()

    def show(self, chart: Any, picks: Mapping[str, Callable[[str], None]] | None = None) -> None:
        """Replace what is shown. ``picks`` names selection parameters of the chart and who hears of a click on them."""
        self.chart = chart
        if in_book() or not _interactive():
            self.widget.children = (w.HTML(static_html(chart)),)
            return
        alt.JupyterChart.enable_offline(True)
        live = alt.JupyterChart(chart)
        for name, hear in (picks or {}).items():

            def heard(change: Any, hear: Callable[[str], None] = hear) -> None:
                if values := [str(next(iter(point.values()))) for point in change.new.value if point]:
                    hear(values[0])

            live.selections.observe(heard, [name])
        self.widget.children = (live,)

    def say(self, text: str) -> None:
        """Show a sentence instead of a chart."""
        self.chart = None
        self.widget.children = (w.HTML(f"<p>{text}</p>"),)


def exported(chart: Any, form: str) -> bytes:
    """A chart as a file of its own that needs no network: ``"svg"``, ``"png"`` (twice the size, white) or ``"html"`` (interactive).

    Raises:
        ValueError: for another format, or without vl-convert.
    """
    if form not in FORMATS:
        raise ValueError(f"form={form!r} is unknown; use one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("vl_convert") is None:
        raise ValueError("figures are written by vl-convert, which is not installed; pip install vl-convert-python")
    import vl_convert

    spec = chart.properties(background="white").to_dict()
    if form == "png":
        png: bytes = vl_convert.vegalite_to_png(spec, scale=2)
        return png
    text: str = vl_convert.vegalite_to_svg(spec) if form == "svg" else vl_convert.vegalite_to_html(spec, bundle=True)
    return text.encode()


def _interactive() -> bool:
    return all(importlib.util.find_spec(module) is not None for module in ("anywidget", "vl_convert"))
