"""Edge attribution against edges patched one by one, against node attribution, and against the totals it must add up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attnlab.circuits import (
    Edit,
    HookedLM,
    NoEffectError,
    Pairs,
    Readout,
    accuracy,
    activation_patch,
    attribution_patch,
    log_odds,
    log_prob,
    logit_diff,
)
from attnlab.circuits.eap import eap, exact_edge_scores
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.ungroup import ungrouped
from attnlab.models.pretrained import tiny
from attnlab.models.random_models import _filled

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def flat(lm: HookedLM) -> HookedLM:
    """The Llama of three layers with a key and a value for each of its six heads."""
    return ungrouped(lm)


@pytest.fixture(params=["flat", "gpt2"])
def model(request: pytest.FixtureRequest) -> HookedLM:
    """RMSNorm with rotary positions and LayerNorm with biases, in turn."""
    return request.getfixturevalue(request.param)


def _small(nearness: float | None = None, straight: bool = False) -> HookedLM:
    """Two layers of two heads. ``nearness`` shrinks the differences between words, ``straight`` leaves nothing nonlinear."""
    bridge: Any = tiny(n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, seed=2)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if straight and ("q_proj" in name or "down_proj" in name):
                parameter.zero_()  # attention is then even, and MLPs write nothing
        if nearness is not None:
            table = bridge.embed.W_E
            table.copy_(table[:1] + nearness * (table - table[:1]))
        for block in bridge.blocks if straight else []:
            norm = block.ln1.original_component
            norm.variance_epsilon = 1e14  # the scale of the norm does not notice its input any more
            norm.weight *= 1e7
    model = HookedLM(bridge)
    if straight:
        model.readout = lambda resid: resid[:, -1]  # type: ignore[method-assign]
    return model


def _rows(model: HookedLM, scores: EdgeScores) -> list[int]:
    """Rows of all heads, layer by layer."""
    return [scores.wiring.source(f"a{node.layer}.h{node.head}") for node in model.spec.heads]


# --------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_eap_is_exact_where_the_model_is_linear(pairs, direction):
    """No attention that depends on the words, no MLP, no norm: every edge adds its share, whatever else is patched."""
    model = _small(straight=True)
    exact, estimate = (how(model, pairs, direction=direction) for how in (exact_edge_scores, eap))
    torch.testing.assert_close(estimate.values, exact.values, rtol=0, atol=1e-9)
    assert (exact.values.abs() > 1e-3).sum() > 5
    into_logits = exact.values[:, -1].sum()
    torch.testing.assert_close(into_logits, torch.tensor(1.0, dtype=torch.float64), **EXACT)  # a cut of a linear model


def test_edges_into_the_logits_are_exact_without_a_final_norm(linear_end, pairs):
    model = ungrouped(linear_end)
    model.readout = linear_end.readout  # type: ignore[method-assign]
    exact, estimate = exact_edge_scores(model, pairs), eap(model, pairs)
    torch.testing.assert_close(estimate.values[:, -1], exact.values[:, -1], **EXACT)
    assert not torch.allclose(estimate.values, exact.values, rtol=1e-3)


def test_eap_is_the_first_order_of_the_exact_scores(pairs):
    """Words ten times as near to each other leave a tenth of the relative error."""
    errors = []
    for nearness in (1e-3, 1e-4):
        model = _small(nearness)
        exact, estimate = (how(model, pairs).values for how in (exact_edge_scores, eap))
        errors.append(float((estimate - exact).norm() / exact.norm()))
    assert errors[0] < 0.02
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("metric", [logit_diff, log_odds, log_prob])
@pytest.mark.parametrize("edge", ["input->a1.h1<q>", "a0.h2->a1.h3<k>", "m0->a2.h1<v>", "a1.h2->m1", "m1->logits"])
def test_an_edge_is_the_finite_difference_through_its_port(model, pairs, batch, edge, metric):
    """By the bridge's own hooks: the port's residual moves a little along the source's write, and nothing else does."""
    source, destination = edge.split("->")
    clean, corrupt = (model.run(side, capture=("z", "mlp_out")) for side in (batch.clean, batch.corrupt))
    if source == "input":
        write = corrupt.resid[0] - clean.resid[0]
    elif source[0] == "m":
        write = corrupt.acts["mlp_out", int(source[1])] - clean.acts["mlp_out", int(source[1])]
    else:
        layer, head = int(source[1]), int(source[4])
        write = (corrupt.acts["z", layer] - clean.acts["z", layer])[:, :, head] @ model.W_O[layer, head]
    step, last = 1e-5, model.spec.n_layers

    def measured(scale: float) -> torch.Tensor:
        edits = []
        if destination.startswith("a"):
            layer, head, port = int(destination[1]), int(destination[4]), destination[6]
            block = model.bridge.blocks[layer]
            project = getattr(block.attn, port).original_component

            def change(act: torch.Tensor, first: int) -> torch.Tensor:
                moved = project(block.ln1.original_component(clean.resid[layer] + scale * write)).view_as(act)
                return torch.cat([act[:, :, :head], moved[:, :, head, None], act[:, :, head + 1 :]], 2)

            edits = [Edit(port, layer, change)]
        elif destination.startswith("m"):
            edits = [Edit("mlp_in", int(destination[1]), lambda act, first: act + scale * write)]
        end = model.run(batch.clean, edits=edits).resid[last]
        return metric(Readout(model, end + scale * write if destination == "logits" else end, batch))

    with torch.no_grad():
        slope = (measured(step) - measured(-step)).mean() / (2 * step)
    scores = eap(model, pairs, metric=metric)
    np.testing.assert_allclose(scores.of(edge) * scores.info["gap"], slope, rtol=1e-5, atol=1e-9)
    assert abs(float(slope)) > 1e-7


