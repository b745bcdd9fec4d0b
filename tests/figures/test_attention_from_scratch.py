"""Figures of the introduction, from invented scores and from the book's own list of papers."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from attnlab import papers
from attnlab.figures import attention_from_scratch as plots
from attnlab.foundations import attention_measures as measure

WORDS = ["When", " Mary", " isn't", ' "', " Mary"]


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def test_score_frame_holds_every_pair_of_the_heads_asked_for(maps: torch.Tensor) -> None:
    frame = plots.score_frame(maps, {"2.1": "sink", "0.0": "broad"})
    assert len(frame) == 2 * 25
    row = frame.query("head == 'sink' and t == 3 and s == 4").score
    assert row.item() == pytest.approx(maps[2, 1, 3, 4].item(), abs=0.01)


def test_every_term_of_the_papers_has_its_place_in_the_equation() -> None:
    assert {paper.terms for paper in papers.all().values()} == set(plots.TERMS)


def test_the_map_has_a_box_for_every_term_and_every_paper() -> None:
    frame = plots.map_frame(papers.all())
    assert len(frame) == len(plots.TERMS) + 30
    by_slug = frame[frame.slug != ""].set_index("slug")
    assert {slug: paper.terms for slug, paper in papers.all().items()} == by_slug.term.to_dict()
    for one in frame.itertuples():  # no two boxes overlap
        over = (frame.x < one.x2) & (frame.x2 > one.x) & (frame.y < one.y2) & (frame.y2 > one.y)
        assert over.sum() == 1, one


def test_the_words_of_a_pick_name_part_and_idea() -> None:
    words = plots.map_words(papers.all())
    term = words[(words.of_term == "values") & (words.of_slug == "")]
    assert term.text.iloc[0] == "values: 2 of 30 papers"
    assert "pointer networks (foundations)" in set(term.text)
    assert set(term.slug) == {"", "pointer-networks", "local-linear-attention"}
    paper = words[words.of_slug == "gna"].sort_values("line").text.tolist()
    assert paper[0] == "gna (kernels) changes: positions"
    assert papers.get("gna").idea in " ".join(paper)
    heights = words.groupby(["of_term", "of_slug"]).line.max()
    assert 17 * heights.max() < plots.BELOW
    assert words.text.str.len().max() <= 60


def test_an_unknown_term_is_answered_with_close_matches() -> None:
    with pytest.raises(ValueError, match="term: 'score' is no term of the equation; did you mean 'scores'"):
        plots.term_map(term="score")


def test_charts_are_valid_and_fit_a_page(maps: torch.Tensor) -> None:
    times = pd.DataFrame(
        [{"piece": piece, "length": n, "ms": n / 7} for piece in plots.PIECE_COLOURS for n in (128, 256, 2048)]
    )
    for chart in (
        plots.weights_figure(maps, WORDS, {"2.1": "sink", "0.0": "broad"}),
        plots.weights_figure(maps, WORDS, {"0.0": "0.0"}, query=2, bound=False),
        plots.spread_chart(measure.spread([4, 16], keys=8, queries=5), keys=8),
        plots.cost_chart(times),
        plots.term_map(),
        plots.term_map(term="values", slug="pointer-networks"),
    ):
        assert len(json.dumps(chart.to_dict())) < 200_000


def test_a_query_counts_from_the_end(maps: torch.Tensor) -> None:
    spec = json.dumps(plots.weights_figure(maps, WORDS, {"0.0": "0.0"}, query=-1).to_dict())
    assert '"value": [{"t": 4}]' in spec


def test_explorers_answer_every_setting(maps: torch.Tensor) -> None:
    assert len(plots.weights_explorer(maps, WORDS).grid(6)) == 6
    assert len(plots.map_explorer().grid()) == len(plots.TERMS)
