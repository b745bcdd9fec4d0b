"""Sums with chains: right chains add up, slips carry through, answers are read off responses."""

import numpy as np
import pytest
import torch

from attnlab.data import chains
from attnlab.data.chains import PLUS, STEP, STOP, WORDS, ZERO, answer_of, correct, sums


def draw(n=200, seed=0, **options):
    return sums(np.random.default_rng(seed), n, **options)


def text(tokens):
    return " ".join(WORDS[token - 1] for token in tokens)


def test_tokens_are_those_of_the_word_model():
    from attnlab.models.word_model import WordModel

    model = WordModel(WORDS, n_layers=1, n_heads=1, d_model=4, d_mlp=4, context=8)
    assert model.tokenizer("0 9 + = ; E")["input_ids"] == [ZERO, ZERO + 9, PLUS, chains.EQUALS, STEP, STOP]


@pytest.mark.parametrize("operands", [2, 3, 4, 7])
def test_a_chain_holds_the_partial_sums_modulo_ten(operands):
    batch = draw(operands=operands)
    assert batch.prompts.shape == (200, 2 * operands)
    assert batch.chains.shape == (200, 2 * operands - 2)
    for prompt, chain, answer in zip(*batch, strict=True):
        digits = [int(word) for word in text(prompt).removesuffix(" =").split(" + ")]
        steps = [int(word) for word in text(chain).removesuffix(" E").split(" ; ")]
        assert steps == [sum(digits[: k + 2]) % 10 for k in range(operands - 1)]
        assert answer == ZERO + steps[-1] == chain[-2]


def test_a_slip_changes_a_step_and_all_that_follow_but_not_the_answer():
    right, slipped = draw(4000), draw(4000, slip=0.25)
    np.testing.assert_array_equal(right.prompts, slipped.prompts)
    np.testing.assert_array_equal(right.answers, slipped.answers)
    written, operands = slipped.chains[:, 0::2] - ZERO, slipped.prompts[:, 0::2] - ZERO
    before = np.concatenate([operands[:, :1], written[:, :-1]], axis=1)
    kept = (before + operands[:, 1:]) % 10 == written  # each step goes on from what is written
    assert abs(kept.mean() - (0.75 + 0.025)) < 0.02
    assert abs((slipped.chains[:, -2] == slipped.answers).mean() - 0.47) < 0.04
    assert (draw(500, slip=1.0).chains[:, 1::2] == right.chains[:500, 1::2]).all()  # separators and the stop never slip


def test_the_same_generator_gives_the_same_problems():
    for a, b in zip(draw(slip=0.3), draw(slip=0.3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (draw(seed=0).prompts != draw(seed=1).prompts).any()


def test_answers_are_read_before_the_first_stop():
    d = ZERO
    responses = [
        [d + 3, STEP, d + 7, STOP],
        [d + 3, STOP, d + 7, STOP],  # what comes after the stop does not count
        [d + 3, STEP, STEP, STOP],  # the last digit, not the last token
        [STOP, d + 1, d + 1, d + 1],  # nothing before the stop
        [d + 3, STEP, d + 7, STEP],  # no stop
        [PLUS, STEP, chains.EQUALS, STOP],  # no digit
        [0, d, 0, STOP],
    ]
    wanted = [d + 7, d + 3, d + 3, 0, 0, 0, d]
    assert answer_of(np.array(responses)).tolist() == wanted
    assert answer_of(torch.tensor(responses).view(7, 1, 4)).tolist() == [[token] for token in wanted]


def test_right_chains_are_correct_and_groups_lie_side_by_side():
    batch = draw(5)
    responses = np.repeat(batch.chains, 3, axis=0)
    assert correct(batch, responses).tolist() == [1.0] * 15
    responses[4, -2] = ZERO + (responses[4, -2] - ZERO + 1) % 10
    assert np.flatnonzero(correct(batch, torch.from_numpy(responses)) == 0).tolist() == [4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw(n=0), "n: at least one problem is wanted, not 0"),
        (lambda: draw(operands=1), "operands: a sum needs at least 2, not 1"),
        (lambda: draw(slip=1.5), "slip: a probability from 0 to 1 is wanted, not 1.5"),
        (lambda: answer_of(np.zeros((3, 0))), "responses: tokens"),
        (lambda: correct(draw(4), np.ones((6, 2))), "responses: "),
    ],
)
def test_what_cannot_be_asked_is_named(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()
