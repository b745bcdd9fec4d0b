"""The README's example is a program that works."""

from __future__ import annotations

import re

import pytest

from tools.chapters import ROOT


@pytest.mark.model
def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "23.3" in capsys.readouterr().out


def test_the_readme_lists_every_chapter() -> None:
    from tools.chapters import all_chapters

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [chapter.name for chapter in all_chapters() if f"(notebooks/{chapter.name}.ipynb)" not in text] == []
