"""Oracles of ``attnlab.kernels.flowformer``: arms, weights, matrix forms of one head, tasks and the record's rows."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from attnlab import claims
from attnlab.data import IGNORE
from attnlab.kernels import flowformer as ff
from attnlab.kernels import flowformer_record, records
from attnlab.kernels import flowformer_runs as runs
from attnlab.mixers import causal_flow_attention, elu_plus_one, flow_attention, flow_quantities

close = {"rtol": 1e-12, "atol": 1e-12}
B, N, M, H, K, V, T = 2, 13, 37, 3, 12, 20, 63


@pytest.fixture
def draw():
    """Normal float64 tensors from one seed."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- arms


def test_linear_attention_is_an_average_by_its_features(draw):
    q, k, v = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V)
    a = torch.einsum("bnhk,bmhk->bnhm", elu_plus_one(q), elu_plus_one(k))
    wanted = torch.einsum("bnhm,bmhv->bnhv", a / a.sum(-1, keepdim=True), v)
    torch.testing.assert_close(ff.linear_attention(q, k, v, feature_map=elu_plus_one), wanted, **close)


def test_flow_without_its_two_halves_is_sigmoid_linear_attention(draw):
    q, k, v = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V)
    bare = flow_attention(q, k, v, eps=0.0, competition=False, allocation=False)
    torch.testing.assert_close(bare, ff.ARMS["sigmoid linear"](q, k, v), **close)


@pytest.mark.parametrize("arm", ff.ARMS)
def test_effective_weights_are_what_outputs_are_made_of(arm, draw):
    q, k, v = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V)
    weights = ff.effective_weights(ff.ARMS[arm], q, k)
    assert weights.shape == (B, N, H, M)
    torch.testing.assert_close(torch.einsum("bnhm,bmhv->bnhv", weights, v), ff.ARMS[arm](q, k, v), **close)


@pytest.mark.parametrize("arm", ["softmax", "elu+1 linear", "sigmoid linear"])
def test_weights_of_averages_sum_to_one(arm, draw):
    weights = ff.effective_weights(ff.ARMS[arm], draw(B, N, H, K), draw(B, M, H, K))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, N, H, dtype=torch.float64), **close)


def test_competition_prefers_no_source_by_more_than_e(draw):
    """Conserved flows are positive, so the clamp leaves [0, 1]: e is the most that two weights can differ by."""
    q, k = 3 * draw(B, N, H, K), 3 * draw(B, M, H, K)
    with_it = ff.effective_weights(partial(flow_attention, eps=0.0), q, k)
    without = ff.effective_weights(partial(flow_attention, eps=0.0, competition=False), q, k)
    preference = with_it / without  # [B, N, H, M]: M softmax(...), the same for every sink
    torch.testing.assert_close(preference, preference[:, :1].expand_as(preference), rtol=1e-9, atol=0)
    assert preference.amax(-1).div(preference.amin(-1)).max() <= math.e * (1 + 1e-9)


def test_evenness_of_an_average_and_of_a_choice():
    even = torch.full((3, 8), 0.7, dtype=torch.float64)
    choice = torch.eye(8, dtype=torch.float64)[:3]
    torch.testing.assert_close(ff.evenness(even), torch.ones(3, dtype=torch.float64))
    assert torch.equal(ff.evenness(choice), torch.zeros(3, dtype=torch.float64))
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ff.evenness(half), torch.tensor([0.5], dtype=torch.float64))


def test_a_layer_projects_and_refuses(draw):
    layer = ff.MultiHead(24, 3, flow_attention).double()
    x = draw(B, N, 24)
    q, k, v = (part.unflatten(-1, (3, 8)) for part in layer.qkv(x).chunk(3, -1))
    torch.testing.assert_close(layer(x), layer.out(flow_attention(q, k, v).flatten(2)), **close)
    with pytest.raises(ValueError, match="heads=5 must divide width=24, and both be positive; choose a divisor"):
        ff.MultiHead(24, 5, flow_attention)


# -------------------------------------------------------------------------------------------- matrix forms of one head


def heads(*x):
    """[T, D] as one sequence of one head."""
    return [part[None, :, None] for part in x]


