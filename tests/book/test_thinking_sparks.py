"""The grid of heads: slider, run, threshold and click change what they should."""

import re

from playwright.sync_api import expect

FIGURE = "spark-map"
MAP = f"#{FIGURE}"
COUNT = re.compile(r"^\d+ heads in the circuit: \d+ new, \d+ lost$")


def counted(page) -> list[int]:
    """Heads in the circuit, new and lost ones, as the figure prints them."""
    text = page.locator(f"{MAP} svg text").filter(has_text=COUNT).text_content()
    return [int(number) for number in re.findall(r"\d+", text)]


def slider(page, name: str):
    return (
        page.locator(f"{MAP} label", has_text=name)
        .locator("input[type=range]")
        .or_(page.locator(f"{MAP} .vega-bind", has_text=name).locator("input[type=range]"))
        .first
    )


def test_the_base_has_neither_new_nor_lost_heads(page):
    slider(page, "updates").fill("0")
    expect(page.locator(f"{MAP} svg text", has_text=re.compile(": 0 new, 0 lost$"))).to_have_count(1)
    assert counted(page)[0] > 0


def test_a_higher_threshold_leaves_fewer_heads(page):
    slider(page, "threshold").fill("0.01")
    page.wait_for_timeout(200)
    low = counted(page)
    slider(page, "threshold").fill("0.05")
    page.wait_for_timeout(200)
    assert counted(page)[0] < low[0]


def test_another_run_is_drawn(page):
    cells = (
        f"() => [...document.querySelectorAll('{MAP} svg .mark-rect path')].map((p) => p.getAttribute('fill')).join()"
    )
    before = page.evaluate(cells)
    page.locator(f"{MAP} input[type=radio]").nth(2).check()
    page.wait_for_function(f"(before) => ({cells})() !== before", arg=before)


def test_a_click_on_a_head_shows_where_it_looks(page):
    line = page.locator(f"{MAP} svg text", has_text=re.compile(r"^Head \d\.\d: "))
    expect(line).to_have_count(1)
    before = line.text_content()
    first = page.locator(f"{MAP} svg .mark-rect").first.locator("path")
    name = re.search(r"\d\.\d", before)[0]
    layer, head = map(int, name.split("."))
    first.nth(0 if (layer, head) != (0, 0) else 9).click()
    expect(page.locator(f"{MAP} svg text", has_text=before)).to_have_count(0)
    expect(line).to_have_count(1)
