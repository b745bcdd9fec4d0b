"""Named mixers against their papers' formulas, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab import mixers

close = {"rtol": 1e-10, "atol": 1e-10}
B, T, H, K, V = 2, 37, 3, 6, 5


def qkv(draw):
    return draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)


def test_normalised_linear_attention_is_a_weighted_mean(draw):
    q, k, v = qkv(draw)
    weights = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    wanted = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    o, state = mixers.linear_attention(q, k, v)
    torch.testing.assert_close(o, wanted, rtol=1e-8, atol=1e-8)  # eps = 1e-10 against denominators near 1
    torch.testing.assert_close(state[..., -1], (F.elu(k) + 1).sum(1), **close)
    o, _ = mixers.linear_attention(q, k, v, scale=1.0, eps=0.5)
    wanted = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 0.5), v)
    torch.testing.assert_close(o, wanted, **close)


def test_linear_attention_takes_any_features(draw):
    q, k, v = qkv(draw)
    o, state = mixers.linear_attention(q, k, v, feature_map=mixers.taylor_features)
    assert o.shape == v.shape
    assert state.shape == (B, H, 1 + K + K * K, V + 1)


def test_taylor_features_give_the_second_order_of_exp(draw):
    q, k = draw(10, K), draw(10, K)
    s = (q * k).sum(-1) / K**0.5
    product = (mixers.taylor_features(q) * mixers.taylor_features(k)).sum(-1)
    torch.testing.assert_close(product, 1 + s + s**2 / 2, **close)


def test_rotation_sees_distances_only(draw):
    q, k, _ = qkv(draw)
    near = torch.einsum("bthk,bshk->bhts", mixers.rotate(q), mixers.rotate(k))
    far = torch.einsum("bthk,bshk->bhts", mixers.rotate(q, offset=1000), mixers.rotate(k, offset=1000))
    torch.testing.assert_close(near, far, **close)
    torch.testing.assert_close(mixers.rotate(q).norm(dim=-1), q.norm(dim=-1), **close)
    assert torch.equal(mixers.rotate(q)[:, 0], q[:, 0])
    assert not torch.allclose(near, torch.einsum("bthk,bshk->bhts", q, k))


def test_hgrn_is_a_leaky_average(draw):
    x, log_forget, h = draw(B, T, K), F.logsigmoid(draw(B, T, K)), draw(B, K)
    o, end = mixers.hgrn(x, log_forget, initial_state=h)
    forget = log_forget.exp()
    for t in range(T):
        h = forget[:, t] * h + (1 - forget[:, t]) * x[:, t]
        torch.testing.assert_close(o[:, t], h, **close)
    torch.testing.assert_close(end, h, **close)


def test_hgrn2_writes_what_it_lets_go(draw):
    """With values of 1 and fixed gates, the state converges to 1 in every channel: a leaky average of ones."""
    log_forget = F.logsigmoid(draw(K)).expand(1, 2000, 1, K)
    _, state = mixers.hgrn2(draw(1, 2000, 1, K), torch.ones(1, 2000, 1, 1, dtype=torch.float64), log_forget)
    torch.testing.assert_close(state, torch.ones_like(state), **close)


def test_ssd_is_the_discretised_state_space(draw):
    """h_t = exp(-dt A) h_{t-1} + dt B x, y = C h + D x (Mamba-2, eq. 1 with A = -exp(a_log))."""
    x, b, c, dt = draw(B, T, H, V), draw(B, T, H, K), draw(B, T, H, K), F.softplus(draw(B, T, H))
    a_log, skip = draw(H), draw(H)
    o, end = mixers.ssd(x, dt, a_log, b, c, skip=skip)
    h = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t in range(T):
        keep = (-dt[:, t] * a_log.exp()).exp()
        h = keep[..., None, None] * h + (dt[:, t, :, None] * b[:, t])[..., None] * x[:, t, :, None]
        wanted = torch.einsum("bhk,bhkv->bhv", c[:, t], h) + skip[:, None] * x[:, t]
        torch.testing.assert_close(o[:, t], wanted, **close)
    torch.testing.assert_close(end, h, **close)


@pytest.mark.parametrize("gated", [False, True])
def test_the_delta_rule_is_a_step_of_regression(gated, draw):
    """S' = S - b k (S^T k - v)^T on the decayed state: one gradient step on |S^T k - v|^2 / 2."""
    q, k, v = qkv(draw)
    beta, log_decay = draw(B, T, H).sigmoid(), F.logsigmoid(draw(B, T, H))
    if gated:
        o, _ = mixers.gated_delta_rule(q, k, v, log_decay, beta)
    else:
        o, _ = mixers.delta_rule(q, k, v, beta)
    state = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t in range(T):
        state = (log_decay[:, t].exp()[..., None, None] * state if gated else state).requires_grad_()
        loss = (torch.einsum("bhkv,bhk->bhv", state, k[:, t]) - v[:, t]).pow(2).sum() / 2
        (gradient,) = torch.autograd.grad(loss, state)
        state = (state - beta[:, t, :, None, None] * gradient).detach()
        wanted = torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / K**0.5
        torch.testing.assert_close(o[:, t], wanted, **close)


def test_bad_input_is_refused(draw):
    q, k, v = qkv(draw)
    with pytest.raises(ValueError, match=r"beta: values from .* to 2.5, but \[0, 2\] is wanted"):
        mixers.delta_rule(q, k, v, torch.full((B, T, H), 2.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="beta: holds NaN"):
        mixers.gated_delta_rule(q, k, v, -draw(B, T, H).abs(), torch.full((B, T, H), torch.nan))
    with pytest.raises(ValueError, match=r"log_decay: shape \(2, 37, 3\) has 3 axes, but \[B, T, H, K\]"):
        mixers.gla(q, k, v, -draw(B, T, H).abs())
    with pytest.raises(ValueError, match=r"log_decay: shape \(2, 37, 3\) has 3 axes, but \[H\]"):
        mixers.lightning_attention(q, k, v, -draw(B, T, H).abs())
    with pytest.raises(ValueError, match=r"log_decay: up to 0\.5"):
        mixers.lightning_attention(q, k, v, torch.full((H,), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="x: K=5 channels do not pair up"):
        mixers.retention(q[..., :5], k[..., :5], v)
    with pytest.raises(ValueError, match=r"dt: values from -1 .* \[0, inf\]"):
        mixers.ssd(v, -torch.ones(B, T, H, dtype=torch.float64), draw(H), k, q)
    with pytest.raises(ValueError, match=r"skip: shape \(1,\), but \[H\] = \(3,\)"):
        mixers.ssd(v, torch.ones(B, T, H, dtype=torch.float64), draw(H), k, q, skip=draw(1))
    with pytest.raises(ValueError, match=r"log_forget: shape \(2, 36, 6\)"):
        mixers.hgrn(draw(B, T, K), -draw(B, T - 1, K).abs())
    with pytest.raises(ValueError, match=r"initial_state: shape \(1, 6\), but \[B, D\] = \(2, 6\)"):
        mixers.hgrn(draw(B, T, K), -draw(B, T, K).abs(), initial_state=draw(1, K))
    with pytest.raises(ValueError, match="form='scan' is not known; choose one of recurrent, chunked, parallel"):
        mixers.gla(q, k, v, -draw(B, T, H, K).abs(), form="scan")
