"""Exercises of the chapter ``kernels/lightning-attention``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.exercises.core import Exercise, Feedback, accept, reject
from attnlab.kernels.lightning_attention import SRMSNorm, cache_numbers, decay_table, state_numbers
from attnlab.mixers import recurrent

# ------------------------------------------------------------------------------------- 1: when the state is the smaller


def break_even(width: int, layers: int, heads: int) -> int:
    """The first length T at which a TNL model with LRPE in its first layer keeps fewer numbers than a cache of keys and values."""
    head_width = width // heads
    state = (layers + 1) * width * head_width  # LRPE doubles the keys of one layer
    return state // (2 * layers * width) + 1  # keys and values of every layer: 2 L D a token


def _even(width: int, layers: int, heads: int, *, states: int | None = None, cached: int = 2, rounded: int = 1) -> int:
    """:func:`break_even` with something counted wrongly."""
    state = (layers + 1 if states is None else states) * width * (width // heads)
    return state // (cached * layers * width) + rounded


_SIZES = ((5120, 42, 40), (64, 2, 4), (256, 6, 4), (512, 1, 2))  # at some of them both are equal at one length


def _check_even(answer: Callable[[int, int, int], Any]) -> Feedback:
    found = [int(answer(*sizes)) for sizes in _SIZES]
    right = [break_even(*sizes) for sizes in _SIZES]
    if found == right:
        width, layers, heads = _SIZES[0]
        return accept(
            f"From {right[0]} tokens on at 42 layers, D = {width} and {heads} heads: about half the width of a head, since d x d numbers "
            f"of state stand against 2 d a token. At 6,144 tokens the cache holds "
            f"{cache_numbers(width, layers, 6144) / state_numbers(width, layers, heads):.0f} times as much."
        )
    mistakes: dict[str, Callable[[int, int, int], int]] = {
        "You compare with keys alone. A cache holds a key and a value for each token and layer: 2 L D a token.": partial(
            _even, cached=1
        ),
        "Your states are D x D. Every head has its own d x d, with d = D / H.": lambda w, n, h: n * w // (2 * n) + 1,
        "At your length the two are equal, or the state is still larger: the first length at which it is smaller is one on.": partial(
            _even, rounded=0
        ),
        "The first layer is missing something: LRPE doubles the features of its keys, so its states are 2 d x d.": lambda w, n, h: (
            _even(w, n, h, states=n)
        ),
        "LRPE stands in the first layer only; you doubled the states of all.": lambda w, n, h: _even(
            w, n, h, states=2 * n
        ),
    }
    for text, wrong in mistakes.items():
        if found == [wrong(*sizes) for sizes in _SIZES]:
            return reject(text)
    width, layers, heads = next(sizes for sizes, a, b in zip(_SIZES, found, right, strict=True) if a != b)
    index = _SIZES.index((width, layers, heads))
    return reject(
        f"For D={width}, {layers} layers and {heads} heads the state holds {state_numbers(width, layers, heads):,} numbers and the cache "
        f"{cache_numbers(width, layers, 1):,} a token; you answered {found[index]:,}."
    )


# ------------------------------------------------------------------------------------------- 2: read one token


def read_token(q: Tensor, k: Tensor, v: Tensor, u: Tensor, log_decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One token of gated linear attention: output [B, D] before its projection, and the memory after it.

    q, k [B, H, K] and v [B, H, V] are ready, u [B, D] is the gate with D = H V, log_decay [H], memory [B, H, K, V].
    """
    kept = log_decay.exp()[:, None, None] * memory  # what was there fades before the token writes
    memory = kept + k[..., :, None] * v[..., None, :]
    o = (q[..., None, :] @ memory).squeeze(-2)  # [B, H, V]; a token reads its own write
    return SRMSNorm(u.shape[-1])(o.flatten(1)) * u, memory  # [B, H, V] -> [B, D]


