"""The ring's step and layout, the chosen mixer and the clicked row, and the sliders of the transfer that hides."""

from playwright.sync_api import expect

from tests.book.drawing import move, words

FIGURE = "ring"


def test_contiguous_shards_let_the_first_rank_wait_and_zigzag_does_not(page):
    full, idle = words(page, "ring", "^100%$"), words(page, "ring", "^0%$")
    expect(idle).not_to_have_count(0)
    before = full.count()
    page.locator("#ring input[type=radio][value=zigzag]").check()
    expect(words(page, "ring", "^50%$")).not_to_have_count(2)  # every block of zigzag is half full, the axes apart
    assert full.count() < before
    move(page, "ring", "ring_step", 3)
    expect(page.locator("#ring svg")).to_have_count(1)


def test_another_mixer_and_another_row_change_the_influence(page):
    def bars():
        return page.locator("#matrices svg .mark-rect.role-mark path").evaluate_all(
            "all => all.map(x => x.getAttribute('d'))"
        )

    before = bars()
    page.locator("#matrices select").select_option("convolution")
    expect(page.locator("#matrices svg")).to_have_count(1)
    page.wait_for_function(
        "old => [...document.querySelectorAll('#matrices svg .mark-rect.role-mark path')].map(x => x.getAttribute('d')).join() != old",
        arg=",".join(before),
    )
    chosen = bars()
    page.locator("#matrices svg .mark-rect.role-mark path").nth(24 * 8 + 2).click(force=True)  # row 8 of 24
    page.wait_for_function(
        "old => [...document.querySelectorAll('#matrices svg .mark-rect.role-mark path')].map(x => x.getAttribute('d')).join() != old",
        arg=",".join(chosen),
    )


def test_a_faster_link_hides_sending_sooner(page):
    expect(words(page, "hiding", "^hidden from 8,000 tokens")).to_have_count(1)
    move(page, "hiding", "link_speed", 400)
    expect(words(page, "hiding", "^hidden from 1,000 tokens")).to_have_count(1)
