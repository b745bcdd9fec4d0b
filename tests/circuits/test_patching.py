"""Activation and path patching against naive whole runs with plain hooks, and against what must hold by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import (
    Node,
    NoEffectError,
    Readout,
    Receiver,
    activation_patch,
    log_odds,
    log_prob,
    logit_diff,
    patching,
    path_patch,
    prob_diff,
)

EXACT = {"rtol": 0, "atol": 1e-10}
Z, MLP = "blocks.{}.attn.hook_z", "blocks.{}.mlp.hook_out"
PORT = {port: f"blocks.{{}}.attn.hook_{port}" for port in "qkv"}
POSITIONS = ["END", "all", "mid", "two", 2, -2]


def writing(value, where, head=None):
    """A plain hook that writes ``value`` at ``where`` [B, T], into one head or everywhere."""

    def hook(act, hook):
        act = act.clone()
        if head is None:
            act[where] = value[where]
        else:
            act[:, :, head][where] = value[:, :, head][where]
        return act

    return hook


def both(batch, direction):
    return (batch.clean, batch.corrupt) if direction == "noise" else (batch.corrupt, batch.clean)


# ------------------------------------------------------------------------------------------ activation patching


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_activation_patching_equals_naive_whole_runs(any_lm, pairs, batch, record, naive_diff, positions, direction):
    """The restart, the rows side by side and the cached keys change nothing."""
    model, layers = any_lm, range(any_lm.spec.n_layers)
    base, source = both(batch, direction)
    acts = record(model, source, [site.format(layer) for site in (Z, MLP) for layer in layers])
    where = batch.mask(positions)
    nodes = [*model.spec.heads, *(Node(layer) for layer in layers)]
    expected = []
    for layer, head in nodes:
        site = (MLP if head is None else Z).format(layer)
        expected.append(naive_diff(model, base, batch, [(site, writing(acts[site], where, head))]))
    start = naive_diff(model, base, batch)
    scores = activation_patch(model, pairs, nodes, positions=positions, direction=direction)
    np.testing.assert_allclose(scores.effect, torch.stack(expected) - start, **EXACT)
    np.testing.assert_allclose(scores.base, start, **EXACT)
    np.testing.assert_allclose(scores.gap, naive_diff(model, source, batch) - start, **EXACT)
    assert np.abs(scores.effect).max() > 1e-4 or positions == 2  # position 2 may lie before the first difference


def test_the_embedding_equals_a_naive_whole_run(any_lm, pairs, batch, record, naive_diff):
    site = "blocks.0.hook_in"
    value = record(any_lm, batch.corrupt, [site])[site]
    for positions in ("mid", "two"):
        expected = naive_diff(any_lm, batch.clean, batch, [(site, writing(value, batch.mask(positions)))])
        scores = activation_patch(any_lm, pairs, ["input"], positions=positions)
        np.testing.assert_allclose(scores.effect[0], expected - naive_diff(any_lm, batch.clean, batch), **EXACT)


def test_groups_of_heads_mlps_and_embedding_equal_naive_whole_runs(any_lm, pairs, batch, record, naive_diff):
    groups = [("0.1", "0.2", "2.3"), ("1.0", "m1", "2.1"), ("input", "1.3", "m2"), ("m0", "m2")]
    names = {"input": "blocks.0.hook_in"} | {f"m{layer}": MLP.format(layer) for layer in range(3)}
    acts = record(any_lm, batch.corrupt, [*names.values(), *(Z.format(layer) for layer in range(3))])
    where = batch.mask("two")
    expected = []
    for group in groups:
        hooks = []
        for node in map(Node.parse, group):
            site = Z.format(node.layer) if node.head is not None else names[str(node)]
            hooks.append((site, writing(acts[site], where, node.head)))
        expected.append(naive_diff(any_lm, batch.clean, batch, hooks))
    scores = activation_patch(any_lm, pairs, groups, positions="two")
    np.testing.assert_allclose(scores.effect, torch.stack(expected) - naive_diff(any_lm, batch.clean, batch), **EXACT)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("metric", [logit_diff, log_odds, prob_diff, log_prob])
def test_patching_every_node_everywhere_is_the_source_run(any_lm, pairs, metric, direction):
    scores = activation_patch(any_lm, pairs, [any_lm.spec.nodes], metric=metric, positions="all", direction=direction)
    np.testing.assert_allclose(scores.effect[0], scores.gap, rtol=0, atol=1e-9)
    assert scores.values[0] == pytest.approx(1, abs=1e-9)


def test_patching_nothing_is_nothing(any_lm, pairs, batch):
    """Before the first difference both prompts write the same, and nothing is allowed to move."""
    assert (batch.clean[:, 0] == batch.corrupt[:, 0]).all()
    scores = activation_patch(any_lm, pairs, any_lm.spec.nodes, positions=0)
    assert np.abs(scores.values).max() < 1e-12


def test_directions_are_mirror_images(lm, pairs):
    """The gap and the base change places; a group of all nodes repairs what it breaks."""
    noise, denoise = (activation_patch(lm, pairs, direction=d) for d in ("noise", "denoise"))
    np.testing.assert_allclose(noise.gap, -denoise.gap, **EXACT)
    np.testing.assert_allclose(noise.base + noise.gap, denoise.base, **EXACT)
    assert not np.allclose(noise.values, denoise.values)


def test_noising_and_denoising_agree_where_the_model_is_linear(linear_end, pairs):
    heads = [f"1.{head}" for head in range(6)]
    noise, denoise = (activation_patch(linear_end, pairs, heads, direction=d) for d in ("noise", "denoise"))
    np.testing.assert_allclose(noise.effect, -denoise.effect, **EXACT)


def test_scores_record_how_they_were_made(lm, pairs):
    made = activation_patch(lm, pairs, ["0.1"], metric=prob_diff, positions="mid", direction="denoise").made
    assert made == {
        "method": "activation patching",
        "model": "tiny",
        "data": "random words",
        "data_hash": pairs.digest,
        "metric": "prob_diff",
        "positions": "mid",
        "direction": "denoise",
    }


# ------------------------------------------------------------------------------- batches, chunks, determinism


def all_methods(model, pairs):
    receivers = [Receiver(2, 1, "q"), Receiver(1, 1, "k", "mid")]
    return [
        activation_patch(model, pairs, positions="two"),
        path_patch(model, pairs),
        path_patch(model, pairs, receivers=receivers, positions="mid"),
    ]


@pytest.mark.parametrize("lengths", [(7,), (7, 9, 5, 7, 9, 12)])
def test_pairs_of_different_lengths_equal_one_by_one(any_lm, make_pairs, lengths):
    pairs = make_pairs(lengths, seed=4)
    together = all_methods(any_lm, pairs)
    for number in range(len(lengths)):
        for whole, alone in zip(together, all_methods(any_lm, pairs.subset([number])), strict=True):
            np.testing.assert_allclose(whole.effect[:, number], alone.effect[:, 0], **EXACT)
            np.testing.assert_allclose(whole.gap[number], alone.gap[0], **EXACT)
            np.testing.assert_allclose(whole.base[number], alone.base[0], **EXACT)


@pytest.mark.parametrize("tokens", [1, 50])
def test_chunks_change_nothing(any_lm, make_pairs, monkeypatch, tokens):
    pairs = make_pairs((7, 5, 7))
    whole = all_methods(any_lm, pairs)
    monkeypatch.setattr(patching, "TOKENS_AT_ONCE", tokens)
    for one, other in zip(whole, all_methods(any_lm, pairs), strict=True):
        np.testing.assert_allclose(one.effect, other.effect, **EXACT)


def test_the_order_of_groups_is_kept(lm, pairs):
    """Groups are sorted by layer inside; outside, row ``i`` is group ``i``."""
    order = ["2.1", "m0", "0.4", "input", "1.5", "0.4"]
    scores = activation_patch(lm, pairs, order, positions="mid")
    assert [str(group[0]) for group in scores.groups] == order
    for row, node in enumerate(order):
        np.testing.assert_allclose(
            scores.effect[row], activation_patch(lm, pairs, [node], positions="mid").effect[0], **EXACT
        )


def test_the_same_call_gives_the_same_bits(any_lm, pairs):
    for first, second in zip(all_methods(any_lm, pairs), all_methods(any_lm, pairs), strict=True):
        assert np.array_equal(first.effect, second.effect)


def test_nothing_stays_behind_when_a_metric_raises(lm, pairs, batch, naive_diff):
    before = naive_diff(lm, batch.clean, batch)

    def broken(end):
        raise RuntimeError("a metric that fails")

    for method in (activation_patch, path_patch):
        with pytest.raises(RuntimeError, match="a metric that fails"):
            method(lm, pairs, metric=broken)
    assert torch.equal(before, naive_diff(lm, batch.clean, batch))


# ------------------------------------------------------------------------------------------------ path patching


def naive_path_patch(model, batch, record, naive_diff, sender, receivers, positions, freeze, direction):
    """Three whole runs with plain hooks, as the definition reads; returns the change of the logit difference, ``[B]``."""
    layers = range(model.spec.n_layers)
    base, source = both(batch, direction)
    where = batch.mask(positions)
    sites = [site.format(layer) for site in (Z, MLP) for layer in layers]
    held, other = (record(model, tokens, sites) for tokens in (base, source))
    hooks = [(Z.format(layer), writing(held[Z.format(layer)], where)) for layer in layers]
    hooks.append((Z.format(sender.layer), writing(other[Z.format(sender.layer)], where, sender.head)))
    if freeze == "heads+mlps":
        hooks += [(MLP.format(layer), writing(held[MLP.format(layer)], where)) for layer in layers]
    if receivers == "logits":
        return naive_diff(model, base, batch, hooks) - naive_diff(model, base, batch)
    ports = {PORT[r.component].format(r.layer) for r in receivers}
    arrived = record(model, base, sorted(ports), hooks)
    deliver = [
        (site, writing(arrived[site], batch.mask(r.positions), r.head))
        for r in receivers
        for site in [PORT[r.component].format(r.layer)]
    ]
    return naive_diff(model, base, batch, deliver) - naive_diff(model, base, batch)


RECEIVERS = {
    "logits": "logits",
    "a query": [Receiver(2, 4)],
    "a query in the middle": [Receiver(2, 1, "q", "mid")],
    "a key of the second group": [Receiver(2, 1, "k", "mid")],
    "a value of the first group": [Receiver(2, 0, "v", "two")],
    "the query of the first layer above": [Receiver(1, 3)],
    "three of different layers": [Receiver(2, 2), Receiver(1, 1, "k", "two"), Receiver(2, 0, "v", "all")],
    "two of one site": [Receiver(2, 0), Receiver(2, 3)],
}


@pytest.mark.parametrize("freeze", ["heads", "heads+mlps"])
@pytest.mark.parametrize("positions", ["END", "mid", "all"])
@pytest.mark.parametrize("receivers", RECEIVERS.values(), ids=RECEIVERS)
def test_path_patching_equals_three_naive_passes(lm, pairs, batch, record, naive_diff, receivers, positions, freeze):
    senders = [Node(0, 0), Node(0, 5), Node(1, 2), Node(2, 4)]
    scores = path_patch(lm, pairs, senders, receivers, positions=positions, freeze=freeze)
    for sender, effect in zip(senders, scores.effect, strict=True):
        expected = naive_path_patch(lm, batch, record, naive_diff, sender, receivers, positions, freeze, "noise")
        np.testing.assert_allclose(effect, expected, **EXACT)


def test_path_patching_of_gpt2_denoising_equals_three_naive_passes(gpt2, pairs, batch, record, naive_diff):
    receivers = [Receiver(2, 3), Receiver(2, 2, "k", "mid"), Receiver(1, 0, "v", "mid")]
    for target in ("logits", receivers):
        scores = path_patch(gpt2, pairs, receivers=target, positions="two", direction="denoise")
        for (sender,), effect in zip(scores.groups, scores.effect, strict=True):
            expected = naive_path_patch(gpt2, batch, record, naive_diff, sender, target, "two", "heads", "denoise")
            np.testing.assert_allclose(effect, expected, **EXACT)


@pytest.mark.parametrize("positions", ["END", "all"])
def test_frozen_path_into_the_logits_is_the_direct_effect(any_lm, pairs, batch, positions):
    """(z_corrupt - z_clean) W_O is added to the last residual and the norm is computed again."""
    last = any_lm.spec.n_layers
    clean, corrupt = (any_lm.run(tokens, capture=("z",)) for tokens in (batch.clean, batch.corrupt))
    start = logit_diff(Readout(any_lm, clean.resid[last], batch))
    scores = path_patch(any_lm, pairs, positions=positions, freeze="heads+mlps")
    for (sender,), effect in zip(scores.groups, scores.effect, strict=True):
        layer, head = sender
        change = (corrupt.acts["z", layer] - clean.acts["z", layer])[:, :, head] @ any_lm.W_O[layer, head]
        direct = logit_diff(Readout(any_lm, clean.resid[last] + change, batch)) - start
        np.testing.assert_allclose(effect, direct, **EXACT)
    assert np.abs(scores.effect).max() > 1e-4


@pytest.mark.parametrize("positions", ["END", "all", "mid"])
def test_in_one_attention_layer_path_patching_is_activation_patching(one_layer, pairs, positions):
    plain = activation_patch(one_layer, pairs, positions=positions)
    for freeze in ("heads", "heads+mlps"):
        into_logits = path_patch(one_layer, pairs, positions=positions, freeze=freeze)
        np.testing.assert_allclose(into_logits.effect, plain.effect, **EXACT)
    assert (np.abs(plain.effect).max() > 1e-4) == (positions != "mid")  # only END is read


def test_senders_of_the_last_layer_have_no_other_path(any_lm, pairs):
    last = any_lm.spec.n_layers - 1
    senders = [Node(last, head) for head in range(any_lm.spec.n_heads)]
    into_logits, plain = path_patch(any_lm, pairs, senders), activation_patch(any_lm, pairs, senders)
    np.testing.assert_allclose(into_logits.effect, plain.effect, **EXACT)


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_senders_at_or_above_the_receiver_score_exactly_zero(lm, pairs, component, layer):
    scores = path_patch(lm, pairs, receivers=[Receiver(layer, 0, component, "all")], positions="all")
    for (sender,), effect in zip(scores.groups, scores.effect, strict=True):
        if sender.layer >= layer:
            assert (effect == 0).all()
    below = np.abs(scores.effect[: layer * lm.spec.n_heads])
    assert layer == 0 or (below.max() > 1e-6)


def test_a_receiver_before_the_sender_hears_nothing(lm, pairs):
    scores = path_patch(lm, pairs, receivers=[Receiver(2, 0, "v", 1)], positions="END")
    assert np.abs(scores.effect).max() < 1e-12


def test_only_the_named_position_of_a_receiver_is_written(lm, pairs):
    at_mid, everywhere = (
        path_patch(lm, pairs, receivers=[Receiver(2, 1, "k", where)], positions="all") for where in ("mid", "all")
    )
    assert not np.allclose(at_mid.effect, everywhere.effect)


# ----------------------------------------------------------------------------------------------------- refusals


def test_equal_metrics_have_nothing_to_attribute(lm, pairs):
    def constant(end):
        return torch.zeros(len(end.normed), dtype=torch.float64)

    for method in (activation_patch, path_patch):
        with pytest.raises(NoEffectError, match=r"random words.*no effect to attribute"):
            method(lm, pairs, metric=constant)


def test_a_metric_of_nan_is_refused(lm, pairs):
    def undefined(end):
        return torch.full((len(end.normed),), torch.nan, dtype=torch.float64)

    with pytest.raises(NoEffectError, match="random words"):
        activation_patch(lm, pairs, metric=undefined)


@pytest.mark.parametrize("method", [activation_patch, path_patch])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "S2"}, "positions='S2' is unknown"),
        ({"positions": 7}, "positions=7 lies outside a prompt of 7 tokens"),
        ({"direction": "back"}, "direction='back' is unknown"),
    ],
)
def test_bad_arguments_are_named(lm, pairs, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(lm, pairs, **arguments)


@pytest.mark.parametrize("method", [activation_patch, path_patch])
@pytest.mark.parametrize("head", ["31.0", "0.6", "m3"])
def test_a_node_that_does_not_exist_is_named(lm, pairs, method, head):
    with pytest.raises(ValueError, match=f"node {head} does not exist in tiny"):
        method(lm, pairs, ["0.1", head])


def test_an_empty_group_is_refused(lm, pairs):
    with pytest.raises(ValueError, match="empty group"):
        activation_patch(lm, pairs, [["0.1"], []])


@pytest.mark.parametrize("sender", ["m1", "input", ("0.1", "0.2")])
def test_senders_must_be_single_heads(lm, pairs, sender):
    with pytest.raises(ValueError, match="senders must be single heads"):
        path_patch(lm, pairs, [sender])


def test_an_unknown_freeze_is_refused(lm, pairs):
    with pytest.raises(ValueError, match="freeze='mlps' is unknown"):
        path_patch(lm, pairs, freeze="mlps")


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        (Receiver(3, 0), "receiver q of 3.0 does not exist.*layers 0 to 2 and 6 query heads"),
        (Receiver(2, 6), "receiver q of 2.6 does not exist"),
        (Receiver(2, 2, "k"), "receiver k of 2.2 does not exist.*2 key/value groups"),
        (Receiver(2, -1, "v"), "receiver v of 2.-1 does not exist"),
        (Receiver(2, 0, "z"), "component 'z' is unknown"),
        (Receiver(2, 0, "q", "S2"), "positions='S2' is unknown"),
        (Receiver(2, 0, "q", 9), "positions=9 lies outside"),
    ],
)
def test_a_receiver_that_does_not_exist_is_named(lm, pairs, receiver, message):
    with pytest.raises(ValueError, match=message):
        path_patch(lm, pairs, ["0.0"], [receiver])


@pytest.mark.parametrize("receivers", [[], "resid"])
def test_receivers_that_name_nothing_are_refused(lm, pairs, receivers):
    with pytest.raises(ValueError, match="receivers"):
        path_patch(lm, pairs, ["0.0"], receivers)