def test_exact_scores_of_a_last_layer_are_those_of_activation_patching(pairs):
    """A head of the last layer whose only reader beside the (silent) MLP is the logits."""
    bridge: Any = tiny(n_layers=1, n_heads=2, n_kv_heads=2, d_model=16, seed=2)
    with torch.no_grad():
        bridge.blocks[0].mlp.out.original_component.weight.zero_()
    model = HookedLM(bridge)
    scores = exact_edge_scores(model, pairs)
    patched = activation_patch(model, pairs, positions="all")
    for head in range(2):
        assert scores.of(f"a0.h{head}->logits") == pytest.approx(patched.of(f"0.{head}"), abs=1e-12)


# ----------------------------------------------------------------------------------------------------- totals


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_edges_out_of_a_head_add_up_to_its_attribution(model, pairs, direction):
    edges, nodes = eap(model, pairs, direction=direction), attribution_patch(model, pairs, direction=direction)
    np.testing.assert_allclose(edges.node_scores()[_rows(model, edges)], nodes.values, **EXACT)
    assert edges.info["gap"] == pytest.approx(nodes.gap.mean(), abs=1e-12)
    assert edges.info["base"] == pytest.approx(nodes.base.mean(), abs=1e-12)


def test_edges_out_of_the_embedding_add_up_to_its_gradient(model, pairs, batch):
    """One gradient by the embedding, without any port."""
    clean, corrupt = (model.run(side, grad=True) for side in (batch.clean, batch.corrupt))
    value = logit_diff(Readout(model, clean.resid[model.spec.n_layers], batch))
    (grad,) = torch.autograd.grad(value.sum(), [clean.resid[0]])
    total = ((corrupt.resid[0] - clean.resid[0]) * grad).detach().sum() / len(batch)
    scores = eap(model, pairs)
    np.testing.assert_allclose(scores.node_scores()[0] * scores.info["gap"], total, **EXACT)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_integrated_gradients_add_up_to_the_whole_difference(pairs, direction):
    """Completeness of the edges out of the embedding: the midpoint's error falls like 1 / steps squared, an end's like 1 / steps."""
    model = _small(nearness=0.2)  # words near each other: the orders show from a few steps on

    def error(steps: int, endpoint: Any) -> float:
        found = eap(model, pairs, steps=steps, endpoint=endpoint, direction=direction)
        return abs(float(found.node_scores()[0]) - 1)

    assert error(16, "midpoint") < 1e-3
    assert error(16, "midpoint") / error(8, "midpoint") == pytest.approx(1 / 4, rel=0.15)
    for endpoint in ("left", "right"):
        assert error(32, endpoint) / error(16, endpoint) == pytest.approx(1 / 2, rel=0.15)


