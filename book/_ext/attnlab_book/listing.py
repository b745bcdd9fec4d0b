"""``{chapter-list} <part>``: the papers of a part, with a link to each chapter that is written."""

from __future__ import annotations

from html import escape

from attnlab import papers
from attnlab_book.pages import HtmlDirective, citation


class ChapterList(HtmlDirective):
    """The papers of one part as cards."""

    required_arguments = 1

    def html(self) -> str:
        """Return one card a paper; an unknown part is an error of the page."""
        part = self.arguments[0]
        members = [paper for paper in papers.all().values() if paper.part == part]
        if not members:
            parts = dict.fromkeys(paper.part for paper in papers.all().values())
            raise self.error(f"part: no paper is in {part!r}; the book has {', '.join(parts)}")
        return f'<ul class="attnlab-chapters">{"".join(map(self._card, members))}</ul>'

    def _card(self, paper: papers.Paper) -> str:
        return (
            f"<li><strong>{escape(paper.headline)}</strong>"
            f"<p>{escape(paper.idea)}</p>"
            f'<p class="attnlab-cite">{citation(paper)}</p>'
            f"<p>{self.status(paper, 'Read the chapter')}</p></li>"
        )
