"""The figure of the multiple-choice chapter: radios and menu change what they should, a click lights up one prompt."""

from playwright.sync_api import expect

FIGURE = "letter-map"
MAP = f"#{FIGURE}"
FILLS = f"""() => [...document.querySelectorAll("{MAP} svg .mark-symbol path")]
    .filter((path) => path.hasAttribute("transform") && path.getAttribute("fill"))
    .map((path) => path.getAttribute("fill"))"""
FAINT = f"""() => [...document.querySelectorAll("{MAP} svg .mark-symbol path")]
    .filter((path) => Number(path.getAttribute("opacity") ?? 1) < 0.2).length"""


def choose(page, value):
    page.locator(f'{MAP} input[type=radio][value="{value}"]').check()
    page.wait_for_timeout(100)


def test_in_order_place_and_letter_colour_alike_and_shuffled_they_do_not(page):
    by_place = page.evaluate(FILLS)
    assert len(set(by_place)) >= 4
    choose(page, "letter")
    assert page.evaluate(FILLS) == by_place
    choose(page, "shuffled")
    by_letter = page.evaluate(FILLS)
    choose(page, "place")
    assert page.evaluate(FILLS) != by_letter


def test_being_right_needs_fewer_colours(page):
    before = len(set(page.evaluate(FILLS)))
    choose(page, "right or wrong")
    assert len(set(page.evaluate(FILLS))) < before


def test_the_menu_changes_the_head(page):
    menu = page.locator(f"{MAP} select")
    names = menu.locator("option").all_text_contents()
    expect(page.locator(f"{MAP} svg text", has_text=f"Labels that head {names[0]} looks at")).to_have_count(1)
    menu.select_option(names[-1])
    expect(page.locator(f"{MAP} svg text", has_text=f"Labels that head {names[-1]} looks at")).to_have_count(1)


def test_a_click_lights_up_one_prompt(page):
    assert page.evaluate(FAINT) == 0
    page.locator(f"{MAP} svg .mark-symbol path").first.click(force=True)
    page.wait_for_function(f"() => ({FAINT})() > 0")
