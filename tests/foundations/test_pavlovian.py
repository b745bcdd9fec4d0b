"""Oracles of ``attnlab.foundations.pavlovian``: rules against mixers and closed forms, the laboratory against hand calculations."""

from __future__ import annotations

import pytest
import torch

from attnlab import mixers
from attnlab.foundations import pavlovian as chapter
from attnlab.foundations.pavlovian import RULES, Phase

EXACT = {"rtol": 0, "atol": 1e-12}


def pairs(batch=2, trials=21, width=5, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, trials, width, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, trials, outputs, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5)
    return k / k.norm(dim=-1, keepdim=True), v


def final(rule, k, v):
    return chapter.learn(rule, k, v)[:, -1]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("trials", [1, 2, 63, 100])
def test_a_rule_is_its_mixer(name, trials):
    k, v = pairs(trials=trials)
    torch.testing.assert_close(chapter.as_mixer(RULES[name], k, v), final(RULES[name], k, v), **EXACT)


def test_hebb_is_masked_attention_without_softmax():
    k, v = pairs()
    states = chapter.learn(chapter.Hebb(1.0), k, v)
    o = chapter.recall(states[:, 1:], k)  # every token reads after its own write
    torch.testing.assert_close(o, (k @ k.mT).tril() @ v, **EXACT)
    mixed, _ = mixers.linear_attention(
        *(x[:, :, None] for x in (k, k, v)), feature_map=lambda x: x, normalise=False, scale=1.0
    )
    torch.testing.assert_close(o, mixed[:, :, 0], **EXACT)


def test_order_matters_to_the_delta_rule_alone():
    k, v = pairs()
    torch.testing.assert_close(final(chapter.Hebb(), k, v), final(chapter.Hebb(), k.flip(1), v.flip(1)), **EXACT)
    assert not torch.allclose(final(chapter.Delta(), k, v), final(chapter.Delta(), k.flip(1), v.flip(1)))


