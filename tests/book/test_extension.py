"""The Sphinx extension on a book of two pages: what it prints, and what makes it warn."""

import json
import os
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from attnlab import claims, papers

ROOT = Path(__file__).parents[2]
SLUG = "circuit-reuse"
CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_nb", "attnlab_book"]
nb_execution_mode = "off"
nb_ipywidgets_js = {{}}
html_theme = "basic"
html_theme_options = {{}}
html_static_path = [{str(ROOT / "book" / "_static")!r}]
attnlab_rows_dir = "claims"
"""
FACTS = {"slug": SLUG, "level": "easy", "minutes": {"read": 25, "run": 2, "practise": 45}, "gpu": "optional"}


def notebook(facts):
    cell = {"cell_type": "markdown", "metadata": {}, "source": "# A chapter\n\nText."}
    return json.dumps({"cells": [cell], "metadata": {"attnlab": facts}, "nbformat": 4, "nbformat_minor": 4})


def row(claim, verdict="confirmed"):
    """A row with the current rule of ``claim``; its verdict is what the test wants, whatever the rule says."""
    return {
        "schema": 1,
        "claim": claim.name,
        "value": 25.0,
        "interval": [24.0, 26.0],
        "controls": {name: {"value": 2.0, "interval": [1.0, 3.0]} for name in claim.controls},
        "unit": claim.unit,
        "verdict": verdict,
        "rule": claim.rule,
        "rule_hash": claim.rule_hash,
        "seeds": list(claim.seeds),
        "seconds": 3.0,
        "machine": {"platform": "Linux", "cpus": 2, "gpu": None},
        "versions": {},
        "date": "2026-01-31T00:00:00+00:00",
        "origin": "run",
    }


@pytest.fixture
def book(tmp_path):
    """A source folder with the three directives, one written chapter, and no rows."""
    (tmp_path / "conf.py").write_text(CONF)
    directives = "```{paper-map}\n```\n\n```{chapter-list} circuits\n```\n\n```{claims-ledger}\n```\n"
    (tmp_path / "index.md").write_text(f"# Book\n\n{directives}\n\n```{{toctree}}\nnotebooks/circuits/{SLUG}\n```\n")
    chapter = tmp_path / "notebooks" / "circuits" / f"{SLUG}.ipynb"
    chapter.parent.mkdir(parents=True)
    chapter.write_text(notebook(FACTS))
    (tmp_path / "claims").mkdir()
    return tmp_path


@pytest.fixture
def record(book):
    """Write the rows of the written chapter's claims."""

    def write(verdict="confirmed"):
        for claim in claims.load(SLUG).values():
            file = book / "claims" / f"{claim.slug}--{claim.id}.json"
            file.write_text(json.dumps(row(claim, verdict)))

    return write


def build(book):
    """Return the two pages and the warnings of one build."""
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(book), str(book / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    pages = [book / "out" / "index.html", book / "out" / "notebooks" / "circuits" / f"{SLUG}.html"]
    return [page.read_text(encoding="utf-8") for page in pages], done.stderr


def test_a_verdict_from_a_record_has_its_badge_too(book, record):
    record()
    claim = next(iter(claims.load(SLUG).values()))
    (book / "records").mkdir()
    (book / "records" / "gpu.json").write_text(json.dumps({"rows": [{"ms": 1.0}, row(claim, "refuted")]}))
    (book / "conf.py").write_text(CONF + 'attnlab_records_dir = "records"\n')
    (_, chapter), _ = build(book)
    assert chapter.count('class="attnlab-badge"') == len(claims.load(SLUG)) + 1
    assert f"{claim.id.replace('-', ' ')} (record): refuted" in chapter


def test_many_verdicts_fold_into_their_counts(book, record):
    record("refuted")
    total = len(claims.load(SLUG))
    (_, chapter), _ = build(book)
    assert total > 5
    assert f"<summary>{total} verdicts: \N{BALLOT X} {total} refuted</summary>" in chapter
    few = list(claims.load(SLUG).values())[:-5]
    for claim in few:
        (book / "claims" / f"{claim.slug}--{claim.id}.json").unlink()
    (_, chapter), _ = build(book)
    assert "<summary>" not in chapter.split("Text.")[0].split('class="attnlab-facts"')[1]


def test_pages_carry_facts_states_and_entries(book, record):
    record()
    (index, chapter), _ = build(book)
    assert chapter.index("<h1") < chapter.index('class="attnlab-facts"') < chapter.index("Text.")
    assert "<b>25 min</b> to read" in chapter
    assert f"https://arxiv.org/abs/{papers.get(SLUG).arxiv}" in chapter
    assert chapter.count('class="attnlab-badge"') == len(claims.load(SLUG))
    assert f"#claim-{SLUG}-" in chapter
    assert f'href="notebooks/circuits/{SLUG}.html"' in index
    assert "in preparation" in index
    for claim in claims.load(SLUG).values():
        assert f'data-claim="{claim.name}"' in index
        assert (f">Our hypothesis: {escape(claim.statement)}<" in index) == claim.ours
    assert "25 [24, 26]" in index


def test_charts_are_loaded_only_where_there_is_one(book, record):
    record()
    (index, chapter), _ = build(book)
    for script in ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js", "charts.js"):
        assert index.count(script) == 1
        assert script not in chapter
    assert "ledger.js" in index
    assert "ledger.js" not in chapter


def test_a_claim_without_a_row_is_a_warning(book):
    _, warnings = build(book)
    for claim in claims.load(SLUG).values():
        assert f"{claim.name}: declared but not recorded" in warnings


def test_a_row_without_a_claim_is_a_warning(book, record):
    record()
    claim = next(iter(claims.load(SLUG).values()))
    stray = {**row(claim), "claim": f"{SLUG}/nobody-declared-this"}
    (book / "claims" / f"{SLUG}--nobody-declared-this.json").write_text(json.dumps(stray))
    _, warnings = build(book)
    assert "nobody-declared-this: recorded but not declared" in warnings


def test_new_rows_reach_pages_that_did_not_change(book, record):
    build(book)
    record()
    (index, chapter), _ = build(book)
    assert 'data-verdict="confirmed"' in index
    assert 'data-verdict="confirmed"' in chapter


def test_missing_facts_and_an_unknown_part_are_named(book, record):
    record()
    chapter = book / "notebooks" / "circuits" / f"{SLUG}.ipynb"
    chapter.write_text(notebook({**FACTS, "minutes": {"read": 1}}))
    (book / "index.md").write_text(
        (book / "index.md").read_text().replace("{chapter-list} circuits", "{chapter-list} sea")
    )
    _, warnings = build(book)
    assert "lacks minutes.run, minutes.practise" in warnings
    assert "no paper is in 'sea'; the book has foundations, circuits" in warnings
