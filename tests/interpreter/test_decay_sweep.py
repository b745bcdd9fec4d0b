"""The sweep behind linear attention with scalar decay, forward and backward, against the quadratic form in float64.

The interpreter runs programs one after the other and is wrong about bfloat16, so races, shared memory and bfloat16 are left
to ``tests/kernels/test_gpu.py``. What is proven here: the algebra, every mask, and where a program reads and writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from attnlab.kernels import arguments, decay_launch
from attnlab.kernels.decay_function import LinearDecay
from attnlab.kernels.decay_launch import Sweeps, Tiles, tiles_for
from attnlab.kernels.dispatch import rows
from attnlab.kernels.launch import Launcher
from attnlab.kernels.packed import Sequences
from attnlab.mixers import recurrence

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before triton is imported"
)

SCALE = 0.3
FLOAT32, FLOAT16 = 1e-5, 5e-3  # relative Frobenius; measured: 2e-7 and 3e-4, decay gradients 1e-6 and 2e-3
HEAD_DECAYS = (-0.01, -0.5)


@dataclass(frozen=True)
class Case:
    """One launch: B T H=2 K V, chunks of 16, slices of V, pieces a sequence, parts a piece, and what is switched on."""

    length: int = 37
    batch: int = 2
    width: int = 12
    values: int = 20
    slice: int = 16
    pieces: int = 1
    parts: int = 1
    gated: bool = False
    state: bool = False
    bounds: tuple[int, ...] | None = None  # of packed sequences
    joint: bool = False  # q, k and v are views of one projection

    @property
    def tiles(self) -> Tiles:
        return Tiles(chunk=16, slice=self.slice, warps=4, stages=1, pieces=self.pieces, parts=self.parts)

    @property
    def packing(self) -> Sequences:
        return arguments.sequences(None if self.bounds is None else torch.tensor(self.bounds), self.batch, self.length)

    @property
    def sequences(self) -> int:
        return self.batch if self.bounds is None else len(self.bounds) - 1


CASES = {
    "one piece": Case(),
    "one piece, gates, state": Case(gated=True, state=True),
    "two pieces": Case(length=70, pieces=2),
    "two pieces, gates, state": Case(length=70, pieces=2, gated=True, state=True),
    "three pieces, state": Case(length=90, batch=1, pieces=3, state=True),
    "three pieces, gates": Case(length=90, batch=1, pieces=3, gated=True),
    "three pieces, the last of one token": Case(length=33, batch=1, pieces=3, gated=True, state=True),
    "packed, in pieces": Case(length=150, batch=1, pieces=3, bounds=(0, 7, 130, 150)),
    "packed, in pieces, gates, state": Case(
        length=150, batch=1, pieces=4, bounds=(0, 1, 49, 145, 150), gated=True, state=True
    ),
    "three pieces of three parts, state": Case(length=278, batch=1, pieces=3, parts=3, state=True),
    "two pieces of two parts, gates": Case(length=100, pieces=2, parts=2, gated=True, state=True),
    "packed, in pieces of two parts": Case(length=200, batch=1, pieces=3, parts=2, bounds=(0, 7, 130, 200), state=True),
    "forty pieces": Case(length=640, batch=1, pieces=40, gated=True, state=True),
    "packed": Case(length=90, batch=1, bounds=(0, 7, 50, 90)),
    "packed, gates, state": Case(length=90, batch=1, bounds=(0, 1, 17, 81, 90), gated=True, state=True),
    "views, state": Case(joint=True, state=True),
    "views, gates, two pieces": Case(length=70, pieces=2, joint=True, gated=True),
    "wide keys, narrow values": Case(width=20, values=12, gated=True, state=True),
    "as wide keys as values": Case(values=12, gated=True, state=True),
    "as wide keys as values, two slices, pieces, state": Case(length=70, width=20, pieces=2, state=True),
    "as wide keys as values, packed, pieces, gates, views": Case(
        length=150, batch=1, width=20, pieces=3, bounds=(0, 7, 130, 150), gated=True, joint=True
    ),
    "one slice for all values": Case(values=40, slice=64, state=True),
    "one token": Case(length=1, gated=True, state=True),
}


@pytest.fixture
def draw():
    """Normal float32 tensors from one seed: ``draw(2, 37, 2, 12)``."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


