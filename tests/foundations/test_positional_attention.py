"""Weights that look and weights that do not, networks set by hand, and what the record computes from rows."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from attnlab.foundations import positional_attention as chapter
from attnlab.foundations import positional_attention_runs as runs
from attnlab.foundations import positional_handmade as handmade
from attnlab.models.training import seeded


def build(name="positional", length=5, **sizes):
    return seeded(lambda: chapter.build(name, length, **({"width": 12, "hidden": 10} | sizes)), 0).double()


def lists(batch=3, length=5, seed=1):
    return torch.randn(batch, length, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    "name", ["positional", "standard", "standard, P in every layer", "positional, P at the input", "uniform"]
)
def test_only_weights_that_look_change_with_the_data(name):
    network = build(name)
    _, one = network.run(lists(seed=1))
    _, two = network.run(lists(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) != chapter.MODELS[name].looks
    for a in one:
        assert a.shape[-3:] == (2, 6, 6)
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))


def test_positional_weights_have_no_gradient_with_respect_to_the_data():
    x = lists().requires_grad_()
    assert not any(a.requires_grad for a in build().requires_grad_(False).run(x)[1])
    assert all(a.requires_grad for a in build("standard").requires_grad_(False).run(x)[1])


@pytest.mark.parametrize("name", chapter.MODELS)
def test_a_batch_is_its_lists_one_by_one(name):
    network, x = build(name), lists()
    torch.testing.assert_close(network(x), torch.stack([network(one[None])[0] for one in x]), rtol=0, atol=1e-12)


def by_hand(network, x):
    """One list [n, 1] through loops over layers, heads and nodes."""
    nodes = torch.cat([x, torch.zeros(1, 1, dtype=x.dtype)])
    if network.told:
        nodes = torch.cat([nodes, network.position], dim=1)
    state = nodes @ network.encode.weight.T + network.encode.bias
    for layer in network.layers:
        source = network.position if isinstance(layer.weights, chapter.Positional) else state
        width, per_head = source.shape[1], state.shape[1] // 2
        qk = source @ layer.weights.qk.weight.T + layer.weights.qk.bias
        v = state @ layer.v.weight.T + layer.v.bias
        heard = torch.empty_like(state)
        for head, i in itertools.product(range(2), range(len(nodes))):
            mine = qk[:, 2 * width * head : 2 * width * (head + 1)]
            scores = torch.stack([mine[i, :width] @ mine[j, width:] for j in range(len(nodes))]) / width**0.5
            columns = slice(per_head * head, per_head * (head + 1))
            heard[i, columns] = scores.softmax(0) @ v[:, columns]
        heard = heard @ layer.o.weight.T + layer.o.bias
        state = layer.mlp(torch.cat([heard, state], dim=1))
    return (state @ network.decode.weight.T + network.decode.bias)[:-1]


@pytest.mark.parametrize("name", ["positional", "standard"])
def test_the_network_is_its_definition(name):
    network, x = build(name), lists(1)
    torch.testing.assert_close(network(x)[0], by_hand(network, x[0]), rtol=0, atol=1e-12)


def test_given_weights_replace_those_of_the_network():
    network, x = build("standard"), lists()
    outputs, weights = network.run(x)
    torch.testing.assert_close(network.run(x, given=weights)[0], outputs, rtol=0, atol=0)
    assert not torch.allclose(network.run(x, given=[a.roll(1, 0) for a in weights])[0], outputs)


def test_places_are_known_by_position_alone():
    network, x = build(), lists()
    order = [3, 0, 4, 1, 2]
    moved = build()
    moved.position.copy_(network.position[[*order, 5]])  # the scratch node stays the last
    torch.testing.assert_close(moved(x[:, order]), network(x)[:, order], rtol=0, atol=1e-12)
    assert not torch.allclose(network(x[:, order]), network(x)[:, order])


def test_sizes_are_those_of_the_official_code():
    network = chapter.build("positional", 8, width=64, heads=2, layers=4, hidden=64)
    nodes = 9
    qk = sum(p.numel() for p in network.layers[0].weights.parameters())
    assert qk == nodes * 2 * nodes * 2 + 2 * nodes * 2
    assert network.encode.in_features == 1
    standard = chapter.build("standard", 8)
    assert standard.encode.in_features == 1 + nodes
    assert standard.layers[0].weights.qk.out_features == 2 * 64 * 2


def test_the_rescaled_model_scales():
    network, x = build("standard, rescaled"), lists()
    torch.testing.assert_close(network(50 * x), 50 * network(x))
    zeros = torch.zeros(1, 5, 1, dtype=torch.float64)
    assert torch.isfinite(network(zeros)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build()(lists(length=4)), "x: lists of 5 places with 1 numbers each are wanted"),
        (lambda: chapter.build("sideways", 3), "name: 'sideways' is unknown; choose one of positional"),
        (lambda: build(length=0), "length: at least 1 is wanted, not 0"),
        (lambda: build(width=7), "width: 7 cannot be shared by 2 heads"),
    ],
)
def test_what_cannot_be_built_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------- set by hand


def test_any_row_stochastic_matrix_is_within_reach():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64).softmax(-1)
    weights = chapter.Positional(4, 6, 2).double()
    handmade.set_weights(weights, wanted)
    found = weights(torch.zeros(1), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="each row with the sum 1"):
        handmade.set_weights(weights, 2 * wanted)
    with pytest.raises(ValueError, match=r"shape \[2, 6, 6\] is wanted, not \[6, 6\]"):
        handmade.set_weights(weights, wanted[0])


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_minimum_and_sum_are_exact_at_any_scale(length, c):
    x = c * lists(9, length)
    torch.testing.assert_close(handmade.prefix_min(length)(x), x.cummin(1).values, rtol=0, atol=1e-14 * c)
    torch.testing.assert_close(handmade.cumulative_sum(length)(x), x.cumsum(1), rtol=0, atol=1e-13 * c)


def test_the_minimum_takes_logarithmically_many_layers():
    assert [len(handmade.prefix_min(n).layers) for n in (1, 2, 3, 8, 9)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [2, 4, 8])
def test_zeros_and_ones_are_sorted_and_so_is_everything(length):
    binary = torch.tensor(list(itertools.product((0.0, 1.0), repeat=length)), dtype=torch.float64)[..., None]
    network = handmade.sorting(length)
    assert torch.equal(network(binary), binary.sort(1).values)
    x = 1e3 * lists(20, length)
    torch.testing.assert_close(network(x), x.sort(1).values, rtol=0, atol=1e-11)


def test_a_network_without_its_last_stage_does_not_sort():
    binary = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)[..., None]
    network = handmade.sorting(8, handmade.odd_even_merge(8)[:-1])
    assert not torch.equal(network(binary), binary.sort(1).values)


def test_stages_touch_every_place_at_most_once():
    for n in (2, 4, 8, 16):
        stages = handmade.odd_even_merge(n)
        depth = n.bit_length() - 1
        assert len(stages) == depth * (depth + 1) // 2
        assert all(len({place for pair in stage for place in pair}) == 2 * len(stage) for stage in stages)
    with pytest.raises(ValueError, match="length: a power of two from 2 on is wanted, not 6"):
        handmade.odd_even_merge(6)


@pytest.mark.parametrize("algorithm", handmade.ALGORITHMS)
def test_rounds_end_with_the_result_and_wires_explain_them(algorithm):
    x = lists(1, 8)[0, :, 0]
    held = handmade.rounds(algorithm, x)
    wanted = {"running minimum": x.cummin(0).values, "running sum": x.cumsum(0), "sorting": x.sort().values}[algorithm]
    torch.testing.assert_close(held[-1], wanted)
    stages = handmade.wires(algorithm, 8)
    assert len(stages) == len(held) - 1
    for stage in stages:
        assert {(place, place) for place in range(8)} <= set(stage)
    with pytest.raises(ValueError, match="algorithm: 'bubble' is unknown"):
        handmade.rounds("bubble", x)
    with pytest.raises(ValueError, match="x: 1 of 8 numbers are NaN or infinite; leave such lists out"):
        handmade.rounds(algorithm, torch.where(torch.arange(8) == 3, torch.nan, x))
    with pytest.raises(ValueError, match=r"x: one list \[n\] is wanted, not shape \[1, 8\]"):
        handmade.rounds(algorithm, x[None])


@pytest.mark.parametrize("build", [handmade.prefix_min, handmade.cumulative_sum])
def test_no_place_is_no_network(build):
    with pytest.raises(ValueError, match="length: at least one place is wanted, not 0"):
        build(0)


# ------------------------------------------------------------------------------------------------------- the experiments


def rows(errors, seeds=(0, 1)):
    return [
        {"model": model, "seed": seed, "scale": scale, "mse": mse * (1 + seed), "relative": mse * (1 + seed) / scale**2}
        for model, by_scale in errors.items()
        for scale, mse in zip(runs.SCALES, by_scale, strict=True)
        for seed in seeds
    ]


def test_ratios_are_of_the_same_seed():
    found = rows(
        {"positional": [1e-3, 1, 1, 1, 1], "standard": [1e-4, 1, 4, 9, 25], "standard, rescaled": [1, 1, 1, 1, 0.5]}
    )
    numbers = runs.extrapolates(found)
    assert numbers["value"] == pytest.approx(25)
    assert numbers["interval"] == pytest.approx((25, 25))
    assert numbers["controls"] == pytest.approx({"at5": 9, "at3": 4, "in_range": 1e-3 * 2**0.5})
    told = rows({"positional, P at the input": [1, 1, 1, 1, 5], "standard": [1, 1, 1, 1, 25]})
    assert runs.positions_at_input(told)["value"] == pytest.approx(5)
    assert runs.rescaling(found)["value"] == pytest.approx(math.log10(0.5))
    assert runs.beyond_scaling(found)["value"] == pytest.approx(10)
    assert runs.data_routing(found, found)["value"] == pytest.approx(10)
    assert runs.table(found).loc["standard", 10] == pytest.approx(25 * 2**0.5)


def test_spread_is_geometric():
    assert runs.spread([1, 100]) == (pytest.approx(10), (1, 100))


def test_seeds_stacked_are_seeds_alone():
    setting = runs.Setting(steps=4, batch=8, width=8, warmup=1, samples=32, tests=8)
    together = setting.train("cumulative min", "standard", (0, 1), "cpu")
    other = setting.train("cumulative min", "standard", (0,), "cpu")
    for ours, alone in zip(together.networks[0].parameters(), other.networks[0].parameters(), strict=True):
        torch.testing.assert_close(ours, alone, rtol=0, atol=5e-3)  # Adam's epsilon against gradients near zero


def test_surgery_changes_nothing_within_the_range():
    setting = runs.Setting(steps=2, batch=8, width=8, warmup=1, samples=32, tests=16)
    found = runs.surgery(setting.train("sort", "standard", (0,), "cpu"), setting, scales=(1, 10))
    assert found.small[0] == pytest.approx(found.own[0], rel=1e-6)
    assert found.small[1] != pytest.approx(found.own[1], rel=1e-6)
    assert runs.weights_drift(found)["controls"]["other"][0] > 0


def test_tests_reach_further_and_are_the_same_for_all():
    setting = runs.Setting()
    assert np.abs(setting.test("sort", 1).inputs).max() <= 2
    far = setting.test("sort", 10).inputs
    assert 10 < np.abs(far).max() <= 20
    assert (far == setting.test("sort", 10).inputs).all()
    assert setting.test(runs.LOOKUP, 3).inputs.shape == (1000, 4, 5)


def test_the_command_writes_a_record_and_resumes(tmp_path, capsys):
    path = tmp_path / "positional-attention.json"
    runs.main(["--record", str(path), "--tiny"])
    first = json.loads(path.read_text())
    judged = {row["claim"] for row in first["rows"] if "claim" in row}
    assert len(judged) == 8
    assert len(pd.DataFrame([row for row in first["rows"] if "claim" not in row]).groupby(["task", "model"])) == 16
    capsys.readouterr()
    runs.main(["--record", str(path), "--tiny", "--resume"])
    assert capsys.readouterr().out == ""
