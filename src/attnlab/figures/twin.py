"""The live twin of a figure: widgets around the pure function that the static page calls once.

In a notebook with a kernel the reader moves the controls. Where no kernel runs, the same object shows the values its
controls stand at and what the function returns for them.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets
from IPython.display import HTML, display

from attnlab.figures.render import described, figure_html
from attnlab.lab import in_book

WIDGET = "application/vnd.jupyter.widget-view+json"
NOTE = "This panel comes alive in JupyterLab, VS Code or Colab; here it shows one setting."
_CHOICES = (
    ipywidgets.Dropdown,
    ipywidgets.RadioButtons,
    ipywidgets.Select,
    ipywidgets.SelectionSlider,
    ipywidgets.ToggleButtons,
)


class Twin:
    """A pure function, one control for each of its arguments, and a meaningful state without a kernel."""

    def __init__(self, fn: Callable[..., Any], controls: dict[str, Any], *, alt: str = "", caption: str = "") -> None:
        self.fn = fn
        self.alt = alt
        self.caption = caption
        self.widget = ipywidgets.interactive(self._display, **controls)
        self.controls: dict[str, Any] = dict(zip(controls, self.widget.kwargs_widgets, strict=True))
        fixed = [name for name, child in self.controls.items() if isinstance(child, ipywidgets.fixed)]
        if fixed:
            raise ValueError(f"controls: {fixed} cannot be moved; bind fixed arguments with functools.partial")

    def values(self) -> dict[str, Any]:
        """Return what each control stands at."""
        return {name: control.value for name, control in self.controls.items()}

    def call(self, **values: Any) -> Any:
        """Call the function; a chart gets the twin's alternative text unless it has its own."""
        result = self.fn(**values)
        if _is_chart(result) and not isinstance(result.description, str):
            result = described(result, alt=self.alt, caption=self.caption)
        return result

    def grid(self, limit: int = 48) -> list[dict[str, Any]]:
        """Call the function over the grid of the controls' values; return the settings that were tried.

        At most ``limit`` settings, spread evenly with both ends in. An exception passes through with the setting noted.
        """
        if limit < 2:
            raise ValueError(f"limit: got {limit}; at least 2, for both ends of the grid")
        names = list(self.controls)
        settings = list(itertools.product(*(choices(self.controls[name]) for name in names)))
        if len(settings) > limit:
            settings = [settings[round(i * (len(settings) - 1) / (limit - 1))] for i in range(limit)]
        tried = [dict(zip(names, setting, strict=True)) for setting in settings]
        for values in tried:
            try:
                static_html(self.call(**values))
            except Exception as error:
                error.add_note(f"with the controls at {values}")
                raise
        return tried

    def _display(self, **values: Any) -> None:
        result = self.call(**values)
        display(HTML(result) if isinstance(result, str) else result)

    def _static(self) -> str:
        """Return the state without a kernel: the settings, the result, and where the panel comes alive."""
        settings = "".join(
            f"<div><dt>{escape(control.description or name)}</dt><dd>{escape(str(control.value))}</dd></div>"
            for name, control in self.controls.items()
        )
        result = static_html(self.call(**self.values()))
        return f'<div class="attnlab-twin"><dl>{settings}</dl>{result}<p class="attnlab-note">{NOTE}</p></div>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {
            "text/html": self._static(),
            "text/plain": f"[panel] {getattr(self.fn, '__name__', 'function')} at {self.values()}",
        }
        if not in_book():
            bundle[WIDGET] = self.widget._repr_mimebundle_()[WIDGET]
        return bundle


def twin(fn: Callable[..., Any], /, *, alt: str = "", caption: str = "", **controls: Any) -> Twin:
    """Return the live twin of ``fn``, a pure function that returns an altair chart, a data frame or HTML.

    ``controls`` names each argument of ``fn`` with an ipywidgets control (or what ``ipywidgets.interactive`` makes one
    of, such as a list of options). ``alt`` and ``caption`` go with a chart that has no description of its own.
    Raises ``ValueError`` if there is no control.
    """
    if not controls:
        raise ValueError("controls: got none; name each argument of the function with an ipywidgets control")
    return Twin(fn, controls, alt=alt, caption=caption)


def choices(control: Any, points: int = 4) -> list[Any]:
    """Return the values of one control that a test should try: all options, or up to ``points`` steps of a range.

    Raises ``ValueError`` for a control whose values cannot be listed.
    """
    if isinstance(control, _CHOICES):
        options = list(control.options.items() if isinstance(control.options, dict) else control.options)
        labelled = all(isinstance(option, tuple) and len(option) == 2 for option in options)
        return [option[1] for option in options] if labelled else options
    if isinstance(control, ipywidgets.Checkbox | ipywidgets.ToggleButton):
        return [False, True]
    if isinstance(control, ipywidgets.FloatLogSlider):
        exponents = _spread(control.min, control.max, control.step, points)
        return [control.base**exponent for exponent in exponents]
    if isinstance(control, ipywidgets.IntSlider | ipywidgets.BoundedIntText):
        return [int(value) for value in _spread(control.min, control.max, control.step, points)]
    if isinstance(control, ipywidgets.FloatSlider | ipywidgets.BoundedFloatText):
        return _spread(control.min, control.max, control.step or 0.0, points)
    if isinstance(control, ipywidgets.Text | ipywidgets.Textarea):
        return [control.value]
    raise ValueError(f"control: cannot list the values of {type(control).__name__}; a slider or a choice would do")


def static_html(result: Any) -> str:
    """Return ``result`` as HTML that needs no kernel."""
    if isinstance(result, str):
        return result
    if _is_chart(result):
        spec = result.to_dict()
        if in_book():
            return figure_html(spec)
        return _picture(spec)
    if hasattr(result, "to_html"):
        return f'<div class="attnlab-scroll">{result.to_html(border=0)}</div>'
    own = getattr(result, "_repr_html_", lambda: None)()
    return own if own is not None else f"<pre>{escape(repr(result))}</pre>"


def _picture(spec: dict[str, Any]) -> str:
    """Return a chart as an image for a saved notebook, or its text where the converter is not installed."""
    text = escape(spec["description"])
    if importlib.util.find_spec("vl_convert") is None:
        return f"<p>{text}</p>"
    import vl_convert

    data = base64.b64encode(vl_convert.vegalite_to_svg(spec).encode()).decode()
    return f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def _spread(low: float, high: float, step: float, points: int) -> list[float]:
    """Return up to ``points`` values from ``low`` to at most ``high`` that lie on the steps of a slider."""
    if step <= 0:
        return [low + (high - low) * i / (points - 1) for i in range(points)]
    count = int((high - low) / step + 1e-9)
    picks = sorted({round(i * count / (points - 1)) for i in range(points)})
    return [low + pick * step for pick in picks]


def _is_chart(result: Any) -> bool:
    """Say whether ``result`` is an altair chart of any kind."""
    import altair

    return isinstance(result, altair.TopLevelMixin)
