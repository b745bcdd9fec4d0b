"""Oracles of ``attnlab.circuits.sae_circuits``: writes, codes, scores, controls, the experiments on tiny models, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab import claims
from attnlab.circuits import HookedLM, Node, repeats, roc, sae_circuits, sae_circuits_runs
from attnlab.circuits.sae_circuits import HeadWrites
from attnlab.models.word_model import WordModel

HEADS = [Node(layer, head) for layer in range(4) for head in range(5)]
TRUE = np.arange(20) < 3


def writes(shift: float = 4.0, per_class: int = 13, d: int = 24, seed: int = 0) -> HeadWrites:
    """Noise of 20 heads, the first three of which are shifted on positive prompts."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2 * per_class, 20, d)) * 0.25
    offset = rng.normal(size=(20, d))
    positive = np.arange(2 * per_class) < per_class
    values += offset
    values[:per_class, :3] += shift * rng.normal(size=(3, d)) * 0.25
    return HeadWrites(torch.as_tensor(values, dtype=torch.float32), positive, HEADS)


@pytest.fixture
def codes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 7, size=(18, 6)), np.arange(18) < 9


# ------------------------------------------------------------------------------------------------------------ writes


def test_writes_of_all_heads_add_up_to_the_attention_output(gpt2, pairs, record):
    found = sae_circuits.head_writes(gpt2, pairs, ("last",))["last"]
    bias = gpt2.bridge.b_O.detach()
    (batch,) = pairs.batches()
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(3)]
    for side, tokens in enumerate((batch.clean, batch.corrupt)):
        kept = record(gpt2, tokens, names)
        for layer, name in enumerate(names):
            total = found.values[side * 3 : side * 3 + 3, layer * 4 : layer * 4 + 4].sum(1) + bias[layer]
            torch.testing.assert_close(total, kept[name][:, -1].to(total.dtype), rtol=0, atol=1e-5)


def test_pools_are_means_over_their_positions(lm, make_pairs):
    mixed = make_pairs((6, 8, 6, 9))
    found = sae_circuits.head_writes(lm, mixed, sae_circuits.POOLS)
    for batch in mixed.batches():
        z = lm.run(batch.corrupt, capture=("z",)).stack("z")  # [L, B, T, H, d_head]
        every = torch.einsum("lbthk,lhkd->bltHd".replace("H", "h"), z, lm.W_O.to(z)).to(torch.float32)
        for pool, kept in {"mean": slice(None), "last": slice(-1, None), "mean_without_first": slice(1, None)}.items():
            wanted = every[:, :, kept].mean(2).flatten(1, 2)
            torch.testing.assert_close(found[pool].values[4 + batch.index], wanted, rtol=0, atol=1e-5)


def test_positive_prompts_come_first_and_are_labelled(lm, pairs):
    found = sae_circuits.head_writes(lm, pairs)["mean"]
    assert found.positive.tolist() == [True] * 3 + [False] * 3
    assert found.heads == lm.spec.heads


def test_normalised_writes_have_entries_of_mean_square_one():
    assert float(writes().normalised().values.pow(2).mean()) == pytest.approx(1.0, abs=1e-5)


def test_the_first_prompts_of_each_class_are_kept():
    few = writes().first(2)
    assert few.positive.tolist() == [True, True, False, False]
    assert torch.equal(few.values, writes().values[[0, 1, 13, 14]])


def test_writes_refuse_what_cannot_be_compared(lm, pairs):
    good = writes()
    with pytest.raises(ValueError, match="pools holds 'max'; use 'mean', 'last'"):
        sae_circuits.head_writes(lm, pairs, ("max",))
    with pytest.raises(ValueError, match="positive marks 13 prompts and leaves 12"):
        HeadWrites(good.values[:25], good.positive[:25], HEADS)
    with pytest.raises(ValueError, match="positive marks 0 prompts and leaves 0"):
        HeadWrites(good.values[:0], good.positive[:0], HEADS)
    with pytest.raises(ValueError, match=r"26 prompts and 19 heads want \[26, 19, d_model\]"):
        HeadWrites(good.values, good.positive, HEADS[:19])
    with pytest.raises(ValueError, match="give one boolean a prompt"):
        HeadWrites(good.values, good.positive.astype(int), HEADS)
    for count in (0, 14):
        with pytest.raises(ValueError, match=f"per_class={count} must lie between 1 and 13"):
            good.first(count)


