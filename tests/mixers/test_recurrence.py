"""The recurrence against its closed form, its symmetries, its limits, its gradients and its cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnlab.mixers import attend, chunked, decayed_scores, parallel, recurrent

FORMS = [recurrent, chunked, parallel]
exact = {"rtol": 1e-12, "atol": 1e-12}


def inputs(draw, length=37, batch=2, heads=3, width=4, values=5):
    return draw(batch, length, heads, width), draw(batch, length, heads, width), draw(batch, length, heads, values)


@pytest.mark.parametrize("length", [1, 2, 7, 37, 64])
def test_scores_a_channel_are_the_sum_over_pairs(length, draw):
    q, k = draw(2, length, 6), draw(2, length, 6)
    cumulated = F.logsigmoid(draw(2, length, 6)).cumsum(-2)
    weights = (cumulated[:, :, None] - cumulated[:, None]).clamp(max=0).exp()  # [B, C, C, K]
    wanted = torch.einsum("bic,bjc,bijc->bij", q, k, weights).tril()
    torch.testing.assert_close(decayed_scores(q, k, cumulated), wanted, **exact)
    same = cumulated[..., :1]
    torch.testing.assert_close(decayed_scores(q, k, same), decayed_scores(q, k, same.expand_as(q)), **exact)


@pytest.mark.parametrize("form", FORMS)
def test_a_fixed_decay_weighs_pairs_by_their_distance(form, draw):
    """o_t = sum_{s <= t} a^(t - s) (q_t . k_s) v_s, from the first token on: the newest token has weight 1."""
    q, k, v = inputs(draw)
    decay = torch.tensor([1.0, 0.9, 0.3], dtype=torch.float64)
    age = torch.arange(37)[:, None] - torch.arange(37)
    weights = (decay[:, None, None] ** age.clamp(min=0)).tril()  # [H, T, T]
    wanted = torch.einsum("hts,bthk,bshk,bshv->bthv", weights, q, k, v)
    o, _ = form(q, k, v, decay.log(), scale=1.0)
    torch.testing.assert_close(o, wanted, **exact)


@pytest.mark.parametrize("form", FORMS)
def test_ones_give_the_geometric_series(form):
    ones = torch.ones(1, 100, 1, 1, dtype=torch.float64)
    decay = torch.tensor([0.8], dtype=torch.float64)
    o, state = form(ones, ones, ones, decay.log())
    wanted = (1 - 0.8 ** torch.arange(1, 101, dtype=torch.float64)) / (1 - 0.8)
    torch.testing.assert_close(o.flatten(), wanted, **exact)
    torch.testing.assert_close(state.flatten(), wanted[-1:], **exact)


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_the_state_is_a_cumulated_sum(form, draw):
    q, k, v = inputs(draw)
    states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    o, state = form(q, k, v, scale=1.0)
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, states), **exact)
    torch.testing.assert_close(state, states[:, -1], **exact)


@pytest.mark.parametrize("form", FORMS)
def test_total_decay_leaves_the_token_itself(form, draw):
    q, k, v = inputs(draw)
    o, _ = form(q, k, v, torch.full((3,), -1e4, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v, **exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3,), (2, 300, 3), (2, 300, 3, 4)])
def test_strong_decay_underflows_to_zero_and_not_to_nan(form, shape, draw):
    """-8 a token is exp(-2400) over the sequence: zero even in float64, and long before that in float32."""
    q, k, v = (x.float().requires_grad_() for x in inputs(draw, 300))
    log_decay = torch.full(shape, -8.0, requires_grad=True)
    beta = torch.full((2, 300, 3), 0.5)
    for erase in (None, 0.1 * beta):
        o, state = form(q, k, v, log_decay, erase=erase)
        grads = torch.autograd.grad(o.sum() + state.sum(), [q, k, v, log_decay])
        assert all(x.isfinite().all() for x in (o, state, *grads))


def test_long_sequences_without_decay(draw):
    q, k, v = inputs(draw, 5000, batch=1, heads=1)
    o, state = chunked(q, k, v, torch.zeros(1, dtype=torch.float64), chunk_size=64)
    states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, states) / 2, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, states[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_float32_stays_near_float64(decay, draw):
    """Mild gates over 1000 tokens, where exp(-cumulated) alone would overflow: RMS error below 1e-5 of the output's RMS."""
    q, k, v = inputs(draw, 1000, batch=1)
    shape = {"head": (3,), "token": (1, 1000, 3), "channel": (1, 1000, 3, 4)}[decay]
    log_decay = F.logsigmoid(draw(*shape))
    wanted, _ = chunked(q, k, v, log_decay)
    o, _ = chunked(q.float(), k.float(), v.float(), log_decay.float())
    assert log_decay.sum(1 if len(shape) > 1 else 0).min() * (1 if len(shape) > 1 else 1000) < -300
    assert (o - wanted).pow(2).mean().sqrt() < 1e-5 * wanted.pow(2).mean().sqrt()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("erases", [False, True])
