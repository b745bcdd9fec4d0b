"""What can a Single Attention Layer Learn? A Study Through the Random Features Lens (Fu, Guo, Bai, Mei 2023, arXiv:2307.11353).

Taught in the chapter ``foundations/random-features``. Query-key weights are drawn once and frozen, only values are trained, so a
layer is a linear model on fixed features. Of the paper we read the abstract and summaries, not the body: sizes, the corner of the
biased weights and the constant in the values are ours, and so are the infinite-head kernel and the moments.

Tensors here: tokens ``[n, N + 1, D]`` with the query first and N keys after it; unit tokens of width d become ``D = d + 1`` by
``augment``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Family = Literal["query", "keys", "correlation"]
FAMILIES: tuple[Family, ...] = ("query", "keys", "correlation")
CHUNK = 2**24  # numbers of the largest intermediate array

# ------------------------------------------------------------------------------------------------------------- the data


def draw_tokens(n: int, keys: int, d: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """``n`` inputs of a query and ``keys`` keys, all uniform on the unit sphere: [n, keys + 1, d].

    Raises:
        ValueError: fewer than one input or key, or fewer than two dimensions.
    """
    for name, size, least in (("n", n, 1), ("keys", keys, 1), ("d", d, 2)):
        if size < least:
            raise ValueError(f"{name}={size} must be at least {least}")
    x = torch.randn(n, keys + 1, d, generator=generator, dtype=dtype, device=generator.device)
    return F.normalize(x, dim=-1)


def augment(tokens: Tensor) -> Tensor:
    """``[x; 1]`` for every token: [n, N + 1, d + 1]."""
    return F.pad(tokens, (0, 1), value=1.0)


@dataclass(frozen=True)
class Target:
    """A function to learn, with ``beta`` a unit vector: one of three families, and its degree.

    ``query``: ``<beta, x_0>^p``; ``keys``: the mean over keys of ``<beta, x_i>^p``; ``correlation``: the mean over keys of
    ``<x_0, x_i>^p <beta, x_i>``. A ``pure`` correlation is freed of what is cheaper to say: of its mean given the query (p = 1), of
    the power two below it (p = 2, 3).
    """

    family: Family
    p: int
    pure: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is unknown; use one of {', '.join(FAMILIES)}")
        if isinstance(self.p, bool) or not isinstance(self.p, int) or self.p < 1:
            raise ValueError(f"p={self.p!r} must be a positive integer: it is a degree")
        if self.pure and (self.family != "correlation" or self.p > 3):
            raise ValueError(
                f"pure: only correlations up to degree 3 have a pure part here, not {self.family} {self.p}"
            )

    @property
    def name(self) -> str:
        """Such as ``correlation 3``."""
        return f"{self.family} {self.p}" + (" (pure)" if self.pure else "")

    def __call__(self, tokens: Tensor, beta: Tensor) -> Tensor:
        """Values [n] for unit tokens [n, N + 1, d]."""
        query, keys = tokens[:, 0], tokens[:, 1:]
        if self.family == "query":
            return (query @ beta) ** self.p
        if self.family == "keys":
            return ((keys @ beta) ** self.p).mean(1)
        c, b = torch.einsum("nd,nid->ni", query, keys), keys @ beta
        if not self.pure:
            return (c**self.p * b).mean(1)
        d = tokens.shape[-1]
        if self.p == 1:
            return (c * b).mean(1) - query @ beta / d
        lower = moment(d, 2 * self.p - 2) / moment(d, 2 * self.p - 4)
        return ((c**self.p - lower * c ** (self.p - 2)) * b).mean(1)


def moment(d: int, k: int) -> float:
    """``E <u, x>^k`` for x uniform on the unit sphere of ``d`` dimensions and a unit vector u: (k - 1)!! / (d (d + 2) ...)."""
    if k % 2:
        return 0.0
    return math.prod(range(1, k, 2)) / math.prod(range(d, d + k, 2))


# --------------------------------------------------------------------------------------------------------- the features


def draw_heads(heads: int, width: int, generator: torch.Generator) -> Tensor:
    """Frozen query-key matrices [M, width, width], ``width = d + 1``, of variance 1/4: the scores of augmented unit tokens have variance 1.

    Raises:
        ValueError: no head.
    """
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1")
    return torch.randn(heads, width, width, generator=generator, dtype=torch.float64, device=generator.device) / 2


def biased(W: Tensor, mu: float) -> Tensor:
    """The same draw with the mean ``mu diag(1, ..., 1, 0)``, which adds ``mu <x_0, x_i>`` to every score. 0 leaves it as it is."""
    mean = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    mean[-1, -1] = 0
    return W + mu * mean


def scores(tokens: Tensor, W: Tensor) -> Tensor:
    """``<W_m, x_0 x_iᵀ>`` of every head with every key: [n, M, N]."""
    q = torch.einsum("na,mab->nmb", tokens[:, 0], W)
    return torch.einsum("nmb,nib->nmi", q, tokens[:, 1:])


def attention_features(tokens: Tensor, W: Tensor, weigh: Literal["relu", "softmax"] = "relu") -> Tensor:
    """What the trained values multiply: for each head a weighted sum of the keys, [n, M * D].

    Args:
        tokens: as the layer sees them, [n, N + 1, D].
        W: frozen query-key matrices, [M, D, D].
        weigh: ``relu`` divides by the number of keys (the theory); ``softmax`` normalises over them (a Transformer).

    Raises:
        ValueError: shapes that do not fit, or another way to weigh.
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2 or W.ndim != 3 or W.shape[1:] != (tokens.shape[2],) * 2:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and W {tuple(W.shape)} must be [n, N + 1, D] with N >= 1, and [M, D, D]"
        )
    if weigh not in ("relu", "softmax"):
        raise ValueError(f"weigh={weigh!r} must be 'relu' or 'softmax'")
    blocks = []
    for part in _chunks(tokens, W.shape[0]):
        s = scores(part, W)
        weights = F.relu(s) / s.shape[-1] if weigh == "relu" else s.softmax(-1)  # [n, M, N]
        blocks.append((weights @ part[:, 1:]).flatten(1))  # [n, M, D] to [n, M D]
    return torch.cat(blocks)


