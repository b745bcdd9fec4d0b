"""Group-relative policy optimisation: advantages, the clipped objective and its gradient, sampling, a run that learns."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from attnlab.models.grpo import GRPOConfig, group_advantages, grpo, policy_loss, rollout, token_log_probs
from attnlab.models.training import Diverged


class Bag(nn.Module):
    """The next token depends on the sum of the embeddings so far: causal, and small."""

    def __init__(self, vocabulary=7, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, 16)
        self.out = nn.Linear(16, vocabulary)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens):
        return self.out(self.drop(torch.tanh(self.embed(tokens).cumsum(1))))


class Asked(NamedTuple):
    prompts: object


PROMPTS = torch.randint(7, (13, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return Bag().eval()


def ask(rng, n):
    return Asked(rng.integers(7, size=(n, 3)))


# ------------------------------------------------------------------------------------------------ advantages


def test_advantages_have_mean_zero_and_unit_deviation_in_every_group():
    rewards = torch.rand(11, 5, dtype=torch.float64)
    found = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(found.mean(1), torch.zeros(11, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(11, dtype=torch.float64))


@pytest.mark.parametrize("group", [1, 2, 7])
def test_equal_rewards_give_exactly_zero(group):
    rewards = torch.full((3, group), 0.1)  # whose mean is not 0.1 in float32 for every size
    assert (group_advantages(rewards) == 0).all()
    assert (group_advantages(rewards, eps=0.0) == 0).all()


def test_two_responses_get_plus_and_minus_one():
    torch.testing.assert_close(
        group_advantages(torch.tensor([[0.0, 1.0]])), torch.tensor([[-1.0, 1.0]]), atol=1e-5, rtol=0
    )


# ------------------------------------------------------------------------------------------------ the objective


def test_the_loss_is_the_clipped_objective_computed_by_hand():
    log_probs, old = (-torch.rand(4, 3, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    total = 0.0
    for i in range(4):
        row = 0.0
        for t in range(3):
            ratio, a = math.exp(log_probs[i, t] - old[i, t]), float(advantages[i])
            row += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        total += row / 3
    assert math.isclose(float(policy_loss(log_probs, old, advantages, None, 0.2)), -total / 4, rel_tol=1e-12)


def test_at_ratio_one_the_gradient_is_that_of_reinforce(model):
    responses, old = rollout(model, PROMPTS, 4, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(13)
    now = token_log_probs(model, PROMPTS, responses)
    found = torch.autograd.grad(policy_loss(now, now.detach(), advantages), list(model.parameters()))
    now = token_log_probs(model, PROMPTS, responses)
    wanted = torch.autograd.grad(-(advantages[:, None] * now).mean(), list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(old, now, rtol=0, atol=1e-5)


def test_constant_rewards_have_no_gradient(model):
    responses, old = rollout(model, PROMPTS, 4, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(torch.full((13, 1), 0.3)).flatten()
    policy_loss(token_log_probs(model, PROMPTS, responses), old, advantages).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_tokens_outside_the_clip_range_have_no_gradient():
    log_probs = torch.tensor([[0.5, 0.1], [-0.5, -0.1]], requires_grad=True)
    policy_loss(log_probs, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), None, 0.2).backward()
    assert (log_probs.grad == 0).tolist() == [[True, False], [True, False]]


def test_weights_of_one_change_no_bit_and_negative_advantages_keep_theirs():
    log_probs, old = (-torch.rand(6, 5) for _ in range(2))
    advantages = torch.randn(6)
    plain = policy_loss(log_probs, old, advantages, None)
    assert torch.equal(plain, policy_loss(log_probs, old, advantages, torch.ones(6, 5)))
    negative = -advantages.abs()
    assert torch.equal(
        policy_loss(log_probs, old, negative, None), policy_loss(log_probs, old, negative, 1 + torch.rand(6, 5))
    )
    positive = advantages.abs()
    torch.testing.assert_close(
        policy_loss(log_probs, old, positive, torch.full((6, 5), 1.5)), 1.5 * policy_loss(log_probs, old, positive)
    )


def test_no_gradient_flows_through_weights():
    weights = torch.ones(2, 3, requires_grad=True)
    log_probs = torch.zeros(2, 3, requires_grad=True)
    policy_loss(log_probs, torch.zeros(2, 3), torch.ones(2), weights).backward()
    assert weights.grad is None
    assert log_probs.grad is not None


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probs_of_a_rollout_are_those_of_the_sampled_tokens(model, temperature):
    responses, log_probs = rollout(model, PROMPTS, 6, temperature, torch.Generator().manual_seed(3))
    assert responses.shape == log_probs.shape == (13, 6)
    torch.testing.assert_close(log_probs, token_log_probs(model, PROMPTS, responses, temperature), rtol=0, atol=1e-5)


def test_samples_follow_the_model_and_the_generator(model):
    many = PROMPTS[:1].repeat(20_000, 1)
    first, _ = rollout(model, many, 1, generator=torch.Generator().manual_seed(0))
    wanted = model(PROMPTS[:1])[0, -1].softmax(-1)
    torch.testing.assert_close(torch.bincount(first[:, 0], minlength=7) / 20_000, wanted, rtol=0, atol=0.015)
    again, _ = rollout(model, many, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


def test_temperature_zero_is_greedy(model):
    responses, log_probs = rollout(model, PROMPTS, 3, 0.0)
    tokens = PROMPTS
    for t in range(3):
        best = model(tokens)[:, -1].argmax(-1)
        assert torch.equal(responses[:, t], best)
        tokens = torch.cat([tokens, best[:, None]], 1)
    torch.testing.assert_close(log_probs, token_log_probs(model, PROMPTS, responses), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ a run


def one_if_three(batch, responses):
    return (responses == 3).float().mean(1)


def small(**options):
    return GRPOConfig(**({"iterations": 30, "prompts": 8, "group": 4, "lr": 2e-2} | options))


def test_a_run_learns_what_is_rewarded_and_repeats_under_its_seed():
    seen = []
    history = grpo(Bag(), ask, one_if_three, 4, small(), on_iteration=lambda i, model, reward: seen.append((i, reward)))
    assert list(history.columns) == ["iteration", "reward", "equal"]
    assert history.reward.iloc[-5:].mean() > history.reward.iloc[:3].mean() + 0.3
    assert seen == list(zip(history.iteration, history.reward, strict=True))
    assert grpo(Bag(), ask, one_if_three, 4, small()).equals(history)
    assert not grpo(Bag(), ask, one_if_three, 4, small(seed=1)).equals(history)


def test_a_constant_reward_moves_nothing():
    model = Bag()
    before = [parameter.clone() for parameter in model.parameters()]
    history = grpo(model, ask, lambda batch, responses: torch.full((32,), 0.1), 4, small(iterations=3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (history.equal == 1).all()


def test_weights_of_one_run_as_plain_and_see_prompt_and_response():
    shapes = []

    def ones(model, tokens, log_probs, prompt_length):
        shapes.append((tuple(tokens.shape), tuple(log_probs.shape), prompt_length, torch.is_grad_enabled()))
        return torch.ones_like(log_probs)

    plain, weighed = Bag(), Bag()
    grpo(plain, ask, one_if_three, 4, small(iterations=4))
    grpo(weighed, ask, one_if_three, 4, small(iterations=4), weigh=ones)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), weighed.parameters(), strict=True))
    assert shapes == [((32, 7), (32, 4), 3, False)] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(group=1), "group: at least 2 is wanted, not 1"),
        (lambda: small(temperature=0.0), "temperature: a positive number is wanted, not 0.0"),
        (lambda: group_advantages(torch.zeros(3)), "rewards: one row a group"),
        (lambda: rollout(Bag(), PROMPTS[0], 3), r"prompts: tokens \[B, P\] are wanted"),
        (lambda: rollout(Bag(), PROMPTS, 0), "length: at least one token is wanted, not 0"),
        (lambda: rollout(Bag(), PROMPTS, 3, -1.0), "temperature: 0"),
        (lambda: token_log_probs(Bag(), PROMPTS, PROMPTS[:2]), "responses: one a prompt is wanted, not 2 for 13"),
        (lambda: policy_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), "must have one shape"),
        (lambda: policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "advantages: one a response"),
        (lambda: grpo(Bag(), ask, lambda b, r: torch.zeros(3), 4, small()), r"reward: one a response, \[32\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_reward_that_is_no_number_stops_the_run():
    with pytest.raises(Diverged, match="iteration 1: the loss is nan"):
        grpo(Bag(), ask, lambda b, r: torch.full((32,), float("nan")), 4, small())
