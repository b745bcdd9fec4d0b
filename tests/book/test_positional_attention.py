"""The wires stay while the numbers change, the standard model's maps move with c and the positional ones do not."""

import re

import pytest
from playwright.sync_api import expect

from tests.book.drawing import move

FIGURE = "wires"


def boxes(page):
    """The texts in the rounded boxes, which are drawn last."""
    return page.locator("#wires svg .mark-text.role-mark").last.locator("text")


def numbers(page):
    """The numbers in the rounded boxes."""
    return boxes(page).all_text_contents()


def drawn(page, figure, kind, group):
    """Outline and fill of all marks of a kind in one group of marks."""
    marks = page.locator(f"#{figure} svg .{kind}.role-mark").nth(group)
    return marks.evaluate('g => [...g.children].map(m => m.outerHTML.replace(/aria-[a-z]+="[^"]*"/g, \'\')).join()')


def test_other_numbers_leave_the_wires_alone(page):
    before, wires = numbers(page), drawn(page, "wires", "mark-rule", 0)
    page.locator("#wires input[type=radio]").nth(1).check()
    expect(boxes(page).first).not_to_have_text(before[0])
    assert drawn(page, "wires", "mark-rule", 0) == wires
    move(page, "wires", "wire_scale", 50)
    expect(page.locator("#wires svg text").filter(has_text=re.compile("00$"))).not_to_have_count(0)
    assert drawn(page, "wires", "mark-rule", 0) == wires


def test_another_algorithm_has_other_wires_and_ends_sorted(page):
    wires = drawn(page, "wires", "mark-rule", 0)
    page.locator("#wires select").select_option("sorting")
    expect(boxes(page)).to_have_count(56)  # the input and six layers of eight
    assert drawn(page, "wires", "mark-rule", 0) != wires
    last = [float(text.replace("−", "-")) for text in numbers(page)[-8:]]
    assert last == sorted(last)


def test_a_click_shows_what_reaches_a_place(page):
    lit = page.locator("#wires svg .mark-rule.role-mark").nth(1).locator("line")
    seven = lit.count()
    boxes(page).nth(0).click(force=True)  # place 1 hears itself alone
    expect(lit).to_have_count(3)
    assert seven > 3


def test_only_the_standard_maps_move_with_the_scale(page):
    fixed, moving = (drawn(page, "explorer", "mark-rect", group) for group in (0, 1))
    move(page, "explorer", "attention_c", 10)
    page.wait_for_function(
        "old => [...document.querySelectorAll('#explorer svg .mark-rect.role-mark')[1].children]"
        '.map(m => m.outerHTML.replace(/aria-[a-z]+="[^"]*"/g, \'\')).join() !== old',
        arg=moving,
    )
    assert drawn(page, "explorer", "mark-rect", 0) == fixed


@pytest.mark.parametrize("figure", ["errors", "surgery", "record"])
def test_charts_fit_and_have_points(page, figure):
    expect(page.locator(f"#{figure} svg")).to_have_count(1)
    assert page.locator(f"#{figure} svg .mark-symbol path").count() > 5
    room, width = page.locator(f"#{figure}").evaluate("box => [box.clientWidth, box.querySelector('svg').clientWidth]")
    assert width <= max(room, 560) + 1
