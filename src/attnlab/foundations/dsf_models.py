"""Token mixers of the chapter ``foundations/dsf`` that can be trained, all in one and the same layer.

A layer is a short causal convolution, a core, and an output projection. The cores differ, and nothing else does: the sweep that the
paper published gave positions to some mixers and an MLP to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.foundations import dsf, dsf_builders
from attnlab.foundations.dsf import Recurrence

Gate = Literal["plain", "reversed", "reversed, exponent 1"]
TAPS = 4  # of the convolution, as in Mamba and in the qLSTM of the paper
STEPS = (1e-3, 1e-1)  # Mamba's steps at the start, log-uniform


class ShortConvolution(nn.Module):
    """Each channel as a weighted sum of itself at the last ``TAPS`` tokens; it starts as the identity and a little of the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width))

    def init_weights(self) -> None:
        """Weight 1 for the token itself, and small random ones for those before."""
        nn.init.normal_(self.weight, std=TAPS**-0.5)
        with torch.no_grad():
            self.weight[0] += 1

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        padded, length = F.pad(x, (0, 0, TAPS - 1, 0)), x.shape[1]
        return sum(
            (w * padded[:, TAPS - 1 - ago : TAPS - 1 - ago + length] for ago, w in enumerate(self.weight)),
            torch.zeros((), dtype=x.dtype, device=x.device),
        )


class Layer(nn.Module):
    """Convolution, core, output projection."""

    def __init__(self, width: int, core: Kept) -> None:
        super().__init__()
        self.convolution = ShortConvolution(width)
        self.core = core
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        return self.out(self.core(self.convolution(x)))


class Kept(nn.Module):
    """A core: it maps tokens to tokens and knows what it keeps of the past."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.values = nn.Linear(width, width, bias=False)

    def state_floats(self, length: int) -> int:
        """Numbers that a layer keeps between tokens, its convolution apart."""
        raise NotImplementedError


class Core(Kept):
    """A mixer that is a record: from tokens to a :class:`~attnlab.foundations.dsf.Recurrence` and its inputs, then one evaluator."""

    def record(self, x: Tensor) -> Recurrence:
        """The record of tokens [B, T, D], with one head."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        record, u = self.record(x), self.values(x)[:, :, None]  # [B, T, 1, D]
        evaluate = dsf.matrix if record.shared else dsf.recurrent  # a matter of speed at these lengths
        return evaluate(record, u)[:, :, 0]


class SoftmaxCore(Kept):
    """Softmax attention with one head. Its record would need infinitely many numbers, so it is computed directly."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width)
        self.width, self.n = width, n
        self.qk = nn.Linear(width, 2 * n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        q, k = self.qk(x).chunk(2, -1)
        return F.scaled_dot_product_attention(q, k, self.values(x), is_causal=True)

    def state_floats(self, length: int) -> int:
        """A cache of keys and values."""
        return length * (self.n + self.width)


class LinearCore(Core):
    """Linear attention on elu + 1; its normaliser is one more column of the state."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width)
        self.width, self.n = width, n
        self.qk = nn.Linear(width, 2 * n, bias=False)

    def record(self, x: Tensor) -> Recurrence:
        q, k = self.qk(x)[:, :, None].chunk(2, -1)
        return dsf_builders.linear_attention(q, k)

    def state_floats(self, length: int) -> int:
        return self.n * (self.width + 1)


class NormalisedCore(LinearCore):
    """Normalised attention: no feature map, and a learned normaliser, which starts at sqrt(n)."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width, n)
        self.log_eta = nn.Linear(width, 1)

    def init_weights(self) -> None:
        """The normaliser starts where the scale of softmax would be."""
        nn.init.constant_(self.log_eta.bias, math.log(self.n) / 2)

    def record(self, x: Tensor) -> Recurrence:
        q, k = self.qk(x)[:, :, None].chunk(2, -1)
        return dsf_builders.normalised_attention(q, k, self.log_eta(x))


class S6Core(Core):
    """The selective state space of Mamba, with its initial rates 1..n and steps between 0.001 and 0.1."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width)
        self.width, self.n = width, n
        self.bc = nn.Linear(width, 2 * n, bias=False)
        rank = math.ceil(width / 16)
        self.step_down, self.step_up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        self.a_log = nn.Parameter(torch.empty(width, n))
        self.skip = nn.Parameter(torch.ones(width))
        self.a_log.no_weight_decay = self.skip.no_weight_decay = True  # type: ignore[attr-defined]

    def init_weights(self) -> None:
        """Rates and steps of Mamba."""
        with torch.no_grad():
            self.a_log.copy_(torch.arange(1, self.n + 1, dtype=self.a_log.dtype).log().expand_as(self.a_log))
            _step_bias(self.step_up.bias)

    def record(self, x: Tensor) -> Recurrence:
        b, c = self.bc(x)[:, :, None].chunk(2, -1)
        dt = F.softplus(self.step_up(self.step_down(x)))[:, :, None]
        return dsf_builders.s6(dt, self.a_log.exp(), b, c, self.skip)

    def state_floats(self, length: int) -> int:
        return self.n * self.width


