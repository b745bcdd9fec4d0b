"""The runs of ``circuits/thinking-sparks`` on a model too small to learn: what is kept, and what is taken apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import post_training as pt
from attnlab.data import chains
from attnlab.models.grpo import rollout

PLAN = pt.Plan(
    n_layers=2,
    n_heads=2,
    d_model=8,
    batch=5,
    learn_steps=2,
    slip_steps=1,
    switch_steps=2,
    updates=4,
    every=2,
    prompts=16,
    group=16,
)


@pytest.fixture(scope="module")
def base() -> pt.Base:
    return pt.base_model(PLAN, seed=1)


@pytest.fixture
def problems() -> chains.Sums:
    return chains.sums(np.random.default_rng(4), 11)


def test_lessons_answer_at_once_in_the_wanted_share():
    batch = pt.lesson(np.random.default_rng(0), 7, direct=0.5)
    at_once = (batch.responses[:, 1:] == chains.STOP).all(1)
    assert at_once.tolist() == [True] * 3 + [False] * 4
    operands = batch.prompts[:, 0::2] - chains.ZERO
    np.testing.assert_array_equal(batch.responses[:3, 0] - chains.ZERO, operands[:3].sum(1) % 10)
    assert (chains.answer_of(batch.responses) - chains.ZERO == operands.sum(1) % 10).all()
    with pytest.raises(ValueError, match="direct"):
        pt.lesson(np.random.default_rng(0), 7, direct=1.5)


@pytest.mark.parametrize("method", pt.METHODS)
def test_every_run_keeps_equal_numbers_of_updates_and_leaves_the_base_alone(base: pt.Base, method):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    run = pt.post_train(base, method, PLAN, seed=0)
    assert [checkpoint.updates for checkpoint in run] == [0, 2, 4]
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert run[0].model is base.model
    assert pt.distance(run[1].model, base.model) > 0
    assert pt.distance(run[1].model, run[2].model) > 0
    assert np.isfinite([c.reward for c in run[1:]]).all() == (method == "GRPO")
    again = pt.post_train(base, method, PLAN, seed=0)
    assert pt.distance(run[-1].model, again[-1].model) == 0


def test_bases_of_the_two_regimes_differ_in_their_data(base: pt.Base):
    switch = pt.reluctant(base, PLAN, seed=1)
    assert pt.distance(base.model, switch.model) > 0
    slips, direct = (made.batches(np.random.default_rng(0)).responses for made in (base, switch))
    assert (slips[:, 1] == chains.STEP).all()
    assert (direct[:, 1] == chains.STOP).sum() == 4


def test_unknown_methods_and_plans_are_refused(base: pt.Base):
    with pytest.raises(ValueError, match="'DPO' is unknown"):
        pt.post_train(base, "DPO", PLAN, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="divides all"):
        pt.Plan(updates=100, every=15)
    with pytest.raises(ValueError, match="two an iteration"):
        pt.Plan(updates=9, every=3)


def test_greedy_accuracy_is_that_of_greedy_decoding(base: pt.Base, problems: chains.Sums):
    model = pt.copied(base.model)
    with torch.no_grad():  # a model that writes the digit it reads and then E, sometimes right
        model.network.transformer.wte.weight.mul_(5)
    responses, _ = rollout(model, torch.as_tensor(problems.prompts), pt.LENGTH, 0.0)
    greedy = chains.Sums(problems.prompts, responses.numpy(), problems.answers)
    assert pt.chain_accuracy(model, greedy) == 1
    other = greedy.chains.copy()
    other[:4, 2] = other[:4, 2] % 14 + 1
    assert pt.chain_accuracy(model, greedy._replace(chains=other)) == pytest.approx(7 / 11)


def test_probability_of_a_chain_is_that_of_its_samples(base: pt.Base, problems: chains.Sums):
    one = chains.Sums(*(part[:1] for part in problems))
    _, log_probs = rollout(base.model, torch.as_tensor(one.prompts), pt.LENGTH, 0.0)
    responses, _ = rollout(base.model, torch.as_tensor(one.prompts), pt.LENGTH, 0.0)
    likeliest = one._replace(chains=responses.numpy())
    assert pt.chain_probability(base.model, likeliest) == pytest.approx(float(log_probs.sum().exp()), rel=1e-5)


def test_divergence_is_zero_for_the_base_and_positive_elsewhere(base: pt.Base, problems: chains.Sums):
    other = pt.scaled(base.model, [(0, 0)], 0.0)
    assert pt.divergence(base.model, base.model, problems) == 0
    assert pt.divergence(other, base.model, problems) > 0


def test_scaling_by_one_changes_nothing_and_zero_takes_the_head_out(base: pt.Base, problems: chains.Sums):
    tokens = torch.as_tensor(problems.prompts)
    mean = pt.mean_outputs(base.model, problems)
    with torch.no_grad():
        whole = base.model(tokens)
        for filled in (None, mean):
            torch.testing.assert_close(pt.scaled(base.model, [(1, 0)], 1.0, filled)(tokens), whole)
        assert not torch.allclose(pt.scaled(base.model, [(1, 0)])(tokens), whole)
    with pytest.raises(ValueError, match=r"holds 2\.0"):
        pt.scaled(base.model, [(2, 0)])


def test_without_heads_and_mlps_only_the_embedding_reaches_the_logits(base: pt.Base, problems: chains.Sums):
    model = pt.scaled(base.model, [(layer, head) for layer in range(2) for head in range(2)])
    network = model.network.transformer
    with torch.no_grad():
        for block in network.h:
            for out in (block.mlp.c_proj, block.attn.c_proj):
                out.bias.zero_()
            block.mlp.c_proj.weight.zero_()
        tokens = torch.as_tensor(problems.prompts)
        embedded = network.wte(tokens) + network.wpe(torch.arange(tokens.shape[1]))
        torch.testing.assert_close(model(tokens), model.network.lm_head(network.ln_f(embedded)))


def test_the_mean_of_a_constant_head_is_the_head(base: pt.Base, problems: chains.Sums):
    model = pt.copied(base.model)
    with torch.no_grad():  # values that do not depend on the token
        attention = model.network.transformer.h[1].attn.c_attn
        attention.weight[:, 16:20] = 0
        attention.bias[16:20] = torch.arange(1.0, 5.0)
        tokens = torch.as_tensor(problems.prompts)
        torch.testing.assert_close(
            pt.scaled(model, [(1, 0)], 0.0, pt.mean_outputs(model, problems))(tokens), model(tokens)
        )


def test_random_sets_have_the_same_layers_and_other_heads():
    heads = [(0, 1), (0, 2), (2, 5)]
    for chosen in pt.like(heads, 8, 20, np.random.default_rng(0)):
        assert [layer for layer, _ in chosen] == [0, 0, 2]
        assert len(set(chosen)) == 3
        assert not set(chosen) & set(heads)
    assert pt.like([(0, 0), (0, 1)], 3, 1, np.random.default_rng(0)) == [[(0, 2)]]


def test_right_samples_are_counted_for_each_problem(base: pt.Base, problems: chains.Sums):
    found = pt.right_samples(base.model, problems, 5, seed=2)
    assert found.shape == (11,)
    assert ((found >= 0) & (found <= 5)).all()
    assert found.tolist() == pt.right_samples(base.model, problems, 5, seed=2).tolist()
