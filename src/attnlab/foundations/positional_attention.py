"""Positional Attention: Expressivity and Learnability of Algorithmic Computation (Back De Luca et al. 2025, arXiv:2410.01686).

Taught in the chapter ``foundations/positional-attention``. A Transformer whose attention weights are computed from positions alone,
beside one that looks at its data; they differ in nothing but the module that makes the weights. Sizes, initial weights and the
missing residual follow the official code (``opallab/positional_attention``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------- who talks to whom: the weights


class Weights(nn.Module):
    """Attention weights from states x [B, N, D] and positions P [N, N]: [H, N, N] for the whole batch, or [B, H, N, N].

    Attributes:
        looks: whether the weights depend on the data.
        told: whether the network sees the positions at its input too.
    """

    looks: bool = True
    told: bool = True

    def __init__(self, width: int, nodes: int, heads: int) -> None:
        super().__init__()
        self.heads = heads


class Learned(Weights):
    """Softmax of the products of queries and keys. A head is as wide as what they are made of, as in the official code."""

    def __init__(self, width: int, nodes: int, heads: int) -> None:
        super().__init__(width, nodes, heads)
        self.key_width = self.asked_width(width, nodes)
        self.qk = nn.Linear(self.key_width, 2 * heads * self.key_width)
        nn.init.xavier_uniform_(self.qk.weight)
        nn.init.zeros_(self.qk.bias)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        qk = self.qk(self.asked(x, p)).unflatten(-1, (self.heads, 2 * self.key_width)).transpose(-3, -2)
        q, k = qk.chunk(2, dim=-1)  # [..., H, N, K] each
        weights: Tensor = (q @ k.mT * self.key_width**-0.5).softmax(-1)
        return weights

    def asked(self, x: Tensor, p: Tensor) -> Tensor:
        """What queries and keys are made of."""
        raise NotImplementedError

    def asked_width(self, width: int, nodes: int) -> int:
        """Its width."""
        raise NotImplementedError


class Positional(Learned):
    """Queries and keys from the positions alone: one matrix a head, the same for every input."""

    looks = False
    told = False

    def asked(self, x: Tensor, p: Tensor) -> Tensor:
        return p

    def asked_width(self, width: int, nodes: int) -> int:
        return nodes


class Content(Learned):
    """Standard attention: queries and keys from the states."""

    def asked(self, x: Tensor, p: Tensor) -> Tensor:
        return x

    def asked_width(self, width: int, nodes: int) -> int:
        return width


class ContentAndPosition(Learned):
    """A control: states *and* positions, in every layer."""

    def asked(self, x: Tensor, p: Tensor) -> Tensor:
        return torch.cat([x, p.expand(*x.shape[:-1], p.shape[-1])], dim=-1)

    def asked_width(self, width: int, nodes: int) -> int:
        return width + nodes


class PositionalTold(Positional):
    """A control: weights from positions, but the input carries them too, as that of the standard model does."""

    told = True


class Uniform(Weights):
    """A control: everybody listens to everybody, and nothing is learned."""

    looks = False

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return torch.full_like(p, 1 / len(p)).expand(self.heads, *p.shape)


# ------------------------------------------------------------------------------------------------------------ the network


class Layer(nn.Module):
    """Listen, put what was heard beside what is known, think: no residual, no norm."""

    def __init__(self, weights: Weights, width: int, hidden: int) -> None:
        super().__init__()
        self.weights = weights
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        for linear in (self.v, self.o):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, p: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States x [B, N, D], positions p [N, N] -> states [B, N, D] and the weights; ``given`` ones replace them."""
        a = self.weights(x, p) if given is None else given  # [H, N, N] or [B, H, N, N]
        values = self.v(x).unflatten(-1, (self.weights.heads, -1)).transpose(-3, -2)  # [B, H, N, D/H]
        heard = self.o((a @ values).transpose(-3, -2).flatten(-2))  # [B, N, D]
        return self.mlp(torch.cat([heard, x], dim=-1)), a


class Network(nn.Module):
    """Lists of n numbers to lists of n numbers, with one scratch node that holds zeros at the end: N = n + 1 nodes.

    Args:
        weights: the kind of attention weights.
        length: n. Positions are one-hot, so that another length has no weights.
        features: F, numbers at every place.
        width: D.
        heads: H.
        layers: L.
        hidden: width inside the MLPs.
    """

    position: Tensor

    def __init__(
        self,
        weights: type[Weights],
        length: int,
        features: int = 1,
        *,
        width: int = 64,
        heads: int = 2,
        layers: int = 3,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        for name, size in {"length": length, "features": features, "heads": heads, "layers": layers}.items():
            if size < 1:
                raise ValueError(f"{name}: at least 1 is wanted, not {size}")
        if width % heads:
            raise ValueError(f"width: {width} cannot be shared by {heads} heads; a multiple of {heads} is wanted")
        nodes = length + 1
        self.length, self.features = length, features
        self.told = weights.told
        self.register_buffer("position", torch.eye(nodes))
        self.encode = nn.Linear(features + nodes * self.told, width)
        self.layers = nn.ModuleList(Layer(weights(width, nodes, heads), width, hidden) for _ in range(layers))
        self.decode = nn.Linear(width, 1)

    def run(self, x: Tensor, given: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """x [B, n, F] -> outputs [B, n, 1] and the attention weights of every layer.

        ``given`` puts other weights in their place, one tensor [..., H, N, N] a layer: the surgery of the chapter.
        """
        if x.shape[-2:] != (self.length, self.features):
            raise ValueError(
                f"x: lists of {self.length} places with {self.features} numbers each are wanted (one-hot positions know no "
                f"other length), not {list(x.shape)}"
            )
        state, used = self.encode(self._nodes(x)), []
        others = [None] * len(self.layers) if given is None else given
        for layer, other in zip(self.layers, others, strict=True):
            state, a = layer(state, self.position, other)
            used.append(a)
        return self.decode(state)[..., :-1, :], used

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, F] -> [B, n, 1]"""
        return self.run(x)[0]

    def _nodes(self, x: Tensor) -> Tensor:
        """The list with its scratch node [B, N, F], and the positions beside it if this network is told them at the input."""
        x = torch.cat([x, torch.zeros_like(x[..., :1, :])], dim=-2)
        if self.told:
            x = torch.cat([x, self.position.expand(*x.shape[:-1], len(self.position))], dim=-1)
        return x


class Rescaled(nn.Module):
    """A control: divide by the largest number, ask any network, multiply back. ``f(c x) = c f(x)`` by construction."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, F] -> [B, n, 1]; feature 0 is the number, the others stay as they are."""
        size = x[..., :1].abs().amax(dim=-2, keepdim=True).clamp(min=1e-12)  # [B, 1, 1]
        outputs: Tensor = self.network(torch.cat([x[..., :1] / size, x[..., 1:]], dim=-1)) * size
        return outputs


MODELS: dict[str, type[Weights]] = {
    "positional": Positional,
    "standard": Content,
    "standard, P in every layer": ContentAndPosition,
    "positional, P at the input": PositionalTold,
    "uniform": Uniform,
    "standard, rescaled": Content,
}


def build(name: str, length: int, features: int = 1, **sizes: int) -> nn.Module:
    """A model of :data:`MODELS` by name, new; sizes as in :class:`Network`.

    Raises:
        ValueError: an unknown name, or what :class:`Network` refuses.
    """
    if name not in MODELS:
        raise ValueError(f"name: {name!r} is unknown; choose one of {', '.join(MODELS)}")
    network = Network(MODELS[name], length, features, **sizes)
    return Rescaled(network) if name.endswith("rescaled") else network