TOLD = {}  # what followed each key, over all tests


@pytest.fixture(autouse=True)
def key_tells_the_rest(monkeypatch):
    """Compiled kernels keep what follows a key: nothing that follows may depend on anything else."""
    launch = Launcher.launch

    def checked(self, grid, arguments, key, rest):
        kinds = [(x.dtype, x.is_cuda) if isinstance(x, Tensor) else type(x) for x in arguments]
        assert TOLD.setdefault((self, key, *kinds), rest()) == rest()
        launch(self, grid, arguments, key, rest)

    monkeypatch.setattr(Launcher, "launch", checked)


def leaves(case: Case, draw, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs that want gradients; with ``joint`` q, k and v are one tensor."""
    shape = (case.batch, case.length, 2)
    if case.joint:
        x = {"qkv": draw(*shape, 2 * case.width + case.values + 3)}  # 3 channels that nobody reads
    else:
        x = {"q": draw(*shape, case.width), "k": draw(*shape, case.width), "v": draw(*shape, case.values)}
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    x["log_decay"] = -draw(*shape).abs() if case.gated else torch.tensor(HEAD_DECAYS)
    if case.state:
        x["initial_state"] = draw(case.sequences, 2, case.width, case.values)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def parts(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    if case.joint:
        return x["qkv"].split([case.width, case.width, case.values, 3], -1)[:3]
    return x["q"], x["k"], x["v"]


def kernel(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return LinearDecay.apply(*parts(case, x), x["log_decay"], x.get("initial_state"), SCALE, case.packing, case.tiles)


def reference(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The quadratic form, one packed sequence after the other."""
    outs, finals = [], []
    for n, (first, last) in enumerate(pairwise(case.bounds or (0, case.length))):
        piece = slice(first, last)
        decay = x["log_decay"][:, piece] if case.gated else x["log_decay"]
        start = x.get("initial_state")
        if start is not None and case.bounds is not None:
            start = start[n : n + 1]
        o, final = recurrence.parallel(
            *(part[:, piece] for part in parts(case, x)), decay, scale=SCALE, initial_state=start
        )
        outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals)


