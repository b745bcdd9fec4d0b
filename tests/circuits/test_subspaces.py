"""Oracles of ``attnlab.circuits.subspaces``: projectors, ranks, edits, and the two-factor shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.circuits import HookedLM
from attnlab.circuits.chinchilla_mcq import Sheet, correct_letter_score, gold_matrix, label_attention, label_logits
from attnlab.circuits.subspaces import (
    compress,
    fit_heads,
    fit_subspace,
    head_vectors,
    random_subspace,
    share_of,
    two_factor_shares,
)
from attnlab.data.choices import WORDS, choices
from attnlab.models.word_model import WordModel


def coded(classes=4, n=200, width=16, noise=0.02, seed=0):
    """Vectors of orthogonal classes around a mean far from zero, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(width, width, generator=rng, dtype=torch.float64))[0][:classes]
    which = torch.arange(n) % classes
    return 9 + vectors[which] + noise * torch.randn(n, width, generator=rng, dtype=torch.float64), which, 9 + vectors


@pytest.fixture(scope="module")
def words() -> HookedLM:
    model = WordModel(WORDS, n_layers=2, n_heads=4, d_model=32, d_mlp=48, context=19, init_std=0.3, seed=1)
    return HookedLM(model.bridge())


def sheet(n=40, condition="ABCD", layout="list") -> Sheet:
    return Sheet.of(choices(np.random.default_rng(3), n, condition, 4, balanced=True, layout=layout))


# ------------------------------------------------------------------------------------------------------------ projectors


def test_all_directions_are_the_identity_and_none_the_mean():
    x, *_ = coded()
    space = fit_subspace(x)
    torch.testing.assert_close(space.project(x, 16), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(space.project(x, 0), x.mean(0).expand_as(x))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_projection_is_idempotent_and_symmetric(rank):
    x, *_ = coded(noise=1.0)
    space = fit_subspace(x)
    once = space.project(x, rank)
    torch.testing.assert_close(space.project(once, rank), once, atol=1e-9, rtol=0)
    kept = space.basis[:rank].T @ space.basis[:rank]
    torch.testing.assert_close(kept, kept.T)
    torch.testing.assert_close(space.coordinates(x, rank) @ space.basis[:rank] + space.mean, once, atol=1e-9, rtol=0)


def test_explained_variance_falls_and_adds_up():
    space = fit_subspace(coded(noise=0.5)[0])
    assert (space.explained.diff() <= 1e-12).all()
    assert float(space.explained.sum()) == pytest.approx(1.0)


def test_four_class_codes_fill_three_directions():
    """Centred, four orthogonal classes are a tetrahedron: three directions of a third each, and nothing in the fourth."""
    x, which, codes = coded()
    space = fit_subspace(x)
    np.testing.assert_allclose(space.explained[:3], [1 / 3] * 3, atol=0.01)
    assert float(space.explained[3]) < 0.001
    nearest = torch.cdist(space.project(x, 3), codes).argmin(1)
    assert torch.equal(nearest, which)
    lost = (space.project(codes, 2) - codes).square().sum() / (codes - codes.mean(0)).square().sum()
    assert float(lost) == pytest.approx(1 / 3, abs=0.02)


def test_the_mean_is_no_direction():
    """Without centring the mean, far from zero, would be the first 'feature'."""
    x, *_ = coded()
    space = fit_subspace(x)
    towards_mean = x.mean(0) / x.mean(0).norm()
    uncentred = torch.linalg.svd(x, full_matrices=False)[2][0]
    assert float((uncentred @ towards_mean).abs()) > 0.99
    assert float((space.basis[0] @ towards_mean).abs()) < 0.9


def test_a_random_subspace_keeps_the_mean_and_is_orthonormal():
    space = fit_subspace(coded()[0])
    other = random_subspace(space, 5)
    torch.testing.assert_close(other.basis @ other.basis.T, torch.eye(16, dtype=torch.float64), atol=1e-9, rtol=0)
    assert other.mean is space.mean
    assert not torch.allclose(other.basis, random_subspace(space, 6).basis)


# ----------------------------------------------------------------------------------------------------------------- edits


def test_full_rank_changes_nothing(words):
    given = sheet()
    spaces = fit_heads(words, given, ["1.2", "0.1"])
    edits = compress(words, given, spaces, {"q": 8, "k": 8, "v": 8})
    torch.testing.assert_close(label_logits(words, given, edits), label_logits(words, given), atol=1e-5, rtol=0)


def test_rank_zero_makes_attention_to_the_labels_the_same_in_every_prompt(words):
    """With constant queries and keys the scores of the labels are constant; the ratio of two of them is left."""
    given = sheet(condition="random")
    spaces = fit_heads(words, given, ["1.2"])
    table = label_attention(words, given, edits=compress(words, given, spaces, {"q": 0, "k": 0}))[1, 2]
    np.testing.assert_allclose(table / table[:, :1], np.ones_like(table), atol=1e-8)
    other = label_attention(words, given)[1, 2]
    assert np.ptp(other / other[:, :1]) > 1e-3


def test_only_the_named_head_and_part_is_touched(words):
    given = sheet()
    spaces = fit_heads(words, given, ["1.2"])
    run = words.run(given.tokens, compress(words, given, spaces, {"k": 1}), capture=("q", "k", "v"))
    base = words.run(given.tokens, capture=("q", "k", "v"))
    change = (run.acts["k", 1] - base.acts["k", 1]).abs().amax((0, 3))  # [T, H]
    touched = {tuple(cell) for cell in (change > 1e-9).nonzero().tolist()}
    assert touched == {(int(at), 2) for at in given.label_at[0]}
    assert torch.equal(run.acts["q", 1], base.acts["q", 1])
    assert torch.equal(run.acts["v", 1], base.acts["v", 1])


def test_vectors_are_those_of_the_run(words):
    given = sheet()
    table = head_vectors(words, given, ["0.3"])["0.3"]
    run = words.run(given.tokens, capture=("q", "k", "v"))
    torch.testing.assert_close(table["q"], run.acts["q", 0][:, -1, 3])
    torch.testing.assert_close(table["v"][7, 2], run.acts["v", 0][7, int(given.label_at[7, 2]), 3])
    assert table["k"].shape == (40, 4, 8)


def test_a_code_of_places_survives_other_letters_and_one_of_letters_does_not():
    """Keys made by hand: a projector from A to D in order cannot tell the two codes apart, shuffled labels can."""
    rng = np.random.default_rng(0)
    width, n = 8, 400
    codes = np.linalg.qr(rng.normal(size=(width, width)))[0][:4]
    gold = np.arange(n) % 4
    for kind, wanted in (("place", True), ("letter", False)):
        scores = {}
        for condition in ("ABCD", "shuffled"):
            letters = (
                np.tile(np.arange(4), (n, 1))
                if condition == "ABCD"
                else rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)
            )
            keys = codes[np.tile(np.arange(4), (n, 1)) if kind == "place" else letters]
            logits = 20 * np.einsum("nd,nkd->nk", codes[gold], keys)  # the query asks for the place
            pattern = np.exp(logits - logits.max(1, keepdims=True))
            pattern /= pattern.sum(1, keepdims=True)
            scores[condition] = float(correct_letter_score(gold_matrix(pattern, gold)))
        assert scores["ABCD"] > 0.99
        assert (scores["shuffled"] > 0.99) is wanted


