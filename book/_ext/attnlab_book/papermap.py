"""``{paper-map}``: the thirty papers as points under their parts, with an arc between related ones."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import altair as alt

from attnlab import figures, papers
from attnlab.figures.render import described
from attnlab_book.pages import HtmlDirective, citation, written

# The parts get colours of their own: the palette of the chapters has a meaning that a part has not.
PARTS = {
    "foundations": "#4477AA",
    "circuits": "#C65468",
    "kernels": "#228833",
    "hybrids": "#A08A1F",
    "vision": "#2E93B5",
    "accelerators": "#AA3377",
}
ALT = (
    "The papers of the book in six groups, one point each, with an arc between papers that talk to each other. "
    "The list below the map holds the same facts as text."
)
CAPTION = (
    "Pick a point or a name: its arcs and the papers they lead to light up, and its idea appears below. "
    "A filled point has a chapter; a ring is in preparation."
)
ROW = 21  # pixels a line
REACH = 0.42  # how far the longest arc bulges, where 1 is the width of the names


class PaperMap(HtmlDirective):
    """The map, the panel that shows the picked paper, and the same facts as a list."""

    def html(self) -> str:
        """Return the figure with its panel and list."""
        ready = written(self.env)
        figures.enable()
        chart = described(map_chart(papers.all(), ready), alt=ALT, caption=CAPTION, name="paper-map")
        items = "".join(
            f'<li id="paper-map-{escape(slug)}">{self._entry(paper)}</li>' for slug, paper in papers.all().items()
        )
        return (
            f'<div class="attnlab-map">{figures.figure_html(chart.to_dict())}'
            '<div class="attnlab-detail" data-chart="paper-map" data-param="paper" data-field="slug" '
            'aria-live="polite"></div>'
            f"<details><summary>The map as a list</summary><ul>{items}</ul></details></div>"
        )

    def _entry(self, paper: papers.Paper) -> str:
        others = ", ".join(escape(papers.get(slug).headline) for slug in neighbours(papers.all())[paper.slug])
        return (
            f"<strong>{escape(paper.headline)}</strong> "
            f"<p>{escape(paper.idea)}</p>"
            f'<p class="attnlab-cite">{citation(paper)}</p>'
            f'<p class="attnlab-cite">Talks to: {others}.</p>'
            f"<p>{self.status(paper, 'Read the chapter')}</p>"
        )


def map_chart(book: dict[str, papers.Paper], ready: set[str]) -> alt.TopLevelMixin:
    """Return the map of ``book``; papers in ``ready`` are filled points."""
    points, headings = _layout(book)
    near = neighbours(book)
    for point in points:
        point["near"] = near[point["slug"]]
        point["ready"] = point["slug"] in ready
    height = ROW * (max(point["y"] for point in points) + 1)
    labels = [f"{paper.slug.replace('-', ' ')}: {paper.headline}" for paper in book.values()]
    menu = alt.binding_select(options=[None, *book], labels=["none", *labels], name="Paper ")
    start = next((slug for slug in book if slug in ready), next(iter(book)))
    pick = alt.selection_point(name="paper", fields=["slug"], on="click", bind=menu, value=[{"slug": start}])
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-REACH - 0.02, 1], nice=False, zero=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[height / ROW - 0.5, -0.5], nice=False, zero=False))
    colour = alt.Color("part:N", legend=None, scale=alt.Scale(domain=list(PARTS), range=list(PARTS.values())))

    picked = "(isArray(paper.slug) ? paper.slug[0] : null)"
    touches = f"datum.source === {picked} || datum.target === {picked}"
    alive = f"{picked} === null || datum.slug === {picked} || indexof(datum.near, {picked}) >= 0"
    arcs = (
        alt.Chart(alt.Data(values=_arcs(book, points)))
        .mark_line(interpolate="cardinal", tooltip=False)
        .encode(
            x,
            y,
            alt.Order("step:Q"),
            alt.Detail("edge:N"),
            color=colour,
            opacity=alt.condition(touches, alt.value(0.95), alt.value(0.25)),
            strokeWidth=alt.condition(touches, alt.value(2.2), alt.value(1)),
        )
    )
    nodes = alt.Chart(alt.Data(values=points)).encode(x, y, tooltip=alt.Tooltip("idea:N"))
    dots = nodes.mark_point(size=90, strokeWidth=2, cursor="pointer").encode(
        stroke=colour,
        fill=alt.Fill("part:N", legend=None, scale=alt.Scale(domain=list(PARTS), range=list(PARTS.values()))),
        fillOpacity=alt.condition("datum.ready", alt.value(1), alt.value(0)),
        opacity=alt.condition(alive, alt.value(1), alt.value(0.35)),
    )
    bold = alt.ExprRef(f"datum.slug === {picked} ? 'bold' : 'normal'")
    names = nodes.mark_text(
        align="left", dx=10, baseline="middle", fontSize=13, cursor="pointer", fontWeight=bold
    ).encode(
        # A phone has room for the short name only.
        text=alt.Text(value=alt.ExprRef("width < 520 ? datum.short : datum.headline")),
        opacity=alt.condition(alive, alt.value(1), alt.value(0.75)),
    )
    titles = (
        alt.Chart(alt.Data(values=headings))
        .mark_text(align="left", baseline="middle", fontSize=13, fontWeight="bold")
        .encode(x, y, text="part:N")
    )
    layers = alt.layer(arcs, titles, dots, names.add_params(pick))
    return layers.properties(width="container", height=height, title="Which paper talks to which?")


def neighbours(book: dict[str, papers.Paper]) -> dict[str, list[str]]:
    """Return for each paper those that it names or that name it, in the order of the book."""
    pairs = {(paper.slug, other) for paper in book.values() for other in paper.related}
    return {slug: [o for o in book if (slug, o) in pairs or (o, slug) in pairs] for slug in book}


def _layout(book: dict[str, papers.Paper]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return one point a paper and one heading a part, each with the line ``y`` on which it stands."""
    points: list[dict[str, Any]] = []
    headings: list[dict[str, Any]] = []
    y = 0.0
    for part in dict.fromkeys(paper.part for paper in book.values()):
        headings.append({"part": part, "x": 0, "y": y})
        for paper in (paper for paper in book.values() if paper.part == part):
            y += 1
            point = {"slug": paper.slug, "part": part, "short": paper.slug.replace("-", " "), "x": 0, "y": y}
            points.append({**point, "headline": paper.headline, "idea": paper.idea})
        y += 1.5
    return points, headings


def _arcs(book: dict[str, papers.Paper], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the arcs as points of half ellipses to the left of the names; a longer arc bulges further."""
    line = {point["slug"]: point["y"] for point in points}
    longest = max(line.values()) - min(line.values())
    pairs = sorted(
        {tuple(sorted((slug, other), key=line.__getitem__)) for slug in book for other in book[slug].related}
    )
    arcs = []
    for upper, lower in pairs:
        middle, half = (line[upper] + line[lower]) / 2, (line[lower] - line[upper]) / 2
        bulge = REACH * math.sqrt(2 * half / longest)
        for step in range(13):
            angle = math.pi * step / 12
            at = {"x": round(-bulge * math.sin(angle), 4), "y": round(middle - half * math.cos(angle), 3)}
            edge = {"edge": f"{upper} {lower}", "source": upper, "target": lower, "part": book[upper].part}
            arcs.append({**edge, **at, "step": step})
    return arcs
