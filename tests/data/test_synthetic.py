import numpy as np
import pytest

from attnlab import data


def draw(seed=0, batch=50, pairs=6, length=31, vocab=20):
    return data.mqar(np.random.default_rng(seed), batch, pairs, length, vocab)


def test_every_query_asks_for_the_value_that_came_with_its_key():
    tokens, targets = draw()
    assert tokens.shape == targets.shape == (50, 31)
    for row, wanted in zip(tokens, targets, strict=True):
        value_of = dict(zip(row[0:12:2], row[1:12:2], strict=True))
        queries = np.flatnonzero(wanted != data.IGNORE)
        assert len(value_of) == len(queries) == 6
        assert queries.min() >= 12
        assert sorted(row[queries]) == sorted(value_of)
        assert [value_of[key] for key in row[queries]] == wanted[queries].tolist()
        assert not row[12:][wanted[12:] == data.IGNORE].any()  # the rest is filler


def test_keys_and_values_have_their_halves_of_the_vocabulary():
    tokens, _ = draw(batch=400)
    assert set(tokens[:, 0:12:2].ravel()) == set(range(1, 10))
    assert set(tokens[:, 1:12:2].ravel()) == set(range(10, 20))


def test_queries_come_at_every_place():
    _, targets = draw(batch=400)
    assert (targets[:, 12:] != data.IGNORE).any(axis=0).all()


def test_the_generator_decides():
    assert np.array_equal(draw(3).tokens, draw(3).tokens)
    assert not np.array_equal(draw(3).tokens, draw(4).tokens)


def test_the_tightest_sizes_work():
    tokens, targets = draw(pairs=9, length=27, vocab=20)
    assert (tokens != 0).all()
    assert (targets != data.IGNORE).sum() == 50 * 9


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch": 0}, "batch: a positive number"),
        ({"pairs": -1}, "pairs: a positive number"),
        ({"length": 17}, "length: 6 pairs and their queries need at least 18 tokens, not 17"),
        ({"vocab": 13}, "vocab: 6 different keys need at least 14 tokens, not 13"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw(**change)
