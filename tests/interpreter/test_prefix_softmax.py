"""The kernels of the Aaren scan, forward and backward, against autograd through the torch form in float64.

The interpreter runs programs one after the other and is wrong about bfloat16, so races and bfloat16 are left to
``tests/kernels/test_gpu.py``. What is proven here: prefixes inside and across chunks, pieces, every mask, weightless tokens.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from attnlab.kernels import aaren_scan as module
from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.kernels.dispatch import rows
from attnlab.kernels.prefix_softmax import CHUNK, SHORT, PrefixSoftmax, pieces_for
from attnlab.mixers import Summary, aaren

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)

FLOAT32, FLOAT16 = 1e-5, 5e-3  # relative Frobenius; measured: 2e-6 and 3e-4

#: batch, length, heads, width, pieces, standard deviation of the scores
CASES = {
    "one token": (2, 1, 1, 12, 1, 1.0),
    "one ragged chunk": (2, 37, 2, 12, 1, 1.0),
    "one full chunk": (1, CHUNK, 1, 16, 1, 1.0),
    "one token in the second chunk": (1, CHUNK + 1, 2, 20, 1, 1.0),
    "three chunks, ragged": (1, 150, 2, 20, 1, 1.0),
    "sharp scores": (1, 100, 2, 33, 1, 50.0),
    "three levels of chunks": (1, SHORT * SHORT + 5, 1, 5, 1, 1.0),
    "two pieces": (1, 100, 2, 12, 2, 1.0),
    "three pieces, the last of one token": (1, 2 * CHUNK + 1, 1, 20, 3, 10.0),
    "two pieces of two chunks": (1, 3 * CHUNK + 5, 1, 12, 2, 1.0),
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


def cut_into(length: int, pieces: int) -> tuple[int, int]:
    """How many pieces, and their length, a multiple of the chunk."""
    piece = CHUNK * math.ceil(length / (pieces * CHUNK))
    assert math.ceil(length / piece) == pieces
    return pieces, piece


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def errors(s: Tensor, v: Tensor, cut: tuple[int, int], d_o: Tensor, d_lse: Tensor, d_end: Tensor) -> dict[str, float]:
    """Relative errors of all outputs and both gradients, on the values that the kernel sees."""
    results = []
    for exact in (False, True):
        x = [(y.double() if exact else y).detach().requires_grad_() for y in (s, v)]
        o, log, end = torch_form(*x) if exact else PrefixSoftmax.apply(*x, cut)
        grads = torch.autograd.grad([o, log, end], x, [d_o.to(o), d_lse.to(log), d_end.to(end)])
        results.append([o.detach(), log.detach(), end.detach(), *grads])
    names = ["output", "lse", "end", "gradient of s", "gradient of v"]
    return {name: error(got, wanted) for name, got, wanted in zip(names, *results, strict=True)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, draw):
    batch, length, heads, width, pieces, spread = case
    s, v = spread * draw(batch, length, heads), draw(batch, length, heads, width)
    found = errors(s, v, cut_into(length, pieces), draw(*v.shape), draw(*s.shape), draw(*v[:, 0].shape))
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize(("length", "pieces"), [(1, 1), (SHORT, 1), (100, 1), (100, 2)])
def test_half_precision(length, pieces, draw):
    """The end is not rounded, however few tokens there are."""
    s, v = draw(1, length, 2), draw(1, length, 2, 20).half()
    d_o, d_lse, d_end = draw(*v.shape).half(), draw(*s.shape), draw(1, 2, 20)
    found = errors(s, v, cut_into(length, pieces), d_o, d_lse, d_end)
    assert found.pop("end") < FLOAT32
    if length == 1:  # ds is dlse and the rest of products of halves that cancel
        del found["gradient of s"]
    assert max(found.values()) < FLOAT16, found


def test_outputs_that_nobody_reads_have_no_gradient(draw):
    x = [draw(1, 70, 2).requires_grad_(), draw(1, 70, 2, 12).requires_grad_()]
    for index in range(3):
        results = []
        for form in (lambda *y: PrefixSoftmax.apply(*y, (1, 128)), torch_form):
            output = form(*x)[index]
            results.append(torch.autograd.grad(output.square().sum(), x, allow_unused=True))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_tokens_without_weight(pieces, draw):
    """-inf at the start, in the middle and over a whole chunk: zeros until a token counts, and no NaN anywhere."""
    s, v = draw(1, 150, 2), draw(1, 150, 2, 12)
    s[:, :70, 0] = -torch.inf
    s[:, 100:110] = -torch.inf
    cut = cut_into(150, pieces)
    x = [y.clone().requires_grad_() for y in (s, v)]
    o, log, _ = PrefixSoftmax.apply(*x, cut)
    wanted = aaren(s.double(), v.double())[0]
    assert torch.equal(o[:, :70, 0], torch.zeros_like(o[:, :70, 0]))
    assert bool((log[:, :70, 0] == -torch.inf).all())
    assert error(o.detach(), wanted) < FLOAT32
    ds, dv = torch.autograd.grad(o, x, draw(*o.shape))
    assert bool(torch.isfinite(ds).all() and torch.isfinite(dv).all())
    assert float(ds[:, :70, 0].abs().max()) == float(dv[:, :70, 0].abs().max()) == 0


def test_no_output_reads_a_later_token(draw):
    s, v = draw(1, 100, 1), draw(1, 100, 1, 12)
    before, *_ = PrefixSoftmax.apply(s, v, (1, 128))
    s[:, 70:], v[:, 70:] = draw(1, 30, 1), draw(1, 30, 1, 12)
    after, *_ = PrefixSoftmax.apply(s, v, (1, 128))
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


def test_values_that_lie_apart_in_memory(draw):
    s, joint = draw(2, 70, 3), draw(2, 70, 3, 45)
    v = joint[..., 20:40]
    assert not v.is_contiguous()
    assert rows(v) is v
    for got, wanted in zip(
        PrefixSoftmax.apply(s, v, (1, 128)), PrefixSoftmax.apply(s, v.contiguous(), (1, 128)), strict=True
    ):
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


@pytest.mark.parametrize("length", [1, 63, 513, 10_000])
def test_pieces_cover_the_sequence(length):
    pieces, piece = pieces_for(torch.empty(1, length, 2))
    assert piece % CHUNK == 0
    assert (pieces - 1) * piece < length <= pieces * piece