def test_no_token_reads_a_later_one(form, erases, draw):
    """Bit-identical outputs before the token that changed."""
    q, k, v = inputs(draw)
    log_decay, beta = F.logsigmoid(draw(2, 37, 3, 4)), draw(2, 37, 3).sigmoid()
    gates = {"write": beta, "erase": beta if erases else None}
    before, _ = form(q, k, v, log_decay, **gates)
    for x in (q, k, v, log_decay, beta):
        x[:, 23:] = -draw(*x[:, 23:].shape).abs() if x is log_decay else draw(*x[:, 23:].shape)
    after, _ = form(q, k, v, log_decay, **gates)
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.allclose(before[:, 23:], after[:, 23:])


def test_linear_in_values_and_in_queries(draw):
    q, k, v = inputs(draw)
    log_decay, beta = F.logsigmoid(draw(2, 37, 3)), draw(2, 37, 3).sigmoid()
    other = draw(*v.shape)

    def output(q, v):
        return chunked(q, k, v, log_decay, write=beta, erase=beta, chunk_size=8)[0]

    torch.testing.assert_close(output(q, 2 * v + other), 2 * output(q, v) + output(q, other), **exact)
    torch.testing.assert_close(output(3 * q, v), 3 * output(q, v), **exact)


def test_empty_tokens_in_front_change_nothing(draw):
    q, k, v = inputs(draw)
    log_decay = F.logsigmoid(draw(3))
    late, _ = chunked(*(F.pad(x, (0, 0, 0, 0, 5, 0)) for x in (q, k, v)), log_decay, chunk_size=8)
    torch.testing.assert_close(late[:, 5:], chunked(q, k, v, log_decay, chunk_size=8)[0], **exact)


def test_scale_defaults_to_one_over_the_root_of_the_key_width(draw):
    q, k, v = inputs(draw)
    torch.testing.assert_close(attend(q, k, v)[0], attend(q, k, v, scale=0.5)[0], **exact)


def test_gradients_obey_eulers_identity(draw):
    """q, k, v enter linearly, so <x, dx> is the same for all three, and equals <o, do>. (Lightning Attention-2)"""
    x = [y.requires_grad_() for y in inputs(draw)]
    o, _ = chunked(*x, F.logsigmoid(draw(3)), chunk_size=8)
    do = draw(*o.shape)
    grads = torch.autograd.grad(o, x, do)
    for y, dy in zip(x, grads, strict=True):
        torch.testing.assert_close((y * dy).sum(), (o * do).sum(), **exact)


def test_gradient_of_the_decay_from_those_of_queries_and_keys(draw):
    """The log decay enters as e^(t l) on q_t and e^(-s l) on k_s: d/dl = sum_t t (<q_t, dq_t> - <k_t, dk_t>)."""
    q, k, v = (x.requires_grad_() for x in inputs(draw))
    log_decay = F.logsigmoid(draw(3)).requires_grad_()
    o, _ = chunked(q, k, v, log_decay, chunk_size=8)
    dq, dk, dl = torch.autograd.grad(o, [q, k, log_decay], draw(*o.shape))
    t = torch.arange(37, dtype=torch.float64)[:, None]
    torch.testing.assert_close(dl, (t * (q * dq - k * dk).sum(-1)).sum((0, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [recurrent, lambda *x, **y: chunked(*x, **y, chunk_size=2)])
@pytest.mark.parametrize("shape", [(2,), (1, 5, 2), (1, 5, 2, 3)])
@pytest.mark.parametrize("erases", [False, True])
def test_gradients_of_everything(form, shape, erases, draw):
    x = [*inputs(draw, 5, batch=1, heads=2, width=3, values=2), -draw(*shape).abs() - 0.1]
    x += [draw(1, 5, 2), draw(1, 2, 3, 2), draw(1, 5, 2)]
    x = [y.requires_grad_() for y in x[: 7 if erases else 6]]

    def run(q, k, v, log_decay, write, state, erase=None):
        return form(q, k, v, log_decay, write=write, erase=erase, initial_state=state)

    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("erases", [False, True])
def test_the_cost_is_linear_in_length(erases, draw):
    flops = []
    for length in (256, 512):
        q, k, v = inputs(draw, length, width=16, values=16)
        gate = torch.full((2, length, 3), 0.5, dtype=torch.float64) if erases else None
        with FlopCounterMode(display=False) as counter:
            chunked(q, k, v, erase=gate, chunk_size=32)
        flops.append(counter.get_total_flops())
    assert flops[1] == 2 * flops[0]
    if not erases:
        assert flops[0] == 2 * 2 * 3 * 256 * (32 * (16 + 16) + 2 * 16 * 16)
