"""One query or one key for all prompts, on an untrained model of words; the verdict from known numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab import records
from attnlab.circuits import HookedLM
from attnlab.circuits import chinchilla_mcq_taught as taught
from attnlab.circuits.chinchilla_mcq import Sheet, direct_effects, is_right
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
    means = taught.points(taught.vectors_of(words, given, HEADS))
    queries, keys = [], []
    for sheet in given:
        acts = words.run(sheet.tokens, capture=("q", "k")).acts
        queries.append(acts["q", 1][:, -1, 3])
        keys += [acts["k", 1][i, at, 3] for i, at in enumerate(sheet.label_at)]
    torch.testing.assert_close(means["1.3"]["q"].mean, torch.cat(queries).mean(0))
    torch.testing.assert_close(means["1.3"]["k"].mean, torch.cat(keys).mean(0))


def test_one_query_for_all_is_written_at_the_last_token_only(words, given):
    """Against whole runs in which every head's query is overwritten by hand."""
    means = taught.points(taught.vectors_of(words, given, HEADS))
    found = taught.right_answers(words, given, {"q": (means, {"q": 0}), "k": (means, {"k": 0})})
    assert list(found) == ["untouched", "q", "k"]
    from attnlab.circuits.model import Edit

    def alike(name):
        layer, head = map(int, name.split("."))

        def change(act, first):
            act = act.clone()
            act[:, -1, head] = means[name]["q"].mean
            return act

        return Edit("q", layer, change)

    by_hand = []
    for sheet in given:
        with torch.no_grad():
            run = words.run(sheet.tokens, [alike(name) for name in HEADS])
        by_hand.append(is_right(words.logits(words.readout(run.resid[2]), sheet.labels), sheet.gold))
    assert found["q"] == pytest.approx(100 * np.concatenate(by_hand).mean())


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


def test_directions_that_are_all_kept_change_nothing_and_none_is_the_mean(words, given):
    many = [Sheet.of(choices(np.random.default_rng(3), 40, "ABCD", 4))]
    spaces = taught.fitted(taught.vectors_of(words, many, HEADS))
    width = words.spec.d_head
    found = taught.right_answers(words, given, {"whole": (spaces, {"q": width, "k": width, "v": width})})
    assert found["whole"] == found["untouched"]
    for part in ("q", "k", "v"):
        x = taught.vectors_of(words, many, HEADS)["0.1"][part].flatten(0, -2)
        torch.testing.assert_close(spaces["0.1"][part].project(x, 0), x.mean(0).expand_as(x))


def test_random_directions_differ_between_heads_parts_and_draws(words):
    many = [Sheet.of(choices(np.random.default_rng(3), 40, "ABCD", 4))]
    spaces = taught.fitted(taught.vectors_of(words, many, HEADS))
    drawn = [taught.at_random(spaces, draw) for draw in (0, 1)]
    bases = [space.basis for group in drawn for parts in group.values() for space in parts.values()]
    assert len(bases) == 12
    assert all(not torch.allclose(a, b) for i, a in enumerate(bases) for b in bases[:i])
    assert all(torch.equal(drawn[0][head][part].mean, spaces[head][part].mean) for head in HEADS for part in "qkv")


def test_what_nodes_write_is_summed_over_all_prompts(words, given):
    every = [str(node) for node in words.spec.heads]
    found = taught.written(words, given, every, top=100)
    assert found["share"] == pytest.approx(found["any"])
    assert sum(found["nodes"].values()) == pytest.approx(found["total"], abs=1e-2)
    totals = [direct_effects(words, sheet).total for sheet in given]
    assert found["total"] == pytest.approx(np.concatenate(totals).mean())


def rows(**costs: float):
    """Three seeds whose trials cost so many points of 95, ``labels__trial``; those that are not named cost nothing."""
    names = ("one query", "others 0", "queries and keys", "values", "random queries and keys 0")
    accuracy = {
        labels: {"untouched": 95.0}
        | {name: 95.0 - costs.get(f"{labels}__{name.split(' ')[0]}_{name.split(' ')[-1]}", 0.0) for name in names}
        for labels in ("ABCD", "shuffled", "random")
    }
    direct = {"share": 80.0, "any": 5.0}
    return [{"seed": seed, "seconds": 1.0, "accuracy": accuracy, "written": direct} for seed in (0, 1, 2)]


def verdicts(given):
    return {row["claim"].partition("/")[2]: row for row in taught.judged(given)}


@pytest.mark.parametrize(("query", "verdict"), [(40.0, "confirmed"), (1.0, "refuted"), (6.0, "not distinguishable")])
def test_the_verdict_follows_the_rule(query, verdict):
    judged = verdicts(rows(ABCD__one_query=query, ABCD__others_0=4.0))["taught-query"]
    assert judged["verdict"] == verdict
    assert judged["value"] == pytest.approx(query)
    assert judged["controls"]["others"]["value"] == pytest.approx(4.0)


def test_every_claim_reads_its_own_trial():
    found = verdicts(
        rows(
            ABCD__queries_keys=1.0,
            ABCD__random_0=7.0,
            random__queries_keys=9.0,
            shuffled__queries_keys=5.0,
            random__values_values=30.0,
        )
    )
    assert {name: row["value"] for name, row in found.items()} == {
        "taught-query": 0,
        "taught-heads-write": 80,
        "taught-low-rank": 1,
        "taught-random-labels": 9,
        "taught-shuffled-labels": 5,
        "taught-values-carry-the-token": 30,
    }
    controls = {name: next(iter(row["controls"].values()))["value"] for name, row in found.items()}
    assert list(controls.values()) == [0, 5, 7, 1, 1, 9]
    assert [row["verdict"] for row in found.values()] == ["refuted", *["confirmed"] * 5]


def test_lessons_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(records, "load", lambda name: None)
    with pytest.raises(ValueError, match="make it with --finetune"):
        next(taught.taught_rows())


def test_the_record_of_this_checkout_gives_the_verdict_that_it_tells():
    record = records.load("chinchilla-mcq-taught")
    if record is None:
        pytest.skip("not made yet")
    told = [row for row in record.rows if "claim" in row]
    again = list(taught.judged([row for row in record.rows if row.get("case") == "taught"]))
    assert [row["verdict"] for row in again] == [row["verdict"] for row in told]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in told])
