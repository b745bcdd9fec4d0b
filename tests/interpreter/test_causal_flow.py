"""The kernels of causal flow attention, forward and backward, against autograd through the torch form in float64.

The interpreter runs programs one after the other and is wrong about bfloat16, so races and bfloat16 are left to
``tests/kernels/test_gpu.py``. What is proven here: the two triangles, what chunks carry, every mask, and the clamp.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
from attnlab.kernels import arguments
from attnlab.kernels import flow_sweep as sweeps
from attnlab.kernels import flow_walks as walks
from attnlab.kernels.decay_launch import Tiles
from attnlab.kernels.flow_gates import flow_gates
from attnlab.mixers.flow import FlowState, causal_flow_attention

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


def rows_of(q, bounds=None):
    """Those of q [B, T, H, K]; `bounds` pack several into one row."""
    return arguments.sequences(bounds, len(q), q.shape[1])


def flow_sweep(q, k, v, *, cu_seqlens=None, **options):
    return sweeps.flow_sweep(q, k, v, sequences=rows_of(q, cu_seqlens), **options)


def kernels(q, k, v, clamp):
    return flow_sweep(q, k, v, eps=1e-6, clamp=clamp, return_state=False)[0]


def gated(q, k, clamp=1.0):
    """The gated features of q and of k [B, T, H, K]."""
    return flow_gates(q, k, 1e-6, clamp, walks.layout(q, rows_of(q)))[:2]


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
    monkeypatch.setattr(walks, "pieces_for", lambda q, longest: wanted)
    q, k = draw(2, length, 2, 12), draw(2, length, 2, 12)
    lay = walks.layout(q, rows_of(q))
    (grid,), *_ = walks.launch(q, k, lay)
    assert lay.piece == piece
    assert length - (lay.pieces - 1) * piece == last
    assert grid == 4 * lay.pieces
    found = errors(q, k, draw(2, length, 2, 5), 1.0, draw(2, length, 2, 5))
    assert max(found.values()) < FLOAT32, found


def test_wide_heads_come_in_shorter_chunks():
    sizes = {width: walks.chunk_for(torch.empty(1, 1, 1, width)) for width in (12, 64, 65, 128, 256)}
    assert sizes == {12: CHUNK, 64: CHUNK, 65: CHUNK // 2, 128: CHUNK // 2, 256: CHUNK // 2}


def test_pieces_are_chosen_where_four_walks_pay(monkeypatch):
    monkeypatch.setattr(walks, "multiprocessors", lambda device: 132)
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
        assert walks.pieces_for(q, length) == pieces, (batch, length)


def test_packed_sequences_are_cut_if_that_shortens_the_longest(monkeypatch):
    monkeypatch.setattr(walks, "multiprocessors", lambda device: 132)
    q = torch.empty(1).expand(1, 65_536, 16, 128)  # 33 pieces of 1,986 tokens, rounded up to whole chunks
    for bounds, piece, pieces in (
        ((0, 65_536), 2000, 33),
        ((0, 100, 65_536), 2000, 34),
        ((0, 7_900, *range(15_800, 65_536, 7_900), 65_536), 65_536, 9),
    ):
        lay = walks.layout(q, rows_of(q, torch.tensor(bounds)))
        assert (lay.piece, lay.pieces) == (piece, pieces), bounds


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


def test_a_gradient_that_comes_transposed_in_memory(draw):
    """As [B, H, T, V], from ``o.transpose(1, 2)``: results are laid out as ever."""
    q, k, v = (draw(2, 40, 2, 12) for _ in range(3))
    assert max(errors(q, k, v, 1.0, draw(2, 2, 40, 12).transpose(1, 2)).values()) < FLOAT32


def test_no_gate_reads_a_later_token(draw):
    q, k = draw(1, 100, 1, 12), draw(1, 100, 1, 12)
    before = gated(q, k)
    q[:, 70:], k[:, 70:] = draw(1, 30, 1, 12), draw(1, 30, 1, 12)
    after = gated(q, k)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[:, :70], second[:, :70])
        assert not torch.equal(first[:, 70:], second[:, 70:])


# ------------------------------------------------------------------------------------------------- states and packed sequences

B, H, K, V = 2, 2, 12, 5
SUMS = FlowState._fields[:-1]


def a_past(draw, *lengths) -> FlowState:
    """What sequences of these lengths leave, each sum made a leaf; a sequence without tokens leaves nothing."""
    ends = []
    for length in lengths:
        _, end = causal_flow_attention(*(draw(1, max(length, 1), H, width) for width in (K, K, V)))
        if length == 0:
            end = FlowState(*map(torch.zeros_like, end))._replace(
                log_weight=torch.full_like(end.log_weight, -torch.inf)
            )
        ends.append(end)
    return FlowState(*map(torch.cat, zip(*ends, strict=True)))


def sequences(q, k, v, clamp, past, bounds):
    """The torch form, one packed sequence after the other."""
    if bounds is None:
        return causal_flow_attention(q, k, v, clamp=clamp, initial_state=past)
    outs, ends = [], []
    for n, (first, last) in enumerate(pairwise(bounds)):
        here = None if past is None else FlowState(*(part[n : n + 1] for part in past))
        o, end = causal_flow_attention(*(x[:, first:last] for x in (q, k, v)), clamp=clamp, initial_state=here)
        outs.append(o)
        ends.append(end)
    return torch.cat(outs, 1), FlowState(*map(torch.cat, zip(*ends, strict=True)))


def packed(q, k, v, clamp, past, bounds):
    cu = None if bounds is None else torch.tensor(bounds)
    return flow_sweep(q, k, v, eps=1e-6, clamp=clamp, initial_state=past, cu_seqlens=cu)


def all_errors(qkv, past, bounds, draw, clamp=1.0, read=("o", *SUMS)) -> dict[str, float]:
    """Relative errors of outputs, of every part of the final state, and of all gradients if the results in `read` are read."""
    upstream: dict[str, torch.Tensor] = {}
    results = []
    for form, dtype in ((packed, qkv[0].dtype), (sequences, torch.float64)):
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in zip("qkv", qkv, strict=True)}
        state = past
        if past is not None:
            work = torch.float32 if form is packed else dtype
            parts = {name: getattr(past, name).to(work).detach().requires_grad_() for name in SUMS}
            leaves |= parts
            state = FlowState(**parts, length=past.length)
        o, end = form(leaves["q"], leaves["k"], leaves["v"], clamp, state, bounds)
        named = {"o": o, **{name: getattr(end, name) for name in SUMS}}
        for name in read:
            upstream.setdefault(name, draw(*named[name].shape))
        grads = torch.autograd.grad(
            [named[name] for name in read],
            list(leaves.values()),
            [upstream[name].to(qkv[0].dtype if name == "o" else torch.float32).to(named[name]) for name in read],
            materialize_grads=True,
        )
        grads = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        results.append({name: x.detach() for name, x in named.items()} | grads | {"length": end.length})
    got, wanted = results
    assert torch.equal(got.pop("length"), wanted.pop("length"))
    return {name: float((x - wanted[name]).norm() / (wanted[name].norm() + 1e-12)) for name, x in got.items()}


#: length, bounds, tokens that each sequence has had
STATES = {
    "one token": (1, None, (7, 40)),
    "one ragged chunk": (21, None, (40, 100)),
    "three chunks": (2 * CHUNK + 9, None, (300, 3)),
    "one row without a past": (50, None, (0, 9)),
    "packed": (2 * CHUNK + 70, (0, 1, CHUNK + 1, 2 * CHUNK + 2, 2 * CHUNK + 70), (0, 33, 5, 200)),
}


@pytest.mark.parametrize("case", STATES.values(), ids=STATES)
@pytest.mark.parametrize("clamp", [1.0, 10.0])
def test_states(case, clamp, draw):
    length, bounds, past = case
    batch = B if bounds is None else 1
    qkv = [draw(batch, length, H, width) for width in (K, K, V)]
    found = all_errors(qkv, a_past(draw, *past), bounds, draw, clamp)
    assert max(found.values()) < FLOAT32, found


#: length, wanted pieces, bounds; of packed sequences some are shorter than a piece, some numbers of pieces stay empty
CUT = {
    "rows": (5 * CHUNK + 3, 3, None),
    "packed": (7 * CHUNK + 3, 3, (0, 5 * CHUNK + 1, 5 * CHUNK + 2, 7 * CHUNK + 3)),
    "packed, whole pieces": (6 * CHUNK, 3, (0, 2 * CHUNK, 6 * CHUNK)),
    "packed, short ones first": (5 * CHUNK, 5, (0, 1, 9, CHUNK, 2 * CHUNK + 1, 5 * CHUNK)),
}


@pytest.mark.parametrize("case", CUT.values(), ids=CUT)
@pytest.mark.parametrize("with_past", [True, False])
def test_pieces_of_states(case, with_past, draw, monkeypatch):
    length, wanted, bounds = case
    monkeypatch.setattr(walks, "pieces_for", lambda q, longest: wanted)
    batch = B if bounds is None else 1
    qkv = [draw(batch, length, H, width) for width in (K, K, V)]
    past = a_past(draw, *(0, 33, 5, 200, 61)[: batch if bounds is None else len(bounds) - 1]) if with_past else None
    assert walks.layout(qkv[0], rows_of(qkv[0], None if bounds is None else torch.tensor(bounds))).split
    found = all_errors(qkv, past, bounds, draw)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize("read", [("o",), ("o", *SUMS)], ids=["outputs", "and the state"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("bounds", [None, (0, 1, 70, 150)], ids=["rows", "packed"])
def test_as_many_values_as_keys(bounds, pieces, read, draw, monkeypatch):
    """Then gradients share a launch, all of them or two; the sweeps are cut as few sequences are on a GPU."""
    monkeypatch.setattr(sweeps, "tiles_for", lambda q, v: Tiles(16, 16, 4, 1, pieces))
    qkv = [draw(1 if bounds else B, 150, H, K) for _ in "qkv"]
    found = all_errors(qkv, None, bounds, draw, read=read)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize("read", [("o",), *((name,) for name in SUMS), ("log_weight", "memory")])
def test_any_part_of_the_final_state_may_be_read_alone(read, draw):
    qkv = [draw(B, 40, H, width) for width in (K, K, V)]
    found = all_errors(qkv, a_past(draw, 8, 70), None, draw, read=read)
    assert max(found.values()) < FLOAT32, found


def test_half_precision_with_a_state(draw):
    qkv = [draw(1, 100, H, width).half() for width in (K, K, V)]
    found = all_errors(qkv, a_past(draw, 5, 900), (0, 33, 100), draw)
    assert max(found.values()) < FLOAT16, found


def test_eps_is_in_the_flows_and_not_in_the_state(draw):
    qkv, past = [draw(B, 50, H, width) for width in (K, K, V)], a_past(draw, 5, 200)
    o, end = flow_sweep(*qkv, eps=0.01, clamp=1.0, initial_state=past)
    wanted, exact_end = causal_flow_attention(*qkv, eps=0.01, initial_state=past)
    assert error(o, wanted) < FLOAT32
    assert max(error(getattr(end, name), getattr(exact_end, name)) for name in SUMS) < FLOAT32


@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, 77])
def test_two_calls_are_one(cut, draw):
    """The gradient runs through the state between them, and through one that the torch form made for the kernels, or took."""
    q, k, v = (draw(B, 100, H, width) for width in (K, K, V))
    d = draw(B, 100, H, V)
    results = []
    for forms in ((packed, packed), (packed, sequences), (sequences, packed), (sequences,)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        outs, state = [], None
        edges = (0, cut, 100) if len(forms) > 1 else (0, 100)
        for form, (first, last) in zip(forms, pairwise(edges), strict=True):
            o, state = form(*(x[:, first:last] for x in leaves), 1.0, state, None)
            outs.append(o)
        o = torch.cat(outs, 1)
        results.append([o.detach(), *(part.detach() for part in state), *torch.autograd.grad(o, leaves, d)])
    *split, whole = results
    for found in split:
        for got, wanted in zip(found, whole, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_token_by_token(draw):
    """Generation: the state goes through forty calls."""
    q, k, v = (draw(B, 40, H, width) for width in (K, K, V))
    outs, state = [], None
    for t in range(40):
        o, state = packed(*(x[:, t : t + 1] for x in (q, k, v)), 1.0, state, None)
        outs.append(o)
    wanted, end = causal_flow_attention(*(x.double() for x in (q, k, v)))
    assert error(torch.cat(outs, 1), wanted) < FLOAT32
    assert max(error(getattr(state, name), getattr(end, name)) for name in SUMS) < FLOAT32
    assert state.length.tolist() == [40, 40]


def test_packed_sequences_do_not_see_each_other(draw):
    bounds = (0, CHUNK + 1, 3 * CHUNK)
    qkv = [draw(1, 3 * CHUNK, H, width) for width in (K, K, V)]
    before, _ = packed(*qkv, 1.0, None, bounds)
    for x in qkv:
        x[:, CHUNK + 1 :] = draw(*x[:, CHUNK + 1 :].shape)
    after, _ = packed(*qkv, 1.0, None, bounds)
    assert torch.equal(before[:, : CHUNK + 1], after[:, : CHUNK + 1])


def test_states_and_bounds_may_be_views(draw):
    """Every second number of something, as a column of a table is."""
    bounds, past = torch.tensor([0, 20, 50]), a_past(draw, 3, 40)
    qkv = [draw(1, 50, H, width) for width in (K, K, V)]
    apart = FlowState(*(torch.stack([x, -x], -1)[..., 0] for x in past))
    o, end = flow_sweep(*qkv, eps=1e-6, clamp=1.0, initial_state=past, cu_seqlens=bounds)
    again = flow_sweep(
        *qkv, eps=1e-6, clamp=1.0, initial_state=apart, cu_seqlens=torch.stack([bounds, -bounds], -1)[:, 0]
    )
    assert all(torch.equal(x, y) for x, y in zip((o, *end), (again[0], *again[1]), strict=True))


def test_a_state_that_nobody_reads_changes_nothing(draw, monkeypatch):
    """The bits of outputs and gradients are those without it, and backward does the same work."""
    launched = []
    gradients = sweeps.gradients
    monkeypatch.setattr(sweeps, "gradients", lambda *x: launched.append(x[-2:]) or gradients(*x))
    qkv, d = [draw(B, 70, H, width) for width in (K, K, V)], draw(B, 70, H, V)
    results = []
    for return_state in (True, False):
        leaves = [x.clone().requires_grad_() for x in qkv]
        o, _ = flow_sweep(*leaves, eps=1e-6, clamp=1.0, return_state=return_state)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, d)])
    assert launched == [(None, False)] * 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
