from dataclasses import replace
from html.parser import HTMLParser

import pytest

from attnlab.claims import Card, Claim, format_measurement, format_number
from attnlab.claims.rules import parse

CLAIM = Claim(
    slug="aaren",
    id="same",
    statement="Both forms <agree> & match.",
    paper_value='"exactly"',
    source="section 3",
    source_read=False,
    quantity="largest difference",
    unit="1",
    confirm=parse("value < 1e-9", ["value"]),
    refute=parse("value > 1e-6", ["value"]),
    setting="float64, T = 63",
    seeds=(0, 1),
)
ROW = {
    "verdict": "confirmed",
    "value": 3e-16,
    "interval": None,
    "controls": {"float32": {"value": 2e-7, "interval": [1e-7, 3e-7]}},
    "seeds": [0, 1],
    "seconds": 0.5,
    "machine": {"platform": "Linux", "cpus": 2, "gpu": None},
    "date": "2026-01-02T03:04:05+00:00",
}


class Outline(HTMLParser):
    """Collects the balanced tags, the attributes of the section, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.section, self.words = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_html_is_balanced_escaped_and_says_everything():
    page = Card(CLAIM, ROW)._repr_html_()
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.section["class"] == "attnlab-claim"
    assert outline.section["data-verdict"] == "confirmed"
    text = "".join(outline.words)
    for part in (
        "Both forms <agree> & match.",
        '"exactly"',
        "section 3; quoted at second hand",
        "3e-16",
        "float32 2e-07",
    ):
        assert part in text, part
    for part in ("Seeds 0, 1", "0.5 s", "2 CPU cores", "2026-01-02", "value < 1e-9", "value > 1e-6", "✓ confirmed"):
        assert part in text, part
    assert "<agree>" not in page


def test_the_text_says_the_same():
    lines = repr(Card(CLAIM, ROW)).splitlines()
    assert lines[0] == "Claim aaren/same"
    assert [line.split("  ")[1] for line in lines[1:]] == [label for label, _ in Card(CLAIM, ROW).lines()]
    assert lines[-1].endswith("✓ confirmed")


def test_a_source_that_was_read_is_not_called_second_hand():
    assert "second hand" not in repr(Card(replace(CLAIM, source_read=True), ROW))


def test_a_hypothesis_of_ours_is_not_put_into_the_papers_mouth():
    assert repr(Card(CLAIM, ROW)).count("The paper says") == 1
    text = repr(Card(replace(CLAIM, ours=True), ROW))
    assert "The paper says" not in text
    assert "Its value" not in text
    assert f"Our hypothesis  {CLAIM.statement}" in text


def test_a_gpu_is_named_and_no_seed_is_said():
    row = {**ROW, "machine": {"platform": "Linux", "cpus": 2, "gpu": "GPU 9000"}, "seeds": []}
    assert "No randomness; 0.5 s; GPU 9000; 2026-01-02" in repr(Card(CLAIM, row))


def test_a_rule_of_application_is_shown():
    claim = replace(CLAIM, applies=parse("value < 1", ["value"]))
    assert "<dt>Applies if</dt><dd><code>value &lt; 1</code></dd>" in Card(claim, ROW)._repr_html_()


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (16.0, None, "16"),
        (0.0, None, "0"),
        (-4.9512, None, "-4.95"),
        (0.78123, None, "0.781"),
        (3.2e-16, None, "3.2e-16"),
        (1234567.0, None, "1.23e+06"),
        (0.78123, (0.7541, 0.8083), "0.781 [0.754, 0.808]"),
        (10, (8, 12), "10 [8, 12]"),
        (93.70, (91.2, 95.9), "93.7 [91.2, 95.9]"),
        (1234.5, (1000.2, 1500.9), "1234 [1000, 1501]"),
        (3e-16, (1e-16, 5e-16), "3e-16 [1e-16, 5e-16]"),
        (5.0, (5.0, 5.0), "5"),
        (2.5e6, (2e6, 3e6), "2.5e+06 [2e+06, 3e+06]"),
    ],
)
def test_numbers_have_the_digits_that_their_spread_allows(value, interval, text):
    assert format_measurement(value, interval) == text


def test_numbers_round_to_three_digits():
    assert format_number(0.123456) == "0.123"
