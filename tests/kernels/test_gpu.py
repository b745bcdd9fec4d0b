"""The kernels on a GPU: every output and gradient against float64, races, memory, and what only a GPU can get wrong.

Errors are relative Frobenius norms: float32 below 1e-5, bfloat16 below 1e-2 and at most twice that of torch on the same
bfloat16 inputs. The reference sees the inputs after they were rounded, so what is measured is the kernel alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.kernels import arguments, dispatch
from attnlab.kernels.aaren_scan import aaren_scan
from attnlab.kernels.causal_flow import causal_flow
from attnlab.kernels.linear_decay import linear_decay_attention
from attnlab.mixers import FlowState, Summary, aaren, causal_flow_attention, recurrence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Case:
    """Sizes [B, T, H, K, V], the decay (``none``, ``head`` or ``token``), and whether a state comes in."""

    dtype: torch.dtype
    width: int
    values: int
    decay: str
    length: int = 1000
    batch: int = 2
    heads: int = 3
    state: bool = True
    bounds: tuple[int, ...] | None = None
    learns: bool = True  # whether the decay wants a gradient

    @property
    def sequences(self) -> int:
        return self.batch if self.bounds is None else len(self.bounds) - 1

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"T{self.length}", f"K{self.width}", f"V{self.values}"]
        marks = {"packed": self.bounds, "state": self.state, "constant": not self.learns}
        return "-".join([*parts, self.decay, *[name for name, there in marks.items() if there]])


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal float32 tensors on the GPU, from one seed."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device="cuda")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """What the kernels allocate next holds NaN: a value that is read before it is written shows."""
    del_me = torch.full((2**28,), torch.nan, device="cuda")  # 1 GiB, back in the allocator's cache on return
    del del_me


def inputs(case: Case, draw) -> dict[str, Tensor]:
    """Leaves by name; decays remember 2 to 50 tokens."""
    shape = (case.batch, case.length, case.heads)
    x = {"q": draw(*shape, case.width), "k": draw(*shape, case.width), "v": draw(*shape, case.values)}
    x = {name: part.to(case.dtype) for name, part in x.items()}
    if case.decay == "token":
        x["log_decay"] = F.logsigmoid(draw(*shape)) / 8
    else:
        rate = 0.0 if case.decay == "none" else 1.0
        x["log_decay"] = -rate * torch.logspace(math.log10(0.02), math.log10(0.5), case.heads, device="cuda")
    if case.state:
        x["initial_state"] = draw(case.sequences, case.heads, case.width, case.values)
    return {name: part.detach().requires_grad_(case.learns or name != "log_decay") for name, part in x.items()}


def kernel(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    bounds = None if case.bounds is None else torch.tensor(case.bounds, device="cuda")
    return linear_decay_attention(**x, cu_seqlens=bounds)


def chunked64(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The chunked torch form, one packed sequence after the other."""
    outs, finals = [], []
    for n, (first, last) in enumerate(pairwise(case.bounds or (0, case.length))):
        tokens = {
            name: part[:, first:last] if part.dim() > 1 else part for name, part in x.items() if name != "initial_state"
        }
        start = x.get("initial_state")
        if start is not None and case.bounds is not None:
            start = start[n : n + 1]
        o, final = recurrence.chunked(**tokens, initial_state=start, chunk_size=256 if last - first > 4096 else 64)
        outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals)


