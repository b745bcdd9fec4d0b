"""The strip of facts below a chapter's title, from the notebook's metadata and the recorded claims."""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from attnlab import papers
from attnlab_book.pages import LEDGER, LIVE, MARKS, badge, citation, recorded

LOGGER = logging.getLogger(__name__)
FACTS = "attnlab_facts"
MINUTES = ("read", "run", "practise")
FEW = 5
"""As many verdicts stand on a chapter's first screen by name."""
EXPLORE = "notebooks/explore/"
"""Pages below this have no paper, so nothing to practise."""


def read(app: Sphinx, doctree: nodes.document) -> None:
    """Keep a notebook's chapter facts with the page's metadata (``doctree-read``)."""
    page = app.env.docname
    path = Path(app.env.doc2path(page))
    if path.suffix != ".ipynb":
        return
    facts = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("attnlab")
    if facts is None:
        return
    missing = [key for key in ("slug", "level", "minutes", "gpu") if key not in facts]
    wanted = MINUTES[:2] if page.startswith(EXPLORE) else MINUTES
    missing += [f"minutes.{key}" for key in wanted if key not in facts.get("minutes", {})]
    if missing:
        LOGGER.warning("the notebook's metadata.attnlab lacks %s", ", ".join(missing), location=page)
        return
    app.env.metadata[page][FACTS] = facts
    app.env.metadata[page][LIVE] = True


def insert(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put the strip after the page's first title (``doctree-resolved``)."""
    facts = app.env.metadata[page].get(FACTS)
    title = doctree.next_node(nodes.title)
    if facts is None or title is None or app.builder.format != "html":
        return
    parent = title.parent
    parent.insert(parent.index(title) + 1, nodes.raw("", strip(app, page, facts), format="html"))


def strip(app: Sphinx, page: str, facts: dict[str, Any]) -> str:
    """Return the strip as HTML."""
    paper = papers.all().get(facts["slug"])
    lines = [f'<p class="attnlab-paper">{citation(paper)}</p>'] if paper else []
    minutes = facts["minutes"]
    items = [escape(str(facts["level"]))]
    items += [f"<b>{escape(str(minutes[key]))} min</b> to {key}" for key in MINUTES if key in minutes]
    items.append(f"GPU {escape(str(facts['gpu']))}")
    lines.append("<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>")
    lines.append(_verdicts(app, page, facts["slug"]))
    lines.append(f'<p class="attnlab-launch">{_launch(app, page)}</p>')
    return f'<div class="attnlab-facts">{"".join(lines)}</div>'


def _verdicts(app: Sphinx, page: str, slug: str) -> str:
    """Return one badge a verdict, linked to its claim in the ledger if the book has one; those of records say so.

    More than ``FEW`` fold into a line of counts, so that the chapter's first sentence stays on the first screen.
    """
    ledger = next((other for other, metadata in app.env.metadata.items() if LEDGER in metadata), None)
    rows = [row for row in recorded(app) if row["claim"].partition("/")[0] == slug]
    items = []
    for row in rows:
        claim = row["claim"].partition("/")[2]
        label = claim.replace("-", " ") + (" (record)" if row["origin"] == "record" else "")
        href = f"{app.builder.get_relative_uri(page, ledger)}#claim-{slug}-{claim}" if ledger else ""
        items.append(f"<li>{badge(row['verdict'], label, href)}</li>")
    if not items:
        return ""
    badges = f'<ul class="attnlab-badges" aria-label="Claims checked in this chapter">{"".join(items)}</ul>'
    if len(items) <= FEW:
        return badges
    counts = Counter(row["verdict"] for row in rows)
    found = ", ".join(f"{MARKS[verdict]} {counts[verdict]} {escape(verdict)}" for verdict in MARKS if counts[verdict])
    return f'<details class="attnlab-verdicts"><summary>{len(items)} verdicts: {found}</summary>{badges}</details>'


def _launch(app: Sphinx, page: str) -> str:
    """Return the ways to run the page, built from the configured repository."""
    theme = app.config.html_theme_options
    parts = urlsplit(theme.get("repository_url", ""))
    branch = quote(theme.get("repository_branch") or "main")
    path = quote(f"{page}.ipynb")
    links = []
    if parts.netloc == "github.com":
        repository = quote(parts.path.strip("/").removesuffix(".git"))
        links = [
            ("Open in Colab", f"https://colab.research.google.com/github/{repository}/blob/{branch}/{path}"),
            ("Open in Binder", f"https://mybinder.org/v2/gh/{repository}/{branch}?urlpath=lab/tree/{path}"),
        ]
    anchors = [f'<a href="{escape(href)}">{label}</a>' for label, href in links]
    return " ".join([*anchors, "<span>JupyterLab on your machine: <code>make lab</code></span>"])
