"""Oracles of ``attnlab.circuits.chinchilla_mcq``: direct effects add up, centring, matrices and kinds of heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import HookedLM, activation_patch
from attnlab.circuits import chinchilla_mcq as mcq
from attnlab.circuits.chinchilla_mcq import Sheet
from attnlab.circuits.chinchilla_mcq_study import centred_logit, pairs_of
from attnlab.circuits.model import Edit
from attnlab.data.choices import WORDS, choices
from attnlab.models.word_model import WordModel


@pytest.fixture(scope="module")
def words() -> HookedLM:
    """An untrained model over the words."""
    model = WordModel(WORDS, n_layers=2, n_heads=4, d_model=32, d_mlp=48, context=19, init_std=0.3, seed=1)
    return HookedLM(model.bridge())


def drawn(condition="shuffled", options=4, n=12, layout="lines"):
    return choices(np.random.default_rng(7), n, condition, options, balanced=True, layout=layout)


def sheet_for(model: HookedLM, n: int = 9, seed: int = 0) -> Sheet:
    """Random tokens with labels at random places, for a model without words."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 64, (n, 11), generator=rng)
    places = torch.stack([torch.randperm(10, generator=rng)[:3] for _ in range(n)])
    tokens.scatter_(1, places, torch.stack([2 + torch.randperm(60, generator=rng)[:3] for _ in range(n)]))
    return Sheet(tokens, tokens.gather(1, places), places, torch.arange(n) % 3)


# --------------------------------------------------------------------------------------------------- logits


def test_centred_logits_sum_to_zero_and_forget_a_constant():
    logits = torch.randn(5, 4, dtype=torch.float64)
    assert mcq.centred(logits).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(mcq.centred(logits + 7), mcq.centred(logits))
    gold = torch.tensor([0, 1, 2, 3, 0])
    others = torch.stack([torch.cat([row[:g], row[g + 1 :]]).mean() for row, g in zip(logits, gold, strict=True)])
    against_others = logits.gather(1, gold[:, None])[:, 0] - others
    torch.testing.assert_close(mcq.centred(logits).gather(1, gold[:, None])[:, 0] * 4 / 3, against_others)


def test_restricted_loss_is_the_loss_over_the_labels():
    logits, gold = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]), torch.tensor([2, 0])
    loss = mcq.restricted_loss(logits, gold)
    assert loss[0] == pytest.approx(np.log(4))
    assert loss[1] < 0.001
    torch.testing.assert_close(loss, mcq.restricted_loss(logits + 3, gold))


def test_a_predictor_of_places_is_right_on_a_quarter_of_shuffled_labels():
    made = drawn("shuffled", n=4000)
    fixed = made.labels[0, 0] - made.labels[0].min() + np.zeros(1)  # any fixed rule from line to letter
    said = np.sort(made.labels, axis=1)[np.arange(4000), made.gold] + 0 * fixed.astype(int)
    assert abs((said == made.answers).mean() - 0.25) < 0.03


# ------------------------------------------------------------------------------------------- direct and total effects


@pytest.mark.parametrize("which", ["lm", "gpt2", "words"])
def test_direct_effects_add_up_to_the_centred_logit(which, request):
    model = request.getfixturevalue(which)
    sheet = Sheet.of(drawn()) if which == "words" else sheet_for(model)
    effects = mcq.direct_effects(model, sheet)
    np.testing.assert_allclose(
        effects.values.sum(0), effects.total, atol=1e-5
    )  # the norm of a Llama computes in float32
    wanted = mcq.centred(mcq.label_logits(model, sheet)).gather(1, sheet.gold[:, None])[:, 0]
    np.testing.assert_allclose(effects.total, wanted.numpy())
    assert len(effects.nodes) == len(effects.values) == 2 + model.spec.n_layers * (model.spec.n_heads + 1)
    assert effects.share(effects.nodes) == pytest.approx(1.0, abs=1e-4)


def test_total_effect_of_the_last_mlp_is_its_direct_effect_without_a_norm(linear_end):
    """Where the readout is linear a change of the last layer goes to the logits directly."""
    sheet = sheet_for(linear_end)
    direction = linear_end._unembed[0][sheet.answers] - linear_end._unembed[0][sheet.labels].mean(1)
    push = torch.randn(len(sheet), linear_end.spec.d_model, dtype=direction.dtype)

    def change(act, first):
        act = act.clone()
        act[:, -1] += push
        return act

    gold = sheet.gold[:, None]
    before, after = (
        mcq.centred(mcq.label_logits(linear_end, sheet, edits)).gather(1, gold)[:, 0]
        for edits in ((), [Edit("mlp_out", linear_end.spec.n_layers - 1, change)])
    )
    torch.testing.assert_close(after - before, (push * direction).sum(1).cpu(), atol=1e-9, rtol=0)