# -------------------------------------------------------------------------------------------------------------- variance


def balanced(levels=4, copies=3, seed=0, width=5):
    rng = torch.Generator().manual_seed(seed)
    place, letter = (
        axis.flatten().repeat(copies)
        for axis in torch.meshgrid(torch.arange(levels), torch.arange(levels), indexing="ij")
    )
    effects = torch.randn(2, levels, width, generator=rng, dtype=torch.float64)
    return place, letter, effects


def test_shares_of_one_factor_and_of_both():
    place, letter, (a, b) = balanced()
    only = two_factor_shares(3 + a[place], place, letter)
    assert only == pytest.approx({"place": 1.0, "letter": 0.0, "rest": 0.0}, abs=1e-12)
    assert share_of(3 + a[place], place) == pytest.approx(1.0)
    both = two_factor_shares(a[place] + b[letter], place, letter)
    spread = [(x - x.mean(0)).square().sum() for x in (a, b)]
    assert both["place"] == pytest.approx(float(spread[0] / sum(spread)))
    assert both["rest"] == pytest.approx(0.0, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_few_vectors_are_refused():
    with pytest.raises(ValueError, match=r"63 are too few for 16 dimensions; give at least 4 d = 64"):
        fit_subspace(torch.randn(63, 16))


def test_vectors_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="all are the same"):
        fit_subspace(torch.ones(64, 4))


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match="rank: from 0 to 16"):
        fit_subspace(coded()[0]).project(torch.zeros(16), 17)


def test_an_unbalanced_design_is_refused():
    line = torch.arange(4).repeat(5)
    with pytest.raises(ValueError, match="cannot be told apart"):
        two_factor_shares(torch.randn(20, 3), line, line)


@pytest.mark.parametrize(
    ("heads", "ranks", "message"),
    [
        (["m1"], {"q": 1}, "m1 has no queries"),
        (["7.0"], {"q": 1}, "does not exist"),
        (["1.2"], {"o": 1}, "parts are q, k and v"),
    ],
)
def test_compress_refuses_what_is_no_part_of_a_head(words, heads, ranks, message):
    given = sheet()
    space = fit_subspace(torch.randn(64, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        compress(words, given, {head: dict.fromkeys("qkv", space) for head in heads}, ranks)


def test_shared_keys_are_refused_with_the_remedy(lm):
    given = Sheet(
        torch.ones(4, 6, dtype=torch.long),
        torch.tensor([[3, 4]] * 4),
        torch.tensor([[1, 2]] * 4),
        torch.tensor([0, 1, 0, 1]),
    )
    with pytest.raises(ValueError, match=r"shares a key between 3 heads.*ungrouped"):
        head_vectors(lm, given, ["0.0"])
