"""The explorer of circuits: a panel for a live notebook, and its static twin for the book."""

from attnlab.figures.explore.panel import CircuitPanel
from attnlab.figures.explore.static import Study, explorer_chart, study

__all__ = ["CircuitPanel", "Study", "explorer_chart", "study"]