def plain(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The quadratic form as one writes it in torch, every product in the dtype of the inputs."""
    q, k, v = x["q"], x["k"], x["v"]
    running = x["log_decay"].expand(q.shape[:3]).cumsum(1).transpose(1, 2)  # [B, H, T]
    gap = running[..., :, None] - running[..., None, :]
    above = torch.ones(gap.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
    weight = gap.masked_fill(above, -torch.inf).exp().to(q.dtype)
    scale = q.shape[-1] ** -0.5
    o = torch.einsum("bhts,bshv->bthv", torch.einsum("bthk,bshk->bhts", q, k) * weight, v)
    last = running[..., -1:]
    fading = (last - running).exp().to(q.dtype).transpose(1, 2)[..., None]  # [B, T, H, 1]
    final = torch.einsum("bthk,bthv->bhkv", k * fading, v).float()
    if case.state:
        state = x["initial_state"]
        kept = running.exp().to(q.dtype).transpose(1, 2)[..., None]
        o = o + kept * torch.einsum("bthk,bhkv->bthv", q, state.to(q.dtype))
        final = final + last.exp()[..., None] * state
    return scale * o, final


def everything(form, x: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name; `form(x)` returns outputs to which `upstream` belongs, in this order."""
    outputs = form(x)
    wanting = {name: part for name, part in x.items() if part.requires_grad}
    grads = torch.autograd.grad(
        outputs, list(wanting.values()), [d.to(o) for d, o in zip(upstream, outputs, strict=True)]
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in zip(wanting, grads, strict=True)}


def doubled(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach().double().requires_grad_(part.requires_grad) for name, part in x.items()}


def upstream(case: Case, draw) -> list[Tensor]:
    """Gradients of o and of the final state, o's rounded as it will arrive."""
    d_out = draw(case.batch, case.length, case.heads, case.values).to(case.dtype)
    return [d_out, draw(case.sequences, case.heads, case.width, case.values)]


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((part.double() - wanted[name]).norm() / wanted[name].norm()) for name, part in got.items()}


def below(found: dict[str, float], limit: float | dict[str, float]) -> None:
    """Every error keeps its limit; the message has all that do not. NaN does not."""
    limits = limit if isinstance(limit, dict) else dict.fromkeys(found, limit)
    off = {name: f"{error:.1e} > {limits[name]:.1e}" for name, error in found.items() if not error < limits[name]}
    assert not off, str(off)


def float64_of(case: Case, x: dict[str, Tensor], d: list[Tensor]) -> dict[str, Tensor]:
    return everything(lambda y: chunked64(case, y), doubled(x), d)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *(Case(BFLOAT16, width, width, "token") for width in (32, 64, 100, 128, 256)),
    *(Case(BFLOAT16, 128, 128, decay) for decay in ("none", "head")),
    *(Case(BFLOAT16, *sizes, "head") for sizes in ((64, 256), (256, 64), (32, 128))),
    *(Case(FLOAT32, width, width, "head") for width in (32, 64, 100, 128, 256)),
    Case(FLOAT32, 64, 64, "token"),
    Case(FLOAT32, 64, 128, "none", state=False),
    *(Case(FLOAT16, width, width, "token") for width in (64, 128)),
    Case(FLOAT16, 256, 256, "none"),
    Case(BFLOAT16, 64, 64, "token", batch=1, length=4000, bounds=(0, 1, 64, 1063, 4000)),
    Case(FLOAT32, 64, 64, "head", batch=1, length=4000, bounds=(0, 1, 64, 1063, 4000)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, draw):
    x, d = inputs(case, draw), upstream(case, draw)
    got, wanted = everything(lambda y: kernel(case, y), x, d), float64_of(case, x, d)
    found = errors(got, wanted)
    if case.decay != "token" and case.dtype != FLOAT32:
        del found[
            "gradient of log_decay"
        ]  # one number a head, a sum over all tokens with both signs: see the next test
    below(found, LIMITS[case.dtype])


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("width", [64, 128])
def test_at_most_twice_the_error_of_torch_in_bfloat16(width, decay, draw):
    heads = 32 if decay == "head" else 3  # a head's gradient is one sum with both signs: three are a matter of luck
    case = Case(BFLOAT16, width, width, decay, heads=heads)
    x, d = inputs(case, draw), upstream(case, draw)
    wanted = float64_of(case, x, d)
    found = errors(everything(lambda y: kernel(case, y), x, d), wanted)
    torchs = errors(everything(lambda y: plain(case, y), x, d), wanted)
    limits = {name: 2 * error for name, error in torchs.items()}
    below(found, limits)


