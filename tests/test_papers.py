import tomllib

import pytest

from attnlab import papers

TWO = """
[first-paper]
title = "First"
authors = "One, Two"
year = 2020
venue = "ICLR 2020"
arxiv = "2001.00001"
part = "circuits"
headline = "Heads are reused"
idea = "The same heads serve two tasks."
related = ["second-paper"]
terms = "analysis"

[second-paper]
title = "Second"
authors = "Three"
year = 2021
venue = "ICML 2021"
arxiv = ""
part = "vision"
headline = "Look twice"
idea = "Two looks are better."
related = []
terms = "scores"
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    file = tmp_path / "papers.toml"
    file.write_text(TWO)
    monkeypatch.setattr(papers, "FILE", file)
    return file


@pytest.mark.usefixtures("two")
def test_papers_come_in_the_order_of_the_file():
    assert list(papers.all()) == ["first-paper", "second-paper"]
    assert papers.get("first-paper").related == ("second-paper",)
    assert papers.get("first-paper").module == "first_paper"


@pytest.mark.usefixtures("two")
def test_an_unknown_slug_is_answered_with_close_matches():
    with pytest.raises(ValueError, match=r"no paper 'frist-paper'.*did you mean 'first-paper'"):
        papers.get("frist-paper")


@pytest.mark.usefixtures("two")
def test_a_slug_that_resembles_nothing_is_answered_with_all():
    with pytest.raises(ValueError, match=r"there is 'first-paper', 'second-paper'"):
        papers.get("zzz")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('related = ["second-paper"]', 'related = ["third-paper"]', "first-paper.related names 'third-paper'"),
        ('related = ["second-paper"]', 'related = ["first-paper"]', "first-paper.related names 'first-paper'"),
        ("year = 2020\n", "", r"\[first-paper\].*year"),
        ("year = 2020", 'year = 2020\ncolour = "red"', r"\[first-paper\].*colour"),
    ],
)
def test_a_wrong_table_is_named(two, old, new, complaint):
    two.write_text(TWO.replace(old, new, 1))
    papers._load.cache_clear()
    with pytest.raises(ValueError, match=complaint):
        papers.all()


class TestTheBook:
    parts = ("foundations", "circuits", "kernels", "hybrids", "vision", "accelerators")
    terms = ("scores", "normaliser", "values", "positions", "memory", "routing", "hardware", "analysis")

    def test_there_are_thirty_papers_and_parts_stand_together(self):
        seen = [paper.part for paper in papers.all().values()]
        assert len(seen) == 30
        assert seen == sorted(seen, key=self.parts.index)

    def test_every_field_is_filled_as_its_readers_expect(self):
        raw = tomllib.loads(papers.FILE.read_text(encoding="utf-8"))
        for slug, paper in papers.all().items():
            assert slug == paper.slug
            assert paper.terms in self.terms, slug
            assert len(paper.headline.split()) <= 9, slug
            assert len(paper.idea.split()) <= 30, slug
            assert isinstance(paper.year, int), slug
            assert paper.related, slug
            assert all(raw[slug][field] for field in ("title", "authors", "venue", "idea")), slug
