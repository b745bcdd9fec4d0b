"""The explorer's target and mean, who gains from the mean, and a head of the real model."""

import re

from playwright.sync_api import expect

FIGURE = "labels-needed"


def shapes(page, figure, mark):
    """The paths of one kind of mark, joined, to see whether they move."""
    return page.locator(f"#{figure} svg .{mark}.role-mark path").evaluate_all(
        "all => all.map(x => x.getAttribute('d') + x.getAttribute('transform')).join()"
    )


def changed(page, figure, mark, before):
    page.wait_for_function(
        """([figure, mark, old]) => [...document.querySelectorAll(`#${figure} svg .${mark}.role-mark path`)].map(
            x => x.getAttribute('d') + x.getAttribute('transform')).join() != old""",
        arg=[figure, mark, before],
    )


def test_the_mean_moves_one_line_and_the_score_of_a_key_that_equals_the_query(page):
    scores, lines = shapes(page, "labels-needed", "mark-area"), shapes(page, "labels-needed", "mark-line")
    page.locator("#labels-needed input[type=radio][value='4']").check()
    changed(page, "labels-needed", "mark-area", scores)
    changed(page, "labels-needed", "mark-line", lines)


def test_another_target_has_other_curves(page):
    lines, scores = shapes(page, "labels-needed", "mark-line"), shapes(page, "labels-needed", "mark-area")
    page.locator("#labels-needed select").select_option("query 2")
    changed(page, "labels-needed", "mark-line", lines)
    assert shapes(page, "labels-needed", "mark-area") == scores


def test_a_stronger_mean_moves_the_ratios(page):
    expect(page.locator("#gains svg text").filter(has_text=re.compile("^gains$"))).to_have_count(1)
    points = shapes(page, "gains", "mark-symbol")
    page.locator("#gains input[type=radio][value='4']").check()
    changed(page, "gains", "mark-symbol", points)


def test_a_clicked_head_shows_its_ratio_further_back(page):
    cells = page.locator("#real-heads svg .mark-rect.role-mark path")
    expect(cells).to_have_count(270)
    line = shapes(page, "real-heads", "mark-line")
    cells.nth(9 * 9 + 1).click(force=True)
    changed(page, "real-heads", "mark-line", line)
    expect(page.locator("#real-heads svg text").filter(has_text=re.compile(r"^\d+\.\d$"))).not_to_have_count(0)
