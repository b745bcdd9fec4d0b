"""Bytes are counted when they are allocated and when they are freed."""

from __future__ import annotations

import pytest
import torch

from attnlab.scale import memory


def test_a_peak_is_what_lives_at_once():
    with memory.PeakBytes() as count:
        x = torch.zeros(1000)  # 4000 bytes
        y = x[10:].view(-1, 2)  # a view adds nothing
        z = x + 1
        del z
        w = y * 2  # 3960 bytes, in the place of z
    assert count.peak == 8000
    assert count.now == 4000 + 3960
    del w
    assert count.now == 4000


def test_in_place_operations_add_nothing():
    with memory.PeakBytes() as count:
        x = torch.zeros(50)
        x += 1
        x.mul_(2)
    assert count.peak == 200


def test_plain_attention_holds_two_matrices_of_scores():
    scores = memory.HEADS * 512**2 * 4
    assert 2 * scores < memory.peak_plain(512) < 2 * scores + 5 * 512 * memory.HEADS * memory.WIDTH * 4


def test_blocks_grow_with_the_length_and_plain_scores_with_its_square():
    assert memory.peak_blocks(1024) == pytest.approx(2 * memory.peak_blocks(512), rel=0.01)
    assert memory.peak_plain(1024) > 3 * memory.peak_plain(512)
    assert memory.peak_ring(512, 2) < memory.peak_plain(512)


@pytest.mark.parametrize("peak", [lambda n: 3 * n * n + 7 * n + 100, lambda n: 40 * n + 5])
def test_the_longest_sequence_is_the_last_within_the_budget(peak):
    found = memory.longest(peak, 10**6, (8, 16, 24))
    assert peak(found) <= 10**6 < peak(found + 2)


def test_a_ring_counts_the_same_bytes_every_time():
    assert len({memory.peak_ring(256, 4) for _ in range(6)}) == 1  # whatever the threads did in between
