"""A small decoder whose token mixer is an argument, so that a comparison of mixers changes nothing else.

A mixer is any module that maps [B, T, D] to [B, T, D]. The shell around it is always the same: embeddings, pre-norm
blocks, a final norm, a head. :class:`Decoder` reads tokens, :class:`SequenceModel` reads vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MakeLayer = Callable[[int], nn.Module]  # from the index of a layer, 0 at the bottom
MakeNorm = Callable[[int], nn.Module]  # from the width
Positions = Literal["learned"] | None


class Block(nn.Module):
    """One layer: every token listens to the others, then thinks for itself."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module, mixer_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    """Positions, blocks and a final norm: what :class:`Decoder` and :class:`SequenceModel` share. See there."""

    def __init__(
        self,
        width: int,
        layers: int,
        make_mixer: MakeLayer,
        make_mlp: MakeLayer | None,
        norm: MakeNorm,
        positions: Positions,
        max_length: int,
    ) -> None:
        super().__init__()
        _positive(width=width, layers=layers, max_length=max_length)
        if positions not in ("learned", None):
            raise ValueError(f"positions: 'learned' or None is wanted, not {positions!r}")
        self.width = width
        self.positions = nn.Embedding(max_length, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(
                make_mixer(layer),
                MLP(width, 4 * width) if make_mlp is None else make_mlp(layer),
                norm(width),
                norm(width),
            )
            for layer in range(layers)
        )
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        length = x.shape[1]
        if self.positions is not None:
            if length > self.positions.num_embeddings:
                raise ValueError(
                    f"x: {length} tokens, and positions were learned for max_length={self.positions.num_embeddings}; "
                    "build the model with a larger max_length or with positions=None"
                )
            x = x + self.positions(torch.arange(length, device=x.device))  # [T, D] joins [B, T, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """A language model: tokens to logits.

    Args:
        vocab: size of the vocabulary.
        width: D.
        layers: number of blocks.
        make_mixer: the token mixer of a layer, from its index; it must be causal if the model is to predict.
        make_mlp: the MLP of a layer, from its index; left out, :class:`MLP` with hidden size 4 D.
        norm: from D, such as ``nn.LayerNorm``; ``partial(nn.RMSNorm, elementwise_affine=False)`` has no gain.
        positions: ``learned`` adds an embedding of the position; None leaves order to the mixer.
        max_length: the longest sequence, for learned positions.
        tied: whether the head's matrix is the embedding.
        init_std: see :func:`initialise`.

    Raises:
        ValueError: a size that is not positive, unknown positions.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        make_mixer: MakeLayer,
        *,
        make_mlp: MakeLayer | None = None,
        norm: MakeNorm = nn.RMSNorm,
        positions: Positions = "learned",
        max_length: int = 1024,
        tied: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        _positive(vocab=vocab)
        self.trunk = Trunk(width, layers, make_mixer, make_mlp, norm, positions, max_length)
        self.embedding = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        initialise(self, init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T], or [B, T, F] for F tokens at a place, whose embeddings add -> logits [B, T, vocab]"""
        if tokens.ndim not in (2, 3) or 0 in tokens.shape:
            raise ValueError(f"tokens: [B, T] or [B, T, F] with at least one token is wanted, not {list(tokens.shape)}")
        x = self.embedding(tokens)  # [B, T, D] or [B, T, F, D]
        if tokens.ndim == 3:
            x = x.sum(2)
        return self.head(self.trunk(x))


class SequenceModel(nn.Module):
    """The same shell for vectors: forecasting, or classification from the last or the mean output.

    Args:
        inputs: F, numbers a token.
        outputs: O, numbers out of each token.

    The others are those of :class:`Decoder`. The two outer layers have biases, since inputs and targets have offsets,
    and the first keeps torch's initialisation: with a bias of 0 the norm of a block would see no more than signs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        layers: int,
        make_mixer: MakeLayer,
        *,
        make_mlp: MakeLayer | None = None,
        norm: MakeNorm = nn.RMSNorm,
        positions: Positions = "learned",
        max_length: int = 1024,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        _positive(inputs=inputs, outputs=outputs)
        self.embedding = nn.Linear(inputs, width)
        self.trunk = Trunk(width, layers, make_mixer, make_mlp, norm, positions, max_length)
        self.head = nn.Linear(width, outputs)
        initialise(self.trunk, init_std)
        initialise(self.head, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, F] -> [B, T, O]"""
        if x.ndim != 3 or x.shape[2] != self.embedding.in_features or 0 in x.shape:
            raise ValueError(f"x: [B, T, {self.embedding.in_features}] is wanted, not {list(x.shape)}")
        return self.head(self.trunk(self.embedding(x)))


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention.

    Args:
        width: D, a multiple of ``heads``.
        heads: H.
        slopes: [H], each at least 0: head h lowers a score by ``slopes[h]`` for every token of distance (ALiBi, Press et
            al. 2022, arXiv:2108.12409). ``-log_decay`` of a linear mixer gives it the same preference for the near.
        rotary: whether queries and keys are turned by their positions; see :func:`rotary`.
        causal: whether a token sees only itself and those before it.
        scale: of the scores; left out, ``(D / H) ** -0.5``.

    Raises:
        ValueError: heads that do not divide the width, an odd head width under rotary, slopes that do not fit.
    """

    slopes: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        slopes: Tensor | Sequence[float] | None = None,
        rotary: bool = False,
        causal: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        _positive(width=width, heads=heads)
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide width={width}; choose a divisor")
        if rotary and width // heads % 2:
            raise ValueError(
                f"rotary: it turns pairs of channels, and a head has {width // heads}; choose an even number"
            )
        self.heads, self.rotary, self.causal, self.scale = heads, rotary, causal, scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("slopes", None if slopes is None else _slopes(slopes, heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, T, H, D/H]
        if self.rotary:
            q, k = rotary(q), rotary(k)
        bias = None if self.slopes is None else distance_bias(self.slopes, x.shape[1], self.causal).to(q.dtype)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # [B, H, T, D/H]
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias,  # [H, T, T]
            is_causal=self.causal and bias is None,
            scale=self.scale,
        )
        return self.out(o.transpose(1, 2).flatten(2))  # [B, H, T, D/H] -> [B, T, D]


