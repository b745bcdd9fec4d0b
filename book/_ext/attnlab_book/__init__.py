"""The book's Sphinx extension: facts below a chapter's title, the map of papers, the ledger, and scripts where needed.

Everything it prints comes from ``attnlab.papers``, ``attnlab.claims``, the notebooks' own metadata and the rows that
the last run recorded. The pages load files of the book alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from attnlab_book import facts, ledger, listing, papermap
from attnlab_book.pages import live_pages, records_dir, rows_dir

CHART_SCRIPTS = (
    "vendor/vega/vega.min.js",
    "vendor/vega-lite/vega-lite.min.js",
    "vendor/vega-embed/vega-embed.min.js",
    "charts.js",
)


def add_scripts(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Load the chart and ledger scripts on the pages that use them (``html-page-context``)."""
    body = context.get("body") or ""
    if 'class="attnlab-chart"' in body:
        for file in CHART_SCRIPTS:
            app.add_js_file(file, loading_method="defer")
    if 'class="attnlab-ledger"' in body:
        app.add_js_file("ledger.js", loading_method="defer")


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out the scripts of thebe (``html-page-context``).

    Jupyter Book adds them to every page, twice, which is an error in the console; the book has no such button, and
    pressing it would ask another host.
    """
    for key in ("script_files", "css_files"):
        kept = [file for file in context[key] if "thebe" not in f"{file.filename} {file.attributes}".lower()]
        context[key][:] = kept


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Read the pages that show recorded rows or the list of chapters again when those changed."""
    digest = hashlib.sha256("\n".join(sorted(env.found_docs)).encode())
    for folder in (rows_dir(app), records_dir(app)):
        for file in sorted(folder.glob("*.json")) if folder is not None else []:
            digest.update(file.read_bytes())
    previous = getattr(env, "attnlab_digest", "")
    env.attnlab_digest = digest.hexdigest()  # type: ignore[attr-defined]
    return [] if previous == digest.hexdigest() else live_pages(env)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_config_value("attnlab_rows_dir", "_build/out/claims", "env", types=[str])
    app.add_config_value("attnlab_records_dir", "", "env", types=[str])
    app.add_directive("paper-map", papermap.PaperMap)
    app.add_directive("chapter-list", listing.ChapterList)
    app.add_directive("claims-ledger", ledger.ClaimsLedger)
    app.add_css_file("attnlab.css", priority=900)
    app.connect("env-get-outdated", outdated)
    app.connect("env-check-consistency", ledger.audit)
    app.connect("doctree-read", facts.read)
    app.connect("doctree-resolved", facts.insert)
    app.connect("html-page-context", add_scripts)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
