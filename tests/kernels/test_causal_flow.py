"""Causal flow attention without a GPU: the torch form answers, in the same dtypes and with the same complaints."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch

from attnlab.kernels.causal_flow import causal_flow
from attnlab.mixers import FlowState, causal_flow_attention

B, T, H, K, V = 2, 63, 3, 12, 20
BOUNDS = (0, 1, 38, 63)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, H, width, generator=generator, dtype=torch.float64) for width in (K, K, V)]


@pytest.mark.parametrize("clamp", [1.0, 5.0])
def test_it_is_the_torch_form(qkv, clamp):
    for x in qkv:
        x.requires_grad_()
    (o, state), (wanted, end) = causal_flow(*qkv, clamp=clamp), causal_flow_attention(*qkv, clamp=clamp)
    assert torch.equal(o, wanted)
    assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))
    for got, exact in zip(torch.autograd.grad(o.sum(), qkv), torch.autograd.grad(wanted.sum(), qkv), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_smaller_dtypes_are_summed_in_float32_and_come_back(qkv, dtype, tolerance):
    """All that is lost is the rounding of the output: the reference sees the rounded inputs."""
    small = [x.to(dtype) for x in qkv]
    o, state = causal_flow(*small)
    assert {part.dtype for part in state} == {torch.float32, torch.int64}
    wanted, _ = causal_flow_attention(*(x.double() for x in small))
    assert o.dtype == dtype
    assert (o.double() - wanted).norm() / wanted.norm() < tolerance


def test_many_half_precision_tokens_do_not_overflow():
    """8 channels of phi near 1 over 10,000 tokens: sums beyond the 65,504 that half precision holds."""
    q = k = torch.full((1, 10_000, 1, 8), 9.0, dtype=torch.float16)
    o, _ = causal_flow(q, k, torch.ones(1, 10_000, 1, 2, dtype=torch.float16))
    torch.testing.assert_close(o, torch.full_like(o, 1.0).sigmoid())


def test_views_of_one_projection(qkv):
    joint = torch.cat(qkv, -1)
    q, k, v = joint.split([K, K, V], -1)
    assert not q.is_contiguous()
    torch.testing.assert_close(causal_flow(q, k, v)[0], causal_flow(*qkv)[0], rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match=r"q: shape \(2, 0, 3, 12\) has T=0; pass at least one"):
        causal_flow(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r"k: shape \(2, 63, 3, 11\), but \[B, T, H, K\] of q = \(2, 63, 3, 12\)"):
        causal_flow(q, k[..., 1:], v)
    with pytest.raises(ValueError, match=r"v: shape \(2, 62, 3, 20\), but"):
        causal_flow(q, k, v[:, 1:])
    with pytest.raises(ValueError, match=r"clamp=0\.0 must be positive"):
        causal_flow(q, k, v, clamp=0.0)
    with pytest.raises(ValueError, match="k: on meta, but q is on cpu; move one of them"):
        causal_flow(q, k.to("meta"), v)
    with pytest.raises(ValueError, match=r"q: shape \(63, 3, 12\) has 3 axes, but \[B, T, H, K\] is wanted"):
        causal_flow(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="K=257 is wider than a program can hold; use heads of at most 256 channels"):
        causal_flow(*(x[..., :1].expand(-1, -1, -1, 257) for x in (q, k)), v)
    with pytest.raises(ValueError, match="V=300 is wider than a program can hold; use heads of at most 256 channels"):
        causal_flow(q, k, v[..., :1].expand(-1, -1, -1, 300))
    with pytest.raises(ValueError, match=r"k: dtype torch\.float32, but q has torch\.float64; cast one of them"):
        causal_flow(q, k.float(), v)
    with pytest.raises(ValueError, match=r"v: dtype torch\.float16, but q has torch\.float64; cast one of them"):
        causal_flow(q, k, v.half())
    with pytest.raises(ValueError, match=r"q: dtype torch\.int64, but a floating dtype is wanted; cast it"):
        causal_flow(q.long(), k.long(), v.long())


@pytest.mark.parametrize("clamp", [None, -1.0, 0, math.inf, math.nan])
def test_a_clamp_that_bounds_nothing_is_refused(clamp, qkv):
    """The mixer takes None, the kernel's sums of exponentials would overflow."""
    with pytest.raises(ValueError, match=rf"clamp={clamp} must be positive and finite; .*takes None for no bound"):
        causal_flow(*qkv, clamp=clamp)


def test_the_widest_heads_run(qkv):
    q, k, v = (x[..., :1].expand(-1, -1, -1, 256) for x in qkv)
    assert torch.equal(causal_flow(q, k, v)[0], causal_flow_attention(q, k, v)[0])


