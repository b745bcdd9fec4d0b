"""Lettered questions in words: what stands where, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.data.choices import CONDITIONS, DIGIT, EQUALS, FACTS, LAYOUTS, LETTER, QUESTION, TEXT, WORDS, choices


def drawn(condition="ABCD", options=4, n=24, layout="lines", balanced=True, seed=0):
    return choices(np.random.default_rng(seed), n, condition, options, balanced=balanced, layout=layout)


def test_words_are_single_and_distinct():
    assert len(FACTS) == 40
    assert len(set(WORDS)) == len(WORDS)
    assert all(len(word.split()) == 1 for word in WORDS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("options", [2, 4, 7])
def test_the_right_line_holds_the_capital_of_the_country(layout, condition, options):
    made = drawn(condition, options, n=3 * options, layout=layout)
    rows = np.arange(len(made.gold))
    assert made.tokens.shape == (3 * options, 2 * options + 3)
    np.testing.assert_array_equal(made.tokens[:, made.label_at], made.labels)
    country = made.tokens[:, 1] - QUESTION
    texts = made.tokens[:, made.text_at] - TEXT
    np.testing.assert_array_equal(texts[rows, made.gold], country)
    assert all(len(set(row)) == options for row in texts)
    assert all(len(set(row)) == options for row in made.labels)
    np.testing.assert_array_equal(np.bincount(made.gold), np.full(options, 3))
    np.testing.assert_array_equal(made.answers, made.labels[rows, made.gold])
    assert (made.tokens[:, -1] == EQUALS).all()


def test_a_list_has_all_texts_before_all_labels():
    made = drawn(layout="list")
    assert made.text_at.max() < made.label_at.min()
    words = made.words(0)
    assert words[0] == "?"
    assert words[6:10] == ["A", "B", "C", "D"]


def test_labels_follow_their_condition():
    letters = LETTER + np.arange(4)
    assert (drawn("ABCD").labels == letters).all()
    assert (np.sort(drawn("shuffled").labels, axis=1) == letters).all()
    assert (drawn("shuffled").labels != letters).any()
    assert (drawn("digits").labels == DIGIT + np.arange(4)).all()
    gap = drawn("gap").labels
    assert (np.diff(gap, axis=1) >= 1).all()
    assert (gap[:, -1] == LETTER + 4).all()
    random = drawn("random", n=400).labels - LETTER
    assert random.min() == 0
    assert random.max() == 25


def test_a_mixture_keeps_to_its_weights():
    made = drawn({"ABCD": 3, "digits": 1}, n=2000, balanced=False)
    digits = (made.labels[:, 0] == DIGIT).mean()
    assert abs(digits - 0.25) < 0.05


def test_equal_generators_give_equal_prompts():
    np.testing.assert_array_equal(drawn(seed=3).tokens, drawn(seed=3).tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n: at least one prompt"),
        ({"options": 1}, "options: from 2 to 8"),
        ({"options": 9}, "options: from 2 to 8"),
        ({"n": 10}, "balanced needs a multiple of 4"),
        ({"layout": "table"}, "layout: lines or list"),
        ({"condition": "EFGH"}, "condition: ABCD, shuffled"),
        ({"condition": {}}, "weights that are not negative"),
        ({"condition": {"ABCD": -1.0, "random": 2.0}}, "weights that are not negative"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        drawn(**change)
