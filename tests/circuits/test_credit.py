"""Weights of tokens: the rules of equations 13 to 18, what they conserve, and the maps of a model in training."""

from __future__ import annotations

import pytest
import torch

from attnlab.circuits import credit, rhythm
from attnlab.circuits.credit import Credit, MapReader, Weigher, weights
from attnlab.data import chains
from attnlab.models.grpo import policy_loss
from attnlab.models.word_model import WordModel

SETTINGS = Credit(window=4, horizon=(2, 6))


def series(n: int = 15, batch: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """WAAD and FAI at random; the last two tokens have no FAI."""
    generator = torch.Generator().manual_seed(seed)
    waad = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    fai = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    fai[:, -2:] = torch.nan
    return waad, fai


@pytest.fixture(scope="module")
def model() -> WordModel:
    return WordModel(chains.WORDS, n_layers=3, n_heads=4, d_model=16, d_mlp=16, context=20, seed=0).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 14, (5, 18), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- rules


def test_preplan_score_is_the_change_to_the_next_token() -> None:
    found = credit.preplan_score(torch.tensor([1.0, 4.0, 4.0, 2.5]))
    torch.testing.assert_close(found, torch.tensor([3.0, 0.0, 1.5, 0.0]))


def test_top_share_prefers_early_tokens_and_never_nan() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, torch.nan, 0.0], [torch.nan] * 5])
    assert credit.top_share(scores, 0.4).tolist() == [[False, True, True, False, False], [False] * 5]
    assert credit.top_share(torch.ones(10), 0.3).nonzero().flatten().tolist() == [0, 1, 2]
    assert int(credit.top_share(torch.arange(5.0), 0.01).sum()) == 1  # at least one


@pytest.mark.parametrize("rule", credit.RULES)
def test_without_amplification_every_rule_is_plain(rule: str) -> None:
    waad, fai = series()
    extra = {"entropy": waad.flip(-1), "generator": torch.Generator().manual_seed(0)}
    found = weights(rule, waad, fai, Credit(amplify=1.0), **extra)
    torch.testing.assert_close(found, torch.ones_like(waad))


@pytest.mark.parametrize("rule", credit.RULES[1:5])
def test_simple_rules_amplify_the_share_and_nothing_else(rule: str) -> None:
    waad, fai = series()
    extra = {"entropy": waad.flip(-1), "generator": torch.Generator().manual_seed(0)}
    found = weights(rule, waad, fai, SETTINGS, **extra)
    assert ((found == 1.5).sum(-1) == 6).all()  # round(0.4 * 15)
    assert ((found == 1.0).sum(-1) == 9).all()


def test_coupled_without_handing_back_is_global() -> None:
    waad, fai = series()
    coupled, far = (weights(rule, waad, fai, Credit(alpha=0.0)) for rule in ("coupled", "global"))
    torch.testing.assert_close(coupled, far)


def test_handing_back_conserves_credit_or_loses_some_where_two_anchors_share_a_token() -> None:
    """The bonus is conserved if every dominated anchor has an introducing token of its own; it never grows."""
    kept = lost = 0
    for seed in range(40):
        waad, fai = series(batch=1, seed=seed)
        anchors = credit.top_share(fai, 0.4)
        dominated, introduced = credit.introductions(waad, anchors, 2)
        assert not bool((dominated & ~anchors).any())
        coupled, far = (weights(rule, waad, fai, Credit()).sum() for rule in ("coupled", "global"))
        if int(introduced.sum()) == int(dominated.sum()):
            torch.testing.assert_close(coupled, far)
            kept += 1
        else:
            assert coupled < far
            lost += 1
    assert kept
    assert lost


