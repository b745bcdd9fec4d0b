"""Flow attention against the materialised graph and against a loop over tokens; conservation, causality, limits."""

from __future__ import annotations

import pytest
import torch

from attnlab.mixers import FlowState, causal_flow_attention, flow_attention, flow_quantities

FORMS = ["recurrent", "chunked", "cumsum"]
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
close = {"rtol": 1e-12, "atol": 1e-12}
B, N, M, H, K, V = 2, 13, 37, 3, 6, 5
SIGMOID_OF_ONE = 0.7310585786300049


def materialised(q, k, v, eps, clamp, competition, allocation):
    """One head, with the whole matrix of capacities; [N, K], [M, K], [M, V]. eps enters as the definitions print it."""
    sinks, sources = q.sigmoid(), k.sigmoid()
    n, m = len(q), len(k)
    incoming = torch.stack([(x + eps) @ (sources.sum(0) + eps) for x in sinks])
    outgoing = torch.stack([(x + eps) @ (sinks.sum(0) + eps) for x in sources])
    conserved_in = torch.stack([(x + eps) @ ((sources / outgoing[:, None]).sum(0) + eps) for x in sinks])
    conserved_out = torch.stack([(x + eps) @ ((sinks / incoming[:, None]).sum(0) + eps) for x in sources])
    if clamp is not None:
        conserved_out = conserved_out.clamp(-clamp, clamp)
    weights = m * conserved_out.softmax(0) if competition else torch.ones(m, dtype=q.dtype)
    o = (sinks @ sources.T / incoming[:, None]) @ (weights[:, None] * v)
    return o * (conserved_in * n / m).sigmoid()[:, None] if allocation else o


def causal_loop(q, k, v, eps, clamp, competition, allocation):
    """One head, one token after the other; every sum is taken afresh over the prefix."""
    sinks, sources = q.sigmoid(), k.sigmoid()
    incoming, outgoing, weights, values, outputs = [], [], [], [], []
    for i in range(len(q)):
        t = i + 1
        incoming.append((sinks[i] + eps) @ (sources[:t].sum(0) + eps) / t)
        outgoing.append((sources[i] + eps) @ (sinks[:t].sum(0) + eps) / t)
        fixed_sources = (sources[:t] / torch.stack(outgoing)[:, None]).sum(0)
        fixed_sinks = (sinks[:t] / torch.stack(incoming)[:, None]).sum(0)
        conserved_in = (sinks[i] + eps) @ (fixed_sources + eps) / t
        conserved_out = (sources[i] + eps) @ (fixed_sinks + eps) / t
        weights.append((conserved_out if clamp is None else conserved_out.clamp(-clamp, clamp)).exp())
        values.append(t * weights[i] / sum(weights) * v[i] if competition else v[i])
        o = sinks[i] / (t * incoming[i]) @ (sources[:t].T @ torch.stack(values))
        outputs.append(o * conserved_in.sigmoid() if allocation else o)
    return torch.stack(outputs)


def each_head(run, q, k, v, *options):
    heads = [[run(q[b, :, h], k[b, :, h], v[b, :, h], *options) for h in range(H)] for b in range(B)]
    return torch.stack([torch.stack(x, 1) for x in heads])  # [B, N, H, V]


def test_flows_are_sums_of_capacities_and_are_conserved(draw):
    q, k = draw(B, N, H, K), draw(B, M, H, K)
    a = torch.einsum("bnhk,bmhk->bhnm", q.sigmoid(), k.sigmoid())
    flow = flow_quantities(q, k, eps=0.0)
    incoming, outgoing = a.sum(-1), a.sum(-2)
    torch.testing.assert_close(flow.incoming, incoming.mT, **close)
    torch.testing.assert_close(flow.outgoing, outgoing.mT, **close)
    torch.testing.assert_close(flow.conserved_incoming, (a / outgoing[..., None, :]).sum(-1).mT, **close)
    torch.testing.assert_close(flow.conserved_outgoing, (a / incoming[..., None]).sum(-2).mT, **close)
    torch.testing.assert_close(flow.conserved_incoming.sum(1), torch.full((B, H), float(M), dtype=q.dtype), **close)
    torch.testing.assert_close(flow.conserved_outgoing.sum(1), torch.full((B, H), float(N), dtype=q.dtype), **close)


