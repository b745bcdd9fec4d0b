"""The form that all chapters share, checked on the sources."""

from __future__ import annotations

import json
import re

import pytest

from attnlab import exercises, papers
from tools.chapters import ROOT, Chapter, all_chapters
from tools.new_chapter import FIRST_CELL, TITLED_CELL

CHAPTERS = all_chapters()


@pytest.fixture(params=CHAPTERS, ids=lambda chapter: chapter.name)
def chapter(request: pytest.FixtureRequest) -> Chapter:
    return request.param


def text_of(chapter: Chapter) -> str:
    return "\n".join("".join(cell["source"]) for cell in chapter.notebook["cells"])


def test_every_notebook_is_in_the_table_of_contents() -> None:
    found = {
        path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()
        for path in (ROOT / "notebooks").rglob("*.ipynb")
    }
    found = {name for name in found if ".ipynb_checkpoints" not in name}
    assert found == {chapter.name for chapter in CHAPTERS}


def test_first_cell_is_the_same_in_all_chapters(chapter: Chapter) -> None:
    if chapter.paper is None:
        title = chapter.notebook["metadata"]["attnlab"]["title"]
        assert chapter.code[0].rstrip() == TITLED_CELL.format(slug=chapter.slug, title=title)
    else:
        assert chapter.code[0].rstrip() == FIRST_CELL.format(slug=chapter.slug)


def test_sources_carry_no_outputs(chapter: Chapter) -> None:
    for cell in chapter.notebook["cells"]:
        assert not cell.get("outputs"), f"{chapter.name} stores outputs; pre-commit strips them"
        assert not cell.get("execution_count")


def test_nothing_touches_the_path_or_hides_errors(chapter: Chapter) -> None:
    assert not re.search(r"sys\.path|raises-exception|allow_errors", json.dumps(chapter.notebook))


def test_slug_names_notebook_module_claims_exercises_and_test(chapter: Chapter) -> None:
    part = chapter.name.split("/")[0]
    if chapter.is_explorer:
        pytest.skip("an explorer has no module of its own")
    module = chapter.slug.replace("-", "_")
    expected = [
        f"src/attnlab/{part}/{module}.py",
        f"src/attnlab/exercises/{module}.py",
        f"tests/{part}/test_{module}.py",
    ]
    claimed = ROOT / f"src/attnlab/claims/{chapter.slug}.toml"
    assert claimed.exists() == (chapter.paper is not None)  # who has no paper claims nothing
    assert chapter.paper is None or chapter.paper.part == part
    assert [name for name in expected if not (ROOT / name).exists()] == []


def test_facts_are_complete(chapter: Chapter) -> None:
    facts = chapter.notebook["metadata"]["attnlab"]
    assert facts["slug"] == chapter.slug
    assert facts["level"] in ("introductory", "intermediate", "advanced")
    assert set(facts["minutes"]) == {"read", "run"} | (set() if chapter.is_explorer else {"practise"})
    assert ("title" in facts) == (chapter.paper is None), (
        "without a paper a chapter names itself; or a slug is misspelt"
    )
    assert facts["gpu"] in ("no", "optional", "needed")


def test_exercises_are_asked_hinted_and_solved(chapter: Chapter) -> None:
    if chapter.is_explorer:
        pytest.skip("an explorer asks nothing")
    text = text_of(chapter)
    for number in (1, 2, 3):
        assert f'exercises.check("{chapter.slug}/{number}"' in text
        assert f'exercises.solution("{chapter.slug}/{number}")' in text
    assert all(exercise.hints for exercise in exercises.load(chapter.slug).values())


def test_every_figure_has_alternative_text(chapter: Chapter) -> None:
    for cell in chapter.code:
        assert cell.count("figures.show(") == cell.count("alt="), f"figures.show without alt in {cell[:80]!r}"


def test_an_explorer_declares_nothing(chapter: Chapter) -> None:
    if not chapter.is_explorer:
        pytest.skip("a chapter does")
    assert chapter.slug not in papers.all()
    assert not re.search(r"claims\.check|exercises\.check", text_of(chapter))
