"""Running circuits: ends against plain runs, single edges against exact patching, random circuits against a loop head by head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import HookedLM, Node, Readout, activation_patch, log_odds, logit_diff
from attnlab.circuits.eap import exact_edge_scores
from attnlab.circuits.edges import EdgeScores, Wiring
from attnlab.circuits.evaluate import evaluate, evaluate_many
from attnlab.circuits.faithfulness import (
    Faithfulness,
    completeness,
    faithfulness,
    incompleteness,
    minimality,
    sparsity_curve,
)
from attnlab.circuits.graph import Graph
from attnlab.circuits.scores import NoEffectError
from attnlab.circuits.ungroup import ungrouped
from attnlab.models.pretrained import tiny, tiny_gpt2


@pytest.fixture(scope="module")
def small():
    """GPT-2, 2 layers, 2 heads: 46 edges."""
    return HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16, seed=2))


@pytest.fixture(scope="module")
def llama():
    """Llama with one key for both heads, ungrouped: 2 layers, 2 heads."""
    return ungrouped(HookedLM(tiny(n_layers=2, n_heads=2, n_kv_heads=1, d_model=16)))


@pytest.fixture(params=["small", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def mixed(make_pairs):
    """Pairs of two lengths, so two batches that differ from different positions on."""
    return make_pairs((7, 9, 7, 9, 7))


def plain(model, pairs, which, metric=logit_diff):
    """The metric of an untouched run, ``[N]``."""
    values = np.empty(len(pairs))
    for batch in pairs.batches():
        end = model.run(getattr(batch, which)).resid[model.spec.n_layers]
        values[batch.index.numpy()] = metric(Readout(model, end, batch)).numpy()
    return values


def random_graph(model, seed, share=0.5):
    wiring = Wiring.of(model.spec)
    draw = torch.rand(wiring.n_src, wiring.n_dst, generator=torch.Generator().manual_seed(seed))
    return Graph(wiring, wiring.valid & (draw < share))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------- the two ends


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_the_full_graph_is_the_model(model, mixed, ablation):
    got = evaluate(model, Graph.full(Wiring.of(model.spec)), mixed, [logit_diff, log_odds], ablation=ablation)
    assert list(got) == ["logit_diff", "log_odds"]
    close(got["logit_diff"], plain(model, mixed, "clean"))
    close(got["log_odds"], plain(model, mixed, "clean", log_odds))


def test_the_empty_graph_is_the_corrupt_run(model, mixed):
    close(evaluate(model, Graph.empty(Wiring.of(model.spec)), mixed)["logit_diff"], plain(model, mixed, "corrupt"))


def test_nothing_but_the_bias_is_left_of_zero_ablation(small, pairs):
    (batch,) = pairs.batches()
    end = small.bridge.b_O.sum(0).expand(len(pairs), 1, -1)
    close(
        evaluate(small, Graph.empty(Wiring(2, 2)), pairs, ablation="zero")["logit_diff"],
        logit_diff(Readout(small, end, batch)),
    )


def test_mean_ablation_of_everything_reads_the_mean_residual(model, mixed):
    """The means of all writes add up to the mean of the final residual over prompts and positions."""
    ends = [
        model.run(batch.corrupt).resid[model.spec.n_layers].reshape(-1, model.spec.d_model) for batch in mixed.batches()
    ]
    mean = torch.cat(ends).mean(0)
    got = evaluate(model, Graph.empty(Wiring.of(model.spec)), mixed, ablation="mean")["logit_diff"]
    for batch in mixed.batches():
        close(got[batch.index.numpy()], logit_diff(Readout(model, mean.expand(len(batch), 1, -1), batch)))


# ------------------------------------------------------------------------------------------------ edge by edge


def test_one_edge_removed_is_a_patch_by_hand(small, batch, pairs):
    """a0.h1 -> a1.h0<k>: that head's keys are projected from a residual with the corrupt write of a0.h1, all else is clean."""
    clean, corrupt = (small.run(tokens, capture=("z",)) for tokens in (batch.clean, batch.corrupt))
    moved = (corrupt.acts["z", 0] - clean.acts["z", 0])[:, :, 1] @ small.W_O[0, 1]  # [B, T, d_model]
    normed = small.bridge.blocks[1].ln1(clean.resid[1] + moved)
    keys = normed @ small.bridge.W_K[1, 0] + small.bridge.b_K[1, 0]

    def patch(k, hook):
        k = k.clone()
        k[:, :, 0] = keys
        return k

    with small.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_k", patch)]):
        end = small.run(batch.clean).resid[2]
    graph = Graph.full(Wiring(2, 2)) - Graph.from_edges(Wiring(2, 2), ["a0.h1->a1.h0<k>"])
    close(evaluate(small, graph, pairs)["logit_diff"], logit_diff(Readout(small, end, batch)))


def test_every_edge_removed_alone_is_exact_edge_patching(model, mixed):
    scores = exact_edge_scores(model, mixed)
    full = Graph.full(scores.wiring)
    edges = full.edges()
    without = evaluate_many(model, [full - Graph.from_edges(scores.wiring, [edge]) for edge in edges], mixed)[:, 0]
    clean, corrupt = plain(model, mixed, "clean"), plain(model, mixed, "corrupt")
    close((without - clean).mean(1) / (corrupt - clean).mean(), [scores.of(edge) for edge in edges])


