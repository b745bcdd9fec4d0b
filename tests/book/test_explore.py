"""The explorer's static twin: menu, heads and nodes answer without a kernel."""

import re

from playwright.sync_api import expect

FIGURE = "circuits-explorer"
BOX = f"#{FIGURE}"
TASKS = ("IOI", "Colored Objects", "Greater-than")
TOKENS = f"""() => [...document.querySelectorAll("{BOX} svg text")].filter((t) => (getComputedStyle(t).fontFamily || "").includes("mono"))
    .map((t) => t.textContent).join("")"""
BACKGROUND = f"""() => [...document.querySelectorAll("{BOX} svg .mark-rect path")].map((p) => p.getAttribute("opacity")).join()"""
FAINT = f"""() => [...document.querySelectorAll("{BOX} svg .mark-rule line[opacity]")]
    .filter((line) => Number(line.getAttribute("opacity")) < 0.1).length"""


def heading(page) -> str:
    return page.locator(f"{BOX} svg text").filter(has_text=re.compile(r"where END looks$")).text_content()


def test_every_task_shows_its_own_prompt_heads_and_circuit(page):
    seen = set()
    for task in TASKS:
        page.locator(f"{BOX} select").select_option(task)
        page.wait_for_function(f"() => window.attnlabViews['circuits-explorer'].signal('task') === '{task}'")
        page.evaluate("() => window.attnlabViews['circuits-explorer'].runAsync().then(() => true)")
        text = page.evaluate(TOKENS)
        assert len(text) > 20
        seen.add((text, heading(page), page.locator(f"{BOX} svg .mark-rule line").count()))
    assert len({text for text, _, _ in seen}) == 3


def test_a_click_on_a_head_shows_where_it_looks(page):
    before, weights = heading(page), page.evaluate(BACKGROUND)
    page.locator(f"{BOX} svg .mark-rect path").nth(5).click()
    expect(page.locator(f"{BOX} svg text").filter(has_text=before)).to_have_count(0)
    assert page.evaluate(BACKGROUND) != weights


def test_a_click_on_a_node_leaves_its_edges_alone(page):
    assert page.evaluate(FAINT) == 0
    page.locator(f"{BOX} svg .mark-symbol path").last.scroll_into_view_if_needed()
    page.locator(f"{BOX} svg text", has_text=re.compile(r"^m0$")).click(force=True)
    page.wait_for_function(f"({FAINT})() > 0")


def test_the_panel_stands_there_with_its_example(page):
    box = page.locator(".attnlab-twin")
    expect(box).to_contain_text("8 rows, all can be used")
    expect(box).to_contain_text("Mary")
