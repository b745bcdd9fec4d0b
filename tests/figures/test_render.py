"""The renderer: markup for the book, one of altair's renderers for a live notebook, and a text for every figure."""

import json
import re

import altair as alt
import pandas as pd
import pytest

from attnlab import figures
from attnlab.figures import render


@pytest.fixture
def book(monkeypatch):
    """Charts render as they do while the book is built."""
    monkeypatch.setenv("ATTNLAB_BOOK", "1")
    assert figures.enable() == "attnlab"


@pytest.fixture
def chart():
    frame = pd.DataFrame({"x": [1, 2], "label": ["</script><b>", "a & b"]})
    return alt.Chart(frame, title="How far?").mark_point().encode(x="x:Q", y="label:N")


def spec_in(html):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1])


def test_book_markup_carries_the_specification_and_the_text(book, chart):
    described = render.described(chart, alt='Two "points" <rise>', caption="Drag & look", name="rise")
    bundle = described._repr_mimebundle_(None, None)
    html = bundle["text/html"]
    assert 'id="rise"' in html
    assert 'data-alt="Two &quot;points&quot; &lt;rise&gt;"' in html
    assert "<figcaption>Drag &amp; look</figcaption>" in html
    assert bundle["text/plain"] == '[figure] Two "points" <rise>'
    values = next(iter(spec_in(html)["datasets"].values()))
    assert values[0]["label"] == "</script><b>", "data that looks like markup must not end the script element"


def test_a_chart_without_text_is_refused(book, chart):
    with pytest.raises(ValueError, match=r"figures\.show\(chart, alt="):
        chart._repr_mimebundle_(None, None)
    with pytest.raises(ValueError, match="alt: got an empty text"):
        figures.show(chart, alt="  ")


def test_ids_are_stable_and_differ_between_charts(chart):
    first = figures.figure_html(chart.properties(description="a").to_dict())
    again = figures.figure_html(chart.properties(description="a").to_dict())
    other = figures.figure_html(chart.properties(description="b").to_dict())
    assert first == again
    assert re.search(r' id="([^"]*)"', first)[1] != re.search(r' id="([^"]*)"', other)[1]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"google.colab"}, "colab"),
        ({"anywidget", "vl_convert"}, "jupyter"),
        ({"anywidget"}, "html"),
        (set(), "html"),
    ],
)
def test_a_live_notebook_gets_a_renderer_of_altair(monkeypatch, present, expected):
    monkeypatch.delenv("ATTNLAB_BOOK", raising=False)
    monkeypatch.setattr(render, "_importable", lambda module: module in present)
    chosen = []
    monkeypatch.setattr(alt.renderers, "enable", lambda name, **options: chosen.append((name, options)))
    figures.enable()
    assert chosen == [(expected, {"offline": True} if expected == "jupyter" else {})]


def test_a_missing_parent_package_counts_as_missing():
    assert render._importable("json")
    assert not render._importable("no_such_package.inside")


def test_theme_follows_the_page_and_passes_the_schema(book, chart):
    config = chart.to_dict()["config"]
    assert config["background"] == "transparent"
    assert config["axis"]["labelColor"] == "currentColor"


def test_colours_by_name():
    assert figures.colours("softmax", "control") == ["#0072B2", "#7f7f7f"]
    with pytest.raises(ValueError, match="no colour for \\['sofmax'\\]"):
        figures.colours("sofmax")
