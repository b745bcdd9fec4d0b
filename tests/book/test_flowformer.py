"""The flow network: buttons change what is fixed, a click follows one source."""

import pytest
from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "flow-network"
NETWORK = f"#{FIGURE}"


def fix(page, step):
    page.locator(f"{NETWORK} .vega-bind").get_by_text(step).click()


def test_the_side_that_is_fixed_is_one_and_the_sum_is_conserved(page):
    expect(words(page, FIGURE, r"^q\d\s+1\.00$")).to_have_count(0)
    fix(page, "2 fix sinks")
    expect(words(page, FIGURE, r"^q\d\s+1\.00$")).to_have_count(6)
    expect(words(page, FIGURE, r"sent in all 6\.00, received in all 6\.00")).to_have_count(1)
    fix(page, "3 fix sources")
    expect(words(page, FIGURE, r"^k\d\s+1\.00$")).to_have_count(8)
    expect(words(page, FIGURE, r"sent in all 8\.00, received in all 8\.00")).to_have_count(1)
    fix(page, "5 allocation")
    expect(words(page, FIGURE, r"in all [68]\.00")).to_have_count(0)


SHADES = f"""[...document.querySelectorAll("{NETWORK} svg .mark-area path")].map(
    (path) => path.getAttribute("opacity") ?? getComputedStyle(path).opacity)"""


@pytest.mark.parametrize(("bar", "edges"), [(0, 6), (8, 8)])
def test_a_click_on_a_node_dims_all_edges_but_its_own(page, bar, edges):
    before = page.evaluate(SHADES)
    assert len(before) == 48
    assert len(set(before)) == 1
    page.locator(f"{NETWORK} svg .mark-rect path").nth(bar).click()  # eight sources, then six sinks
    page.wait_for_function(f"() => new Set({SHADES}).size === 2")
    assert page.evaluate(SHADES).count(before[0]) == edges
