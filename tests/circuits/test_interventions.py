"""Pattern surgery: rows stay distributions, nothing else moves, and a head's own pattern is no surgery."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from attnlab.circuits import choice_accuracy, force_pattern, log_prob, logit_diff, patching, uniform_over
from attnlab.circuits.interventions import _pattern_edits

HEADS = ["0.1", "1.2", "2.0"]


def nodes(model, names):
    return [model.spec.check(name) for name in names]


def own_pattern(model, head, row=-1):
    """Weights that repeat what a head does anyway."""

    def weights(batch):
        layer, number = model.spec.check(head)
        return model.run(batch.clean, capture=("pattern",)).acts["pattern", layer][:, number, row]

    return weights


def test_uniform_over_a_name(batch):
    weights = uniform_over("two")(batch)
    assert weights.shape == batch.clean.shape
    assert (weights > 0).equal(batch.mask("two"))
    torch.testing.assert_close(weights[weights > 0], torch.full((6,), 0.5, dtype=weights.dtype))


def test_forced_rows_are_the_given_ones_and_all_rows_sum_to_one(any_lm, batch):
    where, target = batch.mask("END"), uniform_over("two")(batch).double()
    run = any_lm.run(
        batch.clean, edits=_pattern_edits([nodes(any_lm, HEADS)], target, where), capture=("pattern", "z", "v")
    )
    plain = any_lm.run(batch.clean, capture=("pattern", "z"))
    for layer, head in nodes(any_lm, HEADS):
        pattern = run.acts["pattern", layer]
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), rtol=0, atol=1e-6)
        assert torch.equal(pattern[:, head, -1], target.to(pattern))
        values = run.acts["v", layer].repeat_interleave(any_lm.spec.n_heads // any_lm.spec.n_kv_heads, 2)[:, :, head]
        mixed = torch.einsum("bt,bte->be", target, values)  # the head now writes the mean of the chosen values
        torch.testing.assert_close(run.acts["z", layer][:, -1, head], mixed, rtol=0, atol=1e-10)
    for layer in range(any_lm.spec.n_layers):
        assert torch.equal(run.acts["z", layer][:, :-1], plain.acts["z", layer][:, :-1])
    assert not torch.equal(run.acts["z", 0][:, -1], plain.acts["z", 0][:, -1])


def test_other_heads_of_the_first_forced_layer_stay_bit_identical(any_lm, batch):
    edits = _pattern_edits([nodes(any_lm, ["1.2"])], uniform_over("mid")(batch).double(), batch.mask("END"))
    forced, plain = (any_lm.run(batch.clean, edits=e, capture=("z",)).acts["z", 1] for e in (edits, ()))
    changed = {head for head in range(plain.shape[2]) if not torch.equal(forced[:, :, head], plain[:, :, head])}
    assert changed == {2}


@pytest.mark.parametrize("row", [-1, 3])
def test_forcing_the_pattern_a_head_already_has_changes_nothing(lm, make_pairs, row):
    pairs = make_pairs([7, 9, 5, 7])
    for head in HEADS:
        (values,) = force_pattern(
            lm, pairs, [(), [head]], own_pattern(lm, head, row), from_position=row, metrics=(logit_diff,)
        )
        np.testing.assert_allclose(values[1], values[0], rtol=0, atol=1e-10)


def test_forcing_gpt2_to_its_own_pattern_changes_nothing(gpt2, pairs):
    (values,) = force_pattern(gpt2, pairs, [(), ["1.2"]], own_pattern(gpt2, "1.2"), metrics=(logit_diff,))
    np.testing.assert_allclose(values[1], values[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("from_position", ["END", "mid", 4])
def test_forcing_equals_a_naive_whole_run(any_lm, pairs, batch, naive_diff, from_position):
    def first_token(batch):
        return torch.eye(batch.clean.shape[1])[torch.zeros(len(batch), dtype=torch.long)]

    where = batch.mask(from_position)

    def hook(pattern, hook, head):
        pattern = pattern.clone()
        for example in range(len(batch)):
            for row in where[example].nonzero()[:, 0]:
                pattern[example, head, row] = 0
                pattern[example, head, row, 0] = 1
        return pattern

    groups = [(), ["0.1"], ["0.1", "2.3"], ["1.0", "1.2"]]
    (values,) = force_pattern(any_lm, pairs, groups, first_token, from_position=from_position, metrics=(logit_diff,))
    for group, got in zip(groups, values, strict=True):
        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", partial(hook, head=head)) for layer, head in nodes(any_lm, group)
        ]
        np.testing.assert_allclose(got, naive_diff(any_lm, batch.clean, batch, hooks), rtol=0, atol=1e-10)
    assert np.abs(values[1] - values[0]).max() > 1e-5


def test_metrics_groups_and_weights_are_laid_out_as_promised(lm, make_pairs, monkeypatch):
    pairs = make_pairs([7, 5, 9, 7])
    groups, weights = [["2.1"], (), ["0.1", "0.2"], ["2.1"]], [uniform_over(n) for n in ("mid", "mid", "two", "two")]
    metrics = (logit_diff, choice_accuracy, log_prob)
    values = force_pattern(lm, pairs, groups, weights, metrics=metrics)
    assert values.shape == (3, 4, 4)
    for row, (group, weight) in enumerate(zip(groups, weights, strict=True)):
        for number in range(4):
            alone = force_pattern(lm, pairs.subset([number]), [group], weight, metrics=metrics)
            np.testing.assert_allclose(values[:, row, number], alone[:, 0, 0], rtol=0, atol=1e-10)
    monkeypatch.setattr(patching, "TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(force_pattern(lm, pairs, groups, weights, metrics=metrics), values, rtol=0, atol=1e-10)


def test_nothing_stays_behind_when_weights_are_refused(lm, pairs, batch, naive_diff):
    before = naive_diff(lm, batch.clean, batch)
    with pytest.raises(ValueError, match="must sum to 1"):
        force_pattern(lm, pairs, [["0.1"]], lambda batch: torch.ones(batch.clean.shape))
    assert torch.equal(before, naive_diff(lm, batch.clean, batch))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda b: 0.5 * uniform_over("mid")(b), "must not be negative and must sum to 1"),
        (lambda b: 3 * uniform_over("mid")(b) - 2 * uniform_over("END")(b), "must not be negative"),
        (lambda b: uniform_over("mid")(b)[:, :-1], r"weights have shape \(3, 6\).*needs \(3, 7\)"),
        (lambda b: torch.full(b.clean.shape, torch.nan), "must not be negative and must sum to 1"),
        (uniform_over("S2"), "positions='S2' is unknown"),
        ([uniform_over("mid")] * 2, "weights has 2 entries for 1 groups"),
    ],
)
def test_bad_weights_are_refused(lm, pairs, weights, message):
    with pytest.raises(ValueError, match=message):
        force_pattern(lm, pairs, [["0.1"]], weights)


@pytest.mark.parametrize(
    ("group", "arguments", "message"),
    [
        (["31.0"], {}, "node 31.0 does not exist"),
        (["0.6"], {}, "node 0.6 does not exist"),
        (["m1"], {}, "an MLP or the embedding has no attention pattern"),
        (["input"], {}, "no attention pattern"),
        (["0.1"], {"from_position": "S2"}, "positions='S2' is unknown"),
        (["0.1"], {"from_position": 7}, "positions=7 lies outside"),
    ],
)
def test_bad_groups_and_positions_are_refused(lm, pairs, group, arguments, message):
    with pytest.raises(ValueError, match=message):
        force_pattern(lm, pairs, [group], uniform_over("mid"), **arguments)
