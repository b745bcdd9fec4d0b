"""The barcode: its slider moves the point on the curve, its menus re-sort the heads."""

import re

from playwright.sync_api import expect

FIGURE = "barcode"
BARCODE = f"#{FIGURE}"


def kept(page) -> tuple[int, int]:
    """How many circuit heads and how many others the figure says are kept."""
    texts = page.locator(f"{BARCODE} svg text")
    hits = texts.filter(has_text=re.compile(r"^\d+ of \d+ circuit heads$")).text_content()
    wrong = texts.filter(has_text=re.compile(r"^and \d+ others kept$")).text_content()
    return int(hits.split()[0]), int(wrong.split()[1])


def rows(page) -> list[str]:
    """The labels of the heads from top to bottom, wherever they stand in the document."""
    labels = page.evaluate(
        f"""() => [...document.querySelectorAll("{BARCODE} svg .role-axis-label text")]
            .map((label) => [label.getBoundingClientRect().top, label.textContent]).sort((a, b) => a[0] - b[0])"""
    )
    return [label for _, label in labels if re.fullmatch(r"\d\.\d", label)]


def test_the_slider_changes_what_is_kept(page):
    few = kept(page)
    page.locator(f"{BARCODE} input[type=range]").fill("1")
    expect(page.locator(f"{BARCODE} svg text", has_text=f"and {few[1]} others kept")).to_have_count(0)
    assert sum(kept(page)) > sum(few)


def test_the_menus_sort_the_heads_anew(page):
    before = rows(page)
    assert len(set(before)) == 24
    area = page.locator(f"{BARCODE} svg text", has_text=re.compile(r"^AUC \d\.\d\d$"))
    old = area.text_content()
    page.locator(f"{BARCODE} select").first.select_option("5")
    expect(area).not_to_have_text(old)
    assert sorted(rows(page)) == sorted(before)
    assert rows(page) != before
