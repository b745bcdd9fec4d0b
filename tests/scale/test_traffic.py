"""The byte formulas against sums done by hand; the counts of real runs are compared in test_attention."""

from __future__ import annotations

import pytest

from attnlab.scale import bytes_sent

SIZES = {"heads": 4, "kv_heads": 4, "width": 8, "element": 2}


def test_by_hand():
    # two ranks of 10 tokens: 10 * 4 * 8 numbers of keys, as many of values
    assert bytes_sent("ring", 2, 10, **SIZES) == 2 * 320 * 2
    assert bytes_sent("ring", 2, 10, **SIZES, backward=True, gradient=4) == 2 * 320 * 2 + 2 * 2 * 320 * 4
    assert bytes_sent("gathered", 4, 10, **SIZES) == 3 * 2 * 320 * 2
    assert bytes_sent("ulysses", 4, 12, **SIZES) == 3 * 4 * (12 * 4 * 8) * 2 // 4


def test_ring_and_ulysses_send_the_same_on_two_ranks_and_ulysses_less_on_more():
    sent = {w: [bytes_sent(m, w, 64 // w, **SIZES) for m in ("ring", "ulysses")] for w in (2, 4)}
    assert sent[2][0] == sent[2][1]
    assert sent[4][0] == 2 * sent[4][1]


def test_fewer_key_heads_help_the_ring_in_proportion():
    full, grouped = (bytes_sent("ring", 8, 16, **{**SIZES, "kv_heads": n}) for n in (4, 1))
    assert full == 4 * grouped


@pytest.mark.parametrize("method", ["ring", "ulysses", "gathered"])
@pytest.mark.parametrize("backward", [False, True])
def test_one_rank_sends_nothing(method, backward):
    assert bytes_sent(method, 1, 16, **SIZES, backward=backward) == 0


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method='broadcast' is unknown; use one of ring, ulysses, gathered"):
        bytes_sent("broadcast", 2, 16, **SIZES)