def test_steps_conserve_and_end_in_flow_attention(draw):
    q, k = 2 * draw(N, K), 2 * draw(M, K)
    steps = ff.flow_steps(q, k)
    ones = {n: torch.ones(n, dtype=torch.float64) for n in (N, M)}
    torch.testing.assert_close(steps["sinks fixed"].sum(1), ones[N], **close)
    torch.testing.assert_close(steps["sources fixed"].sum(0), ones[M], **close)
    assert abs(steps["sinks fixed"].sum() - N) < 1e-12
    assert abs(steps["sources fixed"].sum() - M) < 1e-12
    flow = flow_quantities(*heads(q, k), eps=0.0)
    torch.testing.assert_close(steps["sinks fixed"].sum(0), flow.conserved_outgoing[0, :, 0], **close)
    torch.testing.assert_close(steps["sources fixed"].sum(1), flow.conserved_incoming[0, :, 0], **close)
    for name, switches in (("competition", {"allocation": False}), ("allocation", {})):
        weights = ff.effective_weights(partial(flow_attention, eps=0.0, **switches), *heads(q, k))
        torch.testing.assert_close(steps[name], weights[0, :, 0], **close)


@pytest.mark.parametrize("clamp", [1.0, 5.0])
def test_triangles_are_the_causal_form(clamp, draw):
    q, k, v = 2 * draw(T, K), 2 * draw(T, K), draw(T, V)
    wanted, _ = causal_flow_attention(*heads(q, k, v), eps=0.0, clamp=clamp)
    torch.testing.assert_close(ff.triangle_form(q, k, v, clamp=clamp), wanted[0, :, 0], **close)


def test_running_means_conserve_in_the_normal_form_alone(draw):
    means = ff.running_means(2 * draw(T, K), 2 * draw(T, K)).set_index(["form", "side", "t"])["mean"].sort_index()
    assert len(means) == 2 * 2 * T
    assert (means["normal"] - 1).abs().max() < 1e-12
    for side in ("sinks receive", "sources send"):
        assert means["causal", side][1] == pytest.approx(1, abs=1e-12)
        assert abs(means["causal", side][T] - 1) > 1e-3


def test_tokens_that_are_all_alike_conserve_in_the_causal_form_too(draw):
    q, k = draw(1, K).expand(T, K), draw(1, K).expand(T, K)
    for flow in ff.triangle_flows(q, k)[2:]:
        torch.testing.assert_close(flow, torch.ones(T, dtype=torch.float64), **close)


def test_the_last_token_frozen_and_revised(draw):
    q, k, v = 2 * draw(T, K), 2 * draw(T, K), draw(T, V)
    frozen = ff.last_token(q, k, v, frozen_flows=True, frozen_weights=True)
    revised = ff.last_token(q, k, v, frozen_flows=False, frozen_weights=False)
    torch.testing.assert_close(frozen, ff.triangle_form(q, k, v)[-1], **close)
    torch.testing.assert_close(revised, flow_attention(*heads(q, k, v), eps=0.0)[0, -1, 0], **close)
    between = ff.last_token(q, k, v, frozen_flows=False, frozen_weights=True)
    assert not torch.allclose(between, frozen)
    assert not torch.allclose(between, revised)


# ------------------------------------------------------------------------------------------------------------ tasks


def test_distractors_hide_one_answer_under_keys_that_count():
    task = runs.Distractors(length=37, informative=3, counting=5, keys=12, values=4)
    tokens, targets = task.draw(np.random.default_rng(0), 50)
    keys, values = tokens[..., 0], tokens[..., 1]
    counts = keys < task.counting
    assert tokens.shape == (50, 37, 2)
    assert (counts.sum(1) == 3).all()
    assert (values[counts] == np.repeat(targets[:, 0], 3)).all()
    assert (targets == targets[:, :1]).all()
    assert set(values.ravel()) == set(range(12, 16))
    assert keys.max() == 11


def test_text_pieces_of_training_and_test_share_no_block():
    task = runs.Text(length=256, parts=4)
    tokens, part = task.draw(np.random.default_rng(0), 64)
    blocks = runs.library(4, task.BLOCK, task.buckets)
    held = np.arange(blocks.shape[1]) % task.EVERY == task.EVERY - 1
    assert tokens.shape == (64, 256, 2)
    haystack = blocks[:, held, :, 1].tobytes()
    for piece, p in zip(tokens, part, strict=True):
        assert piece[:, 1].tobytes() in blocks[p, ~held, :, 1].tobytes()
        assert piece[:, 1].tobytes() not in haystack


def test_hashes_tell_four_letters_apart():
    blocks = runs.library(4, 8192, 4096)
    characters, names = blocks[0, 0, :, 0], blocks[0, 0, :, 1]
    same = {}
    for i in range(3, 8192):
        same.setdefault(tuple(characters[i - 3 : i + 1]), set()).add(names[i])
    assert all(len(found) == 1 for found in same.values())


