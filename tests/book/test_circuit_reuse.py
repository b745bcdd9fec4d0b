"""The linked maps of the first chapter: slider, menu and click change what they should."""

import re

from playwright.sync_api import expect

FIGURE = "reuse-map"
PURPLE = "#7B4FA3".lower()
MAP = f"#{FIGURE}"
LIT = f"""() => [...document.querySelectorAll("{MAP} svg .mark-rect path")]
    .filter((path) => (path.getAttribute("fill") || "").toLowerCase() === "{PURPLE}").length"""


def shared(page) -> int:
    """The number that the figure prints."""
    text = page.locator(f"{MAP} svg text").filter(has_text=re.compile(r"^\d+ of \d+ heads shared$")).text_content()
    return int(text.split()[0])


def test_purple_cells_are_the_shared_heads_on_both_maps(page):
    assert page.evaluate(LIT) == 2 * shared(page) > 0


def test_the_slider_and_the_menu_change_how_many_are_shared(page):
    before = shared(page)
    slider = page.locator(f"{MAP} input[type=range]")
    slider.fill("5")
    expect(page.locator(f"{MAP} svg text", has_text=re.compile(r" of 5 heads shared$"))).to_have_count(1)
    assert shared(page) < before
    assert page.evaluate(LIT) == 2 * shared(page)
    slider.fill("27")
    page.locator(f"{MAP} select").select_option("Greater-than")
    expect(page.locator(f"{MAP} svg text", has_text=f"{before} of 27 heads shared")).to_have_count(0)
    assert shared(page) < before


def test_a_click_on_a_head_shows_where_it_looks(page):
    expect(page.locator(f"{MAP} svg text", has_text="Where head 23.3 looks")).to_have_count(1)
    bars = f"() => [...document.querySelectorAll('{MAP} svg .mark-rect')].at(-1).innerHTML"
    before = page.evaluate(bars)
    # the purple cell of another head: a shared one is on both maps, and the first is not 23.3
    page.locator(f'{MAP} svg .mark-rect path[fill="{PURPLE}" i]').first.click()
    expect(page.locator(f"{MAP} svg text", has_text="Where head 23.3 looks")).to_have_count(0)
    assert page.evaluate(bars) != before
