"""The kernels of causal flow attention, forward and backward, against autograd through the torch form in float64.

The interpreter runs programs one after the other and is wrong about bfloat16, so races and bfloat16 are left to
``tests/kernels/test_gpu.py``. What is proven here: the two triangles, what chunks carry, every mask, and the clamp.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from attnlab.kernels import flow_gates as gates
from attnlab.kernels.flow_gates import flow_gates
from attnlab.kernels.flow_sweep import CausalFlow
from attnlab.mixers.flow import causal_flow_attention

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)

CHUNK = 32  # tokens, for heads of at most 64 channels
FLOAT32, FLOAT16 = 1e-5, 5e-3  # relative Frobenius; measured: 2e-6 (gradients leave out eps = 1e-6) and 9e-4

#: batch, length, heads, width, standard deviation of q and k, clamp
CASES = {
    "one token": (2, 1, 1, 12, 1.0, 1.0),
    "one ragged chunk": (1, 37, 2, 12, 1.0, 1.0),
    "one full chunk": (1, CHUNK, 1, 16, 1.0, 1.0),
    "one token in the second chunk": (1, CHUNK + 1, 1, 20, 1.0, 1.0),
    "three chunks, ragged": (2, 150, 2, 20, 1.0, 1.0),
    "two full chunks, strong": (1, 2 * CHUNK, 1, 33, 3.0, 1.0),
    "a narrow clamp": (1, 100, 2, 12, 2.0, 0.9),
    "rows so wide that chunks are halved": (1, CHUNK + 5, 1, 130, 1.0, 1.0),
    "clamp out of reach": (1, 100, 2, 12, 1.0, 10.0),
}


@pytest.fixture
def draw():
    """Normal float32 tensors from one seed: ``draw(2, 37, 2, 12)``."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def kernels(q, k, v, clamp):
    return CausalFlow.apply(q, k, v, 1e-6, clamp)


def gated(q, k, clamp=1.0):
    """The gated features of q and of k [B, T, H, K]."""
    return flow_gates(q, k, 1e-6, clamp)[:2]


def weights(q, k, clamp):
    """What phi(k) is multiplied with [B, T, H, K]."""
    return gated(q, k, clamp)[1] / k.sigmoid()


def exact(q, k, v, clamp):
    return causal_flow_attention(q, k, v, clamp=clamp)[0]


