"""The kernels of the Aaren scan, forward and backward, against autograd through the torch form in float64.

The interpreter runs programs one after the other and is wrong about bfloat16, so races and bfloat16 are left to
``tests/kernels/test_gpu.py``. What is proven here: prefixes and suffixes inside and across chunks, every mask, weightless tokens,
packed sequences.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from attnlab.kernels import aaren_scan as module
from attnlab.kernels import arguments
from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.kernels.dispatch import rows
from attnlab.kernels.packed import Sequences
from attnlab.kernels.prefix_softmax import CHUNK, PrefixSoftmax
from attnlab.mixers import Summary, aaren

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)

FLOAT32, FLOAT16 = 1e-5, 5e-3  # relative Frobenius; measured: 2e-6 and 3e-4

#: batch, length, heads, width, standard deviation of the scores
CASES = {
    "one token": (2, 1, 1, 12, 1.0),
    "one ragged chunk": (2, CHUNK - 5, 2, 12, 1.0),
    "one full chunk": (1, CHUNK, 1, 16, 1.0),
    "one token in the second chunk": (1, CHUNK + 1, 2, 20, 1.0),
    "five chunks, ragged": (1, 150, 2, 20, 1.0),
    "sharp scores": (1, 100, 2, 33, 50.0),
    "a full chunk of chunks": (1, CHUNK * CHUNK, 1, 5, 1.0),
    "three levels of chunks": (1, CHUNK * CHUNK + 5, 1, 5, 10.0),
}


@pytest.fixture
def draw():
    """Normal float32 tensors from one seed: ``draw(2, 37, 2)``."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the public function take the way of a GPU."""
    monkeypatch.setattr(module, "on_gpu", lambda name, x: True)


def lse(s: Tensor) -> Tensor:
    """log of the running sum of exp(s) [B, T, H]"""
    return s.logcumsumexp(1)