def test_a_token_in_two_sets_gets_both_terms() -> None:
    """By equation 18 an anchor that introduces another has its own credit and the credit handed back; an if/elif drops one."""
    waad = torch.tensor([[0.0, 0.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]])
    fai = torch.tensor([[0.1, 0.1, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    settings = Credit(share=0.2, alpha=0.5, back=1)
    dominated, introduced = credit.introductions(waad, credit.top_share(fai, 0.2), 1)
    assert dominated.nonzero().tolist() == [[0, 3]]
    assert introduced.nonzero().tolist() == [[0, 2]]
    found = weights("coupled", waad, fai, settings)[0]
    assert found[2].item() == 1 + 0.5 + 0.25
    assert found[3].item() == 1 + 0.25
    assert (found[[0, 1, 4, 5, 6, 7, 8, 9]] == 1).all()


def test_the_introducing_token_is_the_highest_of_those_before_the_earliest_of_equals() -> None:
    waad = torch.tensor([[5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 5.0]])  # scores 2, 2, 0, 0, 0, 4, 0
    anchors = torch.tensor([[False, False, True, False, False, False, False]])
    for back, expected in ((1, [1]), (2, [0]), (5, [0])):
        dominated, introduced = credit.introductions(waad, anchors, back)
        assert dominated[0, 2]
        assert introduced.nonzero()[:, 1].tolist() == expected


def test_matched_weights_have_mean_one_and_keep_their_order() -> None:
    gamma = torch.tensor([[1.5, 1.0, 1.0, 1.5], [1.0, 1.0, 1.0, 1.0]])
    found = credit.matched(gamma)
    torch.testing.assert_close(found.mean(-1), torch.ones(2))
    torch.testing.assert_close(found[0] / found[0, 1], gamma[0])
    torch.testing.assert_close(found[1], gamma[1])


def test_weights_carry_no_gradient() -> None:
    waad, fai = series()
    waad.requires_grad_()
    assert not weights("coupled", waad, fai, SETTINGS).requires_grad


def test_weights_of_one_are_plain_grpo_to_the_bit_and_losses_stay_as_they_are() -> None:
    log_probs = torch.randn(6, 14, generator=torch.Generator().manual_seed(0))
    old = log_probs + 0.1
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0])
    ones = torch.ones_like(log_probs)
    assert torch.equal(policy_loss(log_probs, old, advantages, ones), policy_loss(log_probs, old, advantages))
    negative = -advantages.abs()
    heavy = policy_loss(log_probs, old, negative, 5 * ones)
    assert torch.equal(heavy, policy_loss(log_probs, old, negative))


# --------------------------------------------------------------------------------------------------- maps of a model


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (12, [4, 5, 6, 7, 8]), (36, [12, 15, 18, 21, 24])]
)
def test_middle_layers(layers: int, expected: list[int]) -> None:
    assert credit.middle_layers(layers) == expected


def test_group_means_are_those_of_all_maps(model: WordModel, tokens: torch.Tensor) -> None:
    reader = MapReader.of_words(model, range(3))
    spans = reader.calibrate(model, tokens, 8)
    with torch.no_grad():
        full = model.network(input_ids=tokens, output_attentions=True).attentions
    expected = torch.stack([rhythm.head_spans(layer, 8).mean(0) for layer in full])
    torch.testing.assert_close(spans, expected)
    local, far, logits = reader.read(model, tokens)
    for found, group in zip((local, far), reader.groups, strict=True):
        assert len(group) == 3
        torch.testing.assert_close(found, torch.stack([full[layer][:, head] for layer, head in group]).mean(0))
    torch.testing.assert_close(logits, model(tokens))
    assert not local.requires_grad


def test_hooks_are_gone_after_a_pass_that_failed(model: WordModel, tokens: torch.Tensor) -> None:
    def fused(module, inputs, output):
        return output[0], None

    reader = MapReader.of_words(model)
    before = [len(block._forward_hooks) for block in reader.blocks]
    handle = model.network.transformer.h[1].attn.register_forward_hook(fused)
    with pytest.raises(ValueError, match="maps is None: fused attention forms no map"):
        reader.calibrate(model, tokens, 8)
    handle.remove()
    assert [len(block._forward_hooks) for block in reader.blocks] == before


@pytest.mark.parametrize("rule", credit.RULES)
def test_a_weigher_gives_every_response_a_mean_of_one(model: WordModel, tokens: torch.Tensor, rule: str) -> None:
    reader = MapReader.of_words(model)
    reader.calibrate(model, tokens, 8)
    found = Weigher(rule, reader, SETTINGS, seed=3)(model, tokens, torch.zeros(5, 10), 8)
    assert found.shape == (5, 10)
    torch.testing.assert_close(found.mean(-1), torch.ones(5))
    assert (found.std() > 0) == (rule != "uniform")


def test_a_response_too_short_for_a_horizon_is_weighed_plainly(model: WordModel, tokens: torch.Tensor) -> None:
    reader = MapReader.of_words(model)
    reader.calibrate(model, tokens, 8)
    found = Weigher("coupled", reader, Credit(horizon=(9, 20)))(model, tokens, torch.zeros(5, 10), 8)
    assert torch.equal(found, torch.ones(5, 10))


def test_random_credit_repeats_under_its_seed(model: WordModel, tokens: torch.Tensor) -> None:
    reader = MapReader.of_words(model)
    one, same, other = (
        Weigher("random", reader, SETTINGS, seed)(model, tokens, torch.zeros(5, 10), 8) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Credit(share=0.0), r"share=0.0 must lie in \(0, 1\]"),
        (lambda: Credit(alpha=1.5), r"alpha=1.5 must lie in \[0, 1\]"),
        (lambda: Credit(amplify=0.5), "amplify=0.5 must be at least 1: it amplifies"),
        (lambda: Credit(back=0), "back=0 must be at least 1 token"),
        (lambda: Credit(window=0), "window=0 must be at least 1 token"),
        (lambda: weights("both", *series(), SETTINGS), "rule='both' is unknown; use one of uniform, random"),
        (
            lambda: weights("local", series()[0], series(9)[1], SETTINGS),
            r"waad \(4, 15\) and fai \(4, 9\) must have one",
        ),
        (lambda: Weigher("best", MapReader([], []), SETTINGS), "rule='best' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_must_be_chosen_first(model: WordModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="groups: none yet; call calibrate first"):
        MapReader.of_words(model).read(model, tokens)
