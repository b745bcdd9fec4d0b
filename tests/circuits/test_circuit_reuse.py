"""The experiment of the chapter on tiny models: data, controls, roles, repair, the paper's own set-up."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.circuits import (
    HookedLM,
    Node,
    accuracy,
    activation_patch,
    attention_to,
    attribution_patch,
    choice_accuracy,
    circuit_reuse,
    direct_logit_attribution,
    force_pattern,
    log_odds,
    tasks,
    uniform_over,
)
from attnlab.circuits.circuit_reuse import Repair, _role
from attnlab.models.pretrained import tiny_gpt2


@pytest.fixture(scope="module")
def data(toy_digits):
    return circuit_reuse.three_tasks(toy_digits, n=2, seeds=(0, 1))


@pytest.fixture(scope="module")
def gpt2_medium_shape(toy_digits):
    """A random GPT-2 with the layers and heads of GPT-2 Medium and one number a head."""
    bridge = tiny_gpt2(n_layers=24, n_heads=16, d_model=16, vocab=len(toy_digits))
    bridge._tokenizer = toy_digits  # its setter would reload the tokenizer with a BOS
    return HookedLM(bridge)


# ------------------------------------------------------------------------------------------------------------- data


def test_pooled_data_are_the_seeds_one_after_the_other(toy_digits):
    pooled = circuit_reuse.pooled(tasks.ioi, toy_digits, 3, (5, 7), corruption="abc")
    parts = [tasks.ioi(toy_digits, 3, seed, corruption="abc").pairs for seed in (5, 7)]
    assert pooled.pairs == parts[0] + parts[1]
    assert pooled.name == "ioi-abc"
    assert pooled.pairs[3] == parts[1][0]


def test_three_tasks(data, toy_years):
    assert {name: (pairs.name, len(pairs)) for name, pairs in data.items()} == {
        "IOI": ("ioi-flip", 4),
        "Colored Objects": ("colored-objects", 4),
        "Greater-than": ("greater-than-digit", 4),
    }
    years = circuit_reuse.three_tasks(toy_years, n=1, seeds=(0,), year_form="year")
    assert years["Greater-than"].name == "greater-than-year"


def test_maps_hold_every_head_of_every_task(toy_lm, data):
    maps = circuit_reuse.attribution_maps(toy_lm, data)
    assert list(maps) == list(data)
    for name, scores in maps.items():
        assert np.isfinite(scores.grid()).all()
        assert scores.made["data_hash"] == data[name].digest
        expected = attribution_patch(toy_lm, data[name], metric=log_odds)
        np.testing.assert_array_equal(scores.effect, expected.effect)


# ------------------------------------------------------------------------------------------------------------ roles


@pytest.mark.parametrize(
    ("to", "writes", "role"),
    [
        ({"IO": 0.7, "S1": 0.1, "S2": 0.1}, 0.5, "mover"),
        ({"IO": 0.7, "S1": 0.1, "S2": 0.1}, -0.5, "negative mover"),
        ({"IO": 0.7, "S1": 0.1, "S2": 0.1}, 0.05, "attends to IO"),
        ({"IO": 0.7, "S1": 0.1, "S2": 0.1}, -0.05, "attends to IO"),
        ({"IO": 0.1, "S1": 0.1, "S2": 0.6}, 0.5, "demotes S"),
        ({"IO": 0.1, "S1": 0.1, "S2": 0.6}, -0.5, "promotes S"),
        ({"IO": 0.1, "S1": 0.1, "S2": 0.6}, 0.05, "inhibition-like"),
        ({"IO": 0.1, "S1": 0.6, "S2": 0.1}, 0.5, "attends to S1"),
        ({"IO": 0.2, "S1": 0.2, "S2": 0.24}, 0.5, "attends elsewhere"),
        ({"IO": 0.25, "S1": 0.2, "S2": 0.2}, 0.5, "mover"),
    ],
)
def test_roles_follow_from_attention_and_direct_effect(to, writes, role):
    """The largest direct effect of all heads is 1, so a tenth of it is 0.1."""
    assert _role(to, writes, 1.0) == role
    assert _role(to, 30 * writes, 30.0) == role  # the unit does not matter


def test_head_roles_gathers_the_single_measurements(toy_lm, data):
    pairs, heads = data["IOI"], [Node(0, 3), Node(2, 5), Node(1, 0)]
    exact, direct = activation_patch(toy_lm, pairs), direct_logit_attribution(toy_lm, pairs)
    attends = attention_to(toy_lm, pairs, heads, ["IO", "S1", "S2"])
    table = circuit_reuse.head_roles(exact, direct, attends, heads)
    assert table["head"].tolist() == [str(head) for head in heads]
    writes = direct.mean(-1)
    for node, row in zip(heads, table.to_dict("records"), strict=True):
        to = {name: attends[node][name].mean() for name in ("IO", "S1", "S2")}
        assert row["exact effect"] == exact.of(node)
        assert row["direct effect"] == writes[node]
        assert {name: row[name] for name in to} == pytest.approx(to)
        assert row["role"] == _role(to, writes[node], np.abs(writes).max())


def test_the_plain_way_of_the_chapter_equals_the_restarted_one(toy_lm, data):
    for name in ("IOI", "Colored Objects"):
        heads = ["0.3", "2.5", "1.0"]
        naive = circuit_reuse.naive_end_patch(toy_lm, data[name], heads)
        np.testing.assert_allclose(activation_patch(toy_lm, data[name], heads).effect, naive, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- repair


def test_repair_is_pattern_surgery_onto_the_wrong_colours(toy_lm, toy_digits):
    pairs = tasks.colored_objects(toy_digits, 12)
    groups = {"some": ["1.2", "2.0"], "same, right colour": ["1.2", "2.0"]}
    outcome = circuit_reuse.repair(toy_lm, pairs, groups, {"same, right colour": "right"})
    assert list(outcome.names) == ["untouched", *groups]
    for row, (group, name) in enumerate([((), "wrong"), (groups["some"], "wrong"), (groups["some"], "right")]):
        choice, open_ = force_pattern(toy_lm, pairs, [group], uniform_over(name), metrics=(choice_accuracy, accuracy))
        np.testing.assert_array_equal(outcome.choice[row], choice[0])
        np.testing.assert_array_equal(outcome.open[row], open_[0])


def test_kinds_of_answers_are_counted_by_hand(toy_lm, toy_digits):
    pairs = tasks.colored_objects(toy_digits, 12)
    groups = {"untouched": (), "some": ("1.2", "2.0")}
    table = circuit_reuse.answer_kinds(toy_lm, pairs, groups)
    open_ = force_pattern(toy_lm, pairs, list(groups.values()), uniform_over("wrong"), metrics=(accuracy,))[0]
    np.testing.assert_allclose(table["right"], 100 * open_.mean(1))
    np.testing.assert_allclose(table.sum(axis=1), 100)
    assert (table.loc["untouched"] == circuit_reuse.answer_kinds(toy_lm, pairs, {"again": ()}).loc["again"]).all()


def test_gains_are_points_over_the_untouched_model():
    choice = np.array([[0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=float)
    outcome = Repair(["untouched", "a", "b"], choice, choice[[2, 2, 1]])
    np.testing.assert_allclose(outcome.gains([0, 1, 2]), [0, 50, -25])
    np.testing.assert_allclose(outcome.gains([0, 1, 2], over="vocabulary"), [0, 0, 75])
    assert outcome.gain(2, over="vocabulary")[0] == 75
    with pytest.raises(ValueError, match="over='all' is unknown"):
        outcome.gain(1, over="all")
    for row, gain in ((1, 50), (2, -25)):
        value, (low, high) = outcome.gain(row)
        assert value == gain
        assert -100 <= low <= gain <= high <= 100
        assert low < high
        assert outcome.gain(row) == (value, (low, high))
    assert outcome.gain(0) == (0, (0, 0))


def test_random_groups_are_a_control():
    model = type("Shape", (), {"spec": circuit_reuse_spec()})()
    heads = ["19.2", "19.4", "20.0", "23.3"]
    groups = circuit_reuse.random_groups(model, heads, n=20, seed=3)
    assert list(groups) == [f"random {i}" for i in range(20)]
    assert len({frozenset(group) for group in groups.values()}) == 20
    for group in groups.values():
        assert sorted(Node.parse(head).layer for head in group) == [19, 19, 20, 23]
        assert len(set(group)) == 4
        assert not set(group) & set(heads)
    assert groups == circuit_reuse.random_groups(model, heads, n=20, seed=3)
    assert groups != circuit_reuse.random_groups(model, heads, n=20, seed=4)


def circuit_reuse_spec():
    from attnlab.circuits import Spec

    return Spec("SmolLM2's shape", n_layers=30, n_heads=9, n_kv_heads=3, d_model=576, d_head=64)


def test_random_groups_may_use_up_all_there_are(lm):
    groups = circuit_reuse.random_groups(lm, ["1.2"], n=5)
    assert {head for (head,) in groups.values()} == {"1.0", "1.1", "1.3", "1.4", "1.5"}


@pytest.mark.parametrize(
    ("heads", "n"),
    [(["1.2"], 6), ([f"1.{h}" for h in range(5)], 1), ([f"1.{h}" for h in range(6)], 1)],
)
def test_more_random_groups_than_there_are_is_refused(lm, heads, n):
    with pytest.raises(ValueError, match=rf"n={n} different random groups were not found in layers \[1\]"):
        circuit_reuse.random_groups(lm, heads, n=n)


def test_random_groups_refuse_an_unknown_head(lm):
    with pytest.raises(ValueError, match=r"node 31\.0 does not exist"):
        circuit_reuse.random_groups(lm, ["31.0"])


# ------------------------------------------------------------------------------------------------ the paper's own


def test_another_size_than_gpt2_medium_is_refused(lm):
    with pytest.raises(ValueError, match="tiny has 3 x 6 heads; the paper's are 24 x 16"):
        circuit_reuse.gpt2_medium_repair(lm)


def test_the_papers_experiment_runs_on_its_shape(gpt2_medium_shape, toy_digits):
    table = circuit_reuse.gpt2_medium_repair(gpt2_medium_shape, n=6, seed=1)
    assert table["condition"].tolist() == list(circuit_reuse.GPT2_MEDIUM_ACCURACY)
    assert table["paper"].tolist() == [49.6, 78.1, 81.5, 93.7]
    assert table[["accuracy", "three-way"]].stack().between(0, 100).all()
    pairs = tasks.colored_objects(toy_digits, 6, 1)
    heads = ["12.3", "13.4", "13.13", "19.1"]
    choice, open_ = force_pattern(
        gpt2_medium_shape, pairs, [(), heads], uniform_over("wrong"), metrics=(choice_accuracy, accuracy)
    )
    assert table["three-way"].iloc[[0, 3]].tolist() == pytest.approx((100 * choice.mean(1)).tolist())
    assert table["accuracy"].iloc[[0, 3]].tolist() == pytest.approx((100 * open_.mean(1)).tolist())


def test_the_papers_heads_exist_in_its_shape(gpt2_medium_shape):
    listed = [gpt2_medium_shape.spec.check(h) for group in circuit_reuse.GPT2_MEDIUM_HEADS.values() for h in group]
    assert len(set(listed)) == len(listed)
    spec = circuit_reuse_spec()
    assert all(spec.check(head) for head in circuit_reuse.SMOLLM2_S2_HEADS)
