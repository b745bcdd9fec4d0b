"""Conditioning figures of the chapter ``foundations/pavlovian``."""

from __future__ import annotations

from attnlab.figures import pavlovian as plots
from attnlab.foundations import pavlovian as lab


def test_the_chamber_shows_both_animals_of_every_experiment():
    curves, trials, bars = plots.chamber_frames()
    assert set(zip(curves.effect, curves.group, strict=True)) == {
        (effect, group) for effect in plots.EFFECTS for group in ("experiment", "control")
    }
    assert set(trials.cue) == {"A", "B", "C", "US"}
    assert len(bars) == len(plots.EFFECTS) * len(lab.RULES)
    assert len(str(plots.chamber_chart((curves, trials, bars)).to_dict())) < 200_000


def test_the_twin_answers_at_every_setting():
    assert len(plots.similarity_twin().grid(limit=12)) == 12