# ------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("n", [1, 4, 7, 26])
def test_training_prompts_are_half_of_each_class(n):
    positive = np.arange(26) < 13
    rows = sae_circuits.training_prompts(positive, n, seed=3)
    assert len(set(rows.tolist())) == n
    assert positive[rows].sum() == (n + 1) // 2
    anywhere = sae_circuits.training_prompts(positive, n, seed=3, stratified=False)
    assert len(set(anywhere.tolist())) == n


@pytest.mark.parametrize("n", [0, 27])
def test_more_training_prompts_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n} training prompts of 26; choose between 1 and 26"):
        sae_circuits.training_prompts(np.arange(26) < 13, n, seed=0)


@pytest.mark.parametrize("make", [sae_circuits.sae_codes, sae_circuits.kmeans_codes])
def test_codes_are_one_integer_a_prompt_and_head(make):
    found = make(writes(), m=9, n=4, seed=2)
    assert found.values.shape == (26, 20)
    assert found.values.dtype.kind == "i"
    assert found.values.min() >= 0
    assert found.values.max() < 9
    assert np.array_equal(found.values, make(writes(), m=9, n=4, seed=2).values)


def test_codes_are_the_most_active_feature():
    data = writes()
    found = sae_circuits.sae_codes(data, m=9, n=4, epochs=5)
    activations = found.encoder.encode(data.values)
    assert np.array_equal(found.values, activations.argmax(-1).numpy())
    assert found.dead == float((activations.amax(-1) <= 0).double().mean())


def test_a_planted_circuit_is_in_the_mean_and_in_the_information_of_codes():
    """A clean head has one new code on every positive prompt: a count of new codes gives it 1, the information one bit."""
    data = writes(shift=6.0).normalised()
    assert roc(sae_circuits.mean_difference(data), TRUE).auc == 1
    codes = sae_circuits.sae_codes(data, 60, 10, 1).values
    information = sae_circuits.mutual_information(codes, data.positive)
    assert roc(information, TRUE).auc > 0.95
    assert information[:3].min() > 0.7


# ------------------------------------------------------------------------------------------------------------ scores


def test_new_codes_by_hand():
    codes = np.array([[1, 5], [2, 5], [2, 5], [3, 5]])
    positive = np.array([True, True, False, False])
    assert sae_circuits.unique_codes(codes, positive).tolist() == [1, 0]  # {1, 2} - {2, 3}; a constant head scores 0
    assert sae_circuits.unique_codes(codes, ~positive).tolist() == [1, 0]  # {2, 3} - {1, 2}
    assert sae_circuits.unique_codes(codes, positive, normalise=True).tolist() == [1 / 3, 0]
    moved = np.array([[4], [4], [6], [6]])  # constant, but another constant
    assert sae_circuits.unique_codes(moved, positive).tolist() == [1]


