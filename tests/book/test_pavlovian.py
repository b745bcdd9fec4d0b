"""The conditioning chamber, the inside of a store, and the linked figures of capacity and depth."""

from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "chamber"


def shapes(page, figure, mark):
    return page.locator(f"#{figure} svg .mark-{mark} path").evaluate_all(
        "all => all.map(x => x.getAttribute('d')).join()"
    )


def changes(page, figure, mark, before):
    page.wait_for_function(
        "([figure, mark, old]) => [...document.querySelectorAll(`#${figure} svg .mark-${mark} path`)]"
        ".map(x => x.getAttribute('d')).join() != old",
        arg=[figure, mark, before],
    )


def test_the_control_animal_learns_what_the_other_does_not(page):
    before = shapes(page, "chamber", "line")
    page.locator("#chamber input[type=radio][value=control]").check()
    changes(page, "chamber", "line", before)
    before = shapes(page, "chamber", "rect")
    page.locator("#chamber select").select_option("extinction")
    changes(page, "chamber", "rect", before)
    before = shapes(page, "chamber", "line")
    page.locator("#chamber input[type=radio][value='Hebb']").check()
    changes(page, "chamber", "line", before)


def test_more_pairs_lose_signs_and_the_delta_rule_keeps_the_newest(page):
    def recalled():
        text = words(page, "store", r"^\d+ of \d+ signs recalled$").text_content()
        right, _, pairs, *_ = text.split()
        return int(right), int(pairs)

    assert recalled()[1] == 12
    slider = page.locator("#store input[type=range]")
    slider.fill("4")
    expect(words(page, "store", r"of 4 signs recalled$")).to_have_count(1)
    few = recalled()[0] / 4
    slider.fill("24")
    expect(words(page, "store", r"of 24 signs recalled$")).to_have_count(1)
    assert recalled()[0] / 24 <= few
    before = shapes(page, "store", "rect")
    page.locator("#store input[type=radio][value=delta]").check()
    changes(page, "store", "rect", before)


def test_a_clicked_cue_is_tested(page):
    before = shapes(page, "store", "rect")
    page.locator("#store svg .mark-rect.role-mark path").nth(12 * 5 + 2).click(force=True)
    changes(page, "store", "rect", before)


def test_a_clicked_width_shows_how_failure_sets_in(page):
    expect(words(page, "capacity", "^d_k = 512$")).to_have_count(1)
    page.locator("#capacity svg .mark-symbol path").first.click(force=True)
    expect(words(page, "capacity", "^d_k = 16$")).to_have_count(1)


def test_fewer_pairs_let_a_chain_last(page):
    before = shapes(page, "depth", "line")
    page.locator("#depth input[type=radio][value='8']").check()
    changes(page, "depth", "line", before)