def _read_wrongly(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, log_decay: Tensor, memory: Tensor, *, mistake: str
) -> tuple[Tensor, Tensor]:
    """:func:`read_token` with one mistake in it."""
    factor = (log_decay if mistake == "log" else log_decay.exp())[:, None, None]
    write = k[..., :, None] * v[..., None, :]
    after = factor * (memory + write) if mistake == "late" else factor * memory + write
    if mistake == "no decay":
        after = memory + write
    seen = factor * memory if mistake == "blind" else after
    o = (q[..., None, :] @ seen).squeeze(-2)
    if mistake == "by head":
        return SRMSNorm(o.shape[-1])(o).flatten(1) * u, after
    if mistake == "gate first":
        return SRMSNorm(u.shape[-1])(o.flatten(1) * u), after
    return SRMSNorm(u.shape[-1])(o.flatten(1)) * u, after


_SLIPS = {
    "late": "Your decay comes after the write: the newest token is scaled already when it is read, and by one factor too much for ever after.",
    "blind": "Your token reads before it writes. In this paper s = t counts: it reads its own write.",
    "log": "You multiply by the log of the decay. The factor is exp(log_decay), between 0 and 1.",
    "no decay": "Nothing fades: the memory must be multiplied by exp(log_decay) before the token writes.",
    "by head": "You normalise head by head. Here the norm is joint, over all D channels, so flatten before it.",
    "gate first": "You gate before the norm, which undoes a common factor of the gate. Norm first, then times u.",
}


def _token_case() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_decay = -torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)
    return draw(2, 3, 5), draw(2, 3, 5), draw(2, 3, 4), draw(2, 12), log_decay, draw(2, 3, 5, 4)


def _check_token(answer: Callable[..., Any]) -> Feedback:
    case = _token_case()
    found = answer(*case)
    if not isinstance(found, tuple | list) or len(found) != 2:
        return reject("Return the pair (output, memory).")
    right = read_token(*case)
    for name, got, wanted in zip(("output", "memory"), found, right, strict=True):
        if tuple(got.shape) != tuple(wanted.shape):
            return reject(f"The {name} has shape {tuple(got.shape)}; {tuple(wanted.shape)} is wanted.")
    if _close(found, right):
        return _accept_token(answer)
    for mistake, text in _SLIPS.items():
        if _close(found, _read_wrongly(*case, mistake=mistake)):
            return reject(text)
    memory_is_right = torch.allclose(found[1], right[1], atol=1e-10)
    error = float((found[0] - right[0]).abs().max())
    place = "The memory is right, the output is not" if memory_is_right else "The memory is not right"
    return reject(
        f"{place} (largest error of the output {error:.2g}). Try one head, no decay and a gate of ones first."
    )


def _accept_token(answer: Callable[..., Any], length: int = 37) -> Feedback:
    """Right for one token; now the whole sequence, against the recurrence of the package."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, length, 3, width, generator=generator, dtype=torch.float64) for width in (5, 5, 4))
    *_, log_decay, _ = _token_case()
    memory, gate = torch.zeros(2, 3, 5, 4, dtype=torch.float64), torch.ones(2, 12, dtype=torch.float64)
    outputs = []
    for t in range(length):
        o, memory = answer(q[:, t], k[:, t], v[:, t], gate, log_decay, memory)
        outputs.append(o)
    wanted, last = recurrent(q, k, v, log_decay, scale=1.0)
    error = float((torch.stack(outputs, 1) - SRMSNorm(12)(wanted.flatten(2))).abs().max())
    if error > 1e-10 or not torch.allclose(memory, last, atol=1e-10):
        return reject(f"Right for one token, but after {length} of them the outputs are off by {error:.1e}.")
    return accept(
        f"{length} tokens one by one are the whole sequence at once, to {error:.0e} in float64, with {memory[0].numel()} numbers kept."
    )


def _close(found: Any, wanted: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------- 3: a decay that is learned


class LearnedDecay(nn.Module):
    """Log decays [B, T, H] from tokens x [B, T, D], which begin as the fixed ones [H] that it is built with."""

    def __init__(self, width: int, log_decay: Tensor) -> None:
        super().__init__()
        self.rate = nn.Linear(width, len(log_decay))
        start = (-log_decay).clamp(min=1e-6)  # no decay at all lies at minus infinity
        with torch.no_grad():
            self.rate.weight.zero_()
            self.rate.bias.copy_(start + torch.log(-torch.expm1(-start)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        return -F.softplus(self.rate(x))  # at most 0 for every x, and linear where exp would overflow


class _Unbounded(nn.Module):
    """The linear layer's output as a log decay: positive for some tokens."""

    def __init__(self, width: int, log_decay: Tensor) -> None:
        super().__init__()
        self.rate = nn.Linear(width, len(log_decay))
        with torch.no_grad():
            self.rate.weight.zero_()
            self.rate.bias.copy_(log_decay)

    def forward(self, x: Tensor) -> Tensor:
        return self._bounded(self.rate(x))

    def _bounded(self, z: Tensor) -> Tensor:
        return z


