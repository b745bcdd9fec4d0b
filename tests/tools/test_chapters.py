"""Which change makes which chapter run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import chapters, execute, new_chapter
from tools.chapters import SOURCE, Chapter, all_chapters, imported_modules

REUSE = "circuits/circuit-reuse"


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("from attnlab import circuits, lab", {"attnlab", "attnlab.circuits", "attnlab.lab"}),
        ("import attnlab.claims", {"attnlab.claims"}),
        ("if True:\n    %pip install x\nfrom attnlab.lab import seed", {"attnlab.lab"}),
        ("import json", set()),
    ],
)
def test_imports_of_a_cell(cell: str, found: set[str]) -> None:
    known = {"attnlab", "attnlab.circuits", "attnlab.lab", "attnlab.claims"}
    assert imported_modules([cell], known) == found


def test_a_chapter_depends_on_what_it_imports_directly_or_not() -> None:
    names = {path.relative_to(SOURCE).as_posix() for path in Chapter(REUSE).sources() if SOURCE in path.parents}
    assert "circuits/patching.py" in names  # through the package
    assert "models/weights_cache.py" in names  # through models.pretrained
    assert "exercises/circuit_reuse.py" in names  # loaded by name
    assert "claims/circuit-reuse.toml" in names
    assert "data/images.py" not in names  # the chapter shows no image


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chapter:
    """A chapter over a package of two modules, of which it imports one."""
    (tmp_path / "notebooks" / "part").mkdir(parents=True)
    (tmp_path / "requirements.lock").write_text("torch==1\n")
    cells = [
        {"cell_type": "markdown", "source": ["words"]},
        {"cell_type": "code", "source": ["from attnlab import lab"], "outputs": [], "execution_count": None},
    ]
    (tmp_path / "notebooks" / "part" / "one.ipynb").write_text(json.dumps({"cells": cells}))
    used = tmp_path / "used.py"
    used.write_text("x = 1\n")
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    monkeypatch.setattr(chapters, "EXECUTED", tmp_path / "executed")
    monkeypatch.setattr(Chapter, "sources", lambda self: [used])
    return Chapter("part/one")


def key_after(copy: Chapter, path: Path, text: str) -> str:
    path.write_text(text)
    return Chapter(copy.name).key


def test_key_follows_code_sources_and_lock_but_not_prose(copy: Chapter) -> None:
    before = copy.key
    assert key_after(copy, copy.path, copy.path.read_text().replace("words", "other words")) == before
    assert key_after(copy, copy.path, copy.path.read_text().replace("import lab", "import claims")) != before
    assert key_after(copy, copies_source(copy), "x = 2\n") != before


def copies_source(copy: Chapter) -> Path:
    return copy.sources()[0]


def test_key_follows_the_lock(copy: Chapter) -> None:
    before = copy.key
    assert key_after(copy, chapters.ROOT / "requirements.lock", "torch==2\n") != before


def test_a_chapter_is_fresh_only_with_result_and_key(copy: Chapter) -> None:
    assert not copy.is_fresh()
    copy.executed.parent.mkdir(parents=True)
    copy.executed.write_text("{}")
    assert not copy.is_fresh()  # a killed run leaves no key
    copy.key_file.write_text(copy.key)
    assert copy.is_fresh()
    copy.key_file.write_text("another state")
    assert not copy.is_fresh()


def test_unknown_chapter_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute.main(["circuits/no-such-paper"]) == 2
    assert "circuits/no-such-paper" in capsys.readouterr().err


def test_new_chapter_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert new_chapter.main(["circuits", "no-such-paper"]) == 2
    assert new_chapter.main(["vision", "sae-circuits"]) == 2
    assert new_chapter.main(["circuits", "circuit-reuse"]) == 2
    assert new_chapter.main([]) == 2
    assert "no-such-paper" in capsys.readouterr().err


def test_new_chapter_goes_last_into_its_part() -> None:
    toc = (chapters.ROOT / "_toc.yml").read_text()
    lines = new_chapter.with_chapter(toc, "circuits", "sae-circuits").splitlines()
    before = max(i for i, line in enumerate(toc.splitlines()) if "file: notebooks/circuits/" in line)
    assert lines[before + 1] == "          - file: notebooks/circuits/sae-circuits"
    first = new_chapter.with_chapter(toc, "vision", "biformer").splitlines()
    place = first.index("      - file: book/parts/vision")
    assert first[place + 1 : place + 3] == ["        sections:", "          - file: notebooks/vision/biformer"]


def test_new_chapter_writes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [chapter.name for chapter in all_chapters()]
    (tmp_path / "_toc.yml").write_text((chapters.ROOT / "_toc.yml").read_text())
    for module in (chapters, new_chapter):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in new_chapter.create("vision", "biformer")}
    assert {
        "notebooks/vision/biformer.ipynb",
        "src/attnlab/vision/biformer.py",
        "src/attnlab/claims/biformer.toml",
        "src/attnlab/exercises/biformer.py",
        "tests/vision/test_biformer.py",
        "_toc.yml",
    } <= written
    after = [chapter.name for chapter in all_chapters()]
    papers, rest = [n for n in before if not n.startswith("explore/")], [n for n in before if n.startswith("explore/")]
    assert after == [*papers, "vision/biformer", *rest]
