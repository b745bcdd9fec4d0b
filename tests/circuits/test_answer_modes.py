"""Two modes of one model: the metric and the shares, on a toy; the questions on the real tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import HookedLM, Readout, Scores, Spec, answer_modes
from attnlab.circuits.attribution import attribution_patch
from attnlab.circuits.thinking_sparks import step_pairs
from attnlab.data import chains
from attnlab.models.word_model import WordModel


@pytest.fixture(scope="module")
def model() -> HookedLM:
    made = WordModel(chains.WORDS, n_layers=2, n_heads=2, d_model=12, d_mlp=16, context=14, init_std=0.3, seed=3)
    return HookedLM(made.bridge())


def test_divergence_is_zero_at_the_clean_run_and_has_no_gradient_there(model: HookedLM):
    pairs = step_pairs(model.tokenizer, 2, seed=0)
    metric = answer_modes.from_clean(model, pairs)
    for batch in pairs.batches(size=3):
        run = model.run(batch.clean, capture=("z",), grad=True)
        value = metric(Readout(model, run.resid[2], batch))
        assert value.abs().max() < 1e-6
        (grad,) = torch.autograd.grad(value.sum(), run.acts["z", 0])
        assert grad.abs().max() < 1e-6
        other = metric(Readout(model, model.run(batch.corrupt).resid[2], batch))
        assert (other > 0).all()
    scores = attribution_patch(model, pairs, metric=metric, direction="denoise")
    assert (scores.base > 0).all()
    np.testing.assert_allclose(scores.base + scores.gap, 0, atol=1e-6)
    assert answer_modes.node_shares(scores).sum() == pytest.approx(1)


def test_table_counts_what_a_mode_has_alone_and_what_its_halves_disagree_on():
    spec = Spec("toy", 1, 3, 3, 6, 2)
    groups = [(head,) for head in spec.heads]
    think = Scores(spec, groups, np.array([[6.0, 6], [-4, 0], [0, 4]]), np.ones(2), np.zeros(2))
    number = Scores(spec, groups, np.array([[1.0, 1], [0, 0], [0, 0]]), np.ones(2), np.zeros(2))
    table = answer_modes.mode_table({"think": think, "number": number}, tau=0.1)
    assert table.loc["think"].tolist() == [3, 2, 1.0]
    assert table.loc["number"].tolist() == [1, 0, 0.0]
    frame = answer_modes.mode_frame({"think": think, "number": number})
    assert frame["head"].tolist() == ["0.0", "0.1", "0.2"]
    np.testing.assert_allclose(frame.think, [0.6, 0.2, 0.2])


@pytest.mark.model
def test_questions_are_the_same_in_both_modes_and_of_equal_length():
    from attnlab.models import smollm2

    _, tokenizer = smollm2.load_model()
    think, number = (answer_modes.mode_pairs(tokenizer, mode, 4) for mode in answer_modes.MODES)
    for one, two in zip(think.pairs, number.pairs, strict=True):
        for side in ("clean", "corrupt"):
            a, b = getattr(one, side), getattr(two, side)
            assert a.replace(answer_modes.MODES["think"], "") == b.replace(answer_modes.MODES["number"], "")
        assert one.answers == two.answers != one.foils


def test_an_unknown_mode_is_refused(model: HookedLM):
    with pytest.raises(ValueError, match="'sing' is unknown"):
        answer_modes.mode_pairs(model.tokenizer, "sing")