def network_features(tokens: Tensor, w: Tensor) -> Tensor:
    """A two-layer network on the whole input, ``relu(<w_m, [x_0; ...; x_N; 1]>)``: [n, neurons].

    Args:
        tokens: not augmented, [n, N + 1, d].
        w: frozen first layer, [neurons, (N + 1) d + 1].
    """
    return F.relu(F.pad(tokens.flatten(1), (0, 1), value=1.0) @ w.T)


def set_features(tokens: Tensor, w: Tensor) -> Tensor:
    """The same network given the invariance for free: a neuron sees the query and one key, and is averaged over keys. [n, neurons].

    Args:
        tokens: not augmented, [n, N + 1, d].
        w: frozen first layer, [neurons, 2 d + 1].
    """
    blocks = []
    for part in _chunks(tokens, w.shape[0]):
        query, keys = part[:, :1].expand_as(part[:, 1:]), part[:, 1:]
        pairs = F.pad(torch.cat([query, keys], -1), (0, 1), value=1.0)  # [n, N, 2 d + 1]
        blocks.append(F.relu(pairs @ w.T).mean(1))
    return torch.cat(blocks)


def _chunks(tokens: Tensor, per_key: int) -> Iterator[Tensor]:
    """Parts of the batch whose ``[n, keys, per_key]`` fits into CHUNK numbers."""
    size = max(1, CHUNK // (per_key * tokens.shape[1]))
    yield from tokens.split(size)


# ------------------------------------------------------------------------------------------------- infinitely many heads


def arc_cosine(rho: Tensor) -> Tensor:
    """``E relu(a) relu(b)`` for standard normal a, b with correlation rho: the arc-cosine kernel of order 1."""
    rho = rho.clamp(-1, 1)
    return ((1 - rho**2).sqrt() + rho * (torch.pi - rho.arccos())) / (2 * torch.pi)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of attention features a head, for infinitely many heads without bias: [n, m].

    ``K(x, y) = 1/N² sum_ij kappa(<x_0, y_0> <x_i, y_j> / 4) <x_i, y_j>`` for augmented tokens; two scores have correlation
    ``<x_0, y_0> <x_i, y_j> / 4``.

    Args:
        x, y: augmented unit tokens, [n, N + 1, D] and [m, N + 1, D].

    Raises:
        ValueError: tokens whose squared norm is not 2.
    """
    _require_augmented(x=x, y=y)
    queries = x[:, 0] @ y[:, 0].T
    total = torch.zeros_like(queries)
    for i in range(1, x.shape[1]):
        for j in range(1, y.shape[1]):
            keys = x[:, i] @ y[:, j].T  # [n, m]
            total += arc_cosine(queries * keys / 4) * keys
    return total / ((x.shape[1] - 1) * (y.shape[1] - 1))


def paired_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The formula of ``kernel`` with ``i = j`` only: a plausible mistake, since the order of the keys must not count."""
    _require_augmented(x=x, y=y)
    queries = x[:, 0] @ y[:, 0].T
    keys = torch.einsum("nid,mid->inm", x[:, 1:], y[:, 1:])
    return (arc_cosine(queries * keys / 4) * keys).mean(0)


def mean_weight(c: Tensor, mu: float) -> Tensor:
    """``E relu(mu c + g)`` over heads, g standard normal: the weight that a key of correlation c gets on average."""
    normal = torch.distributions.Normal(0.0, 1.0)
    s = mu * c
    return s * normal.cdf(s) + normal.log_prob(s).exp()


def mean_weight_parts(mu: float, d: int, degrees: int = 5, points: int = 20_001) -> list[float]:
    """What ``mean_weight`` holds of each degree in c: coefficients on orthonormal polynomials, [degrees].

    The polynomials are orthonormal for the correlation of two random unit vectors of ``d >= 3`` dimensions (Gegenbauer's), so
    the squares of the coefficients add up to the mean square weight.
    """
    c = torch.linspace(-1, 1, points, dtype=torch.float64)
    often = (1 - c**2).clamp(min=0) ** ((d - 3) / 2)
    often /= often.sum()
    basis: list[Tensor] = []
    for k in range(degrees):
        polynomial = c**k
        for lower in basis:
            polynomial = polynomial - (polynomial * lower * often).sum() * lower
        basis.append(polynomial / (polynomial.square() * often).sum().sqrt())
    weight = mean_weight(c, mu)
    return [float((weight * polynomial * often).sum()) for polynomial in basis]


def _require_augmented(**given: Tensor) -> None:
    for name, tokens in given.items():
        if not torch.allclose(tokens.square().sum(-1), tokens.new_tensor(2.0), atol=1e-4):
            raise ValueError(f"{name}: tokens must be unit vectors with a 1 appended; normalise them, then augment")


def features_of(gram: Tensor) -> Tensor:
    """Features [n, n] whose inner products are a kernel matrix [n, n]: how ridge regression meets infinitely many heads."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()