@pytest.mark.parametrize(("competition", "allocation"), SWITCHES)
@pytest.mark.parametrize(("eps", "clamp"), [(1e-6, 1.0), (0.0, None), (0.01, 0.3)])
def test_flow_attention_is_the_materialised_graph(competition, allocation, eps, clamp, draw):
    q, k, v = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V)
    o = flow_attention(q, k, v, eps=eps, clamp=clamp, competition=competition, allocation=allocation)
    torch.testing.assert_close(o, each_head(materialised, q, k, v, eps, clamp, competition, allocation), **close)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("competition", "allocation"), SWITCHES)
@pytest.mark.parametrize(("eps", "clamp"), [(1e-6, 1.0), (0.01, None)])
def test_causal_flow_attention_is_the_loop(form, competition, allocation, eps, clamp, draw):
    q, k, v = draw(B, M, H, K), draw(B, M, H, K), draw(B, M, H, V)
    switches = {"eps": eps, "clamp": clamp, "competition": competition, "allocation": allocation}
    o, state = causal_flow_attention(q, k, v, **switches, form=form, chunk_size=8)
    torch.testing.assert_close(o, each_head(causal_loop, q, k, v, *switches.values()), **close)
    assert torch.equal(state.length, torch.tensor([M, M]))


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_gets_sigmoid_of_one_times_its_value(form, draw):
    q, k, v = draw(B, M, H, K), draw(B, M, H, K), draw(B, M, H, V)
    o, _ = causal_flow_attention(q, k, v, form=form, eps=0.0)
    torch.testing.assert_close(o[:, 0], SIGMOID_OF_ONE * v[:, 0], **close)


def test_equal_keys_and_queries_give_a_share_of_the_mean(draw):
    v = draw(B, M, H, V)
    same = draw(B, 1, H, K).expand(-1, M, -1, -1)
    mean = v.mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(flow_attention(same, same, v, eps=0.0), SIGMOID_OF_ONE * mean, **close)


def test_without_distinctions_competition_is_fair(draw):
    """Equal keys send equal flows: every weight is M / M = 1, and values of 1 come out as 1."""
    same = draw(B, 1, H, K).expand(-1, M, -1, -1)
    ones = torch.ones(B, M, H, 1, dtype=torch.float64)
    o = flow_attention(draw(B, N, H, K), same, ones, eps=0.0, allocation=False)
    torch.testing.assert_close(o, torch.ones_like(o), **close)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_reads_a_later_one(form, draw):
    q, k, v = draw(B, M, H, K), draw(B, M, H, K), draw(B, M, H, V)
    before, _ = causal_flow_attention(q, k, v, form=form, chunk_size=8)
    for x in (q, k, v):
        x[:, 23:] = draw(*x[:, 23:].shape)
    after, _ = causal_flow_attention(q, k, v, form=form, chunk_size=8)
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.allclose(before[:, 23:], after[:, 23:])


def test_the_last_causal_output_is_not_the_normal_one(draw):
    q, k, v = draw(B, M, H, K), draw(B, M, H, K), draw(B, M, H, V)
    assert not torch.allclose(causal_flow_attention(q, k, v)[0][:, -1], flow_attention(q, k, v)[:, -1])


def test_order_of_tokens_does_not_matter_and_values_enter_linearly(draw):
    q, k, v, other = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V), draw(B, M, H, V)
    o = flow_attention(q, k, v)
    sinks, sources = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (N, M))
    torch.testing.assert_close(flow_attention(q[:, sinks], k[:, sources], v[:, sources]), o[:, sinks], **close)
    torch.testing.assert_close(flow_attention(q, k, 2 * v + other), 2 * o + flow_attention(q, k, other), **close)