def everything(form, case: Case, x: dict[str, Tensor], d_out: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    o, final = form(case, x)
    grads = torch.autograd.grad([o, final], list(x.values()), [d_out.to(o), d_final.to(final)])
    named = {f"gradient of {name}": grad for name, grad in zip(x, grads, strict=True)}
    return {"o": o.detach(), "final state": final.detach(), **named}


def both(case: Case, draw, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the kernel and what the float64 form make of the same numbers."""
    x = leaves(case, draw, dtype)
    d_out = draw(case.batch, case.length, 2, case.values).to(dtype)
    d_final = draw(case.sequences, 2, case.width, case.values)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    return everything(kernel, case, x, d_out, d_final), everything(reference, case, exact, d_out, d_final)


def compare(got: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    """Relative Frobenius error of every tensor; the message names the one that is off. NaN is off, too."""
    for name, tensor in got.items():
        error = float((tensor.double() - wanted[name]).norm() / wanted[name].norm())
        assert error < limit, f"{name} is off by {error:.1e}, allowed {limit:.0e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, draw):
    compare(*both(case, draw), FLOAT32)


@pytest.mark.parametrize(
    "name", ["two pieces, gates, state", "packed, gates, state", "views, state", "three pieces, state"]
)
def test_outputs_and_gradients_in_float16(name, draw):
    got, wanted = both(CASES[name], draw, torch.float16)
    compare(got, wanted, FLOAT16)


def test_gradient_of_a_strong_head_decay_in_float16(draw):
    """A memory of two tokens in 128: as one difference of sums over all later tokens it would be off by 0.1."""
    case = Case(length=128, batch=1)
    x = leaves(case, draw, torch.float16) | {"log_decay": torch.tensor([-0.5, -0.5], requires_grad=True)}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    d_out = draw(1, 128, 2, 20).half()
    kernel(case, x)[0].backward(d_out)
    reference(case, exact)[0].backward(d_out.double())
    compare({"gradient of log_decay": x["log_decay"].grad}, {"gradient of log_decay": exact["log_decay"].grad}, FLOAT16)


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_reverse_is_forward_over_the_reversed_sequence(gated, pieces, draw):
    """Between tokens t < s lie the gates of t + 1 .. s. Reversed they belong to tokens one later, and the first has none."""
    case = Case(length=90, batch=1, pieces=pieces, gated=gated, state=True)
    x = {name: tensor.detach() for name, tensor in leaves(case, draw).items()}
    q, k, v = parts(case, x)
    start = x["initial_state"]
    sweeps = Sweeps(q, x["log_decay"], SCALE, case.tiles, case.packing)
    updates = sweeps.updates(k, v, reverse=True)
    o, final = sweeps.sweep(q, k, v, reverse=True, start=start, updates=updates, final=True)
    gates = x["log_decay"].double().expand(1, 90, 2)
    late = torch.cat([torch.zeros(1, 1, 2), gates.flip(1)[:, :-1]], 1)
    wanted, state = recurrence.parallel(
        *(part.double().flip(1) for part in (q, k, v)), late, scale=SCALE, initial_state=start.double()
    )
    state = gates[:, 0].exp()[..., None, None] * state  # the state has passed the first token's gate, too
    compare({"o": o, "final state": final}, {"o": wanted.flip(1), "final state": state}, FLOAT32)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("decays", [(-8.0, -0.1), (-0.7, -2.5), (-200.0, 0.0)])
def test_what_is_forgotten_may_be_left_out(decays, pieces, draw):
    """Strong decays let a program skip pieces and chunks; weak ones in the next head must not."""
    case = Case(length=90, batch=1, pieces=pieces, state=True)
    x = leaves(case, draw)
    x["log_decay"] = torch.tensor(decays, requires_grad=True)
    d_out, d_final = draw(1, 90, 2, 20), draw(1, 2, 12, 20)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    compare(
        everything(kernel, case, x, d_out, d_final),
        everything(reference, case, exact, d_out, d_final),
        2e-5,  # at exp(-8) a token the gradient of the decay is what 7 digits leave of a cancellation
    )


def test_the_chosen_pieces_all_have_tokens(monkeypatch):
    """A piece of -n tokens would be taken to decay by exp(+n |g|). Pieces are whole chunks, so their number is recounted."""
    monkeypatch.setattr(decay_launch, "multiprocessors", lambda device: 132)
    for length, heads in product([1, 100, 1024, 4097, 37_000, 65_000, 65_536], [1, 2, 8, 16, 500]):
        x = torch.empty(1, length, heads, 64, dtype=torch.bfloat16, device="meta")
        tiles = tiles_for(x, x, forgets=True)
        part, piece = tiles.part(length), tiles.piece(length)
        assert part % tiles.chunk == piece % part == 0
        assert (tiles.pieces - 1) * piece < length <= tiles.pieces * piece, f"T={length} H={heads}: {tiles}"


@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_do_not_see_each_other(gated, draw):
    """Bit-equal to running every sequence alone."""
    case = Case(length=90, batch=1, bounds=(0, 7, 50, 90), gated=gated, state=True)
    x = {name: tensor.detach() for name, tensor in leaves(case, draw).items()}
    o, final = kernel(case, x)
    for n, (first, last) in enumerate(pairwise(case.bounds)):
        alone = Case(length=last - first, batch=1, gated=gated, state=True)
        y = {name: x[name][:, first:last] for name in ("q", "k", "v")}
        y["log_decay"] = x["log_decay"][:, first:last].contiguous() if gated else x["log_decay"]
        y["initial_state"] = x["initial_state"][n : n + 1]
        o_alone, final_alone = kernel(alone, y)
        assert torch.equal(o[:, first:last], o_alone)
        assert torch.equal(final[n : n + 1], final_alone)


class Guarded:
    """``torch`` for one module, with an ``empty`` that is full of NaN and stands between rows of NaN."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *shape, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 else shape)
        buffer = torch.full((size.numel() + 2 * 512,), torch.nan, dtype=dtype, device=device)
        self.buffers.append((buffer, size.numel()))
        return buffer[512 : 512 + size.numel()].view(size)

    def empty_like(self, x: Tensor, *, memory_format: torch.memory_format) -> Tensor:
        assert memory_format == torch.contiguous_format
        return self.empty(*x.shape, dtype=x.dtype, device=x.device)


def padded(x: Tensor) -> Tensor:
    """The same numbers inside a larger tensor of NaN: more tokens, heads and channels on every side."""
    around = torch.full([n + 6 for n in x.shape], torch.nan)
    inside = around[tuple(slice(3, 3 + n) for n in x.shape)]
    inside.copy_(x)
    return inside


@pytest.mark.parametrize("name", ["one piece", "two pieces, gates, state", "packed, gates, state", "one token"])
def test_nothing_outside_is_read_or_written(name, draw, monkeypatch):
    case = CASES[name]
    x = leaves(case, draw)
    d_out, d_final = draw(case.batch, case.length, 2, case.values), draw(case.sequences, 2, case.width, case.values)
    wanted = everything(kernel, case, x, d_out, d_final)
    y = {key: padded(x[key].detach()).requires_grad_() if key in "qkv" else x[key] for key in x}
    guarded = Guarded()
    monkeypatch.setattr(decay_launch, "torch", guarded)
    got = everything(kernel, case, y, padded(d_out), d_final)
    for key, tensor in got.items():
        assert torch.equal(tensor, wanted[key]), f"{key} depends on what lies around the inputs"
    count = case.pieces * case.batch if case.pieces > 1 else 0
    updates = {count * 2 * case.width * case.values, count * 2}
    assert len(guarded.buffers) >= 5  # o, the final state, and three gradients
    for buffer, size in guarded.buffers:
        assert buffer[:512].isnan().all(), "written in front of an output"
        assert buffer[512 + size :].isnan().all(), "written behind an output"
        pieces = size in updates  # what the last piece adds to the state is nobody's start
        assert pieces or not buffer[512 : 512 + size].isnan().any(), "an output was not written whole"


def test_strided_views_are_not_copied(draw):
    case = CASES["views, state"]
    q, k, v = parts(case, leaves(case, draw))
    assert all(rows(part) is part for part in (q, k, v))
    crossed = v.transpose(-1, -2)
    assert rows(crossed).is_contiguous()


def test_a_sum_as_the_loss_sends_an_expanded_gradient(draw):
    """All strides of the gradient of ``o.sum()`` are 0."""
    case = Case(gated=True)
    x = leaves(case, draw)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    kernel(case, x)[0].sum().backward()
    reference(case, exact)[0].sum().backward()
    compare({name: x[name].grad for name in x}, {name: exact[name].grad for name in x}, FLOAT32)


@pytest.mark.parametrize("name", ["one piece", "as wide keys as values"])
def test_the_gradient_of_transposed_outputs(name, draw):
    """It comes in the memory order [B, H, T, V], which no other gradient may take over: programs write [B, T, H, V]."""
    case = CASES[name]
    x = leaves(case, draw)
    exact = {key: tensor.detach().double().requires_grad_() for key, tensor in x.items()}
    d_out = draw(case.batch, 2, case.length, case.values)
    kernel(case, x)[0].transpose(1, 2).backward(d_out)
    reference(case, exact)[0].transpose(1, 2).backward(d_out.double())
    compare({key: x[key].grad for key in x}, {key: exact[key].grad for key in x}, FLOAT32)


def test_gradients_from_the_final_state_alone(draw):
    case = Case(length=70, pieces=2, state=True)
    x = leaves(case, draw)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    d_final = draw(2, 2, 12, 20)
    kernel(case, x)[1].backward(d_final)
    reference(case, exact)[1].backward(d_final.double())
    assert not x["q"].grad.any()  # no output was asked for
    del x["q"]
    compare({name: x[name].grad for name in x}, {name: exact[name].grad for name in x}, FLOAT32)


@pytest.mark.parametrize("name", ["one piece", "two pieces, gates, state"])
def test_without_the_final_state_everything_else_is_the_same(name, draw):
    case = CASES[name]
    x = leaves(case, draw)
    arguments = (*parts(case, x), x["log_decay"], x.get("initial_state"), SCALE, case.packing, case.tiles)
    o, final = LinearDecay.apply(*arguments, False)
    assert final is None
    with_state, _ = LinearDecay.apply(*arguments, True)
    assert torch.equal(o, with_state)
    d_out = draw(*o.shape)
    wanted = torch.autograd.grad(with_state, list(x.values()), d_out)
    for key, grad, other in zip(x, torch.autograd.grad(o, list(x.values()), d_out), wanted, strict=True):
        assert torch.equal(grad, other), f"gradient of {key}"


def test_gradients_obey_eulers_identity(draw):
    """o is linear in q, in k and in v: <q, dq> = <k, dk> = <v, dv> = <o, do>."""
    case = Case(length=90, batch=1, pieces=3, gated=True)
    x = leaves(case, draw)
    o, _ = kernel(case, x)
    d_out = draw(*o.shape)
    grads = dict(zip(x, torch.autograd.grad(o, list(x.values()), d_out), strict=True))
    wanted = (o.detach().double() * d_out).sum()
    for name in "qkv":
        inner = (x[name].detach().double() * grads[name]).sum()
        torch.testing.assert_close(inner, wanted, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


CONSTANT = {
    "as wide keys as values": CASES["as wide keys as values"],
    "one piece": Case(values=12),
    "one token": Case(length=1, values=12),
    "two slices, views": Case(width=20, joint=True),
    "two pieces": Case(length=70, values=12, pieces=2),
    "three pieces, the last of one token, gates": Case(length=33, batch=1, values=12, pieces=3, gated=True),
    "packed, in pieces, two slices": Case(length=150, batch=1, width=20, pieces=3, bounds=(0, 7, 130, 150)),
    "two pieces, two slices, state": CASES["as wide keys as values, two slices, pieces, state"],
    "three pieces of three parts": Case(length=278, batch=1, values=12, pieces=3, parts=3),
    "packed, in pieces of two parts, state": replace(CASES["packed, in pieces of two parts"], values=12),
    "more values than keys, two pieces": CASES["two pieces"],
}


@pytest.mark.parametrize("case", CONSTANT.values(), ids=CONSTANT)
def test_gradients_beside_a_constant_decay(case, draw):
    x = leaves(case, draw)
    x["log_decay"].requires_grad_(False)
    exact = {key: tensor.detach().double().requires_grad_(tensor.requires_grad) for key, tensor in x.items()}
    got, wanted = (form(case, y)[: 1 + case.state] for form, y in ((kernel, x), (reference, exact)))
    d = [draw(*part.shape) for part in got]
    torch.autograd.backward(got, d)
    torch.autograd.backward(wanted, [part.double() for part in d])
    assert x["log_decay"].grad is None
    wanting = [key for key in x if key != "log_decay"]
    compare({key: x[key].grad for key in wanting}, {key: exact[key].grad for key in wanting}, FLOAT32)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case(values=12), ["_together"]),
        (Case(length=70, values=12, pieces=2), ["_piece_updates", "_together"]),
        (Case(length=278, values=12, batch=1, pieces=3, parts=3), ["_single", "_piece_updates", "_together"]),
        (Case(values=12, state=True), ["_single", "_together"]),
        (Case(), ["_single"] * 3),
    ],
)
def test_gradients_take_as_few_launches_as_they_can(case, wanted, draw, monkeypatch):
    """Together where nothing has to come first; a long first pass runs beside dq, on a GPU."""
    x = leaves(case, draw)
    x["log_decay"].requires_grad_(False)
    o, _ = kernel(case, x)
    launched = []
    launch = Launcher.launch
    monkeypatch.setattr(
        Launcher, "launch", lambda self, *rest: (launched.append(self.kernel.fn.__name__), launch(self, *rest))
    )
    o.sum().backward()
    assert launched == wanted


def test_offsets_beyond_32_bits_are_noticed():
    """The two widths of an offset: sizes alone decide, nothing is allocated."""
    near = SimpleNamespace(shape=torch.Size([1, 2**15, 16, 128]), stride=lambda axis: 16 * 128)
    far = SimpleNamespace(shape=torch.Size([1, 2**20, 16, 128]), stride=lambda axis: 16 * 128)
    assert not decay_launch._far(near, near)
    assert decay_launch._far(far, near)
    assert decay_launch._far(near, far)
