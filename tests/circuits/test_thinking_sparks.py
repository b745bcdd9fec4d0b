"""Oracles of ``attnlab.circuits.thinking_sparks``."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from attnlab.circuits import thinking_sparks as ts
from attnlab.circuits.eap import eap
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.graph import Graph
from attnlab.circuits.model import HookedLM
from attnlab.circuits.post_training import Checkpoint
from attnlab.data import chains
from attnlab.models.word_model import WordModel


@pytest.fixture(scope="module")
def model() -> WordModel:
    return WordModel(chains.WORDS, n_layers=2, n_heads=2, d_model=12, d_mlp=16, context=14, init_std=0.3, seed=3)


@pytest.fixture(scope="module")
def hooked(model: WordModel) -> HookedLM:
    return HookedLM(model.bridge())


@pytest.fixture(scope="module")
def pairs(hooked: HookedLM):
    return ts.step_pairs(hooked.tokenizer, 3, seed=1)


def random_scores(wiring: Wiring, seed: int = 0) -> EdgeScores:
    values = torch.randn(wiring.n_src, wiring.n_dst, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return EdgeScores(wiring, values * wiring.valid)


def shares(*rows: list[float]) -> np.ndarray:
    """Checkpoints of one layer of heads."""
    return np.array(rows)[:, None]


# ------------------------------------------------------------------------------------------------ importance


def test_importance_is_the_flow_out_of_a_head_and_sums_to_one():
    wiring = Wiring(3, 5)
    scores = random_scores(wiring)
    circuit = Graph.top_n(scores, 61).prune()
    found = ts.head_importance(scores, circuit)
    assert found.shape == (3, 5)
    assert found.sum() == pytest.approx(1, abs=1e-14)
    edges = scores.to_frame()
    edges = edges[edges.edge.isin(circuit.edges()) & edges.source.str.startswith("a")]
    flow = edges.score.abs().groupby(edges.source).sum()
    expected = [[flow.get(f"a{layer}.h{head}", 0.0) for head in range(5)] for layer in range(3)]
    np.testing.assert_allclose(found, np.array(expected) / flow.sum(), rtol=1e-12)


def test_importance_refuses_another_model_and_an_empty_circuit():
    scores = random_scores(Wiring(2, 3))
    with pytest.raises(ValueError, match="wired as"):
        ts.head_importance(scores, Graph.full(Wiring(2, 4)))
    with pytest.raises(ValueError, match="through no head"):
        ts.head_importance(scores, Graph.empty(scores.wiring))


def test_shares_of_a_model_do_not_depend_on_signs(hooked: HookedLM, pairs):
    found = ts.head_shares(hooked, pairs, top_share=0.5)
    assert found.shape == (2, 2)
    assert found.sum() == pytest.approx(1)
    scores = eap(hooked, pairs, steps=ts.IG_STEPS, total="absolute")  # other batches
    np.testing.assert_allclose(found, ts.head_importance(scores, Graph.top_n(scores, 23).prune()), atol=1e-6)


# ------------------------------------------------------------------------------------------------ effect and sets


def test_effect_lies_between_one_and_minus_one_and_is_antisymmetric():
    rng = np.random.default_rng(0)
    post, pre = rng.exponential(size=(2, 7, 9))
    post[0, 0], pre[0, 1] = 0, 0
    found = ts.effect(post, pre)
    assert (np.abs(found) < 1).all()
    np.testing.assert_array_equal(found, -ts.effect(pre, post))
    assert found[0, 0] == pytest.approx(-1, abs=1e-4)
    assert found[0, 1] == pytest.approx(1, abs=1e-4)


def test_effect_of_identical_models_is_zero_and_blind_to_size():
    pre = np.array([0.02, 0.002, 0.0])
    assert (ts.effect(pre, pre) == 0).all()
    assert ts.effect(3 * pre[:2], pre[:2]) == pytest.approx([0.5, 0.5], abs=1e-3)


def test_effect_refuses_signed_scores_and_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        ts.effect(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="not signed scores"):
        ts.effect(np.array([-0.1]), np.array([0.1]))


def test_a_head_is_emergent_if_the_base_lacks_it():
    pre, post = np.array([0.04, 0.01, 0.03, 0.0]), np.array([0.01, 0.03, 0.04, 0.029])
    assert ts.emergent(post, pre).tolist() == [False, True, False, False]
    assert ts.emergent(pre, post).tolist() == [True, False, False, False]
    assert not ts.emergent(pre, pre).any()
    assert ts.noise_floor(pre, post) == ts.noise_floor(post, pre) == 1.0
    assert ts.noise_floor(pre, pre) == 0
    with pytest.raises(ValueError, match="no share"):
        ts.emergent(post, pre, tau=0)


def test_churn_counts_both_ways():
    run = shares([0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0])
    assert ts.churn(run).tolist() == [2, 0]


def test_retention_looks_at_heads_of_the_first_half():
    # head 0: of the base; 1: comes early and stays; 2: comes early and goes; 3: comes late
    run = shares([1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1])
    assert ts.retention(run) == (1, 2)
    assert ts.retention(run[:, :, :1]) == (0, 0)


def test_cohorts_add_up_to_the_circuit():
    run = shares([1, 0, 0], [1, 1, 0], [0, 1, 1])
    frame = ts.cohorts(run, [0, 10, 20])
    assert frame.to_dict("list") == {
        "updates": [0, 10, 10, 20, 20],
        "first": [0, 0, 10, 10, 20],
        "heads": [1, 1, 1, 1, 1],
    }


# ------------------------------------------------------------------------------------------------ pass@k


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (4, 2), (6, 1), (6, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, correct: int):
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        right = sum(any(sample < correct for sample in subset) for subset in subsets)
        assert ts.pass_at_k(n, correct, k) == pytest.approx(right / len(subsets))


def test_pass_at_k_at_its_ends():
    assert ts.pass_at_k(8, 1, 8) == 1
    assert ts.pass_at_k(8, 0, 8) == 0
    with pytest.raises(ValueError, match="k=9"):
        ts.pass_at_k(8, 1, 9)
    with pytest.raises(ValueError, match="correct=9"):
        ts.pass_at_k(8, 9, 1)


# ------------------------------------------------------------------------------------------------ prompts


def test_pairs_differ_in_one_operand_and_ask_for_the_digit_that_it_changes(hooked: HookedLM):
    pairs = ts.step_pairs(hooked.tokenizer, 5, seed=0)
    assert len(pairs) == 15
    for pair in pairs.pairs:
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        changed = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        step = (len(clean) - 8) // 2
        assert changed == [2 * (step + 1)]
        for words, digit in ((clean, pair.answers[0]), (corrupt, pair.foils[0])):
            operands = [int(word) for word in words[0:7:2]]
            assert int(digit) == sum(operands[: step + 2]) % 10
        assert clean[8:] == [w for k in range(step) for w in (str(sum(map(int, clean[0 : 2 * k + 3 : 2])) % 10), ";")]


def test_samples_of_prompts_are_seeded_and_differ(hooked: HookedLM):
    first, again, other = (ts.step_pairs(hooked.tokenizer, 4, seed).digest for seed in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------------------------------ a run


def test_a_timeline_starts_at_the_base_and_survives_json(model: WordModel, pairs):
    run = [Checkpoint(0, model, float("nan")), Checkpoint(10, model, 0.25)]
    seen = []
    line = ts.timeline("GRPO", run, pairs, chains.sums(np.random.default_rng(0), 9), lambda at, _: seen.append(at))
    assert seen == line.updates == [0, 10]
    np.testing.assert_array_equal(line.shares[0], line.shares[1])
    assert line.kl.tolist() == line.distance.tolist() == [0, 0]
    back = ts.Timeline.of(line.row())
    np.testing.assert_allclose(back.shares, line.shares, atol=1e-5)
    assert np.isnan(back.reward[0])
    assert back.reward[1] == 0.25
    assert back.method == "GRPO"