class _Clamped(_Unbounded):
    """Clamped: no gradient where it was positive."""

    def _bounded(self, z: Tensor) -> Tensor:
        return z.clamp(max=0)


class _TwoSteps(LearnedDecay):
    """``log(1 - sigmoid(z))`` in two steps, which is minus infinity for large z."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(1 - torch.sigmoid(self.rate(x)))


class _AnyStart(nn.Module):
    """A safe function, but torch's initialisation."""

    def __init__(self, width: int, log_decay: Tensor) -> None:
        super().__init__()
        self.rate = nn.Linear(width, len(log_decay))

    def forward(self, x: Tensor) -> Tensor:
        return -F.softplus(self.rate(x))


class _SameForAll(nn.Module):
    """Learned, but not from the token."""

    def __init__(self, width: int, log_decay: Tensor) -> None:
        super().__init__()
        self.log_rate = nn.Parameter((-log_decay).clamp(min=1e-6).log())

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_rate.exp().expand(*x.shape[:2], -1)


def _check_learned(answer: Callable[[int, Tensor], Any]) -> Feedback:
    generator = torch.Generator().manual_seed(0)
    table = decay_table(2, 4, "fla")[0]  # its first head forgets nothing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = answer(8, table)
    if not isinstance(module, nn.Module):
        return reject("Hand over a class of nn.Module; the checker builds it with (width, log_decay).")
    x = torch.randn(3, 37, 8, generator=generator)
    start = module(x).detach()
    if tuple(start.shape) != (3, 37, 4):
        return reject(
            f"For x of shape (3, 37, 8) and 4 heads, [B, T, H] = (3, 37, 4) is wanted, not {tuple(start.shape)}."
        )
    if (off := float((start - table).abs().max())) > 1e-4:
        return reject(
            f"Before training every token should have the schedule's decay; yours is off by up to {off:.2g}. Zero the weights, and set the "
            "bias to what your function maps to the schedule."
        )
    unsafe = _survives(module, x)
    return _learns(module, x) if unsafe is None else unsafe


