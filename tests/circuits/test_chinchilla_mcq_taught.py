"""One query or one key for all prompts, on an untrained model of words; the verdict from known numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab import records
from attnlab.circuits import HookedLM
from attnlab.circuits import chinchilla_mcq_taught as taught
from attnlab.circuits.chinchilla_mcq import Sheet, is_right
from attnlab.data.choices import WORDS, choices
from attnlab.models.word_model import WordModel

HEADS = ["0.1", "1.3"]


@pytest.fixture(scope="module")
def words() -> HookedLM:
    return HookedLM(WordModel(WORDS, n_layers=2, n_heads=4, d_model=32, d_mlp=48, context=19, init_std=0.3).bridge())


@pytest.fixture(scope="module")
def given() -> list[Sheet]:
    """Two sheets of different size."""
    return [Sheet.of(choices(np.random.default_rng(seed), n, "shuffled", 4)) for seed, n in ((1, 12), (2, 7))]


def test_the_mean_is_over_all_prompts(words, given):
    means = taught.means_of(taught.vectors_of(words, given, HEADS))
    queries, keys = [], []
    for sheet in given:
        acts = words.run(sheet.tokens, capture=("q", "k")).acts
        queries.append(acts["q", 1][:, -1, 3])
        keys += [acts["k", 1][i, at, 3] for i, at in enumerate(sheet.label_at)]
    torch.testing.assert_close(means.q["1.3"], torch.cat(queries).mean(0))
    torch.testing.assert_close(means.k["1.3"], torch.cat(keys).mean(0))


def test_one_query_for_all_is_written_at_the_last_token_only(words, given):
    """Against whole runs in which every head's query is overwritten by hand."""
    means = taught.means_of(taught.vectors_of(words, given, HEADS))
    found = taught.right_answers(words, given, {"q": (means.subspaces(HEADS), "q"), "k": (means.subspaces(HEADS), "k")})
    assert list(found) == ["untouched", "q", "k"]
    assert all(len(right) == 19 for right in found.values())
    from attnlab.circuits.model import Edit

    def alike(name):
        layer, head = map(int, name.split("."))

        def change(act, first):
            act = act.clone()
            act[:, -1, head] = means.q[name]
            return act

        return Edit("q", layer, change)

    by_hand = []
    for sheet in given:
        with torch.no_grad():
            run = words.run(sheet.tokens, [alike(name) for name in HEADS])
        by_hand.append(is_right(words.logits(words.readout(run.resid[2]), sheet.labels), sheet.gold))
    assert np.array_equal(found["q"], np.concatenate(by_hand))


def test_keys_that_know_what_stands_before_them_and_no_more():
    """Keys made of a place and of whether the answer has come: nothing else is left to add."""
    gold = torch.arange(4).repeat(50)
    place = torch.arange(4).expand(200, 4)
    seen = (gold[:, None] < place).double()
    noise = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = torch.stack([place.double(), 3 * seen, 0 * seen], -1) + 0.01 * noise
    shares = taught.key_shares({"1.3": {"k": keys}}, gold, ["1.3"])
    assert shares["place"] + shares["answer seen"] == pytest.approx(1, abs=1e-3)
    assert shares["right line"] == pytest.approx(shares["answer seen"], abs=1e-3)
    assert 0.05 < shares["being right"] < 0.7 * shares["answer seen"]


def test_other_heads_are_as_many_and_of_the_same_layers(words):
    for draw in range(5):
        drawn = taught.others(words, ["1.0", "1.3"], draw)
        assert sorted(drawn) == ["1.1", "1.2"]
    several = [taught.others(words, ["0.1", "1.3"], draw) for draw in range(8)]
    assert all(len(set(drawn)) == 2 and not set(drawn) & {"0.1", "1.3"} for drawn in several)
    assert len({tuple(drawn) for drawn in several}) > 1


def rows(query: float, other: float):
    accuracy = {
        "untouched": 95.0,
        "one query": 95.0 - query,
        "one key": 60.0,
        "others 0": 95.0 - other,
        "others 1": 95.0,
    }
    return [{"seed": seed, "seconds": 1.0, "accuracy": accuracy} for seed in (0, 1, 2)]


@pytest.mark.parametrize(("query", "verdict"), [(40.0, "confirmed"), (1.0, "refuted"), (6.0, "not distinguishable")])
def test_the_verdict_follows_the_rule(query, verdict):
    judged = taught.judged(rows(query, 4.0))
    assert judged["verdict"] == verdict
    assert judged["value"] == pytest.approx(query)
    assert judged["controls"]["others"]["value"] == pytest.approx(2.0)


def test_lessons_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(records, "load", lambda name: None)
    with pytest.raises(ValueError, match="make it with --finetune"):
        next(taught.taught_rows())


def test_the_record_of_this_checkout_gives_the_verdict_that_it_tells():
    record = records.load("chinchilla-mcq-taught")
    if record is None:
        pytest.skip("not made yet")
    (judged,) = [row for row in record.rows if "claim" in row]
    again = taught.judged([row for row in record.rows if row.get("case") == "taught"])
    assert again["verdict"] == judged["verdict"]
    assert again["value"] == pytest.approx(judged["value"])
