"""The widget twin: its state without a kernel, and the walk over its controls that lets an exception fail."""

import altair as alt
import ipywidgets as w
import pandas as pd
import pytest

from attnlab import figures
from attnlab.figures.twin import WIDGET, choices


def line(slope, kind):
    frame = pd.DataFrame({"x": [0, 1], "y": [0, slope]})
    mark = alt.Chart(frame).mark_line() if kind == "line" else alt.Chart(frame).mark_point()
    return mark.encode(x="x:Q", y="y:Q")


@pytest.fixture
def panel():
    return figures.twin(
        line,
        alt="A line through the origin",
        slope=w.IntSlider(2, min=1, max=9, description="slope"),
        kind=w.Dropdown(options=[("a line", "line"), ("points", "point")], description="kind"),
    )


def test_the_book_gets_the_state_and_no_widget(monkeypatch, panel):
    monkeypatch.setenv("ATTNLAB_BOOK", "1")
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert "<dt>slope</dt><dd>2</dd>" in bundle["text/html"]
    assert 'data-alt="A line through the origin"' in bundle["text/html"]
    assert "comes alive" in bundle["text/html"]


def test_a_live_notebook_gets_the_widget_and_the_state(monkeypatch, panel):
    monkeypatch.delenv("ATTNLAB_BOOK", raising=False)
    bundle = panel._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == panel.widget.model_id
    assert "<dt>kind</dt><dd>line</dd>" in bundle["text/html"]
    assert 'alt="A line through the origin"' in bundle["text/html"]


def test_grid_calls_every_setting(panel):
    tried = panel.grid()
    assert {values["slope"] for values in tried} == {1, 4, 6, 9}
    assert {values["kind"] for values in tried} == {"line", "point"}
    assert len(tried) == 8


def test_grid_keeps_to_its_limit_and_to_both_ends():
    seen = []
    panel = figures.twin(lambda a, b: seen.append((a, b)) or "<p></p>", a=list(range(20)), b=list(range(20)))
    assert len(panel.grid(limit=10)) == 10
    assert seen[0] == (0, 0)
    assert seen[-1] == (19, 19)
    with pytest.raises(ValueError, match="limit: got 1"):
        panel.grid(limit=1)


def test_an_exception_in_the_callback_fails_with_its_setting():
    panel = figures.twin(lambda divisor: str(1 / divisor), divisor=[1, 0])
    with pytest.raises(ZeroDivisionError) as caught:
        panel.grid()
    assert "{'divisor': 0}" in caught.value.__notes__[0]


def test_frames_and_other_results_have_a_static_state(monkeypatch):
    monkeypatch.setenv("ATTNLAB_BOOK", "1")
    table = figures.twin(lambda rows: pd.DataFrame({"n": range(rows)}), rows=[3])
    assert "<table" in table._repr_mimebundle_()["text/html"]
    number = figures.twin(lambda n: {"<n>": n}, n=[3])
    assert "&lt;n&gt;" in number._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (w.Checkbox(), [False, True]),
        (w.FloatSlider(min=0, max=1, step=0.5), [0, 0.5, 1.0]),
        (w.FloatLogSlider(min=0, max=2, step=1), [1.0, 10.0, 100.0]),
        (w.SelectionSlider(options=["a", "b"]), ["a", "b"]),
        (w.Dropdown(options={"one": 1}), [1]),
        (w.Text("the cat"), ["the cat"]),
    ],
)
def test_choices_of_a_control(control, expected):
    assert choices(control) == expected


def test_what_cannot_be_walked_is_named():
    with pytest.raises(ValueError, match="ColorPicker"):
        choices(w.ColorPicker())
    with pytest.raises(ValueError, match="controls: got none"):
        figures.twin(line)
    with pytest.raises(ValueError, match="cannot be moved"):
        figures.twin(line, slope=w.fixed(1), kind=["line"])
