"""Resample curves equal the evaluation by edges; the published circuits are scored on their model's shape only."""

from __future__ import annotations

import pytest

from attnlab.circuits import HookedLM
from attnlab.circuits.edges import Wiring
from attnlab.circuits.graph import Graph
from attnlab.circuits.sae_circuits_checks import head_curve, reference_rows
from attnlab.models.pretrained import tiny_gpt2


def test_keeping_heads_equals_masking_the_edges_of_the_others(gpt2, pairs):
    heads = gpt2.spec.heads
    order = [heads[i] for i in (7, 2, 11, 0, 5, 9, 1, 3, 4, 6, 8, 10)]
    curve = head_curve(gpt2, pairs, {"some": order}, [0, 3, 7, 12])
    wiring = Wiring.of(gpt2.spec)
    mlps = [f"m{layer}" for layer in range(3)]
    empty = faithfulness_of(gpt2, pairs, wiring, mlps)
    whole = faithfulness_of(gpt2, pairs, wiring, [*heads, *mlps])
    for row in curve.to_dict("records"):
        kept = faithfulness_of(gpt2, pairs, wiring, [*order[: row["kept"]], *mlps])
        assert row["faithfulness"] == pytest.approx((kept - empty) / (whole - empty), abs=1e-4)


def faithfulness_of(model, pairs, wiring, nodes) -> float:
    """Mean logit difference of the circuit of these nodes."""
    from attnlab.circuits.evaluate import evaluate

    return float(evaluate(model, Graph.of_nodes(wiring, nodes), pairs)["logit_diff"].mean())


def test_both_ends_are_exact(lm, pairs):
    curve = head_curve(lm, pairs, {"all": lm.spec.heads}, [0, 18])
    assert curve.faithfulness.tolist() == pytest.approx([0, 1], abs=1e-12)  # sums of copies and of one, in other order


def test_curves_refuse_what_is_no_ranking(lm, pairs):
    with pytest.raises(ValueError, match="ranking 'short' lists 17 heads; all 18 are wanted"):
        head_curve(lm, pairs, {"short": lm.spec.heads[1:]}, [1])
    with pytest.raises(ValueError, match="kept=19 must lie between 0 and 18"):
        head_curve(lm, pairs, {"all": lm.spec.heads}, [1, 19])


def test_published_circuits_are_scored_with_every_variant(toy_years):
    bridge = tiny_gpt2(n_layers=12, n_heads=12, d_model=24, vocab=len(toy_years))
    bridge._tokenizer = toy_years  # its setter would reload the tokenizer with a BOS
    rows = reference_rows(HookedLM(bridge), n=6, m=5, epochs=2)
    assert len(rows) == 2 * 2 * 3
    assert rows.auc.between(0, 1).all()
    assert set(rows.variant) == {"as first published", "sae-circuits", "authors' code"}


def test_another_size_than_gpt2_small_is_refused(lm):
    with pytest.raises(ValueError, match="tiny has 3 x 6 heads; the circuits' are 12 x 12"):
        reference_rows(lm)
