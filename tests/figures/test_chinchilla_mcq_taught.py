"""Which heads look at the right letter, before and after: every cell of the record, and a chart that fits a phone."""

from __future__ import annotations

from attnlab.figures import chinchilla_mcq_taught as plots

ROWS = [
    {"seed": seed, "scores_before": [[0.0, 0.1], [0.2, -0.1]], "scores_after": [[0.0, 0.5], [0.25, seed / 10]]}
    for seed in (0, 1)
]


def test_every_score_has_its_cell():
    frame = plots.score_frame(ROWS)
    assert len(frame) == 2 * 2 * 4
    (found,) = frame.query("seed == 1 and when == 'after' and layer == 1 and head == 1").score
    assert found == 0.1


def test_the_chart_chooses_a_seed_and_is_narrow():
    spec = plots.heads_chart(plots.score_frame(ROWS)).to_dict()
    assert [panel["title"] for panel in spec["vconcat"]] == ["before the lessons", "after the lessons"]
    assert all(panel["width"] <= 300 for panel in spec["vconcat"])
    (param,) = [param for param in spec["params"] if param["name"] == "taught_seed"]
    assert param["bind"]["options"] == [0, 1]