@pytest.mark.parametrize(
    "task",
    [
        runs.Recall(width=8, steps=3, batch=4, examples=8),
        runs.Distractors(width=8, steps=3, batch=2, examples=4, length=12, longer=(24,)),
        runs.Text(width=8, layers=1, steps=2, batch=2, length=1024, precision="float32"),
    ],
    ids=lambda task: task.name,
)
def test_a_tiny_comparison_runs_and_arms_are_alike(task):
    frames = [runs.train(task, arm, (task.lr,), (0,)) for arm in ("flow", "sigmoid linear")]
    assert [len(frame) for frame in frames] == [1, 1]
    assert len({int(n) for frame in frames for n in frame["parameters"]}) == 1
    assert all(math.isfinite(x) for frame in frames for x in frame["loss"])
    assert ("accuracy at 24" in frames[0]) == (task.name == "distractors")


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="arm='flows' is not known; choose one of softmax, elu"):
        runs.train(runs.Recall(), "flows", (1e-2,), (0,))
    with pytest.raises(ValueError, match="length=1000: a divisor of 8192 is wanted"):
        runs.Text(length=1000)


def table(**losses):
    """What `compare` would return for three seeds of these arms, with accuracy 1 - loss."""
    import pandas as pd

    rows = [
        {"arm": arm.replace("_", " "), "seed": seed, "lr": 0.1, "loss": loss, "accuracy": 1 - loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows).replace({"elu linear": "elu+1 linear", "flow no competition": "flow, no competition"})


GOOD, MIDDLING, BAD = (0.1, 0.12, 0.11), (0.2, 0.3, 0.25), (0.5, 0.6, 0.55)


@pytest.mark.parametrize(
    ("losses", "recall", "distractors"),
    [
        (
            {"flow": GOOD, "sigmoid_linear": BAD, "elu_linear": MIDDLING, "flow_no_competition": BAD},
            "confirmed",
            "confirmed",
        ),
        (
            {"flow": GOOD, "sigmoid_linear": BAD, "elu_linear": MIDDLING, "flow_no_competition": GOOD},
            "confirmed",
            "refuted",
        ),
        (
            {"flow": MIDDLING, "sigmoid_linear": BAD, "elu_linear": GOOD, "flow_no_competition": BAD},
            "refuted",
            "refuted",
        ),
        (
            {"flow": MIDDLING, "sigmoid_linear": MIDDLING, "elu_linear": BAD, "flow_no_competition": BAD},
            "refuted",
            "refuted",
        ),
    ],
)
def test_verdicts_follow_the_rule(losses, recall, distractors):
    frame = table(**losses)
    for claim, wanted in (("recall", recall), ("distractors", distractors)):
        assert claims.measure(f"flowformer/{claim}", **runs.verdict(frame, claim))["verdict"] == wanted


# ----------------------------------------------------------------------------------------------------------- record


def test_cost_has_a_row_for_each_length_and_form():
    rows = flowformer_record.cost((16, 32), ("softmax", "flow, causal kernel"), heads=2, width=8, repeats=1)
    assert [(row["impl"], row["shape"]["T"]) for row in rows] == [
        ("softmax", 16),
        ("flow, causal kernel", 16),
        ("softmax", 32),
        ("flow, causal kernel", 32),
    ]
    assert all(row["ms"] > 0 for row in rows)


def test_the_command_at_a_tiny_size_makes_a_record_that_can_be_read(tmp_path, capsys):
    path = tmp_path / "flowformer.json"
    assert flowformer_record.main(["--record", str(path), "--commit", "abc", "--tiny"]) == 0
    assert "recall: " in capsys.readouterr().out
    record = records.load("flowformer", tmp_path)
    assert record is not None
    assert record.commit == "abc"
    assert record.command.endswith("--record records/flowformer.json --tiny")
    assert record.changed() == []
    frame = record.frame()
    assert set(frame[frame["case"] == "cost"]["T"]) == {64, 128}
    trained = frame[(frame["operator"] == "training") & (frame["case"] == "recall")]
    assert len(trained) == 6 * 2 * 3  # arms, learning rates, seeds
    assert (trained.groupby("impl")["chosen"].sum() == 3).all()
    judged = [row["claim"] for row in record.rows if "claim" in row]
    assert judged == ["flowformer/distractors", "flowformer/recall"]
    json.dumps(record.rows, allow_nan=False)


def test_the_command_wants_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert flowformer_record.main(["--record", str(tmp_path / "x.json")]) == 2
    assert "on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_queries_alone_are_asked_in_recall():
    _, targets = runs.Recall().draw(np.random.default_rng(0), 5)
    assert (targets[:, :-1] == IGNORE).all()
