"""One equation, six models: the list changes the matrix, a click splits a cell."""

from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "equation"
BAR = "#equation svg .mark-rect.role-mark path"


def colours(page):
    return page.locator(BAR).evaluate_all("all => all.map(x => x.getAttribute('fill')).join()")


def test_another_mixer_draws_another_matrix_and_splits_the_cell_anew(page):
    expect(page.locator(BAR)).to_have_count(324)  # 24 * 25 / 2 cells, and 24 ranges of Λ
    split = words(page, FIGURE, "^C·B")
    before, told = colours(page), split.first.text_content()
    page.locator("#equation select").select_option("Mamba-2")
    page.wait_for_function(
        "([path, old]) => [...document.querySelectorAll(path)].map(x => x.getAttribute('fill')).join() != old",
        arg=[BAR, before],
    )
    expect(words(page, FIGURE, "^token 1 → output 22")).to_have_count(1)
    assert split.first.text_content() != told


def test_a_clicked_cell_is_named_and_split(page):
    expect(page.locator(BAR)).to_have_count(324)
    page.locator(BAR).nth(54).click(force=True)  # rows 0 to 9 hold 55 cells
    expect(words(page, FIGURE, "^token 9 → output 9")).to_have_count(1)
    expect(words(page, FIGURE, "∏Λ 1 ")).to_have_count(1)  # nothing lies between a token and itself
