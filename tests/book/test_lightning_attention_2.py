"""The linked picture of the tiles: tile size, head width and a clicked row change what they should."""

from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "tile-map"
MAP = f"#{FIGURE}"


def choose(page, label, value):
    page.locator(f"{MAP} .vega-bind", has_text=label).locator("select").select_option(value)


def test_the_tile_size_moves_keys_between_state_and_tile(page):
    expect(words(page, FIGURE, "^Token 37 reads state 2, the sum of 32 tokens,")).to_have_count(1)
    choose(page, "tokens a tile", "4")
    expect(words(page, FIGURE, "^Token 37 reads state 9, the sum of 36 tokens,")).to_have_count(1)
    expect(words(page, FIGURE, "^16$")).not_to_have_count(0)  # 64 / 4 steps beside the point
    choose(page, "tokens a tile", "64")
    expect(words(page, FIGURE, "^Token 37 reads no state")).to_have_count(1)
    choose(page, "tokens a tile", "1")
    expect(words(page, FIGURE, "meets 1 key of tile 37")).to_have_count(1)


def test_a_click_on_a_row_says_what_it_reads(page):
    page.locator(f"{MAP} svg .mark-rect path").first.click()
    expect(words(page, FIGURE, "^Token 37 reads")).to_have_count(0)
    expect(words(page, FIGURE, r"^Token \d+ reads")).to_have_count(1)


def test_the_head_width_changes_the_operations_only(page):
    lines = f"[...document.querySelectorAll('{MAP} svg .mark-line')].map((mark) => mark.innerHTML)"
    before = page.evaluate(lines)
    choose(page, "head width", "64")
    page.wait_for_function(f"(before) => {lines}[0] !== before", arg=before[0])
    after = page.evaluate(lines)
    assert len(before) == len(after) == 4  # two parts, their sum, and the steps
    assert after[-1] == before[-1]
    assert all(new != old for new, old in zip(after[:-1], before[:-1], strict=True))
