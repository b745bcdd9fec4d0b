"""A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies (Hè & Kabić 2023, arXiv:2302.06218).

Taught in the chapter ``foundations/unified-long-sequence``. A token mixer is a matrix between tokens times a map of each token,
``Y = M(X) phi(X)``. Every mixer here says what its matrix is (``mix``) and, the token MLP apart, computes the same without it
(``forward``). The template is ours: of the paper, abstract and list of symbols could be read. ``ALL`` adds the mixers of
:mod:`attnlab.mixers`. What spreads attention over devices stands in :mod:`attnlab.scale`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.foundations.unified_long_sequence_template import Mixer, Mixing
from attnlab.foundations.unified_long_sequence_workspace import WORKSPACE
from attnlab.mixers import attend, elu_plus_one, linear_attention
from attnlab.models.language import initialise

# -------------------------------------------------------------------------------------------- the matrix depends on the data


class SoftmaxMixer(Mixer):
    """Attention: every token weighs its past by how well keys fit its query, and the weights of a row sum to 1."""

    asks, cost, state = True, "T² D", "2 T D"

    def __init__(self, width: int, length: int) -> None:
        super().__init__(width, length)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def mix(self, x: Tensor) -> Mixing:
        scores = self.q(x) @ self.k(x).mT * self.width**-0.5  # [B, T, T]
        return Mixing(scores.masked_fill(_later(x), -torch.inf).softmax(-1), self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)


class KernelMixer(SoftmaxMixer):
    """A kernel smoother: a token weighs its past by how near it lies, ``exp(-|k_i - k_j|² / 2)``, and normalises."""

    def mix(self, x: Tensor) -> Mixing:
        k = self.k(x) * self.width**-0.25
        apart = (k.pow(2).sum(-1)[:, :, None] + k.pow(2).sum(-1)[:, None, :] - 2 * k @ k.mT).clamp(min=0)  # [B, T, T]
        weights = (-apart / 2).exp().masked_fill(_later(x), 0)
        return Mixing(weights / weights.sum(-1, keepdim=True), self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        # |k_i|² cancels in the normalisation: what is left is attention with keys as queries, and a bias of the keys
        k = self.k(x) * self.width**-0.25
        bias = (-k.pow(2).sum(-1) / 2)[:, None, :].masked_fill(_later(x), -torch.inf)
        return F.scaled_dot_product_attention(k, k, self.v(x), attn_mask=bias, scale=1.0)


class LinearMixer(Mixer):
    """Linear attention: positive features in place of the exponential, so that the past fits into one D x D matrix."""

    asks, cost, state = True, "T D²", "D² + D"

    def __init__(self, width: int, length: int) -> None:
        super().__init__(width, length)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def mix(self, x: Tensor) -> Mixing:
        weights = (elu_plus_one(self.q(x)) @ elu_plus_one(self.k(x)).mT).masked_fill(_later(x), 0)
        return Mixing(weights / weights.sum(-1, keepdim=True), self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))  # one head
        return linear_attention(q, k, v, eps=0)[0][:, :, 0]


class GatedMixer(Mixer):
    """A selective state space, or gated linear attention: what is kept of the past is decided token by token."""

    asks, cost, state = True, "T D N", "D N"

    def __init__(self, width: int, length: int, states: int = 16) -> None:
        super().__init__(width, length)
        self.q, self.k = (nn.Linear(width, states, bias=False) for _ in range(2))
        self.v, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, 1)

    def log_decay(self, x: Tensor) -> Tensor:
        """log of what is kept at each token, [B, T]; the offset lets an untrained model keep 95 percent."""
        return F.logsigmoid(self.gate(x)[..., 0] + 3)

    def mix(self, x: Tensor) -> Mixing:
        total = self.log_decay(x).cumsum(-1)
        kept = (total[:, :, None] - total[:, None, :]).masked_fill(_later(x), -torch.inf).exp()
        q, k = self.q(x), self.k(x)
        return Mixing(q @ k.mT * q.shape[-1] ** -0.5 * kept, self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x)[:, :, None] for f in (self.q, self.k, self.v))
        return attend(q, k, v, self.log_decay(x)[:, :, None])[0][:, :, 0]


# --------------------------------------------------------------------------------------------------- the matrix is fixed


class ConvolutionMixer(Mixer):
    """A causal convolution: one weight a distance, the same everywhere, for all channels."""

    cost, state = "T log T · D", "T D"

    def __init__(self, width: int, length: int, reach: int | None = None) -> None:
        super().__init__(width, length)
        reach = length if reach is None else reach
        if not 1 <= reach <= length:
            raise ValueError(f"reach={reach} must lie between 1 and length={length}")
        self.kernel = nn.Parameter(torch.randn(reach) * reach**-0.5)  # kernel[d] weighs the token d places back
        self.v = nn.Linear(width, width, bias=False)

    def weights(self, length: int) -> Tensor:
        """Weight of each distance [T], 0 beyond the kernel's reach."""
        return F.pad(self.kernel[:length], (0, max(0, length - len(self.kernel))))

    def mix(self, x: Tensor) -> Mixing:
        return Mixing(_toeplitz(self.weights(x.shape[1])).expand(len(x), -1, -1), self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self.weights(x.shape[1]), self.v(x))