def test_a_head_without_outgoing_edges_is_activation_patching(model, mixed):
    exact = activation_patch(model, mixed, ["0.1"], positions="all")
    graph = Graph.full(Wiring.of(model.spec)).without("0.1")
    close(evaluate(model, graph, mixed)["logit_diff"] - plain(model, mixed, "clean"), exact.effect[0])


def by_hand(model, graph, batch, ablated):
    """Reference for GPT-2: every destination sums its sources one by one, every head computes its attention by itself."""
    bridge, wiring = model.bridge, graph.wiring
    size, length = batch.clean.shape
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    constant = torch.zeros(model.spec.d_model, dtype=torch.float64)
    writes = {"input": bridge(batch.clean, stop_at_layer=0)}

    def read(destination):
        total = constant.expand(size, length, -1)
        for name in wiring.sources[: int(wiring.reads[wiring.destination(destination)])]:
            total = total + (writes[name] if f"{name}->{destination}" in graph else ablated[name])
        return total

    for layer in range(wiring.n_layers):
        block, attn = bridge.blocks[layer], bridge.blocks[layer].attn
        for head in range(wiring.n_heads):
            q, k, v = (
                block.ln1(read(f"a{layer}.h{head}<{port}>")) @ weight[layer, head] + bias[layer, head]
                for port, weight, bias in (
                    ("q", bridge.W_Q, bridge.b_Q),
                    ("k", bridge.W_K, bridge.b_K),
                    ("v", bridge.W_V, bridge.b_V),
                )
            )
            pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            writes[f"a{layer}.h{head}"] = pattern @ v @ model.W_O[layer, head]
        constant = constant + attn.b_O
        writes[f"m{layer}"] = block.mlp(block.ln2(read(f"m{layer}")))
    return read("logits")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_a_random_circuit_is_the_loop_head_by_head(gpt2, pairs, batch, share, ablation):
    graph = random_graph(gpt2, seed=int(10 * share), share=share)
    corrupt = gpt2.run(batch.corrupt, capture=("z", "mlp_out"))
    ablated = {"input": corrupt.resid[0]}
    for node in gpt2.spec.nodes[1:]:
        if node.head is None:
            ablated[f"m{node.layer}"] = corrupt.acts["mlp_out", node.layer]
        else:
            z = corrupt.acts["z", node.layer][:, :, node.head]
            ablated[f"a{node.layer}.h{node.head}"] = z @ gpt2.W_O[node.layer, node.head]
    if ablation == "zero":
        ablated = {name: torch.zeros_like(write) for name, write in ablated.items()}
    with torch.no_grad():
        end = by_hand(gpt2, graph, batch, ablated)
    close(evaluate(gpt2, graph, pairs, ablation=ablation)["logit_diff"], logit_diff(Readout(gpt2, end, batch)))


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_pruning_changes_nothing_where_the_input_carries_all(model, mixed, ablation):
    """Edges towards dead ends are free under any ablation; edges behind cut-off sources too under resampling."""
    graph = random_graph(model, 3, share=0.15)
    dead_ends = (
        graph
        - (graph | Graph(graph.wiring, graph.wiring.valid & (torch.arange(graph.wiring.n_src) == 0)[:, None])).prune()
    )
    kept = graph.prune() if ablation == "resample" else graph - dead_ends
    assert len(kept) < len(graph)
    close(*(evaluate(model, g, mixed, ablation=ablation)["logit_diff"] for g in (graph, kept)))


def test_batches_do_not_matter(model, mixed):
    graph = random_graph(model, 1)
    for ablation in ("resample", "mean"):
        close(*(evaluate(model, graph, mixed, ablation=ablation, batch_size=n)["logit_diff"] for n in (1, 16)))


def test_the_model_is_left_as_it_was(model, mixed):
    before = plain(model, mixed, "clean")
    evaluate(model, random_graph(model, 1), mixed)
    assert not getattr(model.bridge.cfg, "use_split_qkv_input", False)
    np.testing.assert_array_equal(plain(model, mixed, "clean"), before)

    def broken(end):
        raise RuntimeError("metric fails")

    with pytest.raises(RuntimeError, match="metric fails"):
        evaluate(model, random_graph(model, 1), mixed, broken)
    np.testing.assert_array_equal(plain(model, mixed, "clean"), before)


# -------------------------------------------------------------------------------------------------- quantities


def test_faithfulness_is_one_for_the_model_and_zero_for_nothing(model, mixed):
    wiring = Wiring.of(model.spec)
    for graph, value in ((Graph.full(wiring), 1), (Graph.empty(wiring), 0)):
        found = faithfulness(model, graph, mixed)
        close([found.ratio_of_means, found.mean_of_ratios], value)
        close(found.interval(), value)
        close(completeness(model, graph, mixed), value)