def test_pairs_ask_for_another_line_of_the_same_prompt(words):
    made = drawn("random", n=8)
    pairs = pairs_of(made, words.tokenizer)
    for pair, number in zip(pairs.pairs, range(8), strict=True):
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        assert [i for i in range(len(clean)) if clean[i] != corrupt[i]] == [1]
        assert pair.answers[0] == WORDS[made.answers[number] - 1]
        assert pair.answers[0] == pair.options[0]
        assert pair.foils[0] in pair.options[1:]
        assert len(set(pair.options)) == 4
    scores = activation_patch(words, pairs, ["1.0", "m1"], metric=centred_logit)
    wanted = mcq.centred(mcq.label_logits(words, Sheet.of(made))).gather(1, torch.as_tensor(made.gold)[:, None])[:, 0]
    np.testing.assert_allclose(scores.base, wanted.numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------- matrices and kinds


def test_attention_is_read_where_the_labels_stand(words):
    sheet = Sheet.of(drawn())
    table = mcq.label_attention(words, sheet)
    pattern = words.run(sheet.tokens, capture=("pattern",)).acts["pattern", 1]
    for number, line in ((0, 0), (5, 3)):
        at = int(sheet.label_at[number, line])
        np.testing.assert_allclose(table[1, 2, number, line], float(pattern[number, 2, -1, at]))
    assert (table.sum(-1) <= 1 + 1e-9).all()


def test_a_planted_head_scores_one_and_a_level_one_scores_zero():
    gold = np.arange(12) % 4
    planted = mcq.gold_matrix(np.eye(4)[gold], gold)
    assert mcq.correct_letter_score(planted) == pytest.approx(1.0)
    assert mcq.category(planted) == "correct letter"
    level = mcq.gold_matrix(np.full((12, 4), 0.25), gold)
    assert mcq.correct_letter_score(level) == pytest.approx(0.0)
    assert mcq.category(level) == "uniform"
    single = np.zeros((4, 4))
    single[1, 1] = 0.9
    assert mcq.category(single) == "single letter"
    assert mcq.category(np.zeros((4, 4))) == "other"


def test_permuting_lines_permutes_the_matrix():
    rng = np.random.default_rng(0)
    attention, gold = rng.dirichlet(np.ones(5), 40), np.arange(40) % 5
    order = rng.permutation(5)
    moved = mcq.gold_matrix(attention[:, order], np.argsort(order)[gold])
    np.testing.assert_allclose(moved, mcq.gold_matrix(attention, gold)[np.ix_(order, order)])


def test_heads_above_lists_the_strongest_first():
    scores = np.array([[0.1, 0.5], [0.9, 0.31]])
    assert mcq.heads_above(scores) == ["1.0", "0.1", "1.1"]
    assert mcq.heads_above(scores, 0.95) == []


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(3, 1, dtype=torch.long)}, "k of at least 2"),
        ({"label_at": torch.zeros(3, 3, dtype=torch.long)}, "k of at least 2"),
        ({"gold": torch.tensor([0, 1, 2])}, "lines from 0 to 1"),
        ({"gold": torch.tensor([0, 1])}, "lines from 0 to 1"),
        ({"label_at": torch.tensor([[1, 9]] * 3)}, "positions from 0 to 4"),
        ({"labels": torch.tensor([[5, 5]] * 3)}, "same label twice"),
    ],
)
def test_a_sheet_refuses_what_does_not_fit(change, message):
    fits = {
        "tokens": torch.ones(3, 5, dtype=torch.long),
        "labels": torch.tensor([[5, 6]] * 3),
        "label_at": torch.tensor([[1, 3]] * 3),
        "gold": torch.tensor([0, 1, 0]),
    }
    assert len(Sheet(**fits)) == 3
    with pytest.raises(ValueError, match=message):
        Sheet(**{**fits, **change})


def test_a_line_that_is_never_right_has_no_row():
    with pytest.raises(ValueError, match="line 2 is never right"):
        mcq.gold_matrix(np.ones((4, 3)) / 3, [0, 1, 0, 1])
