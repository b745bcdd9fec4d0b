"""Softmax in pieces: the algebra of the merge, its guards, and everything that is built on it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attnlab.mixers import (
    Summary,
    aaren,
    blockwise_attention,
    empty,
    leaf,
    merge,
    read,
    split_kv_attention,
    summarise,
)

FORMS = ["recurrent", "scan", "chunked", "parallel"]
close = {"rtol": 1e-12, "atol": 1e-12}
B, T, H, V = 2, 37, 3, 5


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **close)


def masked_softmax(s, v):
    """The whole matrix of weights."""
    scores = s.mT[:, :, None, :].expand(-1, -1, s.shape[1], -1)  # [B, H, T, T]
    above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(above, -math.inf).softmax(-1), v)


def softmax_attention(q, k, v, **options):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def test_merge_is_associative_and_commutative_with_a_neutral_element(draw):
    a, b, c = (leaf(50 * draw(100), draw(100, V)) for _ in range(3))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b), merge(b, a))
    nothing = empty((100,), V, dtype=torch.float64)
    same(merge(a, nothing), a)
    same(merge(nothing, a), a)


def test_two_empty_pieces_are_an_empty_piece():
    nothing = empty((2, 3), V)
    both = merge(nothing, nothing)
    assert torch.equal(both.m, nothing.m)
    assert torch.equal(both.u, nothing.u)
    assert torch.equal(read(both), torch.zeros(2, 3, V))


def test_a_leaf_is_its_score_a_one_and_its_value(draw):
    s, v = draw(4), draw(4, V)
    s[2] = -math.inf
    summary = leaf(s, v)
    assert torch.equal(summary.m, s)
    assert summary.u.tolist() == [1, 1, 0, 1]
    assert torch.equal(summary.w, v * summary.u[:, None])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 37, 64, 100])
@pytest.mark.parametrize("spread", [1, 50])
def test_every_form_is_the_masked_softmax(form, length, spread, draw):
    s, v = spread * draw(B, length, H), draw(B, length, H, V)
    o, _ = aaren(s, v, form=form, chunk_size=8)
    torch.testing.assert_close(o, masked_softmax(s, v), **close)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_sharp_and_shifted_scores_stay_finite_in_float32(form, shift, draw):
    """Rising scores: a later one is larger by far more than float32's exp can hold (88)."""
    s = (50 * draw(1, T, 1)).sort(1).values.float().requires_grad_()
    v = draw(1, T, 1, V).float().requires_grad_()
    o, end = aaren(s + shift, v, form=form, chunk_size=8)
    grads = torch.autograd.grad(o.sum(), [s, v])
    assert all(x.isfinite().all() for x in (o, *end, *grads))


@pytest.mark.parametrize("form", FORMS)
def test_known_averages(form, draw):
    v = draw(B, T, H, V)
    count = torch.arange(1, T + 1, dtype=torch.float64)[:, None, None]
    o, end = aaren(torch.full((B, T, H), -300.0, dtype=torch.float64), v, form=form, chunk_size=8)
    torch.testing.assert_close(o, v.cumsum(1) / count, **close)  # constant scores: the running mean
    torch.testing.assert_close(end.u, torch.full((B, H), float(T), dtype=torch.float64))
    s = draw(B, T, H)
    s[:, 11] = 1000
    o, _ = aaren(s, v, form=form, chunk_size=8)
    assert torch.equal(o[:, 11:], v[:, 11:12].expand(-1, T - 11, -1, -1))  # one dominating score: its value
    assert not torch.allclose(o[:, 10], v[:, 11])


@pytest.mark.parametrize("form", FORMS)
def test_invariances(form, draw):
    s, v = draw(B, T, H), draw(B, T, H, V)
    o, _ = aaren(s, v, form=form, chunk_size=8)
    torch.testing.assert_close(aaren(s + 7, v, form=form, chunk_size=8)[0], o, **close)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist() + list(range(20, T))
    torch.testing.assert_close(aaren(s[:, order], v[:, order], form=form, chunk_size=8)[0][:, 20:], o[:, 20:], **close)
    assert (o <= v.cummax(1).values + 1e-12).all()  # inside the hull of the values so far
    assert (o >= v.cummin(1).values - 1e-12).all()
    later_s, later_v = s.clone(), v.clone()
    later_s[:, 23:], later_v[:, 23:] = draw(B, T - 23, H), draw(B, T - 23, H, V)
    assert torch.equal(aaren(later_s, later_v, form=form, chunk_size=8)[0][:, :23], o[:, :23])


@pytest.mark.parametrize("form", FORMS)
def test_a_score_of_minus_infinity_leaves_the_token_out(form, draw):
    """Also at the start, where nothing has been seen yet: output 0. No gradient turns into NaN."""
    s, v = draw(B, T, H), draw(B, T, H, V)
    out = [0, 1, 2, 8, 9, 20]
    s[:, out] = -math.inf
    left = [t for t in range(T) if t not in out]
    s, v = s.requires_grad_(), v.requires_grad_()
    o, end = aaren(s, v, form=form, chunk_size=4)
    few, few_end = aaren(s[:, left], v[:, left], form=form, chunk_size=4)
    torch.testing.assert_close(o[:, left], few, **close)
    same(end, few_end)
    assert torch.equal(o[:, :3], torch.zeros(B, 3, H, V, dtype=torch.float64))
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum() + end.w.sum(), [s, v]))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, draw):
    s, v = draw(1, 9, 2).requires_grad_(), draw(1, 9, 2, 3).requires_grad_()
    past = leaf(draw(1, 2), draw(1, 2, 3))
    assert torch.autograd.gradcheck(lambda s, v: aaren(s, v, form=form, chunk_size=4, initial=past)[0], [s, v])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_through_the_summary(form, draw):
    """The unit m carries none, and none is missing: the log of the sum m + log u has the softmax as its gradient."""
    s, v = draw(1, 9, 2).requires_grad_(), draw(1, 9, 2, 3)
    early, late = s[:, :4], s[:, 4:]
    _, past = aaren(early, v[:, :4], form=form, chunk_size=2)
    _, end = aaren(late, v[:, 4:], form=form, chunk_size=2, initial=past)
    (grad,) = torch.autograd.grad((end.m + end.u.log()).sum(), s)
    torch.testing.assert_close(grad, s.softmax(1), **close)