class StateSpaceMixer(ConvolutionMixer):
    """A linear state space, S4 without its refinements: a convolution whose kernel is a sum of decaying exponentials."""

    cost, state = "T log T · D", "D N"

    def __init__(self, width: int, length: int, states: int = 16) -> None:
        super().__init__(width, length)
        del self.kernel
        self.rate = nn.Parameter(torch.linspace(-4, 1, states))  # a = exp(-exp(rate)): from slow to fast
        self.read = nn.Parameter(torch.randn(states) * states**-0.5)

    def weights(self, length: int) -> Tensor:
        distance = torch.arange(length, device=self.rate.device, dtype=self.rate.dtype)
        return (-self.rate.exp()[:, None] * distance).exp().mT @ self.read  # sum_n c_n a_n^d


class FourierMixer(Mixer):
    """FNet: a Fourier transform along the tokens and one along the channels; nothing is learned, nothing is causal."""

    causal, cost, state = False, "T log T · D", "–"

    def mix(self, x: Tensor) -> Mixing:
        over_tokens, over_channels = (_fourier(n, x) for n in x.shape[1:])
        return Mixing(over_tokens.expand(len(x), -1, -1), x.to(over_channels.dtype) @ over_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


class TokenMLPMixer(Mixer):
    """MLP-Mixer's token mixing: hidden units read all tokens and all tokens read hidden units; the length is built in.

    It has the two factors, but its values are hidden units that have seen all tokens: no matrix between tokens is left in the
    template, and no faster form.
    """

    causal, cost, state = False, "T H D", "–"

    def __init__(self, width: int, length: int) -> None:
        super().__init__(width, length)
        self.up, self.down = nn.Linear(length, 2 * length, bias=False), nn.Linear(2 * length, length, bias=False)

    def mix(self, x: Tensor) -> Mixing:
        if x.shape[1] != self.length:
            raise ValueError(f"x: {x.shape[1]} tokens, but this mixer has weights for length={self.length}")
        hidden = F.gelu(self.up(x.mT)).mT  # [B, 2T, D]: the values are hidden units, not tokens
        return Mixing(self.down.weight.expand(len(x), -1, -1), hidden)


MIXERS: dict[str, type[Mixer]] = {
    "softmax attention": SoftmaxMixer,
    "kernel smoother": KernelMixer,
    "linear attention": LinearMixer,
    "gated (selective SSM)": GatedMixer,
    "state space (LTI)": StateSpaceMixer,
    "convolution": ConvolutionMixer,
    "Fourier (FNet)": FourierMixer,
    "token MLP (MLP-Mixer)": TokenMLPMixer,
}

#: those of the chapter, then those of the workspace
ALL: dict[str, type[Mixer]] = MIXERS | WORKSPACE


def build(name: str, width: int, length: int, seed: int = 0) -> Mixer:
    """A mixer of ``ALL`` with random weights of unit gain.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ALL:
        raise ValueError(f"name={name!r} is unknown; use one of {', '.join(ALL)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = ALL[name](width, length)
        initialise(mixer)
    return mixer


# ----------------------------------------------------------------------------------------------------- what a matrix tells


def properties(name: str, width: int = 8, length: int = 48, seed: int = 0) -> dict[str, object]:
    """What can be read off the matrix of a mixer with random weights, on random tokens, in float64.

    ``rank past to future`` is that of the block in which the second half of the tokens reads the first half: no state with
    fewer numbers a channel can hand over what the first half said. It is None where there is no matrix between tokens, as in the
    token MLP, and so is ``M φ(X) − fast form`` where there is no other form. Of a matrix for each channel the first counts.
    """
    mixer = build(name, width, length, seed).double()
    x = torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        mixing = mixer.mix(x)
        error = float((mixer(x) - mixing.output()).abs().max())
    m = mixing.matrix if mixing.matrix.ndim == 3 else mixing.matrix[:, 0]
    square = m.shape[1] == m.shape[2]
    past = m[0, length // 2 :, : length // 2]
    return {
        "mixer": name,
        "asks": not torch.allclose(m[0], m[1]),
        "causal": square and bool((m.triu(1) == 0).all()),
        "rows sum to 1": bool(torch.allclose(m.sum(-1), torch.ones_like(m.sum(-1)))),
        "Toeplitz": square and bool(torch.allclose(m[:, 1:, 1:], m[:, :-1, :-1])),
        "rank past to future": int(torch.linalg.matrix_rank(past, rtol=1e-9)) if square else None,
        "cost": mixer.cost,
        "state": mixer.state,
        "M φ(X) − fast form": None if type(mixer).forward is Mixer.forward else error,
    }


def influence(name: str, at: int, width: int = 8, length: int = 48, seed: int = 0) -> Tensor:
    """How much output ``at`` changes with each input token, ``[T]``: the norm of ``dy_at / dx_j``, through matrix and values."""
    mixer = build(name, width, length, seed).double()
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda given: mixer(given)[0, at], x)  # [D, 1, T, D]
    return jacobian[:, 0].pow(2).sum((0, 2)).sqrt()


# ---------------------------------------------------------------------------------------------------------------- details


def _later(x: Tensor) -> Tensor:
    """[T, T], true where the key comes after the query."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)


def _toeplitz(weights: Tensor) -> Tensor:
    """[T] by distance to the lower triangular [T, T] with ``M_ij = weights[i - j]``."""
    length = len(weights)
    distance = torch.arange(length, device=weights.device)[:, None] - torch.arange(length, device=weights.device)
    return weights[distance.clamp(min=0)].tril()


def _convolve(weights: Tensor, x: Tensor) -> Tensor:
    """``y_i = sum_j weights[i - j] x_j`` for x [B, T, D], by transforms twice as long, so that nothing wraps around."""
    size = 2 * x.shape[1]
    product = torch.fft.rfft(weights, size)[:, None] * torch.fft.rfft(x, size, dim=1)
    return torch.fft.irfft(product, size, dim=1)[:, : x.shape[1]]


def _fourier(size: int, like: Tensor) -> Tensor:
    """The matrix ``F_jk = exp(-2 pi i j k / size)``, complex [size, size]."""
    index = torch.arange(size, device=like.device, dtype=torch.float64)
    angle = -2 * torch.pi * torch.outer(index, index) / size
    return torch.polar(torch.ones_like(angle), angle).to(torch.promote_types(like.dtype, torch.complex64))
