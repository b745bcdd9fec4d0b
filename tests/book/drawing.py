"""What the browser tests of chapters do to a figure and read from it; ``figure`` is its id."""

import re

from playwright.sync_api import Locator, Page


def words(page: Page, figure: str, text: str) -> Locator:
    """Lines of text in the drawing that match a pattern."""
    return page.locator(f"#{figure} svg text").filter(has_text=re.compile(text))


def move(page: Page, figure: str, name: str, value: float) -> None:
    """Put a slider of the figure to a value."""
    slider = page.locator(f"#{figure} input[type=range][name={name}]")
    slider.evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )
