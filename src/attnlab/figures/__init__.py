"""Charts of the book and the widgets twinned with them."""

from __future__ import annotations

from attnlab.figures.palette import COLOURS, colours
from attnlab.figures.render import enable, figure_html, show
from attnlab.figures.twin import Twin, twin

__all__ = ["COLOURS", "Twin", "colours", "enable", "figure_html", "show", "twin"]