class MLP(nn.Module):
    """Two matrices with an activation between them: 2 D F numbers for hidden size F."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        _positive(width=width, hidden=hidden)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(self.activation(self.up(x)))


class SGLU(nn.Module):
    """A gated linear unit without activation, bilinear in x: 3 D F numbers (TransNormerLLM, arXiv:2405.17381, eq. 12)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        _positive(width=width, hidden=hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(self.gate(x) * self.up(x))


class SwiGLU(SGLU):
    """The gated linear unit of Llama, with SiLU on the gate: 3 D F numbers (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn channels (i, i + D/2) of token t by the angle ``t * base ** (-2 i / D)`` (RoPE, Su et al., arXiv:2104.09864).

    The product of a turned query and a turned key depends on their distance, not on where they stand.

    Args:
        x: [B, T, H, D], D even.
        base: how slowly the last pair turns.
    """
    length, width = x.shape[1], x.shape[3]
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell neighbouring positions apart
    rates = base ** -(torch.arange(0, width, 2, device=x.device, dtype=wide) / width)  # [D/2]
    angles = torch.outer(torch.arange(length, device=x.device, dtype=wide), rates)[:, None]  # [T, 1, D/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # each [B, T, H, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def distance_bias(slopes: Tensor, length: int, causal: bool = True) -> Tensor:
    """``-slopes[h] * |t - s|`` [H, T, T] for query t and key s; minus infinity where a causal query may not look."""
    t = torch.arange(length, device=slopes.device)
    distance = (t[:, None] - t).abs()  # [T, T]
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(t[:, None] < t, -math.inf) if causal else bias


def initialise(model: nn.Module, std: float | None = None) -> None:
    """Draw linear and embedding weights from normal distributions and set linear biases to 0, everywhere in ``model``.

    Args:
        model: a module inside that wants other values says so in a method ``init_weights()``, which is called last.
        std: one standard deviation for all, such as 0.02 (GPT-2). Left out, embeddings get 1 and a linear layer
            ``in_features ** -0.5``, so that activations begin with unit variance at any width. Narrow models need that:
            at width 32 and 0.02, attention starts so close to a plain average that recall is not found in time.
    """
    for module in model.modules():  # a tied matrix is drawn as the head's, which comes after the embedding
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if std is None else std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 if std is None else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if callable(own := getattr(module, "init_weights", None)):
            own()


def _slopes(slopes: Tensor | Sequence[float], heads: int) -> Tensor:
    given = torch.as_tensor(slopes, dtype=torch.get_default_dtype()).detach().clone()
    if given.shape != (heads,) or not bool(((given >= 0) & given.isfinite()).all()):
        raise ValueError(f"slopes: {heads} finite numbers of at least 0, one a head, are wanted, not {slopes!r}")
    return given


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: a positive number is wanted, not {size}")