def _survives(module: nn.Module, x: Tensor) -> Feedback | None:
    """Whatever the weights become: log decays at most 0, finite, with finite gradients."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    found = module(200 * x)
    gradients = torch.autograd.grad(found.clamp(min=-100).sum(), list(module.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, old in zip(module.parameters(), before, strict=True):
            parameter.copy_(old)
    found = found.detach()
    if bool((found > 0).any()):
        return reject(
            f"After a few updates a log decay can be {float(found.max()):.3g}: a past that grows. The function must map every number to at most 0."
        )
    if not bool(found.isfinite().all()) or any(g is not None and not bool(g.isfinite().all()) for g in gradients):
        return reject(
            "With large inputs a log decay or its gradient is not finite: this is how such a run ends in NaN. Look for a log of something "
            "that underflows to 0; F.softplus and F.logsigmoid do both steps in one."
        )
    return None


def _learns(module: nn.Module, x: Tensor) -> Feedback:
    """Teach it to keep everything, and then to forget at tokens whose first feature is positive."""
    wanted = torch.where(x[..., :1] > 0, 0.01, 0.99).expand(-1, -1, 4)  # [B, T, H]
    for target in (torch.ones_like(wanted), wanted):
        _train(module, x, target)
    fixed = float((wanted.mean() - wanted).square().mean())
    errors = (module(x).exp() - wanted).square().detach()
    error, worst = float(errors.mean()), errors.mean((0, 1))  # worst: by head
    if error != error:
        return reject("Training it ended in NaN.")
    same = module(x).detach()
    if torch.allclose(same, same[:1, :1].expand_as(same), atol=1e-6) and error < 1.1 * fixed:
        return reject(
            f"After training all tokens have the same decay (mean squared error {error:.3f}, no better than the best constant, {fixed:.3f}). "
            "It must depend on x."
        )
    if float(worst.max()) > 0.5 * fixed:
        heads = ", ".join(str(head) for head in torch.nonzero(worst > 0.5 * fixed).flatten().tolist())
        return reject(
            f"Heads that had once learned to keep everything could not learn to forget any more (counted from 0: {heads}): their gradient "
            "died. A clamp has none on one side; take a function that slopes everywhere."
        )
    return accept(
        f"It begins at the schedule, stays at most 0 and finite, and learns when to forget: squared error {error:.4f}, a fixed decay cannot go "
        f"below {fixed:.3f}. The paper reports NaN for learned decays and keeps them fixed; later models, GLA and Mamba-2 among them, learn them "
        "in ways like this one. Put it into a copy of GatedLinearAttention and train: does the text need it?"
    )


def _train(module: nn.Module, x: Tensor, wanted: Tensor, updates: int = 200) -> None:
    """Adam on the squared error of the decays."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(updates):
        loss = (module(x).exp() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


EXERCISES = [
    Exercise(
        number=1,
        title="From which length on is the state smaller?",
        difficulty="easy",
        minutes=6,
        answer_is="function",
        checker=_check_even,
        solution=break_even,
        wrong={
            "keys without values": partial(_even, cached=1),
            "states of D x D": lambda width, layers, heads: width // 2 + 1,
            "LRPE forgotten": lambda width, layers, heads: _even(width, layers, heads, states=layers),
            "LRPE everywhere": lambda width, layers, heads: _even(width, layers, heads, states=2 * layers),
            "one token early": partial(_even, rounded=0),
        },
        hints=(
            "Count the numbers of one layer first: a state has d x d numbers for each of H heads, and H d = D.",
            "The cache holds 2 L D numbers a token. The states hold (L + 1) D d, the one more because of LRPE. Smaller means smaller, not equal.",
        ),
    ),
    Exercise(
        number=2,
        title="Read one token",
        difficulty="medium",
        minutes=15,
        answer_is="function",
        checker=_check_token,
        solution=read_token,
        wrong={mistake: partial(_read_wrongly, mistake=mistake) for mistake in _SLIPS},
        hints=(
            "Fade, write, read, normalise, gate: five lines in this order.",
            "The write is the outer product k v^T for each sequence and head: k[..., :, None] * v[..., None, :], [B, H, K, V].",
            "Reading is q^T memory, [B, H, V]; flatten it to [B, D] before SRMSNorm(D), then multiply by u.",
        ),
    ),
    Exercise(
        number=3,
        title="Learn the decay without NaN",
        difficulty="hard",
        minutes=30,
        answer_is="function",
        checker=_check_learned,
        solution=LearnedDecay,
        wrong={
            "unbounded": _Unbounded,
            "clamped": _Clamped,
            "log of a sigmoid": _TwoSteps,
            "starts anywhere": _AnyStart,
            "the same for all tokens": _SameForAll,
        },
        hints=(
            "You need a smooth function from all numbers to those below 0. What are the two that torch computes stably?",
            "-softplus(z) = logsigmoid(-z). With zero weights, the bias alone decides where it begins: invert the function at the schedule.",
            "softplus^-1(r) = r + log(-expm1(-r)). For a decay of exactly 1 that is minus infinity: begin at r = 1e-6.",
        ),
    ),
]
