"""How an altair chart reaches the reader: the book's own markup, or the renderer that suits a live notebook.

While the book is built (``ATTNLAB_BOOK=1``) a chart becomes a ``<figure>`` with its specification beside it as JSON;
``charts.js`` of the book draws it from files of the book alone. In a live notebook one of altair's own renderers is
chosen, offline if the machine can do that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from html import escape
from typing import Any

import altair as alt

from attnlab.figures.palette import CATEGORIES, SOFTMAX
from attnlab.lab import in_book

NAME = "attnlab"


def theme() -> alt.theme.ThemeConfig:
    """Return the chart theme. ``currentColor`` takes the text colour around the chart, so light and dark both work."""
    text: Any = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 13}
    return {
        "config": {
            "aria": False,  # the figure carries one text; marks one by one would be read out as hundreds of numbers
            "background": "transparent",
            "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "padding": 6,
            "view": {"continuousWidth": 420, "continuousHeight": 260, "stroke": None},
            "title": {
                "color": "currentColor",
                "subtitleColor": "currentColor",
                "fontSize": 15,
                "subtitleFontSize": 13,
                "anchor": "start",
                "offset": 12,
            },
            "axis": {
                **text,
                "labelLimit": 240,
                "titleLimit": 400,
                "titleFontWeight": "normal",
                "labelOverlap": "greedy",
                "labelSeparation": 5,
                "domainColor": "currentColor",
                "domainOpacity": 0.5,
                "tickColor": "currentColor",
                "tickOpacity": 0.5,
                "gridColor": "currentColor",
                "gridOpacity": 0.12,
            },
            "legend": {**text, "labelLimit": 260, "titleLimit": 300, "symbolSize": 110},
            "header": text,
            "mark": {"color": SOFTMAX},
            "text": {"color": "currentColor", "fontSize": 12},
            "rule": {"color": "currentColor"},
            "selection": {
                "interval": {
                    "mark": {
                        "fill": "currentColor",
                        "fillOpacity": 0.1,
                        "stroke": "currentColor",
                        "strokeOpacity": 0.5,
                    }
                }
            },
            "range": {"category": CATEGORIES},
        }
    }


def enable() -> str:
    """Register and switch on the theme and the renderer; return the renderer's name."""
    alt.theme.register(NAME, enable=True)(theme)
    alt.renderers.register(NAME, _mimebundle)
    if in_book():
        alt.renderers.enable(NAME)
    elif _importable("google.colab"):
        alt.renderers.enable("colab")
    elif _importable("anywidget") and _importable("vl_convert"):
        alt.renderers.enable("jupyter", offline=True)
    else:
        alt.renderers.enable("html")
    return str(alt.renderers.active)


def show(chart: Any, *, alt: str, caption: str = "", name: str = "") -> None:
    """Display a chart with the text that stands in for it.

    ``alt`` says what the figure shows to somebody who cannot see it. ``caption`` (plain text) says what to do and what
    to notice. ``name`` is the figure's id in the page, where a test or a link can reach it; without one it is derived
    from the chart. Raises ``ValueError`` if ``alt`` is empty.
    """
    from IPython.display import HTML, display

    display(described(chart, alt=alt, caption=caption, name=name))
    if caption and not in_book():
        display(HTML(f'<p style="max-width: 44em">{escape(caption)}</p>'))


def described(chart: Any, *, alt: str, caption: str = "", name: str = "") -> Any:
    """Return the chart with its alternative text, caption and name inside; ``ValueError`` if ``alt`` is empty."""
    if not alt.strip():
        raise ValueError("alt: got an empty text; say what the figure shows to somebody who cannot see it")
    return chart.properties(description=alt, usermeta={NAME: {"caption": caption, "name": name}})


def figure_html(spec: dict[str, Any]) -> str:
    """Return the markup that ``charts.js`` turns into a drawing.

    ``spec`` is a Vega-Lite specification with a ``description``, which becomes the alternative text. Raises
    ``ValueError`` if there is none.
    """
    text = spec.get("description", "")
    if not text:
        raise ValueError("spec: the chart has no alternative text; display it with figures.show(chart, alt=...)")
    extras = spec.get("usermeta", {}).get(NAME, {})
    body = json.dumps(spec, separators=(",", ":"), allow_nan=False)
    name = extras.get("name") or "chart-" + hashlib.sha256(body.encode()).hexdigest()[:10]
    caption = extras.get("caption", "")
    return (
        '<figure class="attnlab-figure">'
        f'<div class="attnlab-chart" id="{escape(name)}" data-alt="{escape(text)}"></div>'
        # "<" is the one character that could end the script element early
        f'<script type="application/json">{body.replace("<", chr(92) + "u003c")}</script>'
        f"<noscript><p>{escape(text)}</p></noscript>"
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + "</figure>"
    )


def _mimebundle(spec: dict[str, Any], **_: Any) -> dict[str, str]:
    """Render for the book: altair calls this with a chart's specification."""
    return {"text/html": figure_html(spec), "text/plain": f"[figure] {spec['description']}"}


def _importable(module: str) -> bool:
    """Say whether ``module`` could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