@pytest.mark.parametrize("form", FORMS)
def test_far_logits_without_a_clamp_stay_finite(form, draw):
    """Faint keys, then strong ones: conserved flows of thousands, whose exp overflows even in float64."""
    q, k, v = (x.requires_grad_() for x in (draw(1, M, 1, K), draw(1, M, 1, K), draw(1, M, 1, V)))
    faint = torch.where(torch.arange(M) < M - 1, -9.0, 9.0)[:, None, None]
    o, state = causal_flow_attention(q, k + faint, v, clamp=None, form=form)
    grads = torch.autograd.grad(o.sum(), [q, k, v])
    assert state.log_weight.max() > 1000
    assert all(x.isfinite().all() for x in (o, *state, *grads))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, draw):
    x = [draw(1, 5, 1, 3).requires_grad_(), draw(1, 5, 1, 3).requires_grad_(), draw(1, 5, 1, 2).requires_grad_()]
    # A wide clamp keeps clear of its kink.
    assert torch.autograd.gradcheck(lambda *x: causal_flow_attention(*x, clamp=10.0, form=form, chunk_size=2)[0], x)
    assert torch.autograd.gradcheck(lambda *x: flow_attention(*x, clamp=10.0), x)


def test_bad_input_is_refused(draw):
    q, k, v = draw(B, N, H, K), draw(B, M, H, K), draw(B, M, H, V)
    with pytest.raises(ValueError, match=r"k: shape \(2, 37, 3, 6\), but \[B, T, H, K\] of q = \(2, 13, 3, 6\)"):
        causal_flow_attention(q, k, v)
    with pytest.raises(ValueError, match=r"v: shape \(2, 36, 3, 5\), but"):
        flow_attention(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="clamp=0 must be positive, or None for no bound"):
        flow_attention(q, k, v, clamp=0)
    with pytest.raises(ValueError, match="form='parallel' is not known; choose one of recurrent, chunked, cumsum"):
        causal_flow_attention(k, k, v, form="parallel")
    _, state = causal_flow_attention(k, k, v)
    with pytest.raises(ValueError, match=r"initial_state.sources: shape \(2, 3, 6\), but .* = \(1, 3, 6\)"):
        causal_flow_attention(k[:1], k[:1], v[:1], initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state.log_weight: dtype torch.float32"):
        causal_flow_attention(k, k, v, initial_state=state._replace(log_weight=state.log_weight.float()))
    with pytest.raises(
        ValueError, match=r"initial_state.length: dtype torch.int32, but torch.int64 is wanted; cast it"
    ):
        causal_flow_attention(k, k, v, initial_state=state._replace(length=state.length.int()))
    with pytest.raises(ValueError, match=r"initial_state.length: on meta, but q is on cpu; move one of them"):
        causal_flow_attention(k, k, v, initial_state=state._replace(length=state.length.to("meta")))
    with pytest.raises(ValueError, match=r"initial_state.length: int, but a tensor is wanted; see FlowState"):
        causal_flow_attention(k, k, v, initial_state=state._replace(length=M))
    with pytest.raises(ValueError, match=r"initial_state: tuple, but the FlowState that an earlier call returned"):
        causal_flow_attention(k, k, v, initial_state=tuple(state))


@pytest.mark.parametrize("form", FORMS)
def test_every_sequence_counts_its_own_tokens(form, draw):
    """One batch whose rows have passed 5 and 23 tokens."""
    pasts, rest = (
        [[draw(1, n, H, width) for width in (K, K, V)] for n in (5, 23)],
        [draw(2, 9, H, w) for w in (K, K, V)],
    )
    states = [causal_flow_attention(*past)[1] for past in pasts]
    joint = FlowState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
    o, state = causal_flow_attention(*rest, form=form, chunk_size=4, initial_state=joint)
    for n, past in enumerate(pasts):
        whole = [torch.cat([before, after[n : n + 1]], 1) for before, after in zip(past, rest, strict=True)]
        wanted, end = causal_flow_attention(*whole)
        torch.testing.assert_close(o[n], wanted[0, -9:], **close)
        for got, part in zip(state, end, strict=True):
            torch.testing.assert_close(got[n], part[0], **close)
