"""The adapter: restarts are exact, edits and captures do what they say and leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from attnlab.circuits import INPUT, Edit, Node
from attnlab.circuits.model import HOOKS

EXACT = {"rtol": 0, "atol": 1e-10}


def final_logits(model, run):
    return model.logits(model.readout(run.resid[model.spec.n_layers]))


def bump(act, first):
    """A change that no model undoes."""
    return act + 1.0


# ------------------------------------------------------------------------------------------------------------ nodes


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("9.6", Node(9, 6)),
        ("L9H6", Node(9, 6)),
        ("a9.h6", Node(9, 6)),
        ("A9.H6", Node(9, 6)),
        ("L9.6", Node(9, 6)),
        ("31.0", Node(31, 0)),
        ("12.10", Node(12, 10)),
        ("m9", Node(9)),
        ("input", INPUT),
        ((9, 6), Node(9, 6)),
        ((9, None), Node(9)),
        (Node(9, 6), Node(9, 6)),
    ],
)
def test_a_node_is_read_in_every_spelling(text, node):
    assert Node.parse(text) == node


@pytest.mark.parametrize("node", [Node(0, 0), Node(12, 10), Node(0), Node(23), INPUT])
def test_a_printed_node_reads_back(node):
    assert Node.parse(str(node)) == node


@pytest.mark.parametrize(
    "text", ["", "9", "96", "m", "m9.6", "9.", ".6", "9.6.1", "9..6", "-1.2", "head 3", "9,6", "M9"]
)
def test_what_is_no_node_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not understood") as error:
        Node.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["31.0", "3.0", "0.6", "m3"])
def test_a_node_that_the_model_lacks_is_refused_by_name(lm, text):
    with pytest.raises(ValueError, match=f"node {text} does not exist.*0 to 2.*0 to 5"):
        lm.spec.check(text)


def test_spec_lists_every_writer_once(lm, gpt2):
    assert (lm.spec.n_heads, lm.spec.n_kv_heads, gpt2.spec.n_kv_heads) == (6, 2, 4)
    for model in (lm, gpt2):
        assert len(model.spec.heads) == len(set(model.spec.heads)) == model.spec.n_layers * model.spec.n_heads
        assert len(set(model.spec.nodes)) == 1 + len(model.spec.heads) + model.spec.n_layers
        assert all(model.spec.check(node) == node for node in model.spec.nodes)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("rows", [1, 3])
def test_a_run_ends_where_the_bridge_ends(any_lm, batch, rows):
    tokens = batch.clean[:rows]
    with torch.no_grad():
        expected = any_lm.bridge(tokens)[:, -1]
    torch.testing.assert_close(final_logits(any_lm, any_lm.run(tokens)), expected, **EXACT)


def test_a_noop_edit_changes_no_bit(any_lm, batch):
    plain = any_lm.run(batch.clean)
    edited = any_lm.run(batch.clean, edits=[Edit(kind, 1, lambda act, first: act) for kind in HOOKS])
    assert torch.equal(final_logits(any_lm, plain), final_logits(any_lm, edited))


def test_two_runs_give_the_same_bits(any_lm, batch):
    first, second = (any_lm.run(batch.clean, capture=HOOKS) for _ in range(2))
    assert first.acts.keys() == second.acts.keys()
    assert all(torch.equal(first.acts[key], second.acts[key]) for key in first.acts)


@pytest.mark.parametrize("length", [1, 7])
def test_captured_shapes(any_lm, batch, length):
    spec, size = any_lm.spec, len(batch)
    run = any_lm.run(batch.clean[:, :length], capture=HOOKS)
    shapes = {
        "resid_pre": (size, length, spec.d_model),
        "q": (size, length, spec.n_heads, spec.d_head),
        "k": (size, length, spec.n_kv_heads, spec.d_head),
        "v": (size, length, spec.n_kv_heads, spec.d_head),
        "pattern": (size, spec.n_heads, length, length),
        "z": (size, length, spec.n_heads, spec.d_head),
        "mlp_out": (size, length, spec.d_model),
    }
    for kind, shape in shapes.items():
        assert run.stack(kind).shape == (spec.n_layers, *shape)


def test_heads_mlps_and_embedding_add_up_to_the_residual(any_lm, batch):
    """What ``W_O`` and ``z`` mean: the stream is the sum of what the nodes write (and of the bias of ``W_O``)."""
    run = any_lm.run(batch.clean, capture=("z", "mlp_out", "resid_pre"))
    heads = torch.einsum("lbthe,lhed->btd", run.stack("z"), any_lm.W_O)
    given = [getattr(block.attn, "b_O", None) for block in any_lm.bridge.blocks]
    biases = sum(bias for bias in given if bias is not None)
    total = run.acts["resid_pre", 0] + heads + run.stack("mlp_out").sum(0) + biases
    torch.testing.assert_close(run.resid[any_lm.spec.n_layers], total, **EXACT)


def test_logits_of_chosen_tokens_are_columns_of_all_logits(any_lm, batch):
    normed = any_lm.readout(any_lm.run(batch.clean).resid[any_lm.spec.n_layers])
    tokens = torch.tensor([[3, 9], [60, 2], [5, 5]])
    torch.testing.assert_close(any_lm.logits(normed, tokens), any_lm.logits(normed).gather(1, tokens), **EXACT)


# --------------------------------------------------------------------------------------------------------- restarts


def test_a_restart_from_every_layer_and_position_equals_the_full_run(any_lm, batch):
    base = any_lm.run(batch.clean, capture=("z", "pattern"))
    for layer in range(any_lm.spec.n_layers):
        for first in range(batch.clean.shape[1]):
            again = any_lm.resume(base, [layer] * 2, first, capture=("z", "pattern"))
            for above in range(layer, any_lm.spec.n_layers + 1):
                expected = base.resid[above][:, first:].repeat(2, 1, 1)
                torch.testing.assert_close(again.resid[above], expected, **EXACT)
            for above in range(layer, any_lm.spec.n_layers):
                expected = base.acts["pattern", above][:, :, first:].repeat(2, 1, 1, 1)
                torch.testing.assert_close(again.acts["pattern", above], expected, **EXACT)


@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "mlp_out", "resid_pre"])
def test_an_edit_in_a_restart_equals_the_edit_in_a_full_run(any_lm, batch, kind):
    """The edit hits position 3 only, and the restart begins right there."""

    def change(act, first):
        act = act.clone()
        act[:, 3 - first] += 1.0
        return act

    base = any_lm.run(batch.clean)
    full = any_lm.run(batch.clean, edits=[Edit(kind, 1, change)])
    short = any_lm.resume(base, [1], 3, edits=[Edit(kind, 1, change)])
    last = any_lm.spec.n_layers
    torch.testing.assert_close(short.resid[last], full.resid[last][:, 3:], **EXACT)
    assert (full.resid[last][:, 3:] - base.resid[last][:, 3:]).abs().max() > 1e-3  # the edit did something


def test_a_restart_may_stop_early(lm, batch):
    base = lm.run(batch.clean)
    part = lm.resume(base, [1], stop=2, capture=("z",))
    assert set(part.acts) == {("z", 1)}
    assert max(part.resid) == 2
    torch.testing.assert_close(part.resid[2], base.resid[2], **EXACT)


# -------------------------------------------------------------------------------------------------- grouped queries


def changed_heads(before, after):
    """Query heads whose output differs in any bit."""
    return {head for head in range(before.shape[2]) if not torch.equal(before[:, :, head], after[:, :, head])}


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("group", [0, 1])
def test_a_key_or_value_group_reaches_its_own_query_heads_only(lm, batch, kind, group):
    def change(act, first):
        act = act.clone()
        act[:, 2, group] += 1.0
        return act

    base = lm.run(batch.clean, capture=("z",))
    after = lm.run(batch.clean, edits=[Edit(kind, 1, change)], capture=("z",))
    n_rep = lm.spec.n_heads // lm.spec.n_kv_heads
    assert changed_heads(base.acts["z", 1], after.acts["z", 1]) == set(range(group * n_rep, (group + 1) * n_rep))


@pytest.mark.parametrize("kind", ["q", "z"])
def test_a_query_head_is_edited_alone(lm, batch, kind):
    def change(act, first):
        act = act.clone()
        act[:, :, 4] += 1.0
        return act

    base = lm.run(batch.clean, capture=("z",))
    after = lm.run(batch.clean, edits=[Edit(kind, 1, change)], capture=("z",))
    assert changed_heads(base.acts["z", 1], after.acts["z", 1]) == {4}


# ----------------------------------------------------------------------------------------------------- nothing stays


def test_hooks_are_gone_after_an_edit(any_lm, batch):
    before = any_lm.run(batch.clean)
    edited = any_lm.run(batch.clean, edits=[Edit("z", 0, bump)])
    after = any_lm.run(batch.clean)
    assert not torch.equal(final_logits(any_lm, before), final_logits(any_lm, edited))
    assert torch.equal(final_logits(any_lm, before), final_logits(any_lm, after))


def test_hooks_are_gone_after_an_exception(any_lm, batch):
    def fail(act, first):
        raise RuntimeError("an edit that fails")

    before = any_lm.run(batch.clean)
    with pytest.raises(RuntimeError, match="an edit that fails"):
        any_lm.run(batch.clean, edits=[Edit("z", 0, bump), Edit("mlp_out", 1, fail)])
    with pytest.raises(RuntimeError, match="an edit that fails"):
        any_lm.resume(before, [1], 2, edits=[Edit("q", 1, bump), Edit("mlp_out", 1, fail)])
    after = any_lm.run(batch.clean)
    assert torch.equal(final_logits(any_lm, before), final_logits(any_lm, after))
    with torch.no_grad():
        torch.testing.assert_close(any_lm.bridge(batch.clean)[:, -1], final_logits(any_lm, before), **EXACT)


def test_parameters_are_frozen_and_dropout_is_off(any_lm):
    assert not any(parameter.requires_grad for parameter in any_lm.bridge.parameters())
    assert not any(module.training for module in any_lm.bridge.modules())


def test_gradients_reach_captured_activations_only_on_request(lm, batch):
    assert not lm.run(batch.clean, capture=("z",)).acts["z", 0].requires_grad
    run = lm.run(batch.clean, capture=("z",), grad=True)
    grads = torch.autograd.grad(final_logits(lm, run).sum(), [run.acts["z", layer] for layer in range(3)])
    assert all(grad.abs().max() > 0 for grad in grads)