def error(got, wanted) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def errors(q, k, v, clamp, upstream) -> dict[str, float]:
    """Relative errors of the output and of all gradients, on the values that the kernel sees."""
    results = []
    for form, dtype in ((kernels, q.dtype), (exact, torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        o = form(*leaves, clamp)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o))])
    names = ["output", "gradient of q", "gradient of k", "gradient of v"]
    return {name: error(got, wanted) for name, got, wanted in zip(names, *results, strict=True)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients(case, draw):
    batch, length, heads, width, std, clamp = case
    q, k = std * draw(batch, length, heads, width), std * draw(batch, length, heads, width)
    found = errors(q, k, draw(batch, length, heads, 5), clamp, draw(batch, length, heads, 5))
    if length == 1:  # the output is sigmoid(1) v whatever q and k are: their gradients are of the size of eps
        found = {name: found[name] for name in ("output", "gradient of v")}
    assert max(found.values()) < FLOAT32, found


#: length, wanted pieces, and the tokens of a piece and of the last that come of them
PIECES = {
    "two pieces, the last ragged": (4 * CHUNK - 5, 2, 2 * CHUNK, 2 * CHUNK - 5),
    "pieces of one chunk": (3 * CHUNK, 3, CHUNK, CHUNK),
    "the last piece is shorter": (5 * CHUNK, 3, 2 * CHUNK, CHUNK),
    "the last piece has one token": (4 * CHUNK + 1, 3, 2 * CHUNK, 1),
    "fewer pieces than wanted": (5 * CHUNK + 3, 5, 2 * CHUNK, CHUNK + 3),
}


@pytest.mark.parametrize("case", PIECES.values(), ids=PIECES)
def test_pieces(case, draw, monkeypatch):
    length, wanted, piece, last = case
    monkeypatch.setattr(gates, "pieces_for", lambda q: wanted)
    q, k = draw(2, length, 2, 12), draw(2, length, 2, 12)
    (grid,), sizes, _, _ = gates.launch(q, k)
    assert sizes[3] == piece
    assert length - (sizes[2] - 1) * piece == last
    assert grid == 4 * sizes[2]
    found = errors(q, k, draw(2, length, 2, 5), 1.0, draw(2, length, 2, 5))
    assert max(found.values()) < FLOAT32, found


def test_wide_heads_come_in_shorter_chunks():
    sizes = {width: gates.chunk_for(torch.empty(1, 1, 1, width)) for width in (12, 64, 65, 128, 256)}
    assert sizes == {12: CHUNK, 64: CHUNK, 65: CHUNK // 2, 128: CHUNK // 2, 256: CHUNK // 2}


def test_pieces_are_chosen_where_four_walks_pay(monkeypatch):
    monkeypatch.setattr(gates, "multiprocessors", lambda device: 132)
    for batch, length, pieces in (
        (1, 65_536, 33),
        (64, 65_536, 1),
        (4, 65_536, 8),
        (8, 65_536, 4),
        (9, 65_536, 1),
        (1, 4096, 8),
        (1, 1024, 1),
    ):
        q = torch.empty(1).expand(batch, length, 16, 128)
        assert gates.pieces_for(q) == pieces, (batch, length)


def test_the_clamp_is_active_and_has_no_slope(draw):
    q, k = 2 * draw(1, 100, 1, 12), 2 * draw(1, 100, 1, 12)
    bound, loose = (weights(q, k, clamp) for clamp in (1.0, 10.0))
    assert ((bound - loose).abs() > 1e-4).double().mean() > 0.2
    weight = weights(q, k, 1e-3)  # every conserved flow is above
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_half_precision(draw):
    q, k, v = (draw(1, 100, 2, width).half() for width in (20, 20, 5))
    found = errors(q, k, v, 1.0, draw(1, 100, 2, 5).half())
    assert max(found.values()) < FLOAT16, found


def test_long_sequences_of_half_precision_keep_their_precision():
    """What a query reads falls as 1 / (t K), here to 8e-6, where float16 has lost 7 of its 10 bits: the features carry T times that."""
    q = k = torch.zeros(1, 3000, 1, 64, dtype=torch.float16)
    v = torch.ones(1, 3000, 1, 2, dtype=torch.float16)
    torch.testing.assert_close(kernels(q, k, v, 1.0), torch.full_like(v, 1.0).sigmoid(), rtol=1e-3, atol=0)


def inside_nan(x):
    """The same numbers as a view into a larger tensor of NaN; the last axis stays contiguous."""
    around = torch.full([n + 4 for n in x.shape], torch.nan, dtype=x.dtype)
    view = around[tuple(slice(2, 2 + n) for n in x.shape)]
    return view.copy_(x)


def test_views_of_something_larger(draw):
    """Rows that lie apart in memory, NaN between them, as in a joint projection."""
    qkv, d = [draw(2, 70, 3, width) for width in (20, 20, 5)], draw(2, 70, 3, 5)
    results = []
    for inputs, upstream in ((qkv, d), ([inside_nan(x) for x in qkv], inside_nan(d))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = kernels(*leaves, 1.0)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, upstream)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_no_gate_reads_a_later_token(draw):
    q, k = draw(1, 100, 1, 12), draw(1, 100, 1, 12)
    before = gated(q, k)
    q[:, 70:], k[:, 70:] = draw(1, 30, 1, 12), draw(1, 30, 1, 12)
    after = gated(q, k)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[:, :70], second[:, :70])
        assert not torch.equal(first[:, 70:], second[:, 70:])
