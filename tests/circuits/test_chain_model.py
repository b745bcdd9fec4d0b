"""The small model: what it is trained on, forced words, areas, and one run of every credit rule on a tiny task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnlab.circuits import chain_model, credit
from attnlab.circuits.chain_model import Task, areas, auc, force_words
from attnlab.data import chains
from attnlab.models.grpo import GRPOConfig
from attnlab.models.word_model import WordModel

TINY = Task(operands=4, width=16, batch=8, steps=3)


class Adder(nn.Module):
    """Adds perfectly: goes on from the last digit of the chain, whatever stands between; never looks at separators."""

    def __init__(self, operands: int) -> None:
        super().__init__()
        self.prompt = 2 * operands
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        at = length - self.prompt  # tokens of the chain so far
        operands = tokens[:, 0 : self.prompt : 2] - chains.ZERO
        if at % 2:
            following = torch.full((batch,), chains.STEP if at < self.prompt - 3 else chains.STOP)
        else:
            before = operands[:, 0] if at == 0 else tokens[:, -2] - chains.ZERO
            following = chains.ZERO + (before + operands[:, at // 2 + 1]) % 10
        logits = torch.zeros(batch, length, len(chains.WORDS) + 1)
        logits[torch.arange(batch), -1, following] = 9.0
        return logits + 0 * self.weight


@pytest.mark.parametrize("operands", [3, 5, 8])
def test_in_a_perfect_adder_partial_sums_decide_and_separators_do_not(operands: int) -> None:
    task = Task(operands=operands)
    problems = task.held_out(40)
    forced = force_words(Adder(operands), problems)
    np.testing.assert_array_equal(forced.responses.numpy(), problems.chains)
    assert forced.sums.tolist() == [i % 2 == 0 for i in range(task.length - 2)]
    assert (forced.shares(sums=True) == 100).all()
    assert (forced.shares(sums=False) == 0).all()
    assert forced.carried[:, forced.sums].all()
    assert not forced.carried[:, ~forced.sums].any()
    assert set(forced.by_word().values()) == {0.0}


def test_forced_words_are_wrong_and_never_end_the_chain() -> None:
    problems = Task(operands=5).held_out(300)
    forced = force_words(Adder(5), problems)
    told = forced.responses.numpy()[:, : len(forced.sums)]
    assert (forced.wrong != told).all()
    sums, separators = forced.wrong[:, forced.sums], forced.wrong[:, ~forced.sums]
    assert set(np.unique(sums)) == set(range(chains.ZERO, chains.ZERO + 10))
    assert set(np.unique(separators)) == {*range(chains.ZERO, chains.ZERO + 10), chains.PLUS, chains.EQUALS}
    again = force_words(Adder(5), problems)
    np.testing.assert_array_equal(forced.wrong, again.wrong)


def test_area_under_the_curve() -> None:
    yes = np.array([True, True, False, False])
    assert auc(np.array([4.0, 3.0, 2.0, 1.0]), yes) == 1.0
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), yes) == 0.0
    assert auc(np.array([4.0, 1.0, 3.0, 2.0]), yes) == 0.5
    assert auc(np.ones(4), yes) == 0.5
    assert auc(np.array([4.0, np.nan, 3.0, np.nan]), yes) == 1.0
    np.testing.assert_array_equal(areas(np.array([[4.0, 1, 9], [1.0, 4, 9]]), np.array([True, False])), [1.0, 0.0])
    with pytest.raises(ValueError, match="scores: 0 positive and 2 negative items; at least one of each"):
        auc(np.array([np.nan, np.nan, 1.0, 2.0]), yes)


def test_uniform_attention_prefers_what_comes_first() -> None:
    found = chain_model.uniform_scores(16, 14, (2, 6))
    assert np.isfinite(found[:12]).all()
    assert np.isnan(found[12:]).all()
    assert (np.diff(found[:12]) < 0).all()


def test_anchor_scores_are_fai_of_a_group_and_undefined_at_the_end() -> None:
    model = TINY.model().eval()
    problems = TINY.held_out(6)
    responses = torch.as_tensor(problems.chains)
    near, far = (chain_model.anchor_scores(model, problems, responses, (2, 4), group) for group in ("local", "global"))
    assert near.shape == far.shape == (6, 6)
    assert np.isnan(far[:, 4:]).all()
    assert np.isfinite(far[:, :4]).all()
    assert not np.allclose(near[:, :4], far[:, :4])


def test_the_base_is_read_with_its_hash_or_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain_model.train_base(TINY, seed=1)
    model.save(tmp_path / "base.safetensors")
    loaded, digest = chain_model.load_base(tmp_path / "base.safetensors")
    assert len(digest) == 64
    tokens = torch.as_tensor(TINY.held_out(3).prompts)
    torch.testing.assert_close(loaded(tokens), model(tokens))
    monkeypatch.setattr(chain_model, "train_base", lambda: model)
    assert chain_model.load_base(tmp_path / "nothing") == (model, "")


def test_the_stored_base_adds_and_slips_when_sampled() -> None:
    if not chain_model.BASE.is_file():
        pytest.skip("no records/ beside this installation")
    base, _ = chain_model.load_base()
    problems = Task().held_out(64)
    assert base.settings == Task().model().settings
    assert chain_model.accuracy(base, problems) == 1.0
    assert chain_model.accuracy(base, problems, temperature=1.0) < 0.6


@pytest.mark.parametrize("rule", credit.RULES)
def test_every_rule_trains_a_copy_and_repeats(rule: str) -> None:
    base: WordModel = TINY.model().eval()
    before = [parameter.clone() for parameter in base.parameters()]

    def config(seed: int) -> GRPOConfig:
        return GRPOConfig(iterations=2, prompts=8, group=8, lr=1e-2, seed=seed)

    (one, history), (same, _) = (chain_model.train_with_credit(base, rule, 3, config, TINY) for _ in range(2))
    assert len(history) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, one.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
