"""The linked picture of the decays: a clicked head and a chosen schedule change what they should."""

from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "decay-map"
MAP = f"#{FIGURE}"


def mask(page):
    """How opaque the entries of the mask are, in the order of the drawing."""
    return page.evaluate(
        f"[...document.querySelectorAll('{MAP} svg .mark-rect path')].map((mark) => mark.getAttribute('opacity'))"
    )


def test_a_click_on_a_head_draws_its_mask(page):
    expect(
        words(page, FIGURE, r"^Layer 0, head 1 keeps 0\.368 a token:half of a write is gone after 0\.69 tokens")
    ).to_have_count(1)
    before = mask(page)
    words(page, FIGURE, r"^8\.3$").click(force=True)  # the cell, through its label
    expect(
        words(page, FIGURE, r"^Layer 11, head 1 keeps 0\.92 a token:half of a write is gone after 8\.3 tokens")
    ).to_have_count(1)
    assert mask(page) != before


def test_the_schedule_changes_the_same_head(page):
    page.locator(f"{MAP} .vega-bind", has_text="schedule").locator("select").select_option("eq. 10, heads from 0")
    expect(words(page, FIGURE, "^Layer 0, head 1 keeps everything:nothing is forgotten")).to_have_count(1)
    expect(words(page, FIGURE, "^∞$")).to_have_count(12)
