"""The page of claims shows every recorded row, and its filter leaves what it says."""

import json

import pytest
from playwright.sync_api import expect


@pytest.fixture
def ledger(reader, page_with):
    """The page that carries the ledger."""
    return reader().open(page_with('class="attnlab-ledger"'))


def test_every_recorded_row_is_on_the_page(ledger, build):
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in (build / "out" / "claims").glob("*.json")]
    assert rows, "the build recorded no claim"
    for row in rows:
        entry = ledger.locator(f'.attnlab-entry[data-claim="{row["claim"]}"]')
        expect(entry).to_have_attribute("data-verdict", row["verdict"])
        expect(entry.locator(".attnlab-badge")).to_contain_text(row["verdict"])
        expect(entry.locator("dt", has_text="Measured")).not_to_have_count(0)


def test_filter_by_verdict_and_part(ledger):
    entries = ledger.locator(".attnlab-entry")
    verdict = entries.first.get_attribute("data-verdict")
    ledger.get_by_label("Verdict").select_option(verdict)
    matching = ledger.locator(f'.attnlab-entry[data-verdict="{verdict}"]').count()
    expect(ledger.locator(".attnlab-entry:visible")).to_have_count(matching)
    expect(ledger.locator(".attnlab-filter output")).to_have_text(f"{matching} of {entries.count()} claims")
    other = next(
        option
        for option in ledger.get_by_label("Verdict").locator("option").all_text_contents()
        if option != "all" and ledger.locator(f'.attnlab-entry[data-verdict="{option}"]').count() == 0
    )
    ledger.get_by_label("Verdict").select_option(other)
    expect(ledger.locator(".attnlab-entry:visible")).to_have_count(0)