def test_a_full_delta_write_is_exact_and_idempotent():
    k, v = pairs()
    states = chapter.learn(chapter.Delta(1.0), k, v)[:, 1:]
    torch.testing.assert_close(chapter.recall(states, k), v, **EXACT)
    twice = [x.repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(final(chapter.Delta(1.0), *twice), final(chapter.Delta(1.0), k, v), **EXACT)


def test_small_delta_writes_are_hebbian():
    k, v = pairs()
    for rate in (1e-3, 1e-4):
        gap = (final(chapter.Delta(rate), k, v) - final(chapter.Hebb(rate), k, v)).abs().max() / rate
        assert gap < 100 * rate


def test_delta_sweeps_reach_the_least_squares_memory():
    k, v = pairs(batch=1, trials=4, width=6)
    sweeps = [x.repeat(1, 3000, 1) for x in (k, v)]
    store = final(chapter.Delta(1.0), *sweeps)[0]
    torch.testing.assert_close(store, torch.linalg.pinv(k[0]) @ v[0], rtol=0, atol=1e-8)


def test_the_ends_of_a_fading_trace():
    k, v = pairs()
    only_last = chapter.outer(k[:, -1], v[:, -1])
    torch.testing.assert_close(final(chapter.TraceDecay(1.0, 0.0), k, v), only_last, **EXACT)
    torch.testing.assert_close(final(chapter.TraceDecay(0.3, 1.0), k, v), final(chapter.Hebb(0.3), k, v), **EXACT)
    torch.testing.assert_close(final(chapter.GatedDelta(0.3, 1.0), k, v), final(chapter.Delta(0.3), k, v), **EXACT)


def test_oja_in_the_transposed_layout_and_without_a_reinforcer():
    k, v = pairs(trials=1)
    S = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = torch.zeros(2, 3, dtype=torch.float64)
    written = chapter.Oja().write(S, k[:, 0], v[:, 0], theta)
    shrunk = torch.diag_embed(1 - 0.3 * v[:, 0].square()) @ S.mT + 0.3 * v[:, 0, :, None] * k[:, 0, None, :]
    torch.testing.assert_close(written.mT, shrunk, **EXACT)
    torch.testing.assert_close(chapter.Oja().write(S, k[:, 0], 0 * v[:, 0], theta), S, **EXACT)


def test_bcm_strengthens_above_its_threshold_and_weakens_below():
    S, k = torch.zeros(1, 2, 1), torch.tensor([[1.0, 0.0]])
    theta = torch.tensor([[0.5]])
    assert chapter.BCM().write(S, k, torch.tensor([[0.8]]), theta)[0, 0, 0] > 0
    assert chapter.BCM().write(S, k, torch.tensor([[0.2]]), theta)[0, 0, 0] < 0
    assert chapter.BCM().write(S, k, torch.tensor([[0.0]]), theta)[0, 0, 0] == 0


# ---------------------------------------------------------------------------------------------------------- the laboratory


def test_rescorla_and_wagners_learning_curve():
    cues = chapter.cue_vectors(None)
    found = chapter.responses(chapter.Delta(0.3), [Phase("A", 1.0, 10)], cues)
    assert found.A.tolist() == pytest.approx([1 - 0.7**n for n in range(11)])
    assert (found[["B", "C"]] == 0).all(axis=None)


def test_a_compound_shares_the_asymptote():
    cues = chapter.cue_vectors(None)
    last = chapter.responses(chapter.Delta(0.3), [Phase("AB", 1.0, 100)], cues).iloc[-1]
    assert pytest.approx(1) == last.A + last.B
    salient = cues | {"A": 2 * cues["A"]}
    keys, values = chapter.present([Phase("AB", 1.0, 200)], salient)
    store = final(chapter.Delta(0.3), keys, values)[0]
    strengths = [float(cues[name] @ store[:, 0]) * size for name, size in (("A", 2), ("B", 1))]
    assert strengths == pytest.approx([0.8, 0.2])  # in proportion to squared saliences


@pytest.mark.parametrize(
    ("rule", "extinction", "blocking", "overshadowing"),
    [
        ("Hebb", 0, 0, 0),
        ("Hebb, fading", 0, 0, 0),
        ("Oja", 0, 0, 0),
        ("BCM", 0, 0, 0),
        ("delta", 1 - 0.7**10, None, None),
    ],
)
def test_who_does_what_with_orthogonal_cues(rule, extinction, blocking, overshadowing):
    found = chapter.indices(RULES[rule], chapter.cue_vectors(None))
    assert found["extinction"] == pytest.approx(extinction, abs=1e-12)
    learned = 1 - 0.7**10
    if blocking is None:
        shared = (1 - 0.4**10) / 2  # a compound of squared length 2 learns twice as fast
        residue = 0.7**10 * (1 - 0.4**10) / 2  # what A left to be predicted
        assert found["blocking"] == pytest.approx((shared - residue) / learned)
        assert found["overshadowing"] == pytest.approx((learned - shared) / learned)
    else:
        assert found["blocking"] == pytest.approx(blocking, abs=1e-12)
        assert found["overshadowing"] == pytest.approx(overshadowing, abs=1e-12)


def test_the_battery_has_every_rule_and_seed():
    found = chapter.battery([3, 4], width=8)
    assert found.groupby("rule").seed.apply(sorted).tolist() == [[3, 4]] * len(RULES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chapter.Delta(0.0), "rate=0.0 must lie above 0"),
        (lambda: chapter.Hebb(1.5), "rate=1.5 must lie above 0 and be at most 1"),
        (lambda: chapter.TraceDecay(0.3, 1.2), "keep=1.2 must lie between 0 and 1"),
        (lambda: chapter.BCM(0.3, -0.1), "span=-0.1 must lie between 0 and 1"),
        (lambda: chapter.learn(chapter.Hebb(), torch.zeros(1, 0, 4), torch.zeros(1, 0, 1)), "k: shape"),
        (lambda: chapter.learn(chapter.Hebb(), torch.zeros(1, 3, 4), torch.zeros(1, 2, 1)), "v: .* every cue needs"),
        (lambda: chapter.learn(chapter.Hebb(), torch.full((1, 1, 4), torch.nan), torch.zeros(1, 1, 1)), "k: holds NaN"),
        (
            lambda: chapter.learn(chapter.Oja(0.3), torch.ones(1, 1, 4), torch.full((1, 1, 1), 3.0)),
            "Oja's rule diverge",
        ),
        (lambda: chapter.cue_vectors(0, width=2), "width=2 holds no 3 independent cues"),
        (
            lambda: chapter.cue_vectors(0, similarity=0.5),
            "similarity=0.5 must lie between -1 and 1, and needs seed=None",
        ),
        (lambda: chapter.present([Phase("A", 1.0, -1)], chapter.cue_vectors()), "trials=-1 of phase 'A'"),
        (lambda: chapter.present([Phase("AD", 1.0, 1)], chapter.cue_vectors()), r"cues: \['D'\]"),
        (lambda: chapter.present([], chapter.cue_vectors()), "phases: no trial at all"),
    ],
)
def test_what_cannot_be_run_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