def test_gradient_of_the_scores_in_closed_form(draw):
    """ds_i = sum_{t >= i} p_ti (v_i - o_t) . do_t with p_ti = exp(s_i - lse_t)."""
    s, v = draw(1, T, 1).requires_grad_(), draw(1, T, 1, V)
    o, _ = aaren(s, v, chunk_size=8)
    do = draw(*o.shape)
    (ds,) = torch.autograd.grad(o, s, do)
    p = (s[0, :, 0] - s[0, :, 0].logcumsumexp(0)[:, None]).exp().tril()  # [T, T]
    gap = v[0, None, :, 0] - o[0, :, None, 0]  # [T, T, V]
    torch.testing.assert_close(ds[0, :, 0], (p[..., None] * gap * do[0, :, None, 0]).sum((0, 2)), **close)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [1, 8, 37, 100])
def test_blockwise_attention_is_attention(causal, block_size, draw):
    q, k, v = 5 * draw(B, T, H, 6), 5 * draw(B, T, H, 6), draw(B, T, H, V)
    o = blockwise_attention(q, k, v, causal=causal, block_size=block_size)
    torch.testing.assert_close(o, softmax_attention(q, k, v, is_causal=causal), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 5, 36, 37])
def test_windows_mask_what_is_further_back(window, draw):
    q, k, v = draw(B, T, H, 6), draw(B, T, H, 6), draw(B, T, H, V)
    ago = torch.arange(T)[:, None] - torch.arange(T)
    wanted = softmax_attention(q, k, v, attn_mask=(ago >= 0) & (ago < window), scale=0.3)
    o = blockwise_attention(q, k, v, causal=True, block_size=8, window=window, scale=0.3)
    torch.testing.assert_close(o, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("splits", [1, 2, 5, 37])
def test_split_keys_give_the_same_attention(splits, draw):
    q, k, v = draw(B, 4, H, 6), draw(B, T, H, 6), draw(B, T, H, V)
    wanted = softmax_attention(q, k, v)
    torch.testing.assert_close(split_kv_attention(q, k, v, splits), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(blockwise_attention(q, k, v, causal=False, block_size=5), wanted, rtol=1e-10, atol=1e-10)


def test_blocks_may_be_merged_in_any_order(draw):
    q, k, v = draw(B, 4, H, 6), draw(B, 9, H, 6), draw(B, 9, H, V)
    blocks = [summarise(q, k[:, i : i + 3], v[:, i : i + 3]) for i in (0, 3, 6)]
    for a, b, c in itertools.permutations(blocks):
        torch.testing.assert_close(read(merge(merge(a, b), c)), softmax_attention(q, k, v), **close)


def test_attention_in_blocks_has_gradients(draw):
    x = [draw(1, 5, 1, 3).requires_grad_(), draw(1, 5, 1, 3).requires_grad_(), draw(1, 5, 1, 2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: blockwise_attention(*x, causal=True, block_size=2), x)


def test_bad_input_is_refused(draw):
    s, v, q = draw(B, T, H), draw(B, T, H, V), draw(B, T, H, 6)
    with pytest.raises(ValueError, match="s: holds NaN or"):
        aaren(s.log(), v)
    with pytest.raises(ValueError, match="s: holds NaN or"):
        aaren(s.masked_fill(s > 1, math.inf), v)
    with pytest.raises(ValueError, match=r"s: shape \(2, 0, 3\) has T=0; pass at least one"):
        aaren(s[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r"v: shape \(2, 36, 3, 5\), but"):
        aaren(s, v[:, 1:])
    with pytest.raises(ValueError, match="form='tree' is not known; choose one of recurrent, scan, chunked, parallel"):
        aaren(s, v, form="tree")
    with pytest.raises(ValueError, match="chunk_size=0 must be a whole number, at least 1"):
        aaren(s, v, chunk_size=0)
    with pytest.raises(ValueError, match=r"initial.m: shape \(1, 3\), but \[B, H\] = \(2, 3\)"):
        aaren(s, v, initial=empty((1, H), V, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"initial.m: dtype torch.float32, but v has torch.float64"):
        aaren(s, v, initial=empty((B, H), V))
    with pytest.raises(ValueError, match="window=38 needs causal=True and at most T=37"):
        blockwise_attention(q, q, v, causal=True, block_size=8, window=38)
    with pytest.raises(ValueError, match="window=5 needs causal=True"):
        blockwise_attention(q, q, v, causal=False, block_size=8, window=5)
    with pytest.raises(ValueError, match=r"k: shape \(2, 36, 3, 6\), but \[B, T, H, K\] of q"):
        blockwise_attention(q, q[:, 1:], v[:, 1:], causal=True, block_size=8)
    with pytest.raises(ValueError, match="splits=38 is more than the S=37 keys"):
        split_kv_attention(q, q, v, 38)


def test_summaries_are_plain_tuples(draw):
    m, u, w = leaf(draw(B, H), draw(B, H, V))
    assert read(Summary(m, u, w)).shape == (B, H, V)