LONG = [
    Case(BFLOAT16, 128, 128, "none", batch=1, length=65_536, heads=2),
    Case(FLOAT32, 64, 64, "none", batch=1, length=65_536, heads=2),
    Case(FLOAT16, 64, 64, "none", batch=1, length=65_536, heads=2),
    Case(BFLOAT16, 64, 64, "head", batch=1, length=65_000, heads=8),  # the last of its pieces would be empty
    Case(FLOAT32, 64, 64, "head", batch=1, length=65_000, heads=8),
    Case(BFLOAT16, 128, 128, "token", batch=1, length=65_000, heads=2),
    Case(FLOAT32, 128, 64, "token", batch=1, length=5000, heads=2),
    *(
        Case(dtype, 128, width, decay, batch=1, length=9000, bounds=(0, 1, 130, 4226, 8300, 9000))
        for dtype in (BFLOAT16, FLOAT32)
        for width, decay in ((128, "token"), (128, "head"), (64, "none"))
    ),
]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_in_pieces(case, draw):
    x, d = inputs(case, draw), upstream(case, draw)
    found = errors(everything(lambda y: kernel(case, y), x, d), float64_of(case, x, d))
    below(found, LIMITS[case.dtype])


def repeats(form, x: dict[str, Tensor], d: list[Tensor]) -> None:
    """Ten runs more have the bits of the first. No atomics anywhere, so a difference is a race."""
    first = everything(form, x, d)
    for _ in range(10):
        again = everything(form, x, d)
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, different


@pytest.mark.parametrize("case", [CASES[1], CASES[10], LONG[0], LONG[5], LONG[-1], LONG[-2]], ids=str)
def test_the_same_inputs_give_the_same_bits(case, draw):
    repeats(lambda y: kernel(case, y), inputs(case, draw), upstream(case, draw))


CONSTANT = [  # which of the launches go together depends on K = V, on states, and on how the sequences are cut
    *(Case(BFLOAT16, width, width, "head", learns=False, state=state) for width in (64, 100, 128) for state in (False, True)),
    Case(BFLOAT16, 128, 128, "token", learns=False, state=False),
    Case(BFLOAT16, 64, 128, "head", learns=False, state=False),
    Case(BFLOAT16, 256, 256, "head", learns=False, state=False),
    *(Case(dtype, 64, 64, "none", learns=False, state=False) for dtype in (FLOAT32, FLOAT16)),
    *(Case(BFLOAT16, 64, 64, decay, learns=False, state=False, batch=1, length=9000) for decay in ("none", "head", "token")),
    *(
        Case(dtype, 128, 128, "head", learns=False, state=False, batch=1, length=9000, bounds=(0, 1, 130, 4226, 8300, 9000))
        for dtype in (BFLOAT16, FLOAT32)
    ),
    # the first pass of the way back runs on a second stream
    *(Case(BFLOAT16, 128, 128, decay, learns=False, state=state, batch=4, length=16_384, heads=16)
      for decay, state in (("head", False), ("none", False), ("head", True))),
]  # fmt: skip


Form = Callable[[Case, dict[str, Tensor]], tuple[Tensor, Tensor]]


def learned_from(case: Case, form: Form) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """Outputs and final state, the latter only if a state came in: its gradient decides what goes together, too."""
    return lambda x: form(case, x)[: 1 + case.state]


@pytest.mark.parametrize("case", CONSTANT, ids=str)
def test_gradients_beside_a_constant_decay(case, draw):
    x, d = inputs(case, draw), upstream(case, draw)[: 1 + case.state]
    got = everything(learned_from(case, kernel), x, d)
    wanted = everything(learned_from(case, chunked64), doubled(x), d)
    below(errors(got, wanted), LIMITS[case.dtype])


@pytest.mark.parametrize("case", [CONSTANT[0], CONSTANT[4], CONSTANT[12], *CONSTANT[-3:]], ids=str)
def test_gradients_beside_a_constant_decay_repeat_to_the_bit(case, draw):
    x, d = inputs(case, draw), upstream(case, draw)[: 1 + case.state]
    repeats(learned_from(case, kernel), x, d)


@pytest.mark.parametrize("case", [CONSTANT[0], CONSTANT[-3], CASES[1]], ids=str)
def test_the_gradient_of_transposed_outputs(case, draw):
    """It comes in the memory order [B, H, T, V]. Its numbers are the same, so the results are, to the bit."""
    x, (d, *_) = inputs(case, draw), upstream(case, draw)
    plain = everything(lambda y: [kernel(case, y)[0]], x, [d])
    across = d.transpose(1, 2).contiguous()
    turned = everything(lambda y: [kernel(case, y)[0].transpose(1, 2)], x, [across])
    different = [name for name in plain if name != "output 0" and not torch.equal(plain[name], turned[name])]
    assert not different


