"""What the executed chapters left behind: no noise, within the budget, every declared claim recorded."""

from __future__ import annotations

import json

import pytest

from attnlab import claims, lab
from tools.chapters import OUT, ROOT, Chapter, all_chapters
from tools.execute import noise


@pytest.fixture(params=all_chapters(), ids=lambda chapter: chapter.name)
def chapter(request: pytest.FixtureRequest) -> Chapter:
    if not request.param.is_fresh():
        pytest.fail(f"{request.param.name} was not executed since it changed; run make test or python -m tools.execute")
    return request.param


def test_nothing_went_to_standard_error(chapter: Chapter) -> None:
    assert noise(chapter) == ""


def test_budget(chapter: Chapter) -> None:
    run = json.loads((OUT / f"{chapter.slug}.run.json").read_text())
    assert run["cpu_seconds"] <= lab.BUDGET_CPU_SECONDS
    assert run["peak_memory_mb"] <= lab.BUDGET_MB


def test_claims_are_declared_and_recorded() -> None:
    slugs = [chapter.slug for chapter in all_chapters() if chapter.paper is not None]
    assert claims.audit(slugs, claims.rows(OUT / "claims", ROOT / "records")) == []
