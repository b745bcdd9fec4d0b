"""Oracles of ``attnlab.foundations.random_features``: invariances, limits, the kernel, targets, and heads of a real shape."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

from attnlab import claims, records
from attnlab.claims.declaration import load
from attnlab.foundations import random_features as rf
from attnlab.foundations import random_features_heads as real
from attnlab.foundations import random_features_runs as runs
from attnlab.mixers import rotate
from attnlab.models import ridge


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=7, keys=3, d=5, heads=4, seed=0):
    draw = generator(seed)
    tokens = rf.draw_tokens(n, keys, d, draw)
    return tokens, rf.augment(tokens), rf.draw_heads(heads, d + 1, draw)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("weigh", ["relu", "softmax"])
def test_features_are_the_sum_over_keys_written_out(weigh):
    _, seen, W = problem()
    found = rf.attention_features(seen, W, weigh).unflatten(1, W.shape[:2])
    for n in range(len(seen)):
        for m in range(len(W)):
            s = torch.stack([seen[n, 0] @ W[m] @ key for key in seen[n, 1:]])
            weights = s.clamp(min=0) / len(s) if weigh == "relu" else s.softmax(0)
            torch.testing.assert_close(found[n, m], weights @ seen[n, 1:])


@pytest.mark.parametrize("weigh", ["relu", "softmax"])
def test_the_order_of_keys_does_not_count_and_the_query_is_no_key(weigh):
    _, seen, W = problem(keys=4)
    found = rf.attention_features(seen, W, weigh)
    torch.testing.assert_close(rf.attention_features(seen[:, [0, 3, 1, 4, 2]], W, weigh), found, rtol=0, atol=1e-12)
    assert (rf.attention_features(seen[:, [1, 0, 2, 3, 4]], W, weigh) - found).abs().max() > 0.1


def test_the_averaged_network_is_invariant_and_the_network_is_not():
    tokens, _, _ = problem(keys=4)
    shuffled = tokens[:, [0, 3, 1, 4, 2]]
    average, whole = (
        torch.randn(9, 11, dtype=torch.float64, generator=generator()),
        torch.randn(9, 26, dtype=torch.float64),
    )
    torch.testing.assert_close(rf.set_features(shuffled, average), rf.set_features(tokens, average), rtol=0, atol=1e-12)
    assert (rf.network_features(shuffled, whole) - rf.network_features(tokens, whole)).abs().max() > 0.1


def test_one_key_is_a_random_network_on_the_pair():
    _, seen, W = problem(keys=1)
    pair = torch.einsum("na,nb->nab", seen[:, 0], seen[:, 1]).flatten(1)
    neurons = (pair @ W.flatten(1).T).clamp(min=0)  # [n, M]
    torch.testing.assert_close(rf.attention_features(seen, W), (neurons[:, :, None] * seen[:, None, 1]).flatten(1))


def test_writing_every_key_twice_changes_nothing():
    _, seen, W = problem()
    twice = torch.cat([seen, seen[:, 1:]], 1)
    torch.testing.assert_close(rf.attention_features(twice, W), rf.attention_features(seen, W))


def test_without_the_one_features_are_of_degree_three_and_odd():
    tokens, _, _ = problem()
    W = rf.draw_heads(4, 5, generator())
    found = rf.attention_features(tokens, W)
    torch.testing.assert_close(rf.attention_features(2.5 * tokens, W), 2.5**3 * found)
    torch.testing.assert_close(rf.attention_features(-tokens, W), -found)


def test_chunks_do_not_show(monkeypatch):
    tokens, seen, W = problem(n=11)
    average = torch.randn(6, 11, dtype=torch.float64, generator=generator())
    whole = rf.attention_features(seen, W), rf.set_features(tokens, average)
    monkeypatch.setattr(rf, "CHUNK", 3 * 4 * 4)
    torch.testing.assert_close((rf.attention_features(seen, W), rf.set_features(tokens, average)), whole)


def test_scores_have_variance_one_and_the_mean_that_the_bias_gives():
    tokens, seen, _ = problem(n=2, keys=2, d=6)
    W = rf.draw_heads(40_000, 7, generator(3))
    plain, biased = rf.scores(seen, W), rf.scores(seen, rf.biased(W, 1.5))
    c = torch.einsum("nd,nid->ni", tokens[:, 0], tokens[:, 1:])[:, None]
    assert plain.var(1).sub(1).abs().max() < 0.03
    torch.testing.assert_close(biased - plain, (1.5 * c).expand_as(plain))
    assert torch.equal(rf.biased(W, 0.0), W)


def test_mean_weight_is_the_mean_over_heads_and_apart_from_a_line_even():
    c = torch.tensor([-0.7, 0.0, 0.4], dtype=torch.float64)
    g = torch.randn(400_000, dtype=torch.float64, generator=generator())
    for mu in (0.0, 1.0, 4.0):
        sampled = torch.stack([(mu * x + g).clamp(min=0).mean() for x in c])
        torch.testing.assert_close(rf.mean_weight(c, mu), sampled, rtol=0, atol=0.01)
        torch.testing.assert_close(rf.mean_weight(c, mu) - rf.mean_weight(-c, mu), mu * c)


@pytest.mark.parametrize("d", [3, 8])
def test_parts_of_the_mean_weight_add_up_and_hold_no_odd_power_beyond_the_line(d):
    for mu in (0.5, 4.0):
        parts = rf.mean_weight_parts(mu, d, degrees=12)
        assert parts[1] == pytest.approx(mu / 2 * d**-0.5, rel=1e-3)  # of s / 2
        assert max(map(abs, parts[3::2])) < 1e-6
        c = rf.draw_tokens(200_000, 1, d, generator())[:, 0, 0]  # as the correlation of two random tokens
        assert sum(x**2 for x in parts) == pytest.approx(float(rf.mean_weight(c, mu).square().mean()), rel=0.01)


def test_the_sign_of_the_mean_flips_the_line_alone():
    there, back = (rf.mean_weight_parts(mu, 8) for mu in (2.0, -2.0))
    assert back[1] == pytest.approx(-there[1])
    assert [back[0], *back[2:]] == pytest.approx([there[0], *there[2:]])


def test_a_target_of_the_model_is_found_exactly():
    _, seen, W = problem(n=120, heads=10)
    x = rf.attention_features(seen, W)  # 60 features
    y = x @ torch.randn(60, dtype=torch.float64, generator=generator(1))
    path = ridge.Path(x[:100], y[:100])
    assert ridge.relative_error(path.predict(x[100:], 1e-14), y[100:]).item() < 1e-8


# -------------------------------------------------------------------------------------------------------------- kernel


def test_arc_cosine_at_the_ends_and_in_the_middle():
    rho = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rf.arc_cosine(rho), torch.tensor([0, 1 / (2 * math.pi), 0.5], dtype=torch.float64))


def test_many_heads_reach_the_kernel_and_not_the_one_of_paired_keys():
    _, seen, _ = problem(n=6, keys=3, d=4)
    other = problem(n=5, keys=2, d=4, seed=9)[1]  # the numbers of keys may differ
    W = rf.draw_heads(20_000, 5, generator(2))
    x, y = rf.attention_features(seen, W), rf.attention_features(other, W)
    exact = rf.kernel(seen, other)
    assert (x @ y.T / 20_000 - exact).norm() / exact.norm() < 0.03
    paired = rf.paired_kernel(seen, seen)
    assert (x @ x.T / 20_000 - paired).norm() / paired.norm() > 0.1


def test_features_of_a_kernel_have_its_inner_products():
    _, seen, _ = problem(n=9)
    gram = rf.kernel(seen, seen)
    x = rf.features_of(gram)
    torch.testing.assert_close(x @ x.T, gram)


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("d", [3, 8])
def test_moments_of_the_sphere(d):
    x = rf.draw_tokens(200_000, 1, d, generator())[:, 0, 0]
    for k in (1, 2, 4, 6):
        assert float((x**k).mean()) == pytest.approx(rf.moment(d, k), abs=0.004)
    assert rf.moment(8, 4) - rf.moment(8, 2) ** 2 == pytest.approx(2 * 7 / (8**2 * 10))  # variance of a square


def test_targets_written_out():
    tokens, _, _ = problem()
    beta = torch.eye(5, dtype=torch.float64)[2]
    torch.testing.assert_close(rf.Target("query", 3)(tokens, beta), tokens[:, 0, 2] ** 3)
    torch.testing.assert_close(rf.Target("keys", 2)(tokens, beta), (tokens[:, 1:, 2] ** 2).mean(1))
    c = torch.stack([tokens[:, 0].mul(tokens[:, i]).sum(-1) for i in (1, 2, 3)], 1)
    torch.testing.assert_close(rf.Target("correlation", 2)(tokens, beta), (c**2 * tokens[:, 1:, 2]).mean(1))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_pure_part_knows_nothing_of_what_was_taken(p):
    tokens = rf.draw_tokens(100_000, 3, 4, generator())
    beta = torch.eye(4, dtype=torch.float64)[0]
    pure = rf.Target("correlation", p, pure=True)(tokens, beta)
    taken = (
        tokens[:, 0, 0]
        if p == 1
        else rf.Target("correlation", p - 2)(tokens, beta)
        if p > 2
        else tokens[:, 1:, 0].mean(1)
    )
    for other in (taken, tokens[:, 0, 0]):
        correlation = torch.corrcoef(torch.stack([pure, other]))[0, 1]
        assert abs(float(correlation)) < 0.012
    whole = rf.Target("correlation", p)(tokens, beta)
    assert 0.05 < float(pure.var() / whole.var()) < 0.95


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W: rf.draw_tokens(3, 0, 4, generator()), "keys=0"),
        (lambda x, W: rf.draw_tokens(0, 1, 4, generator()), "n=0"),
        (lambda x, W: rf.draw_tokens(3, 1, 1, generator()), "d=1"),
        (lambda x, W: rf.draw_heads(0, 4, generator()), "heads=0"),
        (lambda x, W: rf.attention_features(x[:, :1], W), "N >= 1"),
        (lambda x, W: rf.attention_features(x[..., :-1], W), "must be"),
        (lambda x, W: rf.attention_features(x, W, "sigmoid"), "softmax"),
        (lambda x, W: rf.kernel(2 * x, x), "unit vectors with a 1"),
        (lambda x, W: rf.kernel(x[..., :-1], x[..., :-1]), "augment"),
        (lambda x, W: rf.Target("values", 1), "query, keys, correlation"),
        (lambda x, W: rf.Target("keys", 0), "positive integer"),
        (lambda x, W: rf.Target("keys", 1.5), "positive integer"),
        (lambda x, W: rf.Target("keys", 1, pure=True), "pure part"),
        (lambda x, W: rf.Target("correlation", 4, pure=True), "pure part"),
        (lambda x, W: real.diagonal_ratio(x, x[..., :-1]), "W_K"),
    ],
)
def test_bad_input_is_told_what_would_do(call, message):
    _, seen, W = problem()
    with pytest.raises(ValueError, match=message):
        call(seen, W)


# ---------------------------------------------------------------------------------------------------------- experiment

TINY = runs.SIZES["tiny"][0]


@pytest.fixture(scope="module")
def table():
    return pd.DataFrame([row for seed in (0, 1) for row in TINY.run(seed)])


def test_a_run_has_a_row_for_every_model_size_and_target(table):
    models = {"attention": 3, "softmax attention": 2, "network": 1, "averaged network": 1, "linear": 1}
    counted = table.groupby("model").size().to_dict()
    assert counted == {name: n * 2 * 15 * 2 for name, n in models.items()}
    again = pd.DataFrame(TINY.run(1))
    assert again.error.tolist() == table[table.seed == 1].error.tolist()


def test_all_models_have_as_many_weights():
    tokens = rf.draw_tokens(5, TINY.keys, TINY.d, generator())
    widths = {model: compute().shape[1] for model, _, compute in TINY.features(tokens, generator())}
    assert widths.pop("linear") == 9
    assert set(widths.values()) == {TINY.weights}


def test_ratios_are_taken_within_a_draw(table):
    value, (low, high) = runs.ratio(table, "attention", "network", ["keys 2", "query 2"], 40)
    by_hand = []
    for seed in (0, 1):
        chosen = (
            table[(table.seed == seed) & (table.labels == 40) & (table.mu == 0)].set_index(["model", "target"]).error
        )
        by_hand.append(max(chosen["attention", t] / chosen["network", t] for t in ("keys 2", "query 2")))
    assert (low, high) == (min(by_hand), max(by_hand))
    assert value == pytest.approx(sum(by_hand) / 2)
    with pytest.raises(ValueError, match="keys 9"):
        runs.ratio(table, "attention", "network", "keys 9", 40)


def test_gains_and_slopes_and_summary_cover_the_table(table):
    gains = runs.gains(table)
    assert set(gains.mu) == {1.0, 4.0}
    assert len(gains) == 15 * 2 * 2
    assert (gains.low <= gains.ratio).all()
    slopes = runs.slopes(table)
    assert len(slopes) == 8 * 15
    assert len(runs.summary(table)) == 8 * 15 * 2


def test_claims_of_the_curves_are_declared_and_can_be_judged(table):
    found = runs.verdicts(table, few=20, many=40)
    assert set(found) | {"many-heads", "real-heads"} == set(load("random-features"))
    for name, arguments in found.items():
        assert claims.measure(f"random-features/{name}", **arguments)["verdict"]


def test_exponent_of_an_exact_power():
    rows = [
        {"seed": seed, "heads": M, "kernel": "all pairs", "error": (1 + seed) * M**-0.5}
        for seed in (0, 1)
        for M in (10, 100, 1000)
    ]
    value, (low, high) = runs.exponent(pd.DataFrame(rows), "all pairs")
    assert (value, low, high) == pytest.approx((-0.5, -0.5, -0.5))


def test_heads_curve_ends_in_the_limit():
    rows = runs.heads_curve((2, 3), labels=30, test=20)
    assert [row["heads"] for row in rows[::3]] == [2, 3, None]
    assert all(row["error"] > 0 for row in rows)


def test_the_command_writes_a_record_that_can_be_read_back(tmp_path, capsys):
    path = tmp_path / "random-features.json"
    runs.main(["--record", str(path), "--device", "cpu", "--size", "tiny", "--draws", "1"])
    record = records.load("random-features", tmp_path)
    assert record.command.endswith("--device cpu --size tiny --draws 1")
    assert not record.changed()
    table = runs.from_record(record.rows)
    assert len(table) == 8 * 2 * 15
    assert {row["claim"].split("/")[1] for row in record.rows if "claim" in row} == set(runs.verdicts(table, 20, 40))
    assert json.loads(path.read_text())["rows"][0]["case"] == "curve"
    assert "draw 1 of 1" in capsys.readouterr().out


def test_a_record_that_was_begun_goes_on_and_ends_in_the_same_errors(tmp_path, capsys):
    whole, begun = tmp_path / "whole.json", tmp_path / "begun.json"
    runs.write_record(whole, TINY, 3, command="c", commit="x")
    runs.write_record(begun, TINY, 1, command="c", commit="x")
    runs.write_record(begun, TINY, 3, command="c", commit="x", resume=True, budget=-1)
    assert "1 of 3 draws" in capsys.readouterr().out
    runs.write_record(begun, TINY, 3, command="c", commit="x", resume=True)
    one, other = (runs.from_record(records.load(path.stem, tmp_path).rows) for path in (whole, begun))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))
    with pytest.raises(ValueError, match="--resume"):
        runs.write_record(begun, TINY, 3, command="another", commit="x", resume=True)


# ---------------------------------------------------------------------------------------------------------- real heads


def random_projections(d=9, K=4, seed=0):
    draw = generator(seed)
    return (torch.randn(d, K, generator=draw, dtype=torch.float64) for _ in range(2))


def test_the_ratio_is_that_of_the_product_written_out():
    W_Q, W_K = random_projections()
    product = W_Q @ W_K.T
    off = product[~torch.eye(9, dtype=torch.bool)]
    expected = product.diagonal().mean() / off.std(correction=0)
    torch.testing.assert_close(real.diagonal_ratio(W_Q, W_K), expected)
    torch.testing.assert_close(real.diagonal_ratio(W_Q, W_Q * 3), real.diagonal_ratio(W_Q, W_Q))


def test_shuffles_hold_the_same_numbers_and_equal_keys_stand_out():
    W_Q, W_K = random_projections(40, 8)
    null = real.shuffled_ratios(W_Q, W_K, 500, generator(1))
    assert abs(float(null.mean())) < 0.03
    assert float(null.std()) == pytest.approx(40**-0.5, rel=0.2)
    assert real.diagonal_ratio(W_Q, W_Q) > null.max()
    order = torch.randperm(40, generator=generator(2))
    torch.testing.assert_close(real.shuffled_ratios(W_Q, W_K, 1, generator(2))[0], real.diagonal_ratio(W_Q, W_K[order]))


def test_turned_keys_are_those_of_rotary_positions():
    W_Q, W_K = random_projections(7, 4)
    x, y = (torch.randn(7, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    q, k = (x @ W_Q)[None, None, None], (y @ W_K)[None, None, None]
    score = (rotate(q, offset=12, base=100.0) * rotate(k, offset=7, base=100.0)).sum()
    torch.testing.assert_close(score, x @ W_Q @ real.turned(W_K, 5, 100.0).T @ y)
    assert torch.equal(real.turned(W_K, 0, 100.0), W_K)


def test_every_head_of_a_small_llama_has_its_row():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    heads = real.heads_frame(model, shuffles=20)
    assert heads["name"].tolist() == [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    assert heads["at 0"].tolist() == pytest.approx(heads["ratio"].tolist(), rel=1e-5)
    q, k = (getattr(model.model.layers[1].self_attn, name).weight.detach() for name in ("q_proj", "k_proj"))
    expected = real.diagonal_ratio(q[18:24].T, k[6:12].T)  # head 3 of width 6, group 1
    assert heads.ratio.iloc[-1] == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = 3.0
    assert real.heads_frame(model, shuffles=2, gains=True).ratio.iloc[0] != pytest.approx(heads.ratio.iloc[0])
    found = real.verdict(heads)
    assert found["value"] == pytest.approx((heads.ratio > heads.limit).mean())
    assert set(found["controls"]) == {"shuffled"}


def test_rank_correlation():
    x = pd.Series([3.0, 1.0, 2.0])
    assert real.rank_correlation(x, x**3) == pytest.approx(1)
    assert real.rank_correlation(x, -x) == pytest.approx(-1)