def test_the_two_averages_of_faithfulness():
    found = Faithfulness(np.array([1.0, 3.0]), np.array([2.0, 10.0]), np.array([0.0, 0.0]))
    assert found.ratio_of_means == 4 / 12
    assert found.mean_of_ratios == (1 / 2 + 3 / 10) / 2
    assert np.isnan(Faithfulness(np.ones(2), np.array([2.0, 0.0]), np.zeros(2)).mean_of_ratios)
    with pytest.raises(NoEffectError, match="nothing to be faithful to"):
        Faithfulness(np.ones(2), np.ones(2), np.ones(2)).ratio_of_means  # noqa: B018


def test_minimality_takes_nodes_out_one_by_one(small, mixed):
    graph = random_graph(small, 4, share=0.8)
    found = minimality(small, graph, mixed, given=["m0"])
    assert set(found.node) == set(graph.without("m0").nodes()) - {"input", "logits"}
    assert (found.change.abs().diff().dropna() <= 0).all()
    whole = faithfulness(small, graph.without("m0"), mixed).ratio_of_means
    for row in found.itertuples():
        close(row.without, faithfulness(small, graph.without("m0", row.node), mixed).ratio_of_means)
        close(row.change, row.without - whole)


def test_the_model_is_complete(small, mixed):
    knockouts = {"a head": ["0.1"], "two": [Node(1, 0), "m0"]}
    assert incompleteness(small, Graph.full(Wiring(2, 2)), mixed, knockouts).incompleteness.tolist() == [0, 0]
    graph = random_graph(small, 4)
    row = incompleteness(small, graph, mixed, knockouts).iloc[1]
    assert row.knockout == "two"
    close(row.circuit, faithfulness(small, graph.without("1.0", "m0"), mixed).ratio_of_means)
    close(row.incompleteness, abs(row.circuit - row.model))


@pytest.mark.parametrize("select", ["top", "greedy"])
def test_the_sparsity_curve_and_its_areas(small, mixed, select):
    scores = exact_edge_scores(small, mixed)
    curve = sparsity_curve(small, scores, mixed, [0, 10, 30, 46], select=select)
    assert curve.frame.n_edges.tolist() == [0, 10, 30, 46]
    close(curve.frame.ratio_of_means.iloc[[0, -1]], [0, 1])
    choose = {"top": Graph.top_n, "greedy": Graph.greedy}[select]
    for row in curve.frame.itertuples():
        graph = choose(scores, row.n_edges).prune()
        assert row.kept == len(graph)
        close(row.ratio_of_means, faithfulness(small, graph, mixed).ratio_of_means)
    share, line = curve.frame.share.to_numpy(), curve.frame.ratio_of_means.to_numpy()
    close(curve.cpr, (np.diff(share) * (line[1:] + line[:-1]) / 2).sum())
    close(curve.cmd, (np.diff(share) * (abs(1 - line[1:]) + abs(1 - line[:-1])) / 2).sum())
    inner = sparsity_curve(small, scores, mixed, [10, 30], select=select)  # the ends are known
    close([inner.cpr, inner.cmd], [curve.cpr, curve.cmd])
    assert sparsity_curve(small, scores, mixed).frame.n_edges.tolist() == [1, 2, 5, 9, 23]


# ----------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused(small, lm, pairs):
    full = Graph.full(Wiring(2, 2))
    with pytest.raises(ValueError, match="ablation='noise' is unknown; use 'resample', 'mean' or 'zero'"):
        evaluate(small, full, pairs, ablation="noise")
    with pytest.raises(ValueError, match=r"6 query heads on 2 key/value groups.*pass ungrouped\(model\)"):
        evaluate(lm, Graph.full(Wiring.of(lm.spec)), pairs)
    with pytest.raises(ValueError, match=r"graph is wired as Wiring\(n_layers=3.*use a graph of this model"):
        evaluate(small, Graph.full(Wiring(3, 2)), pairs)
    scores = EdgeScores(Wiring(2, 2), Wiring(2, 2).valid.double())
    with pytest.raises(ValueError, match="select='best' is unknown"):
        sparsity_curve(small, scores, pairs, select="best")
    with pytest.raises(ValueError, match="n=47 edges cannot be had"):
        sparsity_curve(small, scores, pairs, [47])
    with pytest.raises(ValueError, match=r"source 'a5.h0' does not exist"):
        minimality(small, full, pairs, given=["5.0"])


def test_writes_that_are_more_than_added_up_are_refused(pairs):
    model = HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16))
    scaled = [("blocks.0.hook_out", lambda act, hook: 2 * act)]
    with (
        model.bridge.hooks(fwd_hooks=scaled),
        pytest.raises(ValueError, match="does more to what heads and MLPs write"),
    ):
        evaluate(model, Graph.full(Wiring(2, 2)), pairs)


def test_blocks_whose_mlp_does_not_follow_the_heads_are_refused(pairs):
    model = HookedLM(tiny_gpt2(n_layers=2, n_heads=2, d_model=16))
    model.bridge.cfg.parallel_attn_mlp = True
    with pytest.raises(ValueError, match="use one with sequential blocks"):
        evaluate(model, Graph.full(Wiring(2, 2)), pairs)