class SSDCore(Core):
    """Mamba-2 with one head: one step and one rate for the whole state."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width)
        self.width, self.n = width, n
        self.bc = nn.Linear(width, 2 * n, bias=False)
        self.step = nn.Linear(width, 1)
        self.a_log = nn.Parameter(torch.zeros(1))
        self.skip = nn.Parameter(torch.ones(1))

    def init_weights(self) -> None:
        """Mamba's step at the start."""
        with torch.no_grad():
            _step_bias(self.step.bias)

    def record(self, x: Tensor) -> Recurrence:
        b, c = self.bc(x)[:, :, None].chunk(2, -1)
        return dsf_builders.ssd(F.softplus(self.step(x)), self.a_log.exp(), b, c, self.skip)

    def state_floats(self, length: int) -> int:
        return self.n * self.width


class QLSTMCore(Core):
    """The quasi-LSTM: three gates, one number of state a channel.

    Args:
        gate: ``plain`` sigmoid(f), ``reversed`` sigmoid(-f)^a with one learned a, or reversed with a = 1 fixed.
        keep: share of the state that a token keeps at the start, where the weights' part of f is 0; the bias follows from it.
    """

    def __init__(self, width: int, gate: Gate = "plain", keep: float = 0.5) -> None:
        super().__init__(width)
        if gate not in ("plain", "reversed", "reversed, exponent 1"):
            raise ValueError(f"gate={gate!r} is not known; choose plain, reversed, or 'reversed, exponent 1'")
        if not 0 < keep < 1:
            raise ValueError(f"keep={keep} must lie between 0 and 1, both excluded")
        self.width, self.gate, self.keep = width, gate, keep
        self.gates = nn.Linear(width, 3 * width)
        self.exponent = nn.Parameter(torch.ones(())) if gate == "reversed" else None

    def init_weights(self) -> None:
        """Start the forget gate at ``keep``."""
        logit = math.log(self.keep / (1 - self.keep))
        with torch.no_grad():
            self.gates.bias[: self.width] = logit if self.gate == "plain" else -logit

    def record(self, x: Tensor) -> Recurrence:
        forget, write, read = self.gates(x)[:, :, None].chunk(3, -1)
        if self.gate == "plain":
            return dsf_builders.qlstm(forget, write, read)
        exponent = torch.ones((), dtype=x.dtype, device=x.device) if self.exponent is None else self.exponent.relu()
        return dsf_builders.qlstm(forget, write, read, exponent)

    def state_floats(self, length: int) -> int:
        return self.width


KEEP_LONG = 0.98  # 1 / (1 - 0.98) = 50 tokens: longer than the sequences of the chapter

#: the cores that have a state expansion n; each takes width and n
EXPANDED: dict[str, Callable[[int, int], Kept]] = {
    "softmax": SoftmaxCore,
    "linear": LinearCore,
    "normalised": NormalisedCore,
    "S6": S6Core,
    "Mamba-2": SSDCore,
}
#: the four quasi-LSTMs: two gates, two starts; each takes the width
QLSTMS: dict[str, Callable[[int], Kept]] = {
    "qLSTM": partial(QLSTMCore, gate="plain"),
    "qLSTM, reversed": partial(QLSTMCore, gate="reversed"),
    "qLSTM, long start": partial(QLSTMCore, gate="plain", keep=KEEP_LONG),
    "qLSTM, reversed, long start": partial(QLSTMCore, gate="reversed", keep=KEEP_LONG),
}


@dataclass(frozen=True)
class Spec:
    """Which model: its core, the state expansion n (None for a quasi-LSTM), and whether its blocks have an MLP.

    Raises:
        ValueError: an unknown core, or an n that is missing or superfluous.
    """

    kind: str
    n: int | None = None
    mlp: bool = True

    def __post_init__(self) -> None:
        known = [*EXPANDED, *QLSTMS]
        if self.kind not in known:
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {'; '.join(known)}")
        if (self.n is None) == (self.kind in EXPANDED):
            raise ValueError(
                f"n={self.n}: {self.kind} {'needs' if self.kind in EXPANDED else 'has no'} state expansion"
            )

    @property
    def name(self) -> str:
        """As it stands in tables and figures."""
        return self.kind + (f", n = {self.n}" if self.n else "") + ("" if self.mlp else ", no MLP")

    def core(self, width: int) -> Kept:
        """A new core."""
        return EXPANDED[self.kind](width, self.n) if self.n else QLSTMS[self.kind](width)


def effective_memory(record: Recurrence) -> float:
    """``1 / (1 - mean Lambda)``: for how many tokens the average state number of the average token lasts; inf from 1 on.

    For attention this number has no such meaning, since its transitions are ratios of normalisers.
    """
    kept = float(record.lam.double().mean())
    return 1 / (1 - kept) if kept < 1 else math.inf


def _step_bias(bias: Tensor) -> None:
    """Biases whose softplus is log-uniform between the two steps of Mamba, in place."""
    low, high = (math.log(x) for x in STEPS)
    dt = torch.exp(low + (high - low) * torch.rand_like(bias))
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
