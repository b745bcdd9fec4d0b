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


@pytest.mark.parametrize("generate", [data.key_value_recall, data.paired_recall])
class TestOneQuery:
    def draw(self, generate, seed=0, batch=400, pairs=4, keys=8, values=5):
        return generate(np.random.default_rng(seed), batch, pairs, keys, values)

    def pairs(self, generate, tokens):
        """Keys and values [B, pairs] and the query [B] of either layout."""
        if generate is data.paired_recall:
            assert (tokens[:, -1, 1] == 13).all()  # the blank
            return tokens[:, :-1, 0], tokens[:, :-1, 1], tokens[:, -1, 0]
        return tokens[:, 0:-1:2], tokens[:, 1::2], tokens[:, -1]

    def test_the_last_target_is_the_value_of_the_key_asked_for(self, generate):
        tokens, targets = self.draw(generate)
        assert tokens.shape == ((400, 5, 2) if generate is data.paired_recall else (400, 9))
        assert targets.shape == tokens.shape[:2]
        assert (targets[:, :-1] == data.IGNORE).all()
        for keys, values, query, wanted in zip(*self.pairs(generate, tokens), targets[:, -1], strict=True):
            assert len(set(keys)) == 4
            assert dict(zip(keys, values, strict=True))[query] == wanted

    def test_every_key_value_and_place_occurs(self, generate):
        tokens, _ = self.draw(generate)
        keys, values, query = self.pairs(generate, tokens)
        assert set(keys.ravel()) == set(query) == set(range(8))
        assert set(values.ravel()) == set(range(8, 13))
        assert set((keys == query[:, None]).argmax(1)) == set(range(4))

    def test_the_generator_decides(self, generate):
        assert np.array_equal(self.draw(generate, 3).tokens, self.draw(generate, 3).tokens)
        assert not np.array_equal(self.draw(generate, 3).tokens, self.draw(generate, 4).tokens)

    def test_the_tightest_sizes_work(self, generate):
        tokens, targets = self.draw(generate, pairs=1, keys=1, values=1)
        assert (targets[:, -1] == 1).all()
        assert tokens.shape[1] in (2, 3)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"batch": 0}, "batch: a positive number is wanted, not 0"),
            ({"values": -2}, "values: a positive number is wanted, not -2"),
            ({"pairs": 9}, "keys: 9 pairs need as many different keys, not 8"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, generate, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            self.draw(generate, **change)


def test_both_layouts_ask_the_same_questions():
    row, column = (f(np.random.default_rng(5), 7, 3, 6, 4) for f in (data.key_value_recall, data.paired_recall))
    assert np.array_equal(row.tokens[:, 0:-1:2], column.tokens[:, :-1, 0])
    assert np.array_equal(row.targets[:, -1], column.targets[:, -1])


def test_the_most_frequent_value_is_the_yardstick_that_the_docstring_gives():
    """0.41 for 4 pairs and 8 values: the mean share of the most frequent of four draws from eight."""
    draws = np.stack(np.meshgrid(*[np.arange(8)] * 4), axis=-1).reshape(-1, 4)
    most = np.stack([(draws == value).sum(1) for value in range(8)]).max(0)
    assert round(most.mean() / 4, 2) == 0.41
