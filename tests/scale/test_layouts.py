"""Which rank holds which token, and who has to work."""

from __future__ import annotations

import pytest
import torch

from attnlab.scale import LAYOUTS, causal_pairs, positions, shard, unshard


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_token_is_somewhere_and_comes_back(layout, ranks):
    rows = positions(30 if ranks != 2 else 12, ranks, layout)
    assert sorted(rows.flatten().tolist()) == list(range(rows.numel()))
    assert (rows.diff(dim=1) > 0).all()  # ascending on every rank, as blocks of keys want it
    x = torch.randn(2, rows.numel(), 3)
    assert torch.equal(unshard(shard(x, ranks, layout), layout), x)
    flipped = x.transpose(1, 2)
    assert torch.equal(unshard(shard(flipped, ranks, layout, axis=2), layout, axis=2), flipped)


def test_the_layouts_by_hand():
    assert positions(8, 2, "contiguous").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert positions(8, 2, "zigzag").tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert positions(8, 2, "striped").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_shares_the_work_equally_and_contiguous_does_not(ranks):
    length = 48 * ranks
    work = {layout: causal_pairs(length, ranks, layout) for layout in LAYOUTS}
    assert all(int(row.sum()) == length * (length + 1) // 2 for row in work.values())
    assert len(set(work["zigzag"].tolist())) == 1
    pieces = work["contiguous"].double()
    assert float(pieces.max() / pieces.mean()) == pytest.approx(2 - 1 / ranks, abs=0.02)
    assert float(work["striped"].max() / work["striped"].double().mean()) == pytest.approx(1, abs=ranks / length)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, "diagonal"), "layout='diagonal' is unknown; use one of contiguous, zigzag, striped"),
        ((10, 4, "contiguous"), "length=10 is not a positive multiple of 4.*pad the sequence to 12"),
        ((12, 4, "zigzag"), "multiple of 8, the pieces of 'zigzag' on 4 ranks; pad the sequence to 16"),
        ((0, 2, "striped"), "length=0 is not a positive multiple of 2.*pad the sequence to 2"),
        ((8, 0, "striped"), "ranks=0 must be at least 1"),
    ],
)
def test_what_does_not_divide_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        positions(*arguments)
