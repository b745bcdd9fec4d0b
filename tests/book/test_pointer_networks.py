"""The step, the input and the network of the first figure, the measure by size, and one curve out of many."""

from playwright.sync_api import expect

from tests.book.drawing import move, words

FIGURE = "watch"


def drawing(page, figure):
    return page.locator(f"#{figure} svg").first.inner_html()


def changed(page, figure, before):
    page.wait_for_function(
        "([figure, old]) => document.querySelector(`#${figure} svg`).innerHTML !== old", arg=[figure, before]
    )


def test_a_step_moves_the_weight_and_a_larger_input_has_names_up_to_its_size(page):
    before = drawing(page, "watch")
    move(page, "watch", "ptr_step", 5)
    changed(page, "watch", before)
    expect(words(page, "watch", "^20$")).to_have_count(0)
    page.locator("#watch input[type=radio][value='20 points']").check()
    expect(words(page, "watch", "^20$")).not_to_have_count(0)
    before = drawing(page, "watch")
    page.locator("#watch input[type=radio][value='blending attention']").check()
    changed(page, "watch", before)
    expect(page.locator("#watch svg")).to_have_count(1)


def test_exact_answers_and_area_are_two_pictures(page):
    before = drawing(page, "sizes")
    page.locator("#sizes select").select_option("area of the hull (of simple ones)")
    changed(page, "sizes", before)
    before = drawing(page, "sizes")
    page.locator("#sizes input[type=radio][value='400 updates']").check()
    changed(page, "sizes", before)


def test_a_name_in_the_legend_singles_out_its_curves(page):
    before = drawing(page, "learning")
    page.locator("#learning .role-legend-symbol path").nth(1).click(force=True)
    changed(page, "learning", before)
