"""Causal flow attention without a GPU: the torch form answers, in the same dtypes and with the same complaints."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.kernels.causal_flow import causal_flow
from attnlab.mixers import causal_flow_attention

B, T, H, K, V = 2, 63, 3, 12, 20


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, H, width, generator=generator, dtype=torch.float64) for width in (K, K, V)]


@pytest.mark.parametrize("clamp", [1.0, 5.0])
def test_it_is_the_torch_form(qkv, clamp):
    for x in qkv:
        x.requires_grad_()
    o, wanted = causal_flow(*qkv, clamp=clamp), causal_flow_attention(*qkv, clamp=clamp)[0]
    assert torch.equal(o, wanted)
    for got, exact in zip(torch.autograd.grad(o.sum(), qkv), torch.autograd.grad(wanted.sum(), qkv), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_smaller_dtypes_are_summed_in_float32_and_come_back(qkv, dtype, tolerance):
    """All that is lost is the rounding of the output: the reference sees the rounded inputs."""
    small = [x.to(dtype) for x in qkv]
    o = causal_flow(*small)
    wanted, _ = causal_flow_attention(*(x.double() for x in small))
    assert o.dtype == dtype
    assert (o.double() - wanted).norm() / wanted.norm() < tolerance


def test_many_half_precision_tokens_do_not_overflow():
    """8 channels of phi near 1 over 10,000 tokens: sums beyond the 65,504 that half precision holds."""
    q = k = torch.full((1, 10_000, 1, 8), 9.0, dtype=torch.float16)
    o = causal_flow(q, k, torch.ones(1, 10_000, 1, 2, dtype=torch.float16))
    torch.testing.assert_close(o, torch.full_like(o, 1.0).sigmoid())


def test_views_of_one_projection(qkv):
    joint = torch.cat(qkv, -1)
    q, k, v = joint.split([K, K, V], -1)
    assert not q.is_contiguous()
    torch.testing.assert_close(causal_flow(q, k, v), causal_flow(*qkv), rtol=1e-12, atol=1e-12)


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
    assert torch.equal(causal_flow(q, k, v), causal_flow_attention(q, k, v)[0])
