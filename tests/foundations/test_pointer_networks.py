"""Oracles of the four networks: one answer from two ways of computing it, what a permutation does, where a dictionary ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from attnlab.data import IGNORE
from attnlab.foundations import pointer_networks as pn
from attnlab.foundations.pointer_decoding import greedy, pointer_loss
from attnlab.models.training import seeded

MAKE = {
    "softmax": lambda: pn.FixedSoftmax(6, 8),
    "attention": lambda: pn.BlendingAttention(6, 8),
    "pointer": lambda: pn.PointerNet(6),
    "set": lambda: pn.SetPointer(8, layers=2, heads=2),
}
TARGETS = torch.tensor([[3, 1, 5, 3, 0], [2, 4, 2, 0, IGNORE]])


def build(name, seed=0):
    return seeded(MAKE[name], seed).double().eval()


def points(batch=2, n=5, seed=1):
    return torch.rand(batch, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MAKE)
def test_all_symbols_at_once_are_what_steps_give(name):
    solver, given = build(name), points()
    torch.testing.assert_close(
        solver(given, TARGETS)[:, :4], pn.Solver.forward(solver, given, TARGETS)[:, :4], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", MAKE)
def test_a_batch_is_its_instances(name):
    solver, given = build(name), points()
    whole = solver(given, TARGETS)
    alone = torch.cat([solver(given[i : i + 1], TARGETS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
    assert whole.shape == (2, 5, 6)


@pytest.mark.parametrize("name", MAKE)
def test_the_likelihood_of_the_greedy_answer_is_the_product_of_its_steps(name):
    solver, given = build(name), points()
    said, chances = greedy(solver, given, 4)
    logits = solver(given, said).detach()
    for row, (symbols, steps) in enumerate(zip(said.tolist(), chances, strict=True)):
        for place, symbol in enumerate(symbols):
            assert logits[row, place].log_softmax(-1)[symbol].exp() == pytest.approx(float(steps[place, symbol]))
            if symbol == 0:
                break


def test_a_set_of_points_has_no_order_and_a_sequence_has():
    given, turn = points(), torch.tensor([3, 0, 4, 1, 2])
    symbols = torch.cat([torch.tensor([0]), turn + 1])  # symbol k of the turned input is symbols[k] of the old one
    renamed = torch.where(TARGETS > 0, (symbols.argsort())[TARGETS.clamp(min=0)], TARGETS)
    changes = {
        name: float(
            (build(name)(given[:, turn], renamed) - build(name)(given, TARGETS)[..., symbols])[:, :4]
            .detach()
            .abs()
            .max()
        )
        for name in ("set", "pointer")
    }
    assert changes["set"] < 1e-12
    assert changes["pointer"] > 1e-3


def test_without_v_every_symbol_is_as_likely_and_a_planted_match_wins():
    solver, given = build("pointer"), points()
    with torch.no_grad():
        solver.score.v.weight.zero_()
        assert solver(given, TARGETS).softmax(-1) == pytest.approx(torch.full((2, 5, 6), 1 / 6))
        assert float(pointer_loss(solver, (given, TARGETS))) == pytest.approx(math.log(6))
        solver.score.w1.weight.copy_(torch.eye(6))
        solver.score.w2.weight.zero_()
        solver.score.v.weight.fill_(1e4)
    keys = torch.full((1, 6, 6), -1.0, dtype=torch.float64)
    keys[0, 4] = 1
    assert solver.score(keys, torch.zeros(1, 1, 6, dtype=torch.float64)).softmax(-1)[0, 0, 4] == 1


def test_the_additive_score_has_the_right_gradients():
    score = pn.AdditiveScore(3).double()
    torch.manual_seed(0)
    keys, d = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    names, values = zip(*score.named_parameters(), strict=True)

    def run(keys, d, *parameters):
        return functional_call(score, dict(zip(names, parameters, strict=True)), (score.w1(keys), d))

    assert torch.autograd.gradcheck(run, (keys, d, *values))


@pytest.mark.parametrize("name", ["softmax", "attention"])
def test_a_fixed_dictionary_cannot_name_a_ninth_point(name):
    solver = build(name)
    logits = solver(points(n=11), TARGETS)
    assert logits.shape == (2, 5, 12)
    assert torch.isneginf(logits[..., 9:]).all()
    assert torch.isfinite(logits[..., :9]).all()


@pytest.mark.parametrize("name", ["pointer", "set"])
def test_a_pointer_names_as_many_as_there_are(name):
    assert torch.isfinite(build(name)(points(n=30), TARGETS)).all()


def test_clipped_scores_stay_within_the_clip():
    solver = build("set")
    with torch.no_grad():
        solver.key.weight.mul_(1e6)
    assert solver(points(), TARGETS).abs().max() <= 10


def test_the_decoder_is_fed_coordinates():
    x = pn.with_begin(points())
    assert x[:, 0].tolist() == [[0, 0, 1]] * 2
    memory = pn.Memory(x, x, x)
    torch.testing.assert_close(pn.chosen(memory, torch.tensor([[0, 3], [5, 1]]))[1], x[1, [5, 1]])
    assert pn.shifted(TARGETS).tolist() == [[0, 3, 1, 5, 3], [0, 2, 4, 2, 0]]
    corner = pn.with_begin(torch.tensor([[[0.5, 0.5]]]))[0, 1]
    assert corner.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pn.PointerNet(0), "width=0 must be at least 1"),
        (
            lambda: pn.with_begin(torch.zeros(4, 3)),
            r"points: \[B, n, 2\] with at least one point is wanted, not \[4, 3\]",
        ),
    ],
)
def test_what_cannot_be_read_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