STATISTICS = [
    sae_circuits.unique_codes,
    sae_circuits.mutual_information,
    lambda codes, positive: sae_circuits.pair_scores(codes, positive).sum(1),
]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_order_of_prompts_within_a_class_does_not_matter(codes, statistic):
    values, positive = codes
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(9), 9 + rng.permutation(9)])
    np.testing.assert_allclose(statistic(values, positive), statistic(values[order], positive), atol=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_permuting_heads_permutes_scores(codes, statistic):
    values, positive = codes
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(statistic(values[:, order], positive), statistic(values, positive)[order], atol=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_name_of_a_code_does_not_matter(codes, statistic):
    values, positive = codes
    names = np.array([100, 3, 88, 0, 17, 5, 61])
    np.testing.assert_allclose(statistic(names[values], positive), statistic(values, positive), atol=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_identical_classes_score_nothing(codes, statistic):
    values = np.concatenate([codes[0][:9]] * 2)
    scores = statistic(values, codes[1])
    assert np.abs(scores).max() < 1e-12
    assert roc(np.round(scores, 9), np.arange(6) < 2).auc == 0.5


def test_scores_stay_in_their_bounds(codes):
    values, positive = codes
    scores = sae_circuits.unique_codes(values, positive)
    assert ((scores >= 0) & (scores <= min(7, 9))).all()
    share = sae_circuits.unique_codes(values, positive, normalise=True)
    assert ((share >= 0) & (share <= 1)).all()
    bits = sae_circuits.mutual_information(values, positive)
    assert ((bits >= 0) & (bits <= 1 + 1e-12)).all()


def test_pair_scores_equal_the_dense_table_of_the_paper(codes):
    values, positive = codes
    m, heads = values.max() + 1, values.shape[1]
    dense = np.zeros((2, heads, heads, m, m), dtype=int)
    for row, side in zip(values, positive, strict=True):
        for a in range(heads):
            for b in range(heads):
                dense[int(side), a, b, row[a], row[b]] += 1
    wanted = ((dense[1] > 0) & (dense[0] == 0)).sum((-1, -2)).astype(float)
    np.fill_diagonal(wanted, 0)
    np.testing.assert_array_equal(sae_circuits.pair_scores(values, positive), wanted)


def test_head_counts_walk_the_strongest_pairs():
    scores = np.array([[0.0, 5.0, 1.0], [4.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    # the list is 0 1 | 1 0 | 2 1 | ...; its first 3 * 3 // 2 = 4 items are two pairs
    assert sae_circuits.head_counts(scores).tolist() == [2, 2, 0]
    assert sae_circuits.head_counts(scores, items=6).tolist() == [2, 3, 1]


def test_mutual_information_by_hand():
    positive = np.array([True] * 4 + [False] * 4)
    codes = np.array([[1, 1, 0], [1, 1, 1], [1, 2, 2], [1, 2, 3], [2, 1, 0], [2, 1, 1], [2, 2, 2], [2, 2, 3]])
    np.testing.assert_allclose(sae_circuits.mutual_information(codes, positive), [1, 0, 0], atol=1e-12)


def test_mutual_information_equals_that_of_sklearn(codes):
    from sklearn.metrics import mutual_info_score

    values, positive = codes
    wanted = [mutual_info_score(column, positive) / np.log(2) for column in values.T]
    np.testing.assert_allclose(sae_circuits.mutual_information(values, positive), wanted, atol=1e-12)


def test_shuffling_takes_off_what_many_codes_bring_by_chance():
    rng = np.random.default_rng(0)
    positive = np.arange(40) < 20
    noise = rng.integers(0, 30, size=(40, 8))
    signal = np.where(positive, 1, 2)[:, None]
    codes = np.concatenate([noise, signal], axis=1)
    excess, sds = sae_circuits.information_above_chance(codes, positive, draws=50)
    assert sae_circuits.mutual_information(noise, positive).min() > 0.2
    assert np.abs(excess[:8].mean()) < 0.05
    assert excess[8] > 0.9
    assert sds[8] > 5 > np.abs(sds[:8]).max()


@pytest.mark.parametrize("scores", [[0, 3, 1, 1, 0, 2], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]])
def test_softmax_changes_no_auc(scores):
    truth = np.array([False, True, True, False, False, True])
    scores = np.array(scores, dtype=float)
    assert sae_circuits.softmax(scores).sum() == pytest.approx(1)
    assert roc(sae_circuits.softmax(scores), truth).auc == roc(scores, truth).auc


def test_members_are_a_share_of_the_gap_or_the_strongest():
    values = [0.3, -0.4, 0.05, 0.1]
    assert sae_circuits.members(values, share=0.1).tolist() == [True, True, False, False]
    assert sae_circuits.members(values, count=1).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="0 of 4 heads are members"):
        sae_circuits.members(values, share=0.9)
    with pytest.raises(ValueError, match="4 of 4 heads are members"):
        sae_circuits.members(values, count=4)
    for both in ({}, {"share": 0.1, "count": 2}):
        with pytest.raises(ValueError, match="give either share"):
            sae_circuits.members(values, **both)


def test_heads_are_ranked_and_ties_keep_their_order():
    assert sae_circuits.rank_heads(np.array([0.0, 2.0, 0.0, 2.0]), HEADS[:4]) == [HEADS[i] for i in (1, 3, 0, 2)]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_refuse_unequal_classes_and_shapes(codes, statistic):
    values, positive = codes
    with pytest.raises(ValueError, match="positive marks 9 prompts and leaves 8"):
        statistic(values[:17], positive[:17])
    with pytest.raises(ValueError, match=r"codes has shape \(17, 6\); 18 prompts want"):
        statistic(values[:17], positive)


# -------------------------------------------------------------------------------------------------- the experiments


@pytest.fixture(scope="module")
def small() -> HookedLM:
    """An untrained model of the small experiment's words."""
    return HookedLM(WordModel(repeats.WORDS, **(repeats.SIZES | {"n_layers": 2, "n_heads": 4, "d_model": 32})).bridge())


def test_repeats_have_one_answer_which_the_corrupt_prompt_does_not_hold(small):
    pairs = repeats.pairs(small.tokenizer, n=5, period=7, length=11)
    for pair in pairs.pairs:
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        assert clean[7:] == clean[:4] == corrupt[7:]
        assert pair.answers == [clean[4]]
        assert pair.foils == [corrupt[4]]
        assert len(set(corrupt)) == 11
        assert pair.answers[0] not in corrupt


def test_training_sequences_repeat_with_a_period_of_8_to_15():
    tokens = repeats.sequences(np.random.default_rng(0), 33)
    assert tokens.shape == (33, 32)
    assert tokens.min() >= 1
    for row in tokens:
        assert any((row[p:] == row[:-p]).all() for p in range(8, 16))


@pytest.mark.parametrize(
    ("change", "message"), [({"length": 12}, "must lie between period=12 and 24"), ({"period": 40, "length": 50}, "80")]
)
def test_repeats_refuse_what_cannot_be_built(small, change, message):
    with pytest.raises(ValueError, match=message):
        repeats.pairs(small.tokenizer, n=2, **change)


def test_a_missing_model_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="sae_circuits_runs --train"):
        repeats.load(0, tmp_path)


def test_the_command_trains_models_that_load_again(tmp_path, capsys):
    rows = sae_circuits_runs.train_models(tmp_path, [3], steps=2, n_layers=1, n_heads=2, d_model=8)
    assert rows[0]["sha256"] == repeats.file_hash(repeats.path_of(3, tmp_path))
    assert repeats.load(3, tmp_path).spec.n_heads == 2


def test_the_kept_models_are_those_of_the_record():
    from attnlab.kernels import records

    kept = records.load("sae-circuits-models")
    if kept is None:
        pytest.skip("an installation without records/")
    for row in kept.rows:
        assert repeats.file_hash(repeats.FOLDER / row["file"]) == row["sha256"]
        assert row["loss after the longest period"] < 0.2 < 4 < row["loss in the first period"]


def test_real_rows_feed_the_claims(toy_lm, toy_digits):
    rows = []
    for task, pairs in sae_circuits_runs.real_tasks(toy_digits, n=6).items():
        rows += sae_circuits_runs.real_rows(toy_lm, task, pairs, m=6, fits=(0, 1))
    impls = {row["impl"] for row in rows if row["case"] == "real" and row["pool"] == "mean"}
    assert impls == {*sae_circuits.ENCODERS, "mean difference", "attribution patching"}
    assert all(0 <= row["auc"] <= 1 for row in rows if "auc" in row)
    found = sae_circuits_runs.real_claims(rows)
    assert [row["claim"] for row in found] == ["sae-circuits/real-model", "sae-circuits/seconds"]
    assert all(row["verdict"] for row in found)


def test_rows_are_gathered_by_model():
    rows = [
        {"impl": "a", "statistic": "s", "model": model, "fit": fit, "auc": 0.5 + model / 10 + fit / 100, "seconds": 1.0}
        for model in (0, 1)
        for fit in (0, 1)
    ]
    means = sae_circuits_runs.mean_auc(rows)
    assert means == pytest.approx({0: 0.505, 1: 0.605})
    assert sae_circuits_runs.spread(rows) == pytest.approx(np.std([0, 0.01], ddof=1))
    found = sae_circuits_runs.gain(means, {0: 0.5, 1: 0.7})
    assert found["value"] == pytest.approx(-0.045)
    assert found["interval"] == pytest.approx((-0.095, 0.005))
    table = sae_circuits_runs.table(rows)
    assert table.loc["a, s", "mean AUC"] == pytest.approx(0.555)
    assert sae_circuits_runs.chosen(rows, model=1, fit=0) == [rows[2]]


def test_scored_prompts_hold_both_statistics(small):
    pairs = repeats.pairs(small.tokenizer, n=6)
    data = sae_circuits.head_writes(small, pairs)["mean"].normalised()
    truth = np.arange(8) < 3
    rows = sae_circuits_runs.scored_prompts(data, truth, pairs=(2, 6), fits=(0,), model=1)
    assert [(row["statistic"], row["pairs"]) for row in rows] == [
        (name, count) for count in (2, 6) for name in ("new codes", "information")
    ]
    whole = sae_circuits.unique_codes(
        sae_circuits.sae_codes(data, sae_circuits_runs.SMALL_M, 10, 0).values, data.positive
    )
    assert rows[2]["auc"] == roc(whole, truth).auc


def test_every_claim_is_declared_with_a_control():
    assert len(claims.load("sae-circuits")) == 7
