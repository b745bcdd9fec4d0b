"""Where one mixer is another: reductions between the named mixers, and to softmax attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab import mixers

close = {"rtol": 1e-10, "atol": 1e-10}
B, T, H, K, V = 2, 37, 3, 6, 5


@pytest.fixture
def qkv(draw):
    return draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)


def same(x, y):
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a, b, **close)


def softmax_attention(q, k, v, **options):
    """PyTorch's, token-major."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def test_gla_with_open_gates_is_linear_attention(qkv):
    q, k, v = qkv
    same(
        mixers.gla(q, k, v, torch.zeros_like(k)),
        mixers.linear_attention(q, k, v, feature_map=lambda x: x, normalise=False),
    )


def test_gla_with_constant_gates_is_retention(qkv):
    q, k, v = qkv
    constant = mixers.retnet_log_decay(H, dtype=torch.float64)[:, None].expand(B, T, H, K)
    same(mixers.gla(q, k, v, constant), mixers.retention(q, k, v, rotary=False))
    same(mixers.gla(mixers.rotate(q), mixers.rotate(k), v, constant), mixers.retention(q, k, v))


def test_gla_with_shared_gates_is_ssd(qkv, draw):
    q, k, v = qkv
    dt, a_log = F.softplus(draw(B, T, H)), draw(H)
    shared = (-dt * a_log.exp())[..., None].expand(B, T, H, K)
    same(mixers.gla(q, k, dt[..., None] * v, shared, scale=1.0), mixers.ssd(v, dt, a_log, b=k, c=q))


def test_hgrn2_is_gla_with_keys_from_the_gate(qkv, draw):
    q, _, v = qkv
    log_forget = F.logsigmoid(draw(B, T, H, K))
    same(mixers.hgrn2(q, v, log_forget), mixers.gla(q, 1 - log_forget.exp(), v, log_forget))


def test_hgrn_is_hgrn2_with_one_channel_a_head(draw):
    x, log_forget = draw(B, T, 7), F.logsigmoid(draw(B, T, 7))
    ones = torch.ones(B, T, 7, 1, dtype=torch.float64)
    o, state = mixers.hgrn2(ones, x[..., None], log_forget[..., None])
    same(mixers.hgrn(x, log_forget), (o[..., 0], state[..., 0, 0]))


def test_gated_delta_rule_with_open_gates_is_the_delta_rule(qkv, draw):
    q, k, v = qkv
    beta = draw(B, T, H).sigmoid()
    same(
        mixers.gated_delta_rule(q, k, v, torch.zeros(B, T, H, dtype=torch.float64), beta),
        mixers.delta_rule(q, k, v, beta),
    )


def test_with_orthonormal_keys_nothing_is_erased_until_a_key_repeats(draw):
    q, v = draw(1, 9, 1, 8), draw(1, 9, 1, V)
    basis, _ = torch.linalg.qr(draw(8, 8))
    k = torch.cat([basis, basis[2:3]])[None, :, None]  # the ninth key is the third again
    ones = torch.ones(1, 9, 1, dtype=torch.float64)
    delta, _ = mixers.delta_rule(q, k, v, ones)
    hebb, _ = mixers.linear_attention(q, k, v, feature_map=lambda x: x, normalise=False)
    torch.testing.assert_close(delta[:, :8], hebb[:, :8], **close)
    assert not torch.allclose(delta[:, 8], hebb[:, 8])


@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
def test_the_delta_rule_writes_then_reads(qkv, draw, form):
    """b = 1 and a unit key: reading with the key returns the value, whatever was stored before."""
    _, k, v = qkv
    k = F.normalize(k, dim=-1)
    ones = torch.ones(B, T, H, dtype=torch.float64)
    o, _ = mixers.delta_rule(k, k, v, ones, scale=1.0, initial_state=100 * draw(B, H, K, V), form=form)
    torch.testing.assert_close(o, v, **close)


def test_the_delta_rule_at_two_reflects(draw):
    """b = 2 and v = 0 multiplies the state by 1 - 2 k k^T, which undoes itself."""
    k = F.normalize(draw(1, 1, 1, K), dim=-1)
    start, none = draw(1, 1, K, V), torch.zeros(1, 1, 1, V, dtype=torch.float64)
    two = torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    _, mirrored = mixers.delta_rule(k, k, none, two, initial_state=start)
    unit = k[0, 0, 0]
    torch.testing.assert_close(mirrored[0, 0], (torch.eye(K) - 2 * torch.outer(unit, unit)) @ start[0, 0], **close)
    _, back = mixers.delta_rule(k, k, none, two, initial_state=mirrored)
    torch.testing.assert_close(back, start, **close)


def test_one_channel_with_beta_up_to_two_computes_parity():
    bits = torch.randint(2, (1, 200, 1), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 200, 1, 1, dtype=torch.float64)
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    o, _ = mixers.delta_rule(one, one, 0 * one, 2.0 * bits.double(), initial_state=start)
    assert torch.equal(o.flatten() < 0, bits.flatten().cumsum(0) % 2 == 1)


def test_taylor_features_approach_softmax_for_small_scores(qkv):
    """The error of exp's second order is O(s^3) in the scores: half the scores, an eighth of the error."""
    q, k, v = qkv

    def error(size):
        o, _ = mixers.linear_attention(size * q, k, v, feature_map=mixers.taylor_features)
        return (o - softmax_attention(size * q, k, v, is_causal=True)).abs().max()

    assert error(0.01) < 1e-5
    assert error(0.01) / error(0.005) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("form", ["recurrent", "scan", "chunked", "parallel"])
def test_aaren_is_softmax_attention_with_one_query(draw, form):
    q, k, v = draw(H, K), draw(B, T, H, K), draw(B, T, H, V)
    o, _ = mixers.aaren((q * k).sum(-1) / K**0.5, v, form=form)
    wanted = softmax_attention(q.expand(B, T, H, K), k, v, is_causal=True)
    torch.testing.assert_close(o, wanted, **close)
    own = softmax_attention(draw(B, T, H, K), k, v, is_causal=True)
    assert not torch.allclose(o, own)  # queries of the tokens' own are another function


def test_a_window_of_everything_is_attention_and_a_window_of_one_is_the_value(qkv):
    q, k, v = qkv
    full = mixers.blockwise_attention(q, k, v, causal=True, block_size=8, window=T)
    torch.testing.assert_close(full, softmax_attention(q, k, v, is_causal=True), **close)
    torch.testing.assert_close(mixers.blockwise_attention(q, k, v, causal=True, block_size=8, window=1), v, **close)
