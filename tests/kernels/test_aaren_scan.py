"""``attnlab.kernels.aaren_scan`` off the GPU: the torch form in float64, carried summaries, gradients, packed sequences, bad input."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch

from attnlab.kernels import aaren_scan as module
from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.mixers import Summary, aaren

close = {"rtol": 1e-12, "atol": 1e-12}
B, H, V = 2, 3, 20


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 37, 63, 64, 100, 130])
@pytest.mark.parametrize("spread", [1, 50])
def test_it_is_the_mixer(length, spread, draw):
    s, v = spread * draw(B, length, H), draw(B, length, H, V)
    o, summary = aaren_scan(s, v)
    wanted, end = aaren(s, v, form="parallel")
    torch.testing.assert_close(o, wanted, **close)
    for got, right in zip(summary, end, strict=True):
        torch.testing.assert_close(got, right, **close)


@pytest.mark.parametrize("cut", [1, 37, 64])
def test_a_sequence_cut_anywhere(cut, draw):
    s, v = 20 * draw(B, 100, H), draw(B, 100, H, V)
    whole, end = aaren_scan(s, v)
    first, past = aaren_scan(s[:, :cut], v[:, :cut])
    rest, last = aaren_scan(s[:, cut:], v[:, cut:], initial=past)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, **close)
    for got, right in zip(last, end, strict=True):
        torch.testing.assert_close(got, right, **close)


def test_gradients_reach_scores_values_and_the_past(draw):
    s, v, m, u, w = (draw(1, 9, 2), draw(1, 9, 2, 3), draw(1, 2), draw(1, 2).exp(), draw(1, 2, 3))

    def outputs(s, v, u, w):
        o, end = aaren_scan(s, v, initial=Summary(m, u, w))
        return o, end.w / end.u[..., None]

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in (s, v, u, w)])


def test_half_precision_is_computed_in_single_and_returned_in_half(draw):
    s, v = draw(B, 100, H).half(), draw(B, 100, H, V).half()
    o, summary = aaren_scan(s, v)
    wanted, _ = aaren(s.double(), v.double())
    assert o.dtype == torch.float16
    assert {x.dtype for x in summary} == {torch.float32}
    torch.testing.assert_close(o.double(), wanted, rtol=0, atol=2e-3)
    rest, _ = aaren_scan(s, v, initial=summary)
    assert rest.dtype == torch.float16


@pytest.fixture
def half_kernel(monkeypatch):
    """The way of a GPU, with the torch form for the kernel: outputs in the dtype of the values, the end of the last in float32."""
    softmax = pytest.importorskip("attnlab.kernels.prefix_softmax")

    def apply(s, v, sequences):
        o, _ = aaren(s, v.float())
        return o.to(v.dtype), s.logcumsumexp(1), o[:, -1]

    monkeypatch.setattr(module, "on_gpu", lambda name, x: True)
    monkeypatch.setattr(softmax.PrefixSoftmax, "apply", apply)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["torch form", "kernel"])
def test_a_long_stream_does_not_stall_in_half_precision(way, dtype, request):
    """A past of 10,000 ones, then twos: each moves the mean by 1e-4, which half precision cannot tell from 1."""
    if way == "kernel":
        request.getfixturevalue("half_kernel")
    past = Summary(torch.zeros(1, 1), torch.full((1, 1), 1e4), torch.full((1, 1, 3), 1e4))
    s, two = torch.zeros(1, 1, 1), torch.full((1, 1, 1, 3), 2, dtype=dtype)
    for n in range(1, 64):
        o, past = aaren_scan(s, two, initial=past)
        mean = torch.full((1, 1, 3), 1 + n / (1e4 + n))
        torch.testing.assert_close(past.w / past.u[..., None], mean, rtol=1e-6, atol=0)
        assert torch.equal(o[:, 0], mean.to(dtype))
    assert {x.dtype for x in past} == {torch.float32}


def test_scores_in_single_beside_values_in_half(draw):
    s, v = draw(B, 37, H), draw(B, 37, H, V).bfloat16()
    o, _ = aaren_scan(s.float(), v)
    wanted, _ = aaren(s.float().double(), v.double())
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), wanted, rtol=8e-3, atol=1e-4)


def test_tokens_without_weight(draw):
    s, v = draw(B, 37, H), draw(B, 37, H, V)
    s[:, :5] = -math.inf
    o, _ = aaren_scan(s, v)
    assert torch.equal(o[:, :5], torch.zeros_like(o[:, :5]))
    torch.testing.assert_close(o[:, 5:], aaren_scan(s[:, 5:], v[:, 5:])[0], **close)


def test_bad_input_is_named(draw):
    s, v = draw(B, 37, H), draw(B, 37, H, V)
    past = aaren_scan(s, v)[1]
    with pytest.raises(ValueError, match=r"v: .*\[B, T, H, V\]"):
        aaren_scan(s, v[0])
    with pytest.raises(ValueError, match=r"s: "):
        aaren_scan(s[:, 1:], v)
    with pytest.raises(ValueError, match="V=257 is wider"):
        aaren_scan(s, v[..., :1].expand(-1, -1, -1, 257))
    with pytest.raises(ValueError, match=r"initial\.u"):
        aaren_scan(s, v, initial=Summary(past.m, past.u[:1], past.w))
    with pytest.raises(ValueError, match=r"initial\.w"):
        aaren_scan(s, v, initial=Summary(past.m, past.u, past.w[..., 1:]))
    with pytest.raises(ValueError, match="s: on meta"):
        aaren_scan(s.to("meta"), v)
    with pytest.raises(ValueError, match=r"initial\.m: on meta, but v is on cpu; move one of them"):
        aaren_scan(s, v, initial=Summary(past.m.to("meta"), past.u, past.w))
    with pytest.raises(ValueError, match=r"T"):
        aaren_scan(s[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        aaren_scan(s.log(), v)


def test_dtypes_that_do_not_fit_are_refused(draw):
    s, v = draw(B, 37, H), draw(B, 37, H, V)
    past = aaren_scan(s, v)[1]
    with pytest.raises(ValueError, match=r"v: dtype torch\.int64, but a floating dtype is wanted; cast it"):
        aaren_scan(s.long(), v.long())
    with pytest.raises(ValueError, match=r"s: dtype torch\.int64, but v has torch\.float64; cast one of them"):
        aaren_scan(s.long(), v)
    for scores, values in (
        (s, v.float()),
        (s, v.half()),
        (s.float(), v),
        (s.half(), v.float()),
        (s.half(), v.bfloat16()),
    ):
        with pytest.raises(ValueError, match=rf"s: dtype {scores.dtype}, but v has {values.dtype}; cast one of them"):
            aaren_scan(scores, values)
    with pytest.raises(ValueError, match=r"initial\.u: dtype torch\.int64, but a floating dtype is wanted; cast it"):
        aaren_scan(s, v, initial=past._replace(u=past.u.long()))


BOUNDS = (0, 1, 65, 66, 130)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("initial", [False, True])
def test_packed_sequences_do_not_see_each_other(initial, dtype, draw):
    count = len(BOUNDS) - 1
    s, v, d_o = 5 * draw(1, 130, H), draw(1, 130, H, V), draw(1, 130, H, V)
    past = Summary(draw(count, H), draw(count, H).exp(), draw(count, H, V)) if initial else None
    d_u, d_w = draw(count, H), draw(count, H, V)
    leaves = [x.requires_grad_() for x in (s, v, *(past or ())[1:])]

    def gradients(o, end):
        return torch.autograd.grad([o, end.u, end.w], leaves, [d_o, d_u, d_w])

    o, end = aaren_scan(s, v, initial=past, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype))
    outs, ends = [], []
    for n, (first, last) in enumerate(pairwise(BOUNDS)):
        start = past and Summary(*(x[n : n + 1] for x in past))
        out, summary = aaren_scan(s[:, first:last], v[:, first:last], initial=start)
        outs.append(out)
        ends.append(summary)
    wanted, last = torch.cat(outs, 1), Summary(*(torch.cat(x) for x in zip(*ends, strict=True)))
    torch.testing.assert_close(o, wanted, rtol=1e-10, atol=1e-10)
    for got, right in zip((*end, *gradients(o, end)), (*last, *gradients(wanted, last)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


def test_packed_half_precision_keeps_its_summaries_in_single(draw):
    s, v = draw(1, 130, H).half(), draw(1, 130, H, V).half()
    o, end = aaren_scan(s, v, cu_seqlens=torch.tensor(BOUNDS))
    assert (o.dtype, *{x.dtype for x in end}) == (torch.float16, torch.float32)


BAD_BOUNDS = {
    "bounds of a batch": (
        2,
        torch.tensor([0, 37]),
        "cu_seqlens: packs sequences into one row, but there are B=2; reshape to B=1",
    ),
    "floating bounds": (
        1,
        torch.tensor([0.0, 37.0]),
        "cu_seqlens: torch.float32 of shape (2,), but [N + 1] int32 or int64 is wanted",
    ),
    "one bound": (1, torch.tensor([0]), "cu_seqlens: torch.int64 of shape (1,), but [N + 1]"),
    "bounds that start late": (1, torch.tensor([1, 37]), "cu_seqlens: [1, 37]... must rise strictly from 0 to T=37"),
    "bounds that end early": (1, torch.tensor([0, 36]), "must rise strictly from 0 to T=37"),
    "a sequence without tokens": (
        1,
        torch.tensor([0, 5, 5, 37]),
        "cu_seqlens: [0, 5, 5, 37]... must rise strictly from 0 to T=37",
    ),
    "bounds elsewhere": (
        1,
        torch.tensor([0, 37], device="meta"),
        "cu_seqlens: on meta, but v is on cpu; move one of them",
    ),
}


@pytest.mark.parametrize(("batch", "bounds", "message"), BAD_BOUNDS.values(), ids=BAD_BOUNDS)
def test_bad_bounds_are_refused_in_words(batch, bounds, message, draw):
    with pytest.raises(ValueError, match=re.escape(message)):
        aaren_scan(draw(batch, 37, H), draw(batch, 37, H, V), cu_seqlens=bounds)


def test_a_packed_past_has_a_summary_a_sequence(draw):
    s, v = draw(1, 37, H), draw(1, 37, H, V)
    _, past = aaren_scan(s, v)
    message = "initial.m: shape (1, 3), but [N, H] = (2, 3) is wanted"
    with pytest.raises(ValueError, match=re.escape(message)):
        aaren_scan(s, v, initial=past, cu_seqlens=torch.tensor([0, 5, 37]))
