"""The introduction: real weights answer to click, menu and slider; terms and papers of the map light each other up."""

from playwright.sync_api import expect

from attnlab import papers
from tests.book.drawing import words

FIGURE = "term-map"
WEIGHTS, MAP = "real-weights", FIGURE


def effective(page) -> float:
    """The number of effective keys that the figure prints."""
    return float(words(page, WEIGHTS, "effective keys: ").text_content().split()[-1])


def choose(page, name, value):
    """Set one of the controls below the weights."""
    page.locator(f"#{WEIGHTS} .vega-bind", has_text=name).locator("select").select_option(value)


def test_sharpness_leads_from_the_average_to_one_key(page):
    slider = page.locator(f"#{WEIGHTS} input[type=range]")
    slider.fill("0")
    expect(words(page, WEIGHTS, r"effective keys: 15\.0$")).to_have_count(1)  # the last of 15 tokens reads all alike
    slider.fill("4")
    expect(words(page, WEIGHTS, r"effective keys: 15\.0$")).to_have_count(0)
    assert effective(page) < 3


def test_the_mask_and_the_head_can_be_changed(page):
    page.locator(f"#{WEIGHTS} input[type=range]").fill("0")
    choose(page, "mask", "last four tokens")
    expect(words(page, WEIGHTS, r"effective keys: 4\.0$")).to_have_count(1)
    choose(page, "mask", "none")
    expect(words(page, WEIGHTS, r"effective keys: 15\.0$")).to_have_count(1)
    page.locator(f"#{WEIGHTS} input[type=range]").fill("1")
    choose(page, "mask", "causal")
    label = page.locator(f"#{WEIGHTS} select option", has_text="first token").text_content()
    choose(page, "head", label)
    expect(words(page, WEIGHTS, "reads most from “When”")).to_have_count(1)


def test_a_click_on_a_row_asks_for_another_token(page):
    page.locator(f"#{WEIGHTS} input[type=range]").fill("0")
    cells = page.locator(f"#{WEIGHTS} svg .mark-rect path")
    cells.nth(15 + 3 * 15).click()  # after 15 bars, the row of the fourth token, John
    expect(words(page, WEIGHTS, "^“John” reads")).to_have_count(1)
    expect(words(page, WEIGHTS, r"effective keys: 4\.0$")).to_have_count(1)


def lit(page) -> set[str]:
    """The papers whose names are bold."""
    names = {paper.slug.replace("-", " "): paper.slug for paper in papers.all().values()}
    found = page.locator(f'#{MAP} svg text[font-weight="bold"]').all_text_contents()
    return {names[text] for text in found if text in names}


def spot(page, number):
    """The unseen box over a term or a name, in the order terms, papers by column."""
    return page.locator(f'#{MAP} svg .mark-rect path[opacity="0.001"]').nth(number)


def members(term):
    return {slug for slug, paper in papers.all().items() if paper.terms == term}


def test_a_term_lights_its_papers_and_a_paper_its_term(page):
    from attnlab.figures.attention_from_scratch import map_frame

    frame = map_frame(papers.all())
    assert page.locator(f'#{MAP} svg .mark-rect path[opacity="0.001"]').count() == len(frame)
    assert lit(page) == members("scores")
    for number, term in enumerate(frame[frame.slug == ""].term):
        spot(page, number).click()
        expect(words(page, MAP, f"^{term}: {len(members(term))} of 30 papers$")).to_have_count(1)
        assert lit(page) == members(term)

    spot(page, int(frame.index[frame.slug == "titans"][0])).click()
    expect(words(page, MAP, r"^titans \(hybrids\) changes: memory$")).to_have_count(1)
    assert lit(page) == {"titans"}
    box = page.locator(f'#{MAP} svg .mark-rect path[fill-opacity="1"]')
    expect(box).to_have_count(1)  # the box of its term, and no other
    expect(words(page, MAP, "^The state is a network trained while reading")).to_have_count(1)
