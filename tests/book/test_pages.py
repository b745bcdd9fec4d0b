"""Every page of the built book: at the width of a desk and of a phone, in light and dark, offline, by keyboard."""

import pytest
from playwright.sync_api import expect

DESK, PHONE = 1280, 390

CHARTS = """() => [...document.querySelectorAll(".attnlab-chart")].filter((box) => box.clientWidth).map((box) => ({
    id: box.id,
    label: box.querySelector("svg")?.getAttribute("aria-label") || "",
    marks: box.querySelectorAll("svg .mark-symbol path, svg .mark-line path, svg .mark-rect path, svg .mark-area path, "
        + "svg .mark-arc path, svg .mark-rule line, svg .mark-text text, svg .mark-image image, svg .mark-trail path, "
        + "svg .mark-shape path").length,
}))"""

# Relative luminance of the colours that the browser computed, as WCAG 2 defines contrast.
CONTRAST = """(selector) => {
    const channels = (colour) => colour.match(/[0-9.]+/g).map(Number);
    const luminance = (colour) => {
        const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            const parts = channels(colour);
            if (parts.length === 3 || parts[3] === 1) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    return [...document.querySelectorAll(selector)].filter((e) => e.textContent.trim()).map((e) => {
        const style = getComputedStyle(e);
        const ink = luminance(e instanceof SVGElement ? style.fill : style.color);
        const paper = luminance(behind(e));
        return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), e.textContent.trim().slice(0, 40)];
    });
}"""


def shoot(page, build, name, suffix):
    """Keep a picture of the whole page for people to look at."""
    folder = build / "screenshots"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"{name.replace('/', '--')}.{suffix}.png", full_page=True)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_page_reads_offline(reader, build, name, width):
    visitor = reader(width)
    page = visitor.open(f"{name}.html")
    shoot(page, build, name, width)
    assert visitor.foreign == [], "the page asked another host"
    assert visitor.errors == []
    across = page.evaluate("() => document.scrollingElement.scrollWidth")
    assert across <= width, f"the page is {across} px wide on a screen of {width} px"
    for chart in page.evaluate(CHARTS):
        assert chart["marks"] > 0, f"nothing is drawn in {chart['id']}"
        assert chart["label"], f"{chart['id']} has no alternative text"
    nameless = page.eval_on_selector_all(
        "main img", "images => images.filter(i => !i.alt && i.ariaHidden !== 'true').map(i => i.src)"
    )
    assert nameless == [], "images without alternative text"


def test_page_stays_legible_in_the_dark(reader, build, name):
    visitor = reader(DESK, "dark")
    page = visitor.open(f"{name}.html")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    if name.endswith("index") or name.startswith("notebooks/"):
        shoot(page, build, name, "dark")
    ours = (
        ".attnlab-facts p, .attnlab-facts li, .attnlab-badge, .attnlab-claim dt, .attnlab-claim dd, .attnlab-entry dt, "
        ".attnlab-entry dd, .attnlab-feedback p, .attnlab-planned, .attnlab-cite, .attnlab-figure figcaption, "
        ".attnlab-chart .role-axis-label text, .attnlab-chart .role-axis-title text, .attnlab-chart .role-title text"
    )
    for scheme in ("dark", "light"):
        page.evaluate("(scheme) => { document.documentElement.dataset.theme = scheme }", scheme)
        faint = [entry for entry in page.evaluate(CONTRAST, ours) if entry[0] < 4.5]
        assert faint == [], f"contrast below 4.5 in {scheme}"


def test_keyboard_reaches_content_and_navigation(reader, site):
    page = reader(DESK).open("book/index.html")
    page.keyboard.press("Tab")
    expect(page.locator("#pst-skip-link a")).to_be_focused()
    expect(page.locator("#pst-skip-link")).to_be_in_viewport()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.closest('nav, main, .bd-sidebar-primary')?.tagName"))
        if page.evaluate("() => Boolean(document.activeElement.closest('nav.bd-links a, .bd-links__item a'))"):
            break
    else:
        pytest.fail(f"40 times Tab did not reach the chapters of the navigation, only {reached}")


def test_search_finds_a_word(reader):
    visitor = reader()
    page = visitor.open("search.html?q=patching")
    expect(page.locator("#search-results ul.search li a").first).to_be_visible()
    assert visitor.foreign == []
    assert visitor.errors == []


def test_a_page_is_light(build, name):
    weight = (build / "html" / f"{name}.html").stat().st_size
    assert weight <= 1_500_000, f"{name} weighs {weight / 1e6:.1f} MB; show less, or shorten a chart's data"