def torch_form(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`PrefixSoftmax` returns: outputs, lse, and the output of the last token."""
    o, _ = aaren(s, v)
    return o, lse(s), o[:, -1]


def kernels(s: Tensor, v: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return PrefixSoftmax.apply(s, v, arguments.sequences(bounds, len(s), s.shape[1]))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def errors(s: Tensor, v: Tensor, d_o: Tensor, d_lse: Tensor, d_end: Tensor) -> dict[str, float]:
    """Relative errors of all outputs and both gradients, on the values that the kernel sees."""
    results = []
    for exact in (False, True):
        x = [(y.double() if exact else y).detach().requires_grad_() for y in (s, v)]
        o, log, end = torch_form(*x) if exact else kernels(*x)
        grads = torch.autograd.grad([o, log, end], x, [d_o.to(o), d_lse.to(log), d_end.to(end)])
        results.append([o.detach(), log.detach(), end.detach(), *grads])
    names = ["output", "lse", "end", "gradient of s", "gradient of v"]
    return {name: error(got, wanted) for name, got, wanted in zip(names, *results, strict=True)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, draw):
    batch, length, heads, width, spread = case
    s, v = spread * draw(batch, length, heads), draw(batch, length, heads, width)
    found = errors(s, v, draw(*v.shape), draw(*s.shape), draw(*v[:, 0].shape))
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize("length", [1, CHUNK, 100])
def test_half_precision(length, draw):
    """The end is not rounded, however few tokens there are."""
    s, v = draw(1, length, 2), draw(1, length, 2, 20).half()
    d_o, d_lse, d_end = draw(*v.shape).half(), draw(*s.shape), draw(1, 2, 20)
    found = errors(s, v, d_o, d_lse, d_end)
    assert found.pop("end") < FLOAT32
    if length == 1:  # ds is dlse and the rest of products of halves that cancel
        del found["gradient of s"]
    assert max(found.values()) < FLOAT16, found


def test_a_gradient_that_comes_transposed_in_memory(draw):
    """As [B, H, T, V], from ``o.transpose(1, 2)``: results are laid out as ever."""
    s, v = draw(2, 70, 2), draw(2, 70, 2, 12)
    found = errors(s, v, draw(2, 2, 70, 12).transpose(1, 2), draw(*s.shape), draw(*v[:, 0].shape))
    assert max(found.values()) < FLOAT32, found


def test_outputs_that_nobody_reads_have_no_gradient(draw):
    x = [draw(1, 70, 2).requires_grad_(), draw(1, 70, 2, 12).requires_grad_()]
    for index in range(3):
        results = []
        for form in (kernels, torch_form):
            output = form(*x)[index]
            results.append(torch.autograd.grad(output.square().sum(), x, allow_unused=True))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=1e-4, atol=1e-5)


def test_tokens_without_weight(draw):
    """-inf at the start, in the middle and over a whole chunk: zeros until a token counts, and no NaN anywhere."""
    s, v = draw(1, 150, 2), draw(1, 150, 2, 12)
    s[:, :70, 0] = -torch.inf
    s[:, 100:110] = -torch.inf
    x = [y.clone().requires_grad_() for y in (s, v)]
    o, log, _ = kernels(*x)
    wanted = aaren(s.double(), v.double())[0]
    assert torch.equal(o[:, :70, 0], torch.zeros_like(o[:, :70, 0]))
    assert bool((log[:, :70, 0] == -torch.inf).all())
    assert error(o.detach(), wanted) < FLOAT32
    ds, dv = torch.autograd.grad(o, x, draw(*o.shape))
    assert bool(torch.isfinite(ds).all() and torch.isfinite(dv).all())
    assert float(ds[:, :70, 0].abs().max()) == float(dv[:, :70, 0].abs().max()) == 0


def test_no_output_reads_a_later_token(draw):
    s, v = draw(1, 100, 1), draw(1, 100, 1, 12)
    before, *_ = kernels(s, v)
    s[:, 70:], v[:, 70:] = draw(1, 30, 1), draw(1, 30, 1, 12)
    after, *_ = kernels(s, v)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


def test_values_that_lie_apart_in_memory(draw):
    s, joint = draw(2, 70, 3), draw(2, 70, 3, 45)
    v = joint[..., 20:40]
    assert not v.is_contiguous()
    assert rows(v) is v
    for got, wanted in zip(kernels(s, v), kernels(s, v.contiguous()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("cut", [1, 37, CHUNK])
def test_the_public_function_carries_a_summary(cut, on_cpu, draw):
    s, v = 10 * draw(2, 100, 2), draw(2, 100, 2, 12)
    wanted, end = aaren(s.double(), v.double())
    first, past = aaren_scan(s[:, :cut], v[:, :cut])
    rest, last = aaren_scan(s[:, cut:], v[:, cut:], initial=past)
    assert error(torch.cat([first, rest], 1), wanted) < FLOAT32
    assert error(last.w / last.u[..., None], end.w / end.u[..., None]) < FLOAT32
    assert error(last.m + last.u.log(), end.m + end.u.log()) < FLOAT32


@pytest.mark.parametrize("piece", [1, 37])
def test_a_long_past_takes_in_half_precision_tokens(piece, on_cpu, draw):
    """Next to a weight of 1e4, what a few tokens change is less than float16 can tell from 1."""
    past = Summary(torch.zeros(1, 2), torch.full((1, 2), 1e4), torch.full((1, 2, 12), 1e4))
    s, v = 0.1 * draw(1, 3 * piece, 2), (2 + 0.1 * draw(1, 3 * piece, 2, 12)).half()
    _, end = aaren(s.double(), v.double(), initial=Summary(*(x.double() for x in past)))
    for tokens in (slice(first, first + piece) for first in range(0, 3 * piece, piece)):
        o, past = aaren_scan(s[:, tokens], v[:, tokens], initial=past)
        assert o.dtype == torch.float16
    assert {x.dtype for x in past} == {torch.float32}
    torch.testing.assert_close(past.w.double() / past.u[..., None], end.w / end.u[..., None], rtol=3e-7, atol=0)
    torch.testing.assert_close(past.m.double() + past.u.log(), end.m + end.u.log(), rtol=3e-7, atol=0)


def test_the_past_and_the_tokens_without_weight(on_cpu, draw):
    """All four meetings of a past that is empty or not with tokens that are left out or not, and no NaN in any gradient."""
    s, v = draw(1, 37, 2), draw(1, 37, 2, 12)
    s[:, :5] = -torch.inf
    past = Summary(torch.tensor([[0.5, -torch.inf]]), torch.tensor([[3.0, 0.0]]), draw(1, 2, 12))
    past.w[:, 1] = 0
    results = []
    for form, dtype in ((aaren_scan, torch.float32), (aaren, torch.float64)):
        s_, v_, u, w = x = [y.to(dtype).requires_grad_() for y in (s, v, past.u, past.w)]
        o, end = form(s_, v_, initial=Summary(past.m.to(dtype), u, w))
        loss = o.square().sum() + (end.w / end.u[..., None]).sum()
        results.append([o.detach(), *torch.autograd.grad(loss, x)])
    for name, got, wanted in zip(("o", "s", "v", "u", "w"), *results, strict=True):
        one = got[:, :1] if name in ("u", "w") else got  # the gradient of a weight that is 0 is left out
        assert error(one, wanted[:, :1] if name in ("u", "w") else wanted) < FLOAT32, name
        assert bool(torch.isfinite(got).all()), name


def test_a_unit_without_weight_means_nothing(on_cpu, draw):
    s, v = draw(1, 37, 2) - 300, draw(1, 37, 2, 12)
    nothing = Summary(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, 12))
    o, end = aaren_scan(s, v, initial=nothing)
    wanted, alone = aaren_scan(s, v)
    torch.testing.assert_close(o, wanted)
    for got, right in zip(end, alone, strict=True):
        torch.testing.assert_close(got, right)


def test_gradients_reach_the_past(on_cpu, draw):
    s, v = draw(1, 37, 2), draw(1, 37, 2, 12)
    m, u, w = draw(1, 2), draw(1, 2).exp(), draw(1, 2, 12)
    upstream, of_end = draw(*v.shape), draw(1, 2, 12)
    grads = []
    for form, dtype in ((aaren_scan, torch.float32), (aaren, torch.float64)):
        x = [y.to(dtype).requires_grad_() for y in (s, v, u, w)]
        o, end = form(x[0], x[1], initial=Summary(m.to(dtype), x[2], x[3]))
        mean = end.w / end.u[..., None]
        grads.append(torch.autograd.grad([o, mean], x, [upstream.to(o), of_end.to(mean)]))
    for name, got, wanted in zip(("s", "v", "u", "w"), *grads, strict=True):
        assert error(got, wanted) < FLOAT32, name


def test_an_empty_past_changes_nothing(on_cpu, draw):
    s, v = draw(1, 37, 2), draw(1, 37, 2, 12)
    nothing = Summary(torch.full((1, 2), -torch.inf), torch.zeros(1, 2), torch.zeros(1, 2, 12))
    torch.testing.assert_close(aaren_scan(s, v, initial=nothing)[0], aaren_scan(s, v)[0])


#: bounds, width, standard deviation of the scores
PACKED = {
    "one token each": ((0, 1, 2, 3), 12, 1.0),
    "one token, one chunk, one token more": ((0, 1, 1 + CHUNK, 2 + 2 * CHUNK, 130), 20, 1.0),
    "one long sequence alone": ((0, 200), 12, 1.0),
    "a long sequence between short ones": ((0, 70, 71, 264, 290), 12, 10.0),
    "three levels of chunks": ((0, 1, CHUNK * CHUNK + 6, CHUNK * CHUNK + 70), 5, 1.0),
}


def one_after_the_other(s: Tensor, v: Tensor, bounds: tuple[int, ...], past: Summary | None = None) -> list[Tensor]:
    """Outputs [1, T, H, V], and mean [N, H, V] and lse [N, H] of every sequence."""
    outs, ends = [], []
    for n, (first, last) in enumerate(pairwise(bounds)):
        initial = None if past is None else Summary(*(x[n : n + 1] for x in past))
        o, end = aaren(s[:, first:last], v[:, first:last], initial=initial)
        outs.append(o)
        ends.append(end)
    return [torch.cat(outs, 1), *mean_and_lse(Summary(*(torch.cat(x) for x in zip(*ends, strict=True))))]


def packed(s: Tensor, v: Tensor, bounds: tuple[int, ...], past: Summary | None = None) -> list[Tensor]:
    """The same from the public function."""
    o, end = aaren_scan(s, v, initial=past, cu_seqlens=torch.tensor(bounds))
    return [o, *mean_and_lse(end)]


def mean_and_lse(end: Summary) -> list[Tensor]:
    """What does not depend on the unit; a sequence without weight has mean 0."""
    some = end.u > 0
    u = torch.where(some, end.u, 1)
    return [end.w / u[..., None], torch.where(some, end.m + u.log(), 0)]


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_packed_sequences(case, initial, on_cpu, draw):
    bounds, width, spread = case
    count, length = len(bounds) - 1, bounds[-1]
    x = {"s": spread * draw(1, length, 2), "v": draw(1, length, 2, width)}
    if initial:
        x |= {"u": draw(count, 2).exp(), "w": draw(count, 2, width)}
    m = draw(count, 2)
    d = [draw(1, length, 2, width), draw(count, 2, width), draw(count, 2)]
    results = []
    for form, dtype in ((packed, torch.float32), (one_after_the_other, torch.float64)):
        y = {name: part.to(dtype).requires_grad_() for name, part in x.items()}
        past = Summary(m.to(dtype), y["u"], y["w"]) if initial else None
        outputs = form(y["s"], y["v"], bounds, past)
        grads = torch.autograd.grad(outputs, list(y.values()), [part.to(dtype) for part in d])
        results.append([*(o.detach() for o in outputs), *grads])
    for name, got, wanted in zip(("o", "mean", "lse", *x), *results, strict=True):
        assert got.shape == wanted.shape
        assert error(got, wanted) < FLOAT32, name


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_packed_half_precision(case, on_cpu, draw):
    """The mean of every sequence is not rounded, however few tokens there are."""
    bounds, width, *_ = case
    s, v = draw(1, bounds[-1], 2), draw(1, bounds[-1], 2, width).half()
    d_o = draw(*v.shape).half()
    got, wanted = ([part.clone().to(dtype).requires_grad_() for part in (s, v)] for dtype in (None, torch.float64))
    o, mean, lse = packed(*got, bounds)
    exact = one_after_the_other(*wanted, bounds)
    assert (o.dtype, mean.dtype) == (torch.float16, torch.float32)
    assert error(o.detach(), exact[0].detach()) < FLOAT16
    assert error(mean.detach(), exact[1].detach()) < FLOAT32
    assert error(lse.detach(), exact[2].detach()) < FLOAT32
    ds, dv = torch.autograd.grad(o, got, d_o)
    exact_ds, exact_dv = torch.autograd.grad(exact[0], wanted, d_o.double())
    assert error(dv, exact_dv) < FLOAT16
    if bounds != (0, 1, 2, 3):  # one token has weight 1, whatever its score
        assert error(ds, exact_ds) < FLOAT16


@pytest.mark.parametrize("initial", [False, True])
def test_packed_tokens_without_weight(initial, on_cpu, draw):
    """A sequence without any weight, one that begins without, and one that ends without; no NaN anywhere."""
    bounds = (0, 40, 41, 140, 180)
    s, v = draw(1, 180, 2), draw(1, 180, 2, 12)
    s[:, :40, 0] = s[:, 40] = s[:, 41:110, 1] = s[:, 150:] = -torch.inf
    past = None
    if initial:
        past = Summary(draw(4, 2), draw(4, 2).exp(), draw(4, 2, 12))
        for x, nothing in zip(past, (-torch.inf, 0, 0), strict=True):
            x[1:3, 0] = nothing
    x = [part.clone().requires_grad_() for part in (s, v, *(past or ())[1:])]
    got = packed(*x[:2], bounds, past and Summary(past.m, *x[2:]))
    wanted = one_after_the_other(s.double(), v.double(), bounds, past and Summary(*(part.double() for part in past)))
    for one, other in zip(got, wanted, strict=True):
        assert error(one.detach(), other) < FLOAT32
    grads = torch.autograd.grad(got, x, [draw(*part.shape) for part in got])
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    if not initial:
        assert torch.equal(got[0][:, :40, 0], torch.zeros(1, 40, 12))
        assert float(grads[0][:, :40, 0].abs().max()) == float(grads[1][:, :40, 0].abs().max()) == 0


def test_a_packed_sequence_is_as_it_is_alone(on_cpu, draw):
    """To the last bit: its chunks are the same, and nothing of its neighbours comes in, not even 0 * NaN."""
    s, v = draw(1, 200, 2), draw(1, 200, 2, 12)
    v[:, 150:] = torch.nan
    bounds = torch.tensor([0, 37, 150, 200], dtype=torch.int32)
    x = [part.clone().requires_grad_() for part in (s, v)]
    o, end = aaren_scan(*x, cu_seqlens=bounds)
    grads = torch.autograd.grad(o[:, 37:150].square().sum() + end.w[1].sum(), x)
    y = [part[:, 37:150].clone().requires_grad_() for part in (s, v)]
    alone, last = aaren_scan(*y)
    assert torch.equal(o[:, 37:150], alone)
    for one, other in zip(end, last, strict=True):
        assert torch.equal(one[1:2], other)
    for one, other in zip(grads, torch.autograd.grad(alone.square().sum() + last.w.sum(), y), strict=True):
        assert torch.equal(one[:, 37:150], other)


def test_parts_of_packed_sequences():
    """Numbered without gaps, and on the device as on the host."""
    sequences = arguments.sequences(torch.tensor([0, 1, 33, 66, 130]), 1, 130)
    parts, owner = sequences.cut(32)
    assert parts.bounds == parts.packed.tolist() == [0, 1, 2, 4, 6]
    assert owner.tolist() == [0, 1, 2, 2, 3, 3]
    assert {x.dtype for x in (sequences.packed, parts.packed, owner)} == {torch.int32}
    whole, nothing = arguments.sequences(None, 1, 130).cut(32)
    assert (whole, nothing) == (Sequences([0, 5], None), None)
