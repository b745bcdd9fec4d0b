"""What the directives share: where chapters and rows lie, links between pages, and badges."""

from __future__ import annotations

from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from attnlab import claims, papers
from attnlab.claims.card import MARKS

LIVE = "attnlab_live"
"""Key of a page's metadata: the page shows rows or the list of chapters."""
LEDGER = "attnlab_ledger"
"""Key of a page's metadata: the page carries the ledger."""


def rows_dir(app: Sphinx) -> Path:
    """Return the folder of recorded rows; the setting is relative to ``_config.yml``."""
    return (Path(app.confdir) / app.config.attnlab_rows_dir).resolve()


def records_dir(app: Sphinx) -> Path | None:
    """Return the folder of records, or None if the book has none."""
    folder = app.config.attnlab_records_dir
    return (Path(app.confdir) / folder).resolve() if folder else None


def recorded(app: Sphinx) -> list[claims.Row]:
    """Return every recorded row; none if nothing was run yet."""
    return claims.rows(rows_dir(app), records_dir(app))


def live_pages(env: BuildEnvironment) -> list[str]:
    """Return the pages that show rows or the list of chapters."""
    return [page for page, metadata in env.metadata.items() if LIVE in metadata and page in env.found_docs]


def chapter_page(paper: papers.Paper) -> str:
    """Return the page's name of a paper's chapter, whether it is written or not."""
    return f"notebooks/{paper.part}/{paper.slug}"


def written(env: BuildEnvironment) -> set[str]:
    """Return the slugs whose chapter is in the book."""
    return {slug for slug, paper in papers.all().items() if chapter_page(paper) in env.found_docs}


def badge(verdict: str, label: str = "", href: str = "") -> str:
    """Return a verdict as a small label, a link if ``href`` is given."""
    text = f"{MARKS[verdict]} {escape(f'{label}: {verdict}' if label else verdict)}"
    attributes = f'class="attnlab-badge" data-verdict="{escape(verdict)}"'
    return f'<a {attributes} href="{escape(href)}">{text}</a>' if href else f"<span {attributes}>{text}</span>"


def citation(paper: papers.Paper) -> str:
    """Return a paper as one line with a link to arXiv."""
    title = escape(paper.title)
    if paper.arxiv:
        title = f'<a href="https://arxiv.org/abs/{escape(paper.arxiv)}">{title}</a>'
    return f"{title}. {escape(paper.authors)}. {escape(paper.venue)}."


class HtmlDirective(SphinxDirective):
    """A directive that becomes one piece of HTML and is made again when rows or chapters change."""

    def html(self) -> str:
        """Return the HTML."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Mark the page and return its HTML."""
        self.env.metadata[self.env.docname][LIVE] = True
        return [nodes.raw("", self.html(), format="html")]

    def uri(self, page: str) -> str:
        """Return the address of ``page`` relative to this one."""
        return self.env.app.builder.get_relative_uri(self.env.docname, page)

    def status(self, paper: papers.Paper, label: str) -> str:
        """Return a link to the paper's chapter, or say that it is in preparation."""
        if paper.slug in written(self.env):
            return f'<a class="attnlab-ready" href="{escape(self.uri(chapter_page(paper)))}">{escape(label)}</a>'
        return '<span class="attnlab-planned">in preparation</span>'