@pytest.mark.parametrize("case", [CONSTANT[0], CONSTANT[-3], CASES[1]], ids=str)
def test_a_cuda_graph_of_forward_and_backward(case, draw):
    """Replayed on other numbers: nothing on the host may look at them, and a second stream must be caught, too."""
    x, (d, *_) = inputs(case, draw), upstream(case, draw)

    def step() -> dict[str, Tensor]:
        return everything(lambda y: [kernel(case, y)[0]], x, [d])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        caught = step()
    with torch.no_grad():
        for name in "qkv":
            x[name].copy_(draw(*x[name].shape))
    graph.replay()
    wanted = step()
    different = [name for name in wanted if not torch.equal(caught[name], wanted[name])]
    assert not different


def test_the_state_may_be_left_out(draw):
    case = Case(BFLOAT16, 64, 64, "token", length=5000, state=False)
    x = inputs(case, draw)
    o, nothing = linear_decay_attention(**x, return_state=False)
    assert nothing is None
    assert torch.equal(o, kernel(case, x)[0])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_state_carries_across_a_split(dtype, draw):
    case = Case(dtype, 64, 64, "token", state=False)
    x = {name: part.detach() for name, part in inputs(case, draw).items()}
    before, state = linear_decay_attention(**{name: part[:, :333] for name, part in x.items()})
    after, final = linear_decay_attention(**{name: part[:, 333:] for name, part in x.items()}, initial_state=state)
    whole, last = chunked64(case, doubled(x))
    found = errors({"o": torch.cat([before, after], 1), "state": final}, {"o": whole, "state": last})
    below(found, LIMITS[dtype])


