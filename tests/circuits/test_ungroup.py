"""The ungrouped copy computes what the grouped model does, shares its weights and leaves it alone."""

from __future__ import annotations

import gc

import pytest
import torch

from attnlab.circuits import HookedLM
from attnlab.circuits.ungroup import ungrouped
from attnlab.models import pretrained
from attnlab.models.pretrained import tiny

SIZES = {"n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "d_model": 48}
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(scope="module")
def flat(lm: HookedLM) -> HookedLM:
    return ungrouped(lm)


def test_logits_and_activations_are_those_of_the_grouped_model(lm, flat, batch):
    grouped, single = (model.run(batch.clean, capture=("q", "k", "v", "z", "pattern")) for model in (lm, flat))
    torch.testing.assert_close(single.resid[3], grouped.resid[3], **EXACT)
    torch.testing.assert_close(flat.bridge(batch.clean), lm.bridge(batch.clean), **EXACT)
    for kind in ("q", "z", "pattern"):
        torch.testing.assert_close(single.stack(kind), grouped.stack(kind), **EXACT)
    for kind in ("k", "v"):
        torch.testing.assert_close(single.stack(kind), grouped.stack(kind).repeat_interleave(3, -2), **EXACT)


def test_single_precision_agrees(batch):
    lm = HookedLM(tiny(**SIZES, dtype=torch.float32))
    with torch.no_grad():
        difference = ungrouped(lm).bridge(batch.clean) - lm.bridge(batch.clean)
    assert difference.abs().max() < 1e-5


def test_sizes_and_weights(lm, flat):
    assert (flat.spec.n_kv_heads, flat.spec.n_heads) == (6, 6)
    assert lm.spec.n_kv_heads == 2
    for name in ("W_K", "W_V"):
        assert torch.equal(getattr(flat.bridge, name), getattr(lm.bridge, name).repeat_interleave(3, 1))
    assert not any(parameter.requires_grad for parameter in flat.bridge.parameters())


def test_other_weights_are_shared(lm, flat):
    old = {parameter.data_ptr() for parameter in lm.bridge.parameters()}
    new = [parameter for parameter in flat.bridge.parameters() if parameter.data_ptr() not in old]
    assert len(new) == 2 * 3  # keys and values of three layers
    assert flat.tokenizer is lm.tokenizer


def test_an_ungrouped_model_is_not_copied(gpt2, flat):
    assert ungrouped(gpt2) is gpt2
    assert ungrouped(flat) is flat


def test_runs_with_edits_and_restarts_work_on_the_copy(flat, batch):
    base = flat.run(batch.clean)
    again = flat.resume(base, [0, 1])
    torch.testing.assert_close(again.resid[3], base.resid[3].repeat(2, 1, 1), **EXACT)


def test_the_original_may_go_away(batch):
    """A run leaves hooks between the blocks and their norms; the copy must not hold on to those of the original."""
    lm = HookedLM(tiny(**SIZES))
    expected = lm.run(batch.clean).resid[2]
    flat = ungrouped(lm)
    torch.testing.assert_close(lm.run(batch.clean).resid[2], expected, **EXACT)  # still whole after copying
    del lm
    gc.collect()
    torch.testing.assert_close(flat.run(batch.clean).resid[2], expected, **EXACT)


def test_biases_are_repeated_with_their_rows(batch):
    bridge = tiny(**SIZES)
    generator = torch.Generator().manual_seed(1)
    for block in bridge.blocks:
        for projection in (block.attn.k, block.attn.v):
            bias = torch.randn(16, generator=generator, dtype=torch.float64)
            projection.original_component.bias = torch.nn.Parameter(bias)
    lm = HookedLM(bridge)
    torch.testing.assert_close(ungrouped(lm).run(batch.clean).resid[2], lm.run(batch.clean).resid[2], **EXACT)


def test_other_projections_are_refused(batch):
    lm = HookedLM(tiny(**SIZES))
    lm.bridge.blocks[1].attn.v.set_original_component(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"tiny, layer 1: the projection of v is Identity\(\); only an nn.Linear"):
        ungrouped(lm)


@pytest.mark.model
def test_smollm2_computes_the_same():
    try:
        lm = HookedLM(pretrained.load("smollm2-135m-instruct"))
    except pretrained.ModelUnavailable as error:
        pytest.skip(str(error))
    tokens = torch.tensor([lm.tokenizer("When Mary and John went to the store, John gave a drink to")["input_ids"]])
    flat = ungrouped(lm)
    with torch.no_grad():
        assert (flat.bridge(tokens) - lm.bridge(tokens)).abs().max() < 1e-5
    assert sum(parameter.numel() for parameter in flat.bridge.parameters()) > sum(
        parameter.numel() for parameter in lm.bridge.parameters()
    )