def one_after_the_other(q, k, v, past: FlowState) -> tuple[torch.Tensor, FlowState]:
    """The packed sequences of `BOUNDS`, each in a call of its own."""
    outs, ends = [], []
    for n, (first, last) in enumerate(pairwise(BOUNDS)):
        here = FlowState(*(part[n : n + 1] for part in past))
        o, end = causal_flow_attention(*(x[:, first:last] for x in (q, k, v)), initial_state=here)
        outs.append(o)
        ends.append(end)
    return torch.cat(outs, 1), FlowState(*map(torch.cat, zip(*ends, strict=True)))


@pytest.fixture
def past(qkv) -> FlowState:
    """Of three sequences, which had 5, 20 and 63 tokens."""
    ends = [causal_flow_attention(*(x[:1, :length].roll(length, -1) for x in qkv))[1] for length in (5, 20, T)]
    return FlowState(*map(torch.cat, zip(*ends, strict=True)))


def differentiable(state: FlowState) -> FlowState:
    return FlowState(*(part.detach().requires_grad_(part.is_floating_point()) for part in state))


def test_the_state_carries_across_a_split(qkv):
    whole, last = causal_flow(*qkv)
    before, state = causal_flow(*(x[:, :41] for x in qkv))
    after, final = causal_flow(*(x[:, 41:] for x in qkv), initial_state=state)
    torch.testing.assert_close(torch.cat([before, after], 1), whole, rtol=1e-12, atol=1e-12)
    for x, y in zip(final, last, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_with_gradients_of_everything(dtype, qkv, past):
    tokens, past = [x[:1].detach().requires_grad_() for x in qkv], differentiable(past)
    leaves = [*tokens, *past[:-1]]
    results = []
    for form in (
        lambda: causal_flow(*tokens, initial_state=past, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype)),
        lambda: one_after_the_other(*tokens, past),
    ):
        o, end = form()
        loss = o.square().sum() + sum(part.sin().sum() for part in end[:-1])
        results.append([o, *end, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_state_may_be_left_out(qkv):
    o, nothing = causal_flow(*qkv, return_state=False)
    assert nothing is None
    assert torch.equal(o, causal_flow(*qkv)[0])


def test_a_float32_state_serves_all_dtypes(qkv):
    half = [x.bfloat16() for x in qkv]
    _, state = causal_flow(*half)
    o, end = causal_flow(*half, initial_state=state)
    assert (o.dtype, end.memory.dtype) == (torch.bfloat16, torch.float32)
    assert causal_flow(*qkv, initial_state=state)[1].memory.dtype == torch.float64


BAD_STATES = {
    "another batch": (
        lambda s: FlowState(*(x[:1] for x in s)),
        "sources: shape (1, 3, 12), but sizes of the sequences, q and v = (2,",
    ),
    "heads": (
        lambda s: s._replace(log_weight=s.log_weight[:, :2]),
        "log_weight: shape (2, 2), but sizes of the sequences",
    ),
    "transposed": (
        lambda s: s._replace(memory=s.memory.mT),
        "memory: shape (2, 3, 20, 12), but sizes of the sequences",
    ),
    "whole numbers": (
        lambda s: s._replace(sinks=s.sinks.long()),
        "sinks: dtype torch.int64, but a floating dtype is wanted",
    ),
    "device": (lambda s: s._replace(memory=s.memory.to("meta")), "memory: on meta, but q is on cpu; move one of them"),
    "length elsewhere": (
        lambda s: s._replace(length=s.length.to("meta")),
        "length: on meta, but q is on cpu; move one",
    ),
    "a length": (lambda s: s._replace(length=63), "length: int, but a tensor is wanted; see FlowState"),
    "short lengths": (
        lambda s: s._replace(length=s.length.int()),
        "length: dtype torch.int32, but torch.int64 is wanted",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_is_refused(spoil, message, qkv):
    _, state = causal_flow(*qkv)
    with pytest.raises(ValueError, match=re.escape(f"initial_state.{message}")):
        causal_flow(*qkv, initial_state=spoil(state))


def test_no_state_and_bad_bounds_are_refused(qkv, past):
    with pytest.raises(
        ValueError, match="initial_state: Tensor, but the FlowState that an earlier call returned is wanted"
    ):
        causal_flow(*qkv, initial_state=past.memory)
    with pytest.raises(ValueError, match="cu_seqlens: packs sequences into one row, but there are B=2; reshape to B=1"):
        causal_flow(*qkv, cu_seqlens=torch.tensor([0, T]))
    row = [x[:1] for x in qkv]
    with pytest.raises(ValueError, match=r"cu_seqlens: \[0, 62\]... must rise strictly from 0 to T=63"):
        causal_flow(*row, cu_seqlens=torch.tensor([0, T - 1]))
    with pytest.raises(ValueError, match="cu_seqlens: on meta, but q is on cpu; move one of them"):
        causal_flow(*row, cu_seqlens=torch.tensor(BOUNDS, device="meta"))
    with pytest.raises(ValueError, match=r"initial_state.sources: shape \(3, 3, 12\), but .* = \(2, 3, 12\)"):
        causal_flow(*row, initial_state=past, cu_seqlens=torch.tensor([0, 1, T]))