def test_float64_falls_back_and_says_so_once(draw):
    dispatch._warn_fallback.cache_clear()
    case = Case(FLOAT32, 32, 32, "head", length=100)
    x = doubled(inputs(case, draw))
    with pytest.warns(UserWarning, match="linear_decay_attention: no kernel for torch.float64; the slower torch form"):
        o, final = kernel(case, x)
    wanted, last = chunked64(case, x)
    assert torch.equal(o, wanted)
    assert torch.equal(final, last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(case, x)


def test_views_of_a_joint_projection_are_not_copied(draw, monkeypatch):
    from attnlab.kernels.decay_launch import Sweeps, tiles_for

    width, length = 128, 8192
    joint = draw(1, length, 16, 3 * width).bfloat16()
    q, k, v = joint.split(width, -1)
    decay = torch.full((16,), -0.1, device="cuda")
    linear_decay_attention(q, k, v, decay)  # compiles
    launched = []
    sweep = Sweeps.sweep

    def spy(self, *tensors, **options):
        launched.append([x.data_ptr() for x in tensors])
        return sweep(self, *tensors, **options)

    monkeypatch.setattr(Sweeps, "sweep", spy)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, final = linear_decay_attention(q, k, v, decay)
    extra = torch.cuda.max_memory_allocated() - before - o.nbytes - final.nbytes
    assert launched == [[q.data_ptr(), k.data_ptr(), v.data_ptr()]]
    tiles = tiles_for(q, v, forgets=True)
    assert (
        extra <= (tiles.pieces * tiles.parts + 1) * final.nbytes
    )  # what parts add to the state, and nothing like a copy
    wanted, _ = linear_decay_attention(q.contiguous(), k.contiguous(), v.contiguous(), decay)
    assert torch.equal(o, wanted)


def test_a_sum_as_the_loss_sends_an_expanded_gradient(draw):
    """All strides of the gradient of ``o.sum()`` are 0."""
    case = Case(FLOAT32, 64, 64, "head", state=False)
    x = inputs(case, draw)
    exact = doubled(x)
    kernel(case, x)[0].sum().backward()
    chunked64(case, exact)[0].sum().backward()
    found = errors({name: x[name].grad for name in "qkv"}, {name: exact[name].grad for name in "qkv"})
    below(found, LIMITS[FLOAT32])


def test_a_head_decay_may_be_used_again_and_is_looked_at_when_it_changed(draw):
    q = draw(1, 40, 3, 32)
    decay = torch.tensor([-0.1, -0.2, 0.0], device="cuda")
    first, _ = linear_decay_attention(q, q, q, decay)
    again, _ = linear_decay_attention(q, q, q, decay)
    other, _ = linear_decay_attention(q, q, q, decay.clone())
    assert torch.equal(first, again)
    assert torch.equal(first, other)
    decay += 0.5
    with pytest.raises(ValueError, match=r"log_decay: up to 0\.5"):
        linear_decay_attention(q, q, q, decay)


def test_inference_mode(draw):
    with torch.inference_mode():
        q = draw(1, 40, 3, 32)
        decay = torch.tensor([-0.1, -0.2, 0.0], device="cuda")
        o, _ = linear_decay_attention(q, q, q, decay)
        assert torch.equal(o, linear_decay_attention(q, q, q, decay)[0])


def test_arguments_on_two_devices_are_refused(draw):
    q = draw(1, 40, 3, 32)
    with pytest.raises(ValueError, match="log_decay: on cpu, but q is on cuda:0; move one of them"):
        linear_decay_attention(q, q, q, torch.zeros(3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(draw):
    q = draw(1, 40, 3, 32)
    wanted, _ = linear_decay_attention(q, q, q, torch.zeros(3, device="cuda"))
    there = q.to("cuda:1")
    o, _ = linear_decay_attention(there, there, there, torch.zeros(3, device="cuda:1"))
    assert torch.equal(o.cpu(), wanted.cpu())


def scan_inputs(draw, dtype: torch.dtype, length: int, width: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Scores in float32 and values, as leaves by name, and the gradients of the outputs and of the mean of all tokens."""
    x = {"s": 2 * draw(1, length, 4), "v": draw(1, length, 4, width).to(dtype)}
    d = [draw(1, length, 4, width).to(dtype), draw(1, 4, width)]
    return {name: part.requires_grad_() for name, part in x.items()}, d


def scan(form, x: dict[str, Tensor], **options) -> list[Tensor]:
    """Outputs, and the mean that the summary of all tokens stands for; its unit is each form's own."""
    o, end = form(x["s"], x["v"], **options)
    return [o, end.w / end.u[..., None]]


@pytest.mark.parametrize(("length", "width"), [(20, 64), (1000, 64), (32_768, 64), (1000, 40)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_aaren_scan(dtype, length, width, draw):
    x, d = scan_inputs(draw, dtype, length, width)
    got = everything(lambda y: scan(aaren_scan, y), x, d)
    wanted = everything(lambda y: scan(aaren, y, chunk_size=256), doubled(x), d)
    found = errors(got, wanted)
    assert found["output 1"] < LIMITS[FLOAT32]  # the summary is not rounded to the dtype of the values
    below(found, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_aaren_scan_carries_a_long_past(dtype, draw):
    """Next to a weight of 1e4, what few tokens change is less than half precision can tell from the mean."""
    x, d = scan_inputs(draw, dtype, 37, 40)
    x |= {
        name: torch.full((1, 4, *last), 1e4, device="cuda").requires_grad_() for name, last in (("u", ()), ("w", (40,)))
    }

    def after(form, y: dict[str, Tensor]) -> list[Tensor]:
        return scan(form, y, initial=Summary(torch.zeros_like(y["u"]), y["u"], y["w"]))

    got, wanted = everything(lambda y: after(aaren_scan, y), x, d), everything(lambda y: after(aaren, y), doubled(x), d)
    found = errors(got, wanted)
    assert found["output 1"] < 1e-6
    below(found, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_aaren_scan_gives_the_same_bits(dtype, draw):
    """One long sequence: three levels of chunks, forward and backward."""
    x, d = scan_inputs(draw, dtype, 32_768, 40)
    repeats(lambda y: scan(aaren_scan, y), x, d)


PACKED = [
    (0, 1, 64, 1063, 4000),
    (0, 1, 2, 3),
    (0, 32, 65, 1089, 2113),  # whole chunks, and one token more
    (0, 20_000, 20_001, 33_000),  # three levels of chunks
    tuple(range(0, 6001, 60)),
]


def packed_scan(form, x: dict[str, Tensor], bounds: tuple[int, ...]) -> list[Tensor]:
    """Outputs and the mean of every sequence, [1, T, H, V] and [N, H, V]; ``aaren`` takes one sequence after the other."""
    past = Summary(torch.zeros_like(x["u"]), x["u"], x["w"]) if "u" in x else None
    if form is aaren_scan:
        return scan(form, x, initial=past, cu_seqlens=torch.tensor(bounds, device="cuda"))
    parts = []
    for n, (first, last) in enumerate(pairwise(bounds)):
        tokens = {name: x[name][:, first:last] for name in ("s", "v")}
        start = None if past is None else Summary(*(part[n : n + 1] for part in past))
        parts.append(scan(form, tokens, initial=start, chunk_size=256 if last - first > 4096 else 64))
    outs, means = zip(*parts, strict=True)
    return [torch.cat(outs, 1), torch.cat(means)]


def packed_scan_inputs(
    draw, dtype: torch.dtype, bounds: tuple[int, ...], width: int, *, initial: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """As :func:`scan_inputs`, with a weight and a sum of earlier tokens for every sequence, and gradients of every mean."""
    count = len(bounds) - 1
    x, (d_out, _) = scan_inputs(draw, dtype, bounds[-1], width)
    if initial:
        x |= {"u": draw(count, 4).exp().requires_grad_(), "w": draw(count, 4, width).requires_grad_()}
    return x, [d_out, draw(count, 4, width)]


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("bounds", PACKED, ids=lambda bounds: f"T{bounds[-1]}-N{len(bounds) - 1}")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_aaren_scan_of_packed_sequences(dtype, bounds, initial, draw):
    x, d = packed_scan_inputs(draw, dtype, bounds, 40, initial=initial)
    got = everything(lambda y: packed_scan(aaren_scan, y, bounds), x, d)
    wanted = everything(lambda y: packed_scan(aaren, y, bounds), doubled(x), d)
    found = errors(got, wanted)
    assert found["output 1"] < LIMITS[FLOAT32]
    if bounds == (0, 1, 2, 3) and not initial:  # alone, a token has weight 1 whatever its score: only rounding
        del found["gradient of s"]
    below(found, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_aaren_scan_of_packed_sequences_gives_the_same_bits(dtype, draw):
    bounds = (0, 20_000, 20_001, 33_000)
    x, d = packed_scan_inputs(draw, dtype, bounds, 40, initial=True)
    repeats(lambda y: packed_scan(aaren_scan, y, bounds), x, d)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_a_packed_sequence_is_as_it_is_alone(dtype, draw):
    """Neighbours of NaN change nothing, forward and backward."""
    x, (d_out, _) = scan_inputs(draw, dtype, 4000, 40)
    s, v = (part.detach().clone() for part in (x["s"], x["v"]))
    for tokens in (slice(0, 64), slice(1063, 4000)):
        s[:, tokens], v[:, tokens] = torch.nan, torch.nan
    bounds = torch.tensor((0, 1, 64, 1063, 4000), device="cuda")
    here = slice(64, 1063)
    results = []
    for y, options in (((s, v), {"cu_seqlens": bounds}), ((s[:, here], v[:, here]), {})):
        y = [part.clone().requires_grad_() for part in y]
        o, _ = aaren_scan(*y, **options)
        part = o[:, here] if options else o
        grads = torch.autograd.grad(part, y, d_out[:, here])
        results.append([part.detach(), *(grad[:, here] if options else grad for grad in grads)])
    for got, alone in zip(*results, strict=True):
        assert float((got.double() - alone.double()).norm() / alone.double().norm()) < LIMITS[dtype]


def flow_inputs(draw, dtype: torch.dtype, length: int, width: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Leaves by name, and the gradient of the outputs."""
    x = {name: draw(1, length, 3, width).to(dtype).requires_grad_() for name in "qkv"}
    return x, [draw(1, length, 3, width).to(dtype)]


@pytest.mark.parametrize(("length", "width"), [(1000, 64), (4096, 64), (1000, 40), (4096, 40)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_causal_flow(dtype, length, width, draw):
    x, d = flow_inputs(draw, dtype, length, width)
    got = everything(lambda y: [causal_flow(y["q"], y["k"], y["v"])[0]], x, d)
    wanted = everything(lambda y: [causal_flow_attention(y["q"], y["k"], y["v"])[0]], doubled(x), d)
    found = errors(got, wanted)
    below(found, LIMITS[dtype])
    if dtype == BFLOAT16:
        torchs = errors(everything(lambda y: [flow_in_torch(y)], x, d), wanted)
        below(found, {name: 2 * error for name, error in torchs.items()})


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_causal_flow_gives_the_same_bits(dtype, draw):
    """Three long sequences: several pieces each, and four walks that sum for each other."""
    from attnlab.kernels.flow_walks import layout

    x, d = flow_inputs(draw, dtype, 16_384, 40)
    assert layout(x["q"], arguments.sequences(None, *x["q"].shape[:2])).split
    repeats(lambda y: [causal_flow(y["q"], y["k"], y["v"])[0]], x, d)


SUMS = FlowState._fields[:-1]
#: length, width, bounds, tokens that each sequence has had
FLOW_STATES = {
    "one walk": (1000, 64, None, (500,)),
    "pieces": (4096, 64, None, (3000,)),
    "pieces, no power of two": (4096, 40, None, (3000,)),
    "wide": (4096, 128, None, (3000,)),
    "one token": (1, 64, None, (3000,)),
    "packed": (4000, 64, (0, 1, 64, 1063, 4000), (0, 1000, 50, 7)),
    "packed, one walk": (1000, 40, (0, 1, 33, 65, 400, 1000), (9, 0, 1000, 50, 7)),
}


def flow_state(draw, dtype: torch.dtype, case) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Leaves by name, the tokens of the past, and the gradients of the outputs and of all sums of the final state."""
    length, width, _, past = case
    x, d = flow_inputs(draw, dtype, length, width)
    ends = []
    for tokens in past:
        _, end = causal_flow_attention(*(draw(1, max(tokens, 1), 3, width) for _ in "qkv"))
        if tokens == 0:
            end = FlowState(*map(torch.zeros_like, end))._replace(log_weight=torch.full_like(end.log_weight, -math.inf))
        ends.append(end)
    state = FlowState(*map(torch.cat, zip(*ends, strict=True)))
    x |= {name: getattr(state, name).requires_grad_() for name in SUMS}
    return x, state.length, d + [draw(*x[name].shape) for name in SUMS]


def flow_from(x: dict[str, Tensor], past: Tensor, bounds: tuple[int, ...] | None) -> list[Tensor]:
    cu = None if bounds is None else torch.tensor(bounds, device="cuda")
    state = FlowState(**{name: x[name] for name in SUMS}, length=past)
    o, end = causal_flow(x["q"], x["k"], x["v"], initial_state=state, cu_seqlens=cu)
    tokens = torch.tensor([o.shape[1]] if bounds is None else [b - a for a, b in pairwise(bounds)], device="cuda")
    assert torch.equal(end.length, past + tokens)
    return [o, *end[:-1]]


def flow_from64(x: dict[str, Tensor], past: Tensor, bounds: tuple[int, ...] | None) -> list[Tensor]:
    """The torch form, one packed sequence after the other."""
    parts = []
    for n, (first, last) in enumerate(pairwise(bounds or (0, x["q"].shape[1]))):
        state = FlowState(**{name: x[name][n : n + 1] for name in SUMS}, length=past[n : n + 1])
        o, end = causal_flow_attention(*(x[name][:, first:last] for name in "qkv"), initial_state=state)
        parts.append((o, *end[:-1]))
    outs, *ends = zip(*parts, strict=True)
    return [torch.cat(outs, 1), *map(torch.cat, ends)]


@pytest.mark.parametrize("case", FLOW_STATES.values(), ids=FLOW_STATES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_causal_flow_with_states(dtype, case, draw):
    x, past, d = flow_state(draw, dtype, case)
    got = everything(lambda y: flow_from(y, past, case[2]), x, d)
    wanted = everything(lambda y: flow_from64(y, past, case[2]), doubled(x), d)
    found = errors(got, wanted)
    flows = {f"output {i}": found[f"output {i}"] for i in range(1, 6)}  # all of the state but its memory
    below(flows, LIMITS[FLOAT32])
    alone = case[0] == 1  # all that one token reads is the state, and that halves of both kinds read in bfloat16
    below(found, LIMITS[BFLOAT16 if alone and dtype == FLOAT16 else dtype])


@pytest.mark.parametrize("case", [FLOW_STATES["pieces"], FLOW_STATES["packed"]], ids=["pieces", "packed"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_causal_flow_with_states_gives_the_same_bits(dtype, case, draw):
    from attnlab.kernels.flow_walks import layout

    x, past, d = flow_state(draw, dtype, case)
    bounds = None if case[2] is None else torch.tensor(case[2], device="cuda")
    assert layout(x["q"], arguments.sequences(bounds, *x["q"].shape[:2]), past).split
    repeats(lambda y: flow_from(y, past, case[2]), x, d)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_the_flow_state_carries_across_a_split(dtype, draw):
    """Between two calls of the kernels, and between one of theirs and one of the torch form."""
    x, _ = flow_inputs(draw, dtype, 4000, 64)
    q, k, v = (part.detach() for part in x.values())
    whole, last = causal_flow_attention(q.double(), k.double(), v.double())
    before, state = causal_flow(q[:, :1333], k[:, :1333], v[:, :1333])
    after, final = causal_flow(q[:, 1333:], k[:, 1333:], v[:, 1333:], initial_state=state)
    torchs, end = causal_flow_attention(*(y[:, 1333:].float() for y in (q, k, v)), initial_state=state)
    got = {"o": torch.cat([before, after], 1), "torch o": torchs, "torch memory": end.memory}
    wanted = {"o": whole, "torch o": whole[:, 1333:], "torch memory": last.memory}
    for name in SUMS:
        got[name], wanted[name] = getattr(final, name), getattr(last, name)
    below(errors(got, wanted), LIMITS[dtype])


def test_the_flow_state_that_nobody_reads_costs_no_bits(draw):
    x, d = flow_inputs(draw, BFLOAT16, 5000, 64)
    with_state = everything(lambda y: [causal_flow(y["q"], y["k"], y["v"])[0]], x, d)
    without = everything(lambda y: [causal_flow(y["q"], y["k"], y["v"], return_state=False)[0]], x, d)
    assert all(torch.equal(part, without[name]) for name, part in with_state.items())


def flow_in_torch(x: dict[str, Tensor]) -> Tensor:
    """Causal flow attention as one writes it: quadratic, flows in float32, features and weights in the dtype of the inputs."""
    q, k, v = x["q"], x["k"], x["v"]
    n = torch.arange(1, q.shape[1] + 1, device="cuda")
    flows = torch.einsum("bthk,bshk->bhts", q.sigmoid(), k.sigmoid())
    past, future = flows.float().tril(), flows.float().triu()
    incoming, outgoing = past.sum(-1) / n, future.sum(-2) / n
    conserved_in = (past / outgoing[..., None, :]).sum(-1) / n
    strength = ((future / incoming[..., None]).sum(-2) / n).clamp(-1, 1).exp()
    weight = (n * strength / strength.cumsum(-1)).transpose(1, 2)[..., None]
    gate = (conserved_in.sigmoid() / (n * incoming)).transpose(1, 2)[..., None]
    return torch.einsum("bhts,bshv->bthv", flows.tril(), (v * weight).to(v.dtype)) * gate.to(v.dtype)


def test_gates_of_another_shape_are_refused(draw):
    """Last in this file: where nobody looks, it reads out of bounds."""
    q = draw(1, 40, 3, 32)
    with pytest.raises(ValueError, match=r"log_decay: shape \(1, 39, 3\)"):
        linear_decay_attention(q, q, q, -draw(1, 40, 3).abs()[:, 1:])
