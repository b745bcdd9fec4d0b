"""The strip of tokens: pointing draws links, sink and window change what is drawn; a click on the legend follows one rule."""

import pytest

FIGURE = "rhythm"
STRIP = f"#{FIGURE}"
LINKS = f"() => [...document.querySelectorAll('{STRIP} svg .mark-rule')].map((group) => group.innerHTML).join()"
RECTS = f"() => [...document.querySelectorAll('{STRIP} svg .mark-rect')].map((group) => group.innerHTML).join()"


def word(page, number: int):
    """A token of the strip, by its place."""
    return page.locator(f"{STRIP} svg .mark-text.role-mark text").nth(number)


def point_at(page, number: int) -> None:
    word(page, number).scroll_into_view_if_needed()
    box = word(page, number).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_token_is_chosen_from_the_start(page):
    assert page.evaluate(LINKS).count("<line") + page.evaluate(LINKS).count("<path") >= 3


def test_pointing_at_a_token_draws_its_links(page):
    seen = [page.evaluate(LINKS)]
    for number in (50, 35, 20):  # upwards: the tooltip of one token lies over those to the right and below
        point_at(page, number)
        page.wait_for_function(f"(before) => ({LINKS})() !== before", arg=seen[-1])
        seen.append(page.evaluate(LINKS))
    assert len(set(seen)) == 4


def test_pointing_at_the_lines_chooses_a_token_too(page):
    before = page.evaluate(LINKS)
    panel = page.locator(f"{STRIP} svg .mark-line.role-mark path").first
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_function(f"(before) => ({LINKS})() !== before", arg=before)


def test_the_sink_and_the_window_change_fill_and_bars(page):
    start = page.evaluate(RECTS)
    page.locator(f"{STRIP} input[type=radio][value=kept]").check()
    page.wait_for_function(f"(before) => ({RECTS})() !== before", arg=start)
    kept = page.evaluate(RECTS)
    page.locator(f"{STRIP} select").select_option("30")
    page.wait_for_function(f"(before) => ({RECTS})() !== before", arg=kept)


def test_nothing_is_wider_than_the_page(page):
    for name in ("rhythm", "spans", "null", "anchors"):
        box = page.locator(f"#{name} svg").bounding_box()
        assert box["width"] <= page.viewport_size["width"], name


def test_a_click_on_the_legend_follows_one_rule(page):
    if not page.locator("#credit").count():
        pytest.skip("no record of the credit rules yet")
    lines = "() => [...document.querySelectorAll('#credit svg .mark-line')].map((group) => group.innerHTML).join()"
    before = page.evaluate(lines)
    page.locator("#credit svg .role-legend-label text").first.click()
    page.wait_for_function(f"(before) => ({lines})() !== before", arg=before)
