"""What may be said next, greedy decoding and beam search against all answers there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnlab.foundations import pointer_networks as pn
from attnlab.foundations.pointer_decoding import beam_search, forbidden, forbidden_along, greedy, pointer_loss
from attnlab.models.training import seeded


def solver(seed=0, scale=3.0):
    made = seeded(lambda: pn.PointerNet(5), seed).double().eval()
    with torch.no_grad():
        made.score.v.weight.mul_(scale)  # so that answers differ in their likelihood
    return made


def points(batch, n):
    return torch.rand(batch, n, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_a_tour_visits_everyone_once_and_then_stops():
    said, chances = greedy(solver(), points(20, 6), 7, "tour")
    assert (said[:, :6].sort(1).values == torch.arange(1, 7)).all()
    assert (said[:, 6] == 0).all()
    torch.testing.assert_close(chances.sum(-1), torch.ones(20, 7, dtype=torch.float64))
    assert (chances[:, 0, 0] == 0).all()
    assert (chances[:, 6, 0] == 1).all()  # all but one masked: no NaN


def test_what_is_forbidden_along_an_answer_is_what_is_forbidden_step_by_step():
    targets = torch.tensor([[2, 1, 3, 0], [3, 2, 1, 0]])
    along = forbidden_along(targets, 4)
    for step in range(4):
        said = torch.cat([torch.zeros(2, 1, dtype=torch.long), targets[:, :step]], 1)
        assert (along[:, step] == forbidden(said, 4)).all()
    assert torch.isfinite(pointer_loss(solver(), (points(2, 3), targets), "tour"))


@pytest.mark.parametrize("rule", ["free", "tour"])
def test_a_beam_of_one_is_greedy(rule):
    given = points(12, 5)
    said, _ = greedy(solver(), given, 6, rule)
    beam, _ = beam_search(solver(), given, 6, 1, rule)
    assert (said == beam).all()


def test_a_wide_beam_finds_the_likeliest_tour_of_all():
    given = points(6, 4)
    found, score = beam_search(solver(scale=6.0), given, 5, 24, "tour")
    orders = torch.tensor([(*order, 0) for order in itertools.permutations(range(1, 5))])
    for i in range(6):
        each = given[i : i + 1].expand(len(orders), -1, -1)
        logits = solver(scale=6.0)(each, orders).masked_fill(forbidden_along(orders, 5), -torch.inf)
        likelihood = logits.log_softmax(-1).gather(2, orders[..., None])[..., 0].sum(1).detach()
        assert float(score[i]) == pytest.approx(float(likelihood.max()))
        assert (found[i] == orders[likelihood.argmax()]).all()


def test_a_wide_beam_is_no_less_likely_without_a_rule_and_ends_with_stop():
    given = points(8, 4)
    scores = [beam_search(solver(), given, 6, width)[1] for width in (1, 400)]
    assert (scores[1] >= scores[0] - 1e-12).all()
    said, _ = beam_search(solver(), given, 6, 8)
    for row in said.tolist():
        if 0 in row:
            assert not any(row[row.index(0) :])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: greedy(solver(), points(1, 4), 0), "steps=0: at least one symbol"),
        (lambda: beam_search(solver(), points(1, 4), 3, 0), "steps=3, width=0: both must be at least 1"),
    ],
)
def test_nothing_cannot_be_decoded(call, message):
    with pytest.raises(ValueError, match=message):
        call()
