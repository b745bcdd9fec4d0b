"""First-order maps against finite differences and linear models; direct effects that add up; attention that is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import (
    Edit,
    Node,
    NoEffectError,
    Readout,
    activation_patch,
    attention_to,
    attribution_patch,
    direct_logit_attribution,
    log_odds,
    log_prob,
    logit_diff,
)

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("metric", [logit_diff, log_odds, log_prob])
def test_attribution_is_the_finite_difference_along_the_change(any_lm, pairs, batch, metric, direction):
    """d m(z + s (z_source - z_base)) / ds at s = 0, by a central difference, for every head at all positions."""
    last, step = any_lm.spec.n_layers, 1e-5
    tokens = (batch.clean, batch.corrupt) if direction == "noise" else (batch.corrupt, batch.clean)
    base, source = (any_lm.run(side, capture=("z",)) for side in tokens)
    scores = attribution_patch(any_lm, pairs, metric=metric, direction=direction)
    for (node,), effect in zip(scores.groups, scores.effect, strict=True):
        change = torch.zeros_like(base.acts["z", node.layer])
        change[:, :, node.head] = (source.acts["z", node.layer] - base.acts["z", node.layer])[:, :, node.head]
        up, down = (
            metric(
                Readout(
                    any_lm,
                    any_lm.run(
                        tokens[0], edits=[Edit("z", node.layer, lambda z, first, s=sign, c=change: z + s * step * c)]
                    ).resid[last],
                    batch,
                )
            )
            for sign in (1, -1)
        )
        np.testing.assert_allclose(effect, (up - down) / (2 * step), rtol=1e-5, atol=1e-8)
    assert np.abs(scores.effect).max() > 1e-4


@pytest.mark.parametrize("positions", ["END", "all"])
def test_attribution_is_exact_where_the_model_is_linear(linear_end, pairs, positions):
    """No MLP and no norm behind the heads of the last layer: the gradient tells all."""
    heads = [Node(1, head) for head in range(6)]
    exact = activation_patch(linear_end, pairs, heads, positions=positions)
    first_order = attribution_patch(linear_end, pairs, positions=positions)
    for head in heads:
        row = first_order._row([head])
        np.testing.assert_allclose(first_order.effect[row], exact.effect[exact._row([head])], **EXACT)
    assert np.abs(exact.effect).max() > 1e-4


def test_attribution_is_an_estimate_elsewhere(lm, pairs):
    """The oracle above would be empty if attribution patching were exact anyway."""
    exact, estimate = activation_patch(lm, pairs, positions="all"), attribution_patch(lm, pairs)
    assert not np.allclose(exact.effect, estimate.effect, rtol=1e-3)


def test_positions_add_up_to_all(any_lm, pairs):
    """First order is additive over positions."""
    parts = sum(attribution_patch(any_lm, pairs, positions=position).effect for position in range(7))
    np.testing.assert_allclose(attribution_patch(any_lm, pairs).effect, parts, **EXACT)


def test_a_position_before_the_difference_has_no_effect(lm, pairs):
    assert np.abs(attribution_patch(lm, pairs, positions=0).effect).max() < 1e-12


def test_gap_and_base_are_those_of_exact_patching(any_lm, pairs):
    exact, estimate = activation_patch(any_lm, pairs), attribution_patch(any_lm, pairs)
    np.testing.assert_allclose(estimate.gap, exact.gap, **EXACT)
    np.testing.assert_allclose(estimate.base, exact.base, **EXACT)
    assert estimate.groups == exact.groups


def test_lengths_and_batches_change_nothing(any_lm, make_pairs):
    pairs = make_pairs([7, 5, 9, *[7] * 17], seed=2)  # more than one batch of 16
    whole = attribution_patch(any_lm, pairs)
    direct = direct_logit_attribution(any_lm, pairs)
    for number in (0, 1, 2, 3, 19):
        alone = pairs.subset([number])
        np.testing.assert_allclose(whole.effect[:, number], attribution_patch(any_lm, alone).effect[:, 0], **EXACT)
        np.testing.assert_allclose(direct[..., number], direct_logit_attribution(any_lm, alone)[..., 0], **EXACT)


def test_attribution_is_deterministic_and_leaves_nothing_behind(any_lm, pairs, batch, naive_diff):
    before = naive_diff(any_lm, batch.clean, batch)
    first, second = attribution_patch(any_lm, pairs), attribution_patch(any_lm, pairs)
    assert np.array_equal(first.effect, second.effect)
    assert torch.equal(before, naive_diff(any_lm, batch.clean, batch))
    assert all(parameter.grad is None for parameter in any_lm.bridge.parameters())


def test_equal_metrics_have_nothing_to_attribute(lm, pairs):
    with pytest.raises(NoEffectError, match="random words"):
        attribution_patch(lm, pairs, metric=lambda end: 0 * logit_diff(end))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "S2"}, "positions='S2' is unknown"),
        ({"positions": -8}, "positions=-8 lies outside"),
        ({"direction": "back"}, "direction='back' is unknown"),
    ],
)
def test_bad_arguments_are_named(lm, pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        attribution_patch(lm, pairs, **arguments)


# ------------------------------------------------------------------------------------------------ direct effects


@pytest.mark.parametrize("which", ["clean", "corrupt"])
def test_direct_effects_add_up_to_the_logit_difference(any_lm, pairs, batch, naive_diff, which):
    """Heads, MLPs, embedding and biases through the final norm at its scale in the full run (RMSNorm and LayerNorm)."""
    tokens, bridge, last = getattr(batch, which), any_lm.bridge, any_lm.spec.n_layers
    run = any_lm.run(tokens, capture=("resid_pre", "mlp_out"))
    biases = [getattr(block.attn, "b_O", None) for block in bridge.blocks]
    others = [run.acts["resid_pre", 0][:, -1], *run.stack("mlp_out")[:, :, -1]]
    others += [bias.detach().expand(len(batch), -1) for bias in biases if bias is not None]
    weight = bridge.W_U.detach().T
    towards = (weight[batch.answers[:, 0]] - weight[batch.foils[:, 0]]) * bridge.ln_final.weight.detach()
    final = run.resid[last][:, -1]
    if bridge.cfg.normalization_type.startswith("LN"):
        final, others = final - final.mean(-1, keepdim=True), [part - part.mean(-1, keepdim=True) for part in others]
    scale = (final.pow(2).mean(-1) + bridge.cfg.eps).sqrt()
    rest = sum((part * towards).sum(-1) for part in others) / scale
    norm_bias = getattr(bridge.ln_final, "bias", None)
    if norm_bias is not None:
        rest = rest + (weight[batch.answers[:, 0]] - weight[batch.foils[:, 0]]) @ norm_bias.detach()
    heads = direct_logit_attribution(any_lm, pairs, which).sum((0, 1))
    np.testing.assert_allclose(heads + rest.numpy(), naive_diff(any_lm, tokens, batch), **EXACT)
    assert np.abs(heads).max() > 1e-3


def test_direct_effects_refuse_an_unknown_side(lm, pairs):
    with pytest.raises(ValueError, match="which='both' is unknown"):
        direct_logit_attribution(lm, pairs, "both")


def test_direct_effects_refuse_an_unknown_norm(lm, pairs, monkeypatch):
    monkeypatch.setattr(lm.bridge.cfg, "normalization_type", "Batch")
    with pytest.raises(ValueError, match="final norm 'Batch' is neither"):
        direct_logit_attribution(lm, pairs)


# ------------------------------------------------------------------------------------------------------ attention


def test_attention_is_the_pattern_of_the_bridge(any_lm, pairs, batch, record):
    site = "blocks.1.attn.hook_pattern"
    for which in ("clean", "corrupt"):
        pattern = record(any_lm, getattr(batch, which), [site])[site]  # [B, H, T, T]
        seen = attention_to(any_lm, pairs, ["1.0", "1.3"], ["mid", "two", "all"], which=which)
        for node, to in seen.items():
            rows = pattern[:, node.head, -1]
            for name, values in to.items():
                np.testing.assert_allclose(values, (rows * batch.mask(name)).sum(1), **EXACT)
            np.testing.assert_allclose(to["all"], 1, rtol=0, atol=1e-6)


def test_attention_from_another_position(lm, make_pairs):
    pairs = make_pairs([7, 9, 7])
    seen = attention_to(lm, pairs, ["0.1"], ["all", "END"], from_position="mid")[Node(0, 1)]
    np.testing.assert_allclose(seen["all"], 1, **EXACT)
    np.testing.assert_allclose(seen["END"], 0, **EXACT)  # causal: mid comes before END


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": ["31.0"]}, "node 31.0 does not exist"),
        ({"to": ["S2"]}, "positions='S2' is unknown"),
        ({"from_position": "two"}, "from_position='two' must be one position"),
        ({"heads": ["m1"]}, "m1.*no attention"),
        ({"which": "both"}, "which='both' is unknown"),
    ],
)
def test_attention_refuses_by_name(lm, pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_to(lm, pairs, **({"heads": ["0.1"], "to": ["mid"]} | arguments))
