"""Work in steps gives what the whole functions give, to the bit, however often it is stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import Graph, activation_patch, attribution_patch, eap, sparsity_curve, ungrouped
from attnlab.circuits.faithfulness import completeness, faithfulness
from attnlab.circuits.work import EdgeWork, EvaluationWork, HeadWork, head_circuit


@pytest.fixture(scope="module")
def wide(lm):
    return ungrouped(lm)


@pytest.fixture(scope="module")
def five(make_pairs):
    return make_pairs(lengths=(7, 7, 6, 7, 6), seed=4)


def works(lm, wide, five):
    graph = Graph.top_n(eap(wide, five), 40)
    return {
        "edges": lambda: EdgeWork(wide, five, steps=3, batch_size=2),
        "heads": lambda: HeadWork(lm, five, batch_size=2),
        "patch": lambda: HeadWork(lm, five, "patch", batch_size=2),
        "evaluation": lambda: EvaluationWork(wide, graph, eap(wide, five), five, batch_size=2),
        "evaluation of heads": lambda: EvaluationWork(wide, graph, attribution_patch(lm, five), five, batch_size=2),
    }


def numbers(work):
    """What comes out of a work, as one array."""
    result = work.result()
    if isinstance(work, EdgeWork):
        return result.values.numpy()
    if isinstance(work, HeadWork):
        return np.concatenate([result.effect.ravel(), result.gap, result.base])
    return work.values


KINDS = ["edges", "heads", "patch", "evaluation", "evaluation of heads"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_work_goes_on_to_the_same_bits(lm, wide, five, kind, monkeypatch):
    monkeypatch.setattr("attnlab.circuits.work.TOKENS_A_STEP", 60)  # several sweeps a batch
    make = works(lm, wide, five)[kind]
    straight = make()
    straight.finish()
    assert straight.done == straight.total
    for stop in range(1, straight.total):
        first = make()
        for done in first.steps():
            if done == stop:
                break
        second = make()
        second.restore(first.state())
        assert second.done <= stop
        second.finish()
        np.testing.assert_array_equal(numbers(second), numbers(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_counted_and_a_half_result_is_refused(lm, wide, five, kind):
    work = works(lm, wide, five)[kind]()
    with pytest.raises(ValueError, match=rf"has done 0 of {work.total} steps"):
        work.result()
    assert list(work.steps()) == list(range(1, work.total + 1))


def test_a_state_is_a_copy(lm, five):
    work = HeadWork(lm, five, batch_size=2)
    steps = work.steps()
    next(steps)
    before = {key: value.copy() for key, value in work.state().items()}
    kept = work.state()
    list(steps)
    for key, value in before.items():
        np.testing.assert_array_equal(kept[key], value)


def test_results_are_those_of_the_whole_functions(lm, wide, five):
    edges = EdgeWork(wide, five, steps=3, batch_size=8).finish()
    assert torch.equal(edges.values, eap(wide, five, steps=3).values)
    assert edges.info == eap(wide, five, steps=3).info
    heads = HeadWork(lm, five).finish()
    assert np.array_equal(heads.effect, attribution_patch(lm, five).effect)
    assert heads.made == attribution_patch(lm, five).made
    exact = HeadWork(lm, five, "patch", heads=["0.1", "2.3"]).finish()
    np.testing.assert_allclose(exact.effect, activation_patch(lm, five, ["0.1", "2.3"]).effect, atol=1e-12)
    graph = Graph.top_n(edges, 40)
    found = EvaluationWork(wide, graph, edges, five, batch_size=16).finish()
    assert found.faithfulness.ratio_of_means == faithfulness(wide, graph, five).ratio_of_means
    assert found.completeness == completeness(wide, graph, five)
    whole = sparsity_curve(wide, edges, five)
    np.testing.assert_array_equal(found.curve.frame.ratio_of_means, whole.frame.ratio_of_means)
    assert found.curve.cpr == whole.cpr


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations(wide, five, ablation):
    edges = eap(wide, five)
    graph = Graph.top_n(edges, 40)
    found = EvaluationWork(wide, graph, edges, five, ablation=ablation, batch_size=16).finish()
    assert found.faithfulness.ratio_of_means == faithfulness(wide, graph, five, ablation=ablation).ratio_of_means


def test_the_curve_over_heads_ends_at_the_whole_model(lm, wide, five):
    scores = attribution_patch(lm, five)
    found = EvaluationWork(wide, head_circuit(wide, scores, 2), scores, five).finish()
    assert list(found.curve.frame.n_heads)[-1] == len(lm.spec.heads)
    assert found.curve.frame.ratio_of_means.iloc[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "magic"}, "method='magic' is unknown; use 'attribution' or 'patch'"),
        ({"heads": ["0.1"]}, "heads cannot be chosen for attribution"),
        ({"method": "patch", "heads": []}, "heads is empty"),
        ({"method": "patch", "heads": ["9.9"]}, "does not exist"),
        ({"batch_size": 0}, "batch_size=0 takes no pair"),
    ],
)
def test_bad_arguments(lm, five, how, message):
    with pytest.raises(ValueError, match=message):
        HeadWork(lm, five, **how)


def test_the_model_is_free_between_two_steps(lm, wide, five):
    """Another run in between changes nothing: no hook is left on the model."""
    graph = Graph.top_n(eap(wide, five), 40)
    straight = EvaluationWork(wide, graph, eap(wide, five), five, batch_size=2)
    straight.finish()
    disturbed = EvaluationWork(wide, graph, eap(wide, five), five, batch_size=2)
    for _ in disturbed.steps():
        attribution_patch(wide, five)
    np.testing.assert_array_equal(disturbed.values, straight.values)
