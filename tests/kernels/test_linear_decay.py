"""Linear attention with scalar decay where there is no GPU: the torch form behind the same signature, and what it refuses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.kernels.arguments import WIDEST
from attnlab.kernels.linear_decay import linear_decay_attention
from attnlab.mixers import recurrence

B, T, H, K, V = 2, 63, 3, 12, 20
BOUNDS = (0, 1, 38, 63)
exact = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal float64 tensors from one seed: ``draw(2, 63, 3, 12)``."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(draw, length: int = T, batch: int = B, decay: str = "head") -> dict[str, Tensor]:
    """q, k, v and the log decay by name."""
    return {
        "q": draw(batch, length, H, K),
        "k": draw(batch, length, H, K),
        "v": draw(batch, length, H, V),
        "log_decay": F.logsigmoid(draw(H) if decay == "head" else draw(batch, length, H)),
    }


def span(x: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Tokens from `first` to `last`; a decay a head has none."""
    return {name: part if part.dim() == 1 else part[:, first:last] for name, part in x.items()}


def one_after_the_other(x: dict[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """The packed sequences of `BOUNDS`, each in a call of its own."""
    pieces = [
        recurrence.parallel(**span(x, first, last), initial_state=states[n : n + 1])
        for n, (first, last) in enumerate(pairwise(BOUNDS))
    ]
    return torch.cat([o for o, _ in pieces], 1), torch.cat([final for _, final in pieces])


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("length", [1, 37, 63, 100])
def test_is_the_recurrence(length, decay, draw):
    x, state = inputs(draw, length, decay=decay), draw(B, H, K, V)
    o, final = linear_decay_attention(**x, initial_state=state)
    wanted, last = recurrence.recurrent(**x, initial_state=state)
    torch.testing.assert_close(o, wanted, **exact)
    torch.testing.assert_close(final, last, **exact)


@pytest.mark.parametrize("decay", ["head", "token"])
def test_the_state_carries_across_a_split(decay, draw):
    x = inputs(draw, 100, decay=decay)
    whole, last = linear_decay_attention(**x)
    before, state = linear_decay_attention(**span(x, 0, 41))
    after, final = linear_decay_attention(**span(x, 41, 100), initial_state=state)
    torch.testing.assert_close(torch.cat([before, after], 1), whole, **exact)
    torch.testing.assert_close(final, last, **exact)


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_do_not_see_each_other(dtype, decay, draw):
    x, states = inputs(draw, batch=1, decay=decay), draw(3, H, K, V)
    o, final = linear_decay_attention(**x, initial_state=states, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype))
    wanted, last = one_after_the_other(x, states)
    torch.testing.assert_close(o, wanted, **exact)
    torch.testing.assert_close(final, last, **exact)


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_everything(packed, decay, draw):
    x = inputs(draw, batch=1 if packed else B, decay=decay)
    x["initial_state"] = draw(3 if packed else B, H, K, V)
    d_out, d_final = draw(*x["v"].shape), draw(*x["initial_state"].shape)
    leaves = [part.requires_grad_() for part in x.values()]
    bounds = torch.tensor(BOUNDS) if packed else None
    got = torch.autograd.grad(linear_decay_attention(**x, cu_seqlens=bounds), leaves, [d_out, d_final])
    tokens = {name: part for name, part in x.items() if name != "initial_state"}
    form = one_after_the_other(tokens, x["initial_state"]) if packed else recurrence.parallel(**x)
    wanted = torch.autograd.grad(form, leaves, [d_out, d_final])
    for name, grad, other in zip(x, got, wanted, strict=True):
        torch.testing.assert_close(grad, other, **exact, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype, draw):
    """Outputs and gradients come in the dtype of the inputs, states in float32; only the last rounding is theirs."""
    x = {name: part.to(dtype) if part.dim() == 4 else part.float() for name, part in inputs(draw).items()}
    leaves = [part.requires_grad_() for part in x.values()]
    o, final = linear_decay_attention(**x)
    assert (o.dtype, final.dtype) == (dtype, torch.float32)
    wanted, last = recurrence.chunked(**{name: part.detach().float() for name, part in x.items()})
    assert torch.equal(o, wanted.to(dtype))
    assert torch.equal(final, last)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert [grad.dtype for grad in grads] == [part.dtype for part in leaves]


def test_a_float32_decay_serves_all_dtypes(draw):
    x = inputs(draw)
    x["log_decay"] = x["log_decay"].float()
    o, final = linear_decay_attention(**x)
    assert (o.dtype, final.dtype) == (torch.float64, torch.float64)
    half = {name: part.bfloat16() if part.dim() == 4 else part for name, part in x.items()}
    assert linear_decay_attention(**half, initial_state=final)[0].dtype == torch.bfloat16


def test_views_of_a_joint_projection_are_accepted(draw):
    q, k, v = draw(B, T, H, 2 * K + V).split([K, K, V], -1)
    log_decay = F.logsigmoid(draw(H))
    o, _ = linear_decay_attention(q, k, v, log_decay)
    wanted, _ = linear_decay_attention(q.contiguous(), k.contiguous(), v.contiguous(), log_decay)
    assert torch.equal(o, wanted)
    crossed = v.transpose(2, 3).contiguous().transpose(2, 3)  # not even the last axis is contiguous
    assert torch.equal(linear_decay_attention(q, k, crossed, log_decay)[0], wanted)


def test_scale_defaults_to_one_over_the_root_of_the_key_width(draw):
    x = inputs(draw)
    o, final = linear_decay_attention(**x)
    doubled, same = linear_decay_attention(**x, scale=2 * K**-0.5)
    torch.testing.assert_close(doubled, 2 * o, **exact)
    assert torch.equal(same, final)  # the scale belongs to the read, not to the state


def test_no_decay_over_a_long_sequence(draw):
    x = inputs(draw, 5000, batch=1) | {"log_decay": torch.zeros(H, dtype=torch.float64)}
    o, final = linear_decay_attention(**x, scale=1.0)
    states = torch.einsum("bthk,bthv->bhkv", x["k"], x["v"])
    torch.testing.assert_close(final, states, **exact)
    torch.testing.assert_close(o[:, -1], torch.einsum("bhk,bhkv->bhv", x["q"][:, -1], states), **exact)


def test_the_widest_heads_run(draw):
    wide = draw(1, 5, 1, WIDEST)
    o, final = linear_decay_attention(wide, wide, wide, torch.zeros(1))
    assert o.shape == (1, 5, 1, WIDEST)
    assert final.shape == (1, 1, WIDEST, WIDEST)


def test_the_state_may_be_left_out(draw):
    x = inputs(draw)
    o, nothing = linear_decay_attention(**x, return_state=False)
    assert nothing is None
    assert torch.equal(o, linear_decay_attention(**x)[0])


def test_inference_mode(draw):
    x = inputs(draw)
    wanted, _ = linear_decay_attention(**x)
    with torch.inference_mode():
        o, _ = linear_decay_attention(**{name: part.clone() for name, part in x.items()})
    assert torch.equal(o, wanted)


def test_without_triton_the_torch_form_runs():
    """Triton exists for Linux only."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; "
        "from attnlab.kernels.linear_decay import linear_decay_attention as f; "
        "x = torch.ones(1, 3, 1, 2); print(f(x, x, x, torch.zeros(1), scale=1.0)[0][0, :, 0, 0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2.0, 4.0, 6.0]"


def ones(*shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


WIDE = {"q": ones(B, T, H, 257), "k": ones(B, T, H, 257)}
NO_TOKENS = {"q": ones(B, 0, H, K), "k": ones(B, 0, H, K), "v": ones(B, 0, H, V)}
LONG = {name: torch.ones(1, T, H, n, dtype=torch.long) for name, n in (("q", K), ("k", K), ("v", V))}
ONE_ROW = {"q": ones(1, T, H, K), "k": ones(1, T, H, K), "v": ones(1, T, H, V)}

BAD = {
    "growing head decay": (
        {"log_decay": ones(H, value=0.25)},
        "log_decay: up to 0.25, but a decay is at most 1, so its log at most 0; pass log(a)",
    ),
    "growing gates": ({"log_decay": ones(B, T, H, value=1e-3)}, "log_decay: up to 0.001, but a decay is at most 1"),
    "NaN gates": ({"log_decay": ones(B, T, H, value=math.nan)}, "log_decay: holds NaN or infinite values; gates must"),
    "shut gates": ({"log_decay": ones(H, value=-math.inf)}, "log_decay: holds NaN or infinite values; gates must be"),
    "gate shape": ({"log_decay": -ones(B, T)}, "log_decay: shape (2, 63), but [H], [B, T, H] or [B, T, H, K]"),
    "gates of another length": ({"log_decay": -ones(B, T + 1, H)}, "log_decay: shape (2, 64, 3), but [H]"),
    "a gate a channel": (
        {"log_decay": -ones(B, T, H, K)},
        "log_decay: [B, T, H, K] decays every channel on its own; use attnlab.mixers.recurrence.chunked",
    ),
    "no tokens": (NO_TOKENS, "q: shape (2, 0, 3, 12) has T=0; pass at least one"),
    "no channels": ({"q": ones(B, T, H, 0), "k": ones(B, T, H, 0)}, "q: shape (2, 63, 3, 0) has K=0; pass at least"),
    "flat q": ({"q": ones(T, H, K)}, "q: shape (63, 3, 12) has 3 axes, but [B, T, H, K] is wanted"),
    "other K": ({"k": ones(B, T, H, K + 1)}, "k: shape (2, 63, 3, 13), but [B, T, H, K] of q = (2, 63, 3, 12) is"),
    "other heads": ({"v": ones(B, T, 1, V)}, "v: shape (2, 63, 1, 20), but [B, T, H, V] with B, T, H of q = (2, 63,"),
    "wide keys": (WIDE, "K=257 is wider than a program can hold; use heads of at most 256 channels"),
    "wide values": ({"v": ones(B, T, H, 300)}, "V=300 is wider than a program can hold; use heads of at most 256"),
    "two devices": ({"k": ones(B, T, H, K).to("meta")}, "k: on meta, but q is on cpu; move one of them"),
    "decay elsewhere": ({"log_decay": ones(H).to("meta")}, "log_decay: on meta, but q is on cpu; move one of them"),
    "state elsewhere": (
        {"initial_state": ones(B, H, K, V).to("meta")},
        "initial_state: on meta, but q is on cpu; move one of them",
    ),
    "two dtypes": ({"v": ones(B, T, H, V).float()}, "v: dtype torch.float32, but q has torch.float64; cast one of"),
    "integers": (LONG, "q: dtype torch.int64, but a floating dtype is wanted; cast it"),
    "whole decays": (
        {"log_decay": torch.zeros(H, dtype=torch.long)},
        "log_decay: dtype torch.int64, but a floating dtype",
    ),
    "a whole state": (
        {"initial_state": torch.ones(B, H, K, V, dtype=torch.int32)},
        "initial_state: dtype torch.int32, but a floating dtype is wanted; cast it",
    ),
    **{
        f"scale {scale}": ({"scale": scale}, f"scale={scale} must be finite and not 0; leave it out for K ** -0.5")
        for scale in (0, math.nan, math.inf, -math.inf)
    },
    "state of another batch": (
        {"initial_state": ones(B + 1, H, K, V)},
        "initial_state: shape (3, 3, 12, 20), but [N, H, K, V] = (2, 3, 12, 20) is wanted",
    ),
    "transposed state": ({"initial_state": ones(B, H, V, K)}, "initial_state: shape (2, 3, 20, 12), but [N, H, K, V]"),
    "bounds of a batch": (
        {"cu_seqlens": torch.tensor([0, T])},
        "cu_seqlens: packs sequences into one row, but there are B=",
    ),
    "a state a row, not a sequence": (
        ONE_ROW | {"cu_seqlens": torch.tensor(BOUNDS), "initial_state": ones(1, H, K, V)},
        "initial_state: shape (1, 3, 12, 20), but [N, H, K, V] = (3, 3, 12, 20) is wanted",
    ),
    "floating bounds": (
        ONE_ROW | {"cu_seqlens": ones(2)},
        "cu_seqlens: torch.float64 of shape (2,), but [N + 1] int32 or int64 is wanted",
    ),
    "one bound": (ONE_ROW | {"cu_seqlens": torch.tensor([0])}, "cu_seqlens: torch.int64 of shape (1,), but [N + 1]"),
    "bounds that start late": (
        ONE_ROW | {"cu_seqlens": torch.tensor([1, T])},
        "cu_seqlens: [1, 63]... must rise strictly from 0 to T=63",
    ),
    "bounds that end early": (ONE_ROW | {"cu_seqlens": torch.tensor([0, T - 1])}, "must rise strictly from 0 to T=63"),
    "a sequence without tokens": (
        ONE_ROW | {"cu_seqlens": torch.tensor([0, 5, 5, T])},
        "cu_seqlens: [0, 5, 5, 63]... must rise strictly from 0 to T=63",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words(bad, message):
    good = {"q": ones(B, T, H, K), "k": ones(B, T, H, K), "v": ones(B, T, H, V), "log_decay": -ones(H)}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_decay_attention(**(good | bad))
