"""Figures answer: a click or a choice changes what it should, at both widths and after the theme was switched."""

import pytest
from playwright.sync_api import expect

from attnlab import papers

BRIGHT = """() => [...document.querySelectorAll("#paper-map .mark-line path")]
    .filter((path) => Number(path.getAttribute("stroke-width")) > 2).length"""


@pytest.fixture
def arcs():
    """How many arcs of the map a paper has."""
    edges = {frozenset((slug, other)) for slug, paper in papers.all().items() for other in paper.related}
    return lambda slug: sum(slug in edge for edge in edges)


@pytest.mark.parametrize("width", [1280, 390])
def test_picking_a_paper_on_the_map_lights_its_relatives(reader, page_with, arcs, width):
    page = reader(width).open(page_with('id="paper-map"'))
    names = page.locator("#paper-map svg text")
    label = papers.get("titans").headline if width > 520 else "titans"
    names.get_by_text(label, exact=True).click()
    detail = page.locator(".attnlab-detail")
    expect(detail).to_contain_text(papers.get("titans").idea)
    assert page.evaluate(BRIGHT) == arcs("titans")
    # The same by keyboard: the menu below the map.
    page.locator("#paper-map select").select_option(label=f"gna: {papers.get('gna').headline}")
    expect(detail).to_contain_text(papers.get("gna").idea)
    assert page.evaluate(BRIGHT) == arcs("gna")


def test_a_chosen_paper_survives_the_switch_of_theme(reader, page_with):
    page = reader().open(page_with('id="paper-map"'))
    page.locator("#paper-map select").select_option(label=f"gna: {papers.get('gna').headline}")
    page.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    page.set_viewport_size({"width": 700, "height": 900})
    expect(page.locator(".attnlab-detail")).to_contain_text(papers.get("gna").idea)
    fits = "() => { const box = document.querySelector('#paper-map'); return box.scrollWidth <= box.clientWidth + 1 }"
    page.wait_for_function(fits)


def test_views_are_in_reach_of_the_reader(reader, page_with):
    page = reader().open(page_with('class="attnlab-chart"'))
    boxes = page.eval_on_selector_all(".attnlab-chart", "boxes => boxes.map((box) => box.id)")
    views = page.evaluate("() => Object.keys(window.attnlabViews)")
    assert sorted(views) == sorted(boxes)


def test_a_broken_specification_is_shown_in_place(reader, page_with):
    visitor = reader()
    broken = page_with('id="paper-map"')
    visitor.context.route(
        f"**/{broken}",
        lambda route: route.fulfill(
            response=(answer := route.fetch()),
            body=answer.text().replace('<script type="application/json">{', '<script type="application/json">{{', 1),
        ),
    )
    page = visitor.open(broken)
    expect(page.locator("#paper-map .attnlab-error")).to_contain_text("This chart could not be drawn")
    assert any("chart paper-map was not drawn" in error for error in visitor.errors)
