"""The scan tree: a click on a circle lights its tree, says what it sums up, and moves the memory beside it."""

from playwright.sync_api import expect

from tests.book.drawing import words

FIGURE = "scan-tree"
TREE = f"#{FIGURE}"


def lit(page):
    """Thick links."""
    return page.locator(f'{TREE} svg .mark-rule line[stroke-width="2"]')


def test_a_click_lights_the_tree_of_a_circle(page):
    expect(words(page, FIGURE, "^Tokens 1 to 13: 12 merges, 4 in a row")).to_have_count(1)
    before = lit(page).count()
    assert before >= 24  # two links a merge, and those that pass a summary on
    expect(words(page, FIGURE, "^416$")).to_have_count(1)  # keys and values of 13 tokens

    circles = page.locator(f'{TREE} svg path[opacity="0.001"]')  # large and unseen, to be hit by a finger
    assert circles.count() == 80
    circles.nth(16 + 6).click()  # round 1, token 7
    expect(words(page, FIGURE, "^Tokens 6 to 7: 1 merge, 1 in a row")).to_have_count(1)
    expect(lit(page)).to_have_count(2)
    expect(words(page, FIGURE, "^224$")).to_have_count(1)
    expect(words(page, FIGURE, "^18$")).not_to_have_count(0)  # m, u and w are what they were

    circles.nth(79).click()  # the last output
    expect(words(page, FIGURE, "^Tokens 1 to 16: 15 merges, 4 in a row")).to_have_count(1)
    expect(lit(page)).to_have_count(30)