def test_one_step_from_the_left_is_eap_and_rules_differ_elsewhere(flat, pairs):
    plain = eap(flat, pairs)
    assert torch.equal(plain.values, eap(flat, pairs, steps=1, endpoint="left").values)
    for endpoint in ("midpoint", "right"):
        assert not torch.allclose(plain.values, eap(flat, pairs, endpoint=endpoint).values, rtol=1e-3)


def test_right_from_clean_is_left_from_corrupt(flat, pairs):
    """The points of one are the points of the other, and the difference of the writes and of the metric both turn their sign."""
    there = eap(flat, pairs, steps=3, endpoint="right", direction="noise")
    back = eap(flat, pairs, steps=3, endpoint="left", direction="denoise")
    torch.testing.assert_close(there.values, back.values, **EXACT)
    assert there.info["gap"] == pytest.approx(-back.info["gap"])


def test_steps_are_averaged(flat, pairs):
    """The left points of six steps are the left points and the midpoints of three."""
    left, middle = (eap(flat, pairs, steps=3, endpoint=endpoint).values for endpoint in ("left", "midpoint"))
    torch.testing.assert_close((left + middle) / 2, eap(flat, pairs, steps=6, endpoint="left").values, **EXACT)


def test_parallel_blocks_have_their_own_wiring(pairs):
    """Pythia's MLP does not see the heads of its block; the totals hold all the same."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = HookedLM(_filled(GPTNeoXForCausalLM(config).double(), 64, seed=0))
    edges, nodes = eap(model, pairs), attribution_patch(model, pairs)
    assert edges.wiring == Wiring(2, 4, parallel_blocks=True)
    np.testing.assert_allclose(edges.node_scores()[_rows(model, edges)], nodes.values, **EXACT)
    assert float(eap(model, pairs, steps=32, endpoint="midpoint").node_scores()[0]) == pytest.approx(1, abs=0.01)


# ---------------------------------------------------------------------------------------------------- bookkeeping


def test_lengths_and_batches_change_nothing(flat, make_pairs: Callable[..., Pairs]):
    pairs = make_pairs([7, 5, 9, *[7] * 8], seed=2)  # more than one batch of 8
    alone = [eap(flat, pairs.subset([number])) for number in range(len(pairs))]
    raw = sum(scores.values * scores.info["gap"] for scores in alone) / len(pairs)
    whole = eap(flat, pairs)
    torch.testing.assert_close(whole.values * whole.info["gap"], raw, **EXACT)
    assert whole.info["gap"] == pytest.approx(np.mean([scores.info["gap"] for scores in alone]))


def test_exact_scores_do_not_depend_on_batches_either(make_pairs: Callable[..., Pairs]):
    model, pairs = _small(), make_pairs([5, 7], seed=1)
    parts = [exact_edge_scores(model, pairs.subset([number])) for number in range(2)]
    raw = sum(scores.values * scores.info["gap"] for scores in parts) / 2
    whole = exact_edge_scores(model, pairs)
    torch.testing.assert_close(whole.values * whole.info["gap"], raw, **EXACT)


def test_info_says_how_the_scores_were_made(gpt2, pairs):
    info = eap(gpt2, pairs, steps=2, endpoint="midpoint", direction="denoise").info
    assert (
        info.items()
        >= {
            "model": "tiny",
            "task": "random words",
            "data_hash": pairs.digest,
            "pairs": 3,
            "method": "EAP-IG",
            "metric": "logit_diff",
            "steps": 2,
            "endpoint": "midpoint",
            "path": "inputs",
            "direction": "denoise",
        }.items()
    )
    assert eap(gpt2, pairs).info["method"] == "EAP"
    assert exact_edge_scores(_small(), pairs).info["method"] == "exact"


def test_scores_are_deterministic_and_leave_nothing_behind(model, pairs, batch, naive_diff):
    before = naive_diff(model, batch.clean, batch)
    first, second = (eap(model, pairs, steps=2) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(before, naive_diff(model, batch.clean, batch))
    assert all(parameter.grad is None for parameter in model.bridge.parameters())
    assert not first.values.requires_grad


@pytest.mark.parametrize("how", [eap, exact_edge_scores])
def test_hooks_are_removed_after_an_exception(how, pairs, batch, naive_diff):
    """The metric fails in the run with edits, its third use: after the base and the source run."""
    model, calls = _small(), []
    before = naive_diff(model, batch.clean, batch)

    def failing(end: Readout) -> torch.Tensor:
        calls.append(end)
        if len(calls) == 3:
            raise RuntimeError("enough")
        return logit_diff(end)

    with pytest.raises(RuntimeError, match="enough"):
        how(model, pairs, metric=failing)
    assert torch.equal(before, naive_diff(model, batch.clean, batch))
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())
    torch.testing.assert_close(eap(model, pairs).values, eap(_small(), pairs).values, rtol=0, atol=0)


@pytest.mark.parametrize("how", [eap, exact_edge_scores])
def test_equal_metrics_have_nothing_to_attribute(how, pairs):
    with pytest.raises(NoEffectError, match="random words: the mean metric is 0 on the base and on the source"):
        how(_small(), pairs, metric=lambda end: 0 * logit_diff(end))


@pytest.mark.parametrize("how", [eap, exact_edge_scores])
def test_metrics_that_are_no_number_are_refused(how, pairs):
    with pytest.raises(NoEffectError, match="mean metric is nan"):
        how(_small(), pairs, metric=lambda end: torch.nan * logit_diff(end))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 gives no gradient; use a whole number of at least 1"),
        ({"steps": 2.5}, "steps=2.5 gives no gradient"),
        ({"endpoint": "centre"}, "endpoint='centre' is unknown; use 'left', 'midpoint' or 'right'"),
        ({"path": "activations"}, "path='activations' is unknown; use 'inputs'"),
        ({"direction": "back"}, "direction='back' is unknown"),
        ({"metric": accuracy}, "metric has no gradient"),
    ],
)
def test_bad_arguments_are_named(gpt2, pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        eap(gpt2, pairs, **arguments)


@pytest.mark.parametrize("how", [eap, exact_edge_scores])
def test_models_without_such_edges_are_refused(how, lm, pairs, monkeypatch):
    with pytest.raises(ValueError, match=r"6 query heads but 2 keys and values.*pass ungrouped\(model\)"):
        how(lm, pairs)
    model = _small()
    monkeypatch.setattr(model, "W_O", 2 * model.W_O)
    with pytest.raises(ValueError, match="does not add up to its residual stream"):
        how(model, pairs)


# ------------------------------------------------------------------------------------------- how pairs add up


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_absolute_totals_are_sums_of_the_sizes_of_single_pairs(model, pairs, direction, batch_size):
    options = {"steps": 2, "direction": direction}
    whole = eap(model, pairs, total="absolute", batch_size=batch_size, **options)
    single = [eap(model, pairs.subset([i]), **options) for i in range(len(pairs))]
    wanted = sum((scores.values * scores.info["gap"]).abs() for scores in single)
    torch.testing.assert_close(whole.values * abs(whole.info["gap"]) * len(pairs), wanted, rtol=1e-4, atol=1e-6)
    assert (whole.values >= 0).all()
    assert whole.info["total"] == "absolute"


def test_the_size_of_a_batch_changes_no_signed_score(model, pairs):
    torch.testing.assert_close(eap(model, pairs, batch_size=2).values, eap(model, pairs).values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"total": "squared"}, "total='squared' is unknown"), ({"batch_size": 0}, "batch_size=0 takes no pair")],
)
def test_other_totals_are_refused(model, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        eap(model, pairs, **options)
