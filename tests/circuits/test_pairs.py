"""Pairs: what is refused and by which name, where positions lie, how batches are cut."""

from __future__ import annotations

import pytest
import torch

from attnlab.circuits import Pair, Pairs
from attnlab.circuits.pairs import PAD, spans_of

GOOD = Pair("t2 t3 t4 t5", "t2 t9 t4 t5", ["t7"], ["t8"], {"mid": [(3, 5)]})


def with_(**changes):
    return Pair(**({name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__} | changes))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_(corrupt=GOOD.clean), "the same prompt 't2 t3 t4 t5'"),
        (with_(corrupt="t2 t9 t4"), "clean has 4 tokens and corrupt 3"),
        (with_(answers=["t7 t7"]), "'t7 t7' is 2 tokens"),
        (with_(answers=[""]), "'' is 0 tokens"),
        (with_(foils=["t8 t9"]), "'t8 t9' is 2 tokens"),
        (with_(options=["t7", "t8 t9"]), "'t8 t9' is 2 tokens"),
        (with_(foils=["t8", "t7"]), "'t7' is both answer and foil"),
        (with_(answers=[]), "at least one token"),
        (with_(foils=[]), "at least one token"),
        (with_(spans={"mid": [(2, 3)]}), "no token ends inside mid"),
        (with_(spans={"mid": []}), "no token ends inside mid"),
        (with_(spans={"mid": [(3, 8)]}), r"mid \('t3 t4'\) is not one token"),
    ],
)
def test_a_bad_pair_is_refused_by_number_and_item(lm, bad, message):
    with pytest.raises(ValueError, match=message) as error:
        Pairs("toy", lm.tokenizer, [GOOD, bad], single_token=["mid"])
    assert "pair 1 of 'toy'" in str(error.value)


def test_no_pairs_are_refused(lm):
    with pytest.raises(ValueError, match="pairs of 'toy' is empty"):
        Pairs("toy", lm.tokenizer, [])


def test_a_span_may_hold_several_tokens_if_nobody_asks_for_one(lm):
    pairs = Pairs("toy", lm.tokenizer, [with_(spans={"mid": [(3, 8)]})])
    assert pairs.position(0, "mid") == [1, 2]


def test_words_and_positions(lm):
    pairs = Pairs("toy", lm.tokenizer, [GOOD])
    assert pairs.words(0) == ["t2", "t3", "t4", "t5"]
    assert (pairs.position(0, "mid"), pairs.position(0, "END")) == ([1], [3])


def test_masks(batch, pairs):
    size, length = batch.clean.shape
    assert batch.mask("all").all()
    for name in ("mid", "two", "END"):
        for row in range(size):
            assert batch.mask(name)[row].nonzero()[:, 0].tolist() == pairs.position(row, name)
    assert torch.equal(batch.mask(-1), batch.mask("END"))
    assert torch.equal(batch.mask(-length), batch.mask(0))
    assert batch.mask(2).sum(0).tolist() == [0, 0, size, 0, 0, 0, 0]


@pytest.mark.parametrize("position", [7, -8, 100])
def test_a_position_out_of_range_is_refused(batch, position):
    with pytest.raises(ValueError, match=f"positions={position} lies outside a prompt of 7 tokens"):
        batch.mask(position)


def test_an_unknown_position_is_refused_with_the_known_ones(batch):
    with pytest.raises(ValueError, match=r"positions='S2' is unknown.*'END', 'mid', 'two'"):
        batch.mask("S2")


def test_a_position_that_not_every_pair_has_is_unknown_to_the_batch(lm):
    (batch,) = Pairs("toy", lm.tokenizer, [GOOD, with_(spans={})]).batches()
    with pytest.raises(ValueError, match="positions='mid' is unknown"):
        batch.mask("mid")


def test_lists_of_unequal_length_are_padded_and_pads_mask_nothing(lm):
    many = with_(answers=["t7", "t10"], spans={"mid": [(3, 5), (6, 8)]})
    (batch,) = Pairs("toy", lm.tokenizer, [GOOD, many]).batches()
    assert batch.answers[0].tolist()[1] == PAD
    assert batch.mask("mid").tolist() == [[False, True, False, False], [False, True, True, False]]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_batches_hold_one_length_and_every_pair_once(make_pairs, size):
    pairs = make_pairs([5, 7, 5, 9, 7, 5, 7])
    seen = []
    for batch in pairs.batches(size):
        assert 1 <= len(batch) <= size
        for row, number in enumerate(batch.index.tolist()):
            assert batch.clean[row].tolist() == pairs.tokenizer(pairs.pairs[number].clean)["input_ids"]
            assert batch.corrupt[row].tolist() == pairs.tokenizer(pairs.pairs[number].corrupt)["input_ids"]
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(7))


def test_subset_keeps_the_order_asked_for(make_pairs):
    pairs = make_pairs([5, 7, 5, 9])
    part = pairs.subset([3, 0])
    assert len(part) == 2
    assert part.pairs == [pairs.pairs[3], pairs.pairs[0]]
    assert part.words(0) == pairs.words(3)
    assert part.digest != pairs.digest
    assert repr(part) == "Pairs('random words', 2 pairs, 5-9 tokens)"


def test_digest_follows_the_texts(make_pairs):
    assert make_pairs(seed=1).digest == make_pairs(seed=1).digest
    assert make_pairs(seed=1).digest != make_pairs(seed=2).digest


def test_spans_are_whole_words():
    assert spans_of("Ann and Anna met Ann.", "Ann") == [(0, 3), (17, 20)]
    assert spans_of("a pen, a pencil", "pen") == [(2, 5)]
    assert spans_of("nobody", "Ann") == []
