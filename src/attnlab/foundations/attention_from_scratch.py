"""Softmax attention from a lookup to a cached decoder, in functions short enough to be read on the page.

Taught in the chapter ``foundations/attention-from-scratch``. The formula is that of Vaswani et al. 2017 (arXiv:1706.03762,
section 3.2); grouped heads are those of Ainslie et al. 2023 (arXiv:2305.13245). Tensors are token-major: queries
[B, T, H, K], keys [B, S, H, K], values [B, S, H, V]; S counts keys, T queries, and the last query stands at the last key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.mixers import checks, rotate

# ------------------------------------------------------------------------------------------------------------- a lookup


def soft_lookup(query: Tensor, keys: Tensor, values: Tensor, sharpness: float = 1.0) -> Tensor:
    """A dictionary that answers with an average: query [K], keys [N, K], values [N, V], answer [V]."""
    weights = (sharpness * keys @ query).softmax(-1)  # [N], positive, sum 1
    return weights @ values


# ------------------------------------------------------------------------------------------- scores, mask, softmax, sum


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Every query against every key: ``q_t . k_s * scale``, [B, H, T, S].

    Args:
        q: [B, T, H, K].
        k: [B, S, H, K].
        scale: K ** -0.5 unless given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("bthk,bshk->bhts", q, k) * scale


def masked_softmax(s: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis of the places that ``mask`` allows; a row that allows none is all zeros.

    Args:
        s: scores [..., T, S].
        mask: boolean, broadcastable to ``s``; True: may be read.
    """
    s = s.masked_fill(~mask, -torch.inf)  # e^-inf is exactly 0: what is forbidden has no weight at all
    return s.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)  # softmax of a row of -inf is nan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention: every query gets the average of the values, weighted by how its scores compare.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, H, K] and [B, S, H, V].
        mask: boolean [T, S], [B, 1, T, S] or what broadcasts to [B, H, T, S]; all places if left out.
        scale: of the scores; K ** -0.5 unless given.
        bias: added to the scores, broadcastable to [B, H, T, S].

    Returns:
        Outputs [B, T, H, V] and the pattern [B, H, T, S].

    Raises:
        ValueError: shapes that do not fit, a mask that is not boolean, or half precision.
    """
    checks.heads(q, k, v, same_length=False)
    mask = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else _boolean(mask)
    s = scores(q, k, scale)
    s = s if bias is None else s + bias
    pattern = masked_softmax(s, mask.expand(torch.broadcast_shapes(mask.shape, s.shape)))
    return torch.einsum("bhts,bshv->bthv", pattern, v), pattern


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: dtype {mask.dtype}; pass booleans, True where a query may read (numbers go into bias)")
    return mask


# ---------------------------------------------------------------------------------------------------------------- masks


def causal(queries: int, keys: int | None = None) -> Tensor:
    """[T, S] boolean: query t may read keys up to its own place. With fewer queries than keys they are the last ones."""
    keys = queries if keys is None else keys
    if not 1 <= queries <= keys:
        raise ValueError(
            f"queries: {queries} queries over {keys} keys; the last query stands at the last key, so 1 to {keys}"
        )
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def window(length: int, width: int) -> Tensor:
    """[T, T] boolean: query t may read the last ``width`` keys, its own place included."""
    if not 1 <= width <= length:
        raise ValueError(f"width: a window of {width} over {length} tokens; 1 to {length} would do")
    return causal(length).triu(1 - width)


def real_tokens(lengths: Tensor, keys: int) -> Tensor:
    """[B, 1, 1, S] boolean: keys before each sequence's length; the rest is padding. ``lengths`` are integers [B]."""
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


# ---------------------------------------------------------------------------------------------------------------- heads


class Layer(NamedTuple):
    """The four matrices of an attention layer, one slice a head; G = H / Hkv query heads share one key and value head."""

    W_Q: Tensor  # [H, d, K]
    W_K: Tensor  # [Hkv, d, K]
    W_V: Tensor  # [Hkv, d, V]
    W_O: Tensor  # [H, V, d]

    def to(self, dtype: torch.dtype) -> Layer:
        """The same layer in another dtype."""
        return Layer(*(W.to(dtype) for W in self))


def random_layer(
    d: int, n_heads: int, n_kv_heads: int | None = None, *, d_head: int | None = None, seed: int = 0
) -> Layer:
    """A layer with entries of variance 1 / (rows that are summed), in float64, so that unit inputs give unit outputs."""
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    d_head = d // n_heads if d_head is None else d_head
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: {n_heads} query heads cannot share {n_kv_heads} evenly; pass a divisor")
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, rows: int, columns: int) -> Tensor:
        return torch.randn(heads, rows, columns, generator=generator, dtype=torch.float64) * rows**-0.5

    W_Q, W_K, W_V = draw(n_heads, d, d_head), draw(n_kv_heads, d, d_head), draw(n_kv_heads, d, d_head)
    return Layer(W_Q, W_K, W_V, draw(n_heads, d_head, d) * n_heads**-0.5)


def project(layer: Layer, x: Tensor, *, offset: int = 0, base: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T, d] become q [B, T, H, K], k [B, T, Hkv, K] and v [B, T, Hkv, V].

    With ``base``, q and k are turned by their position (rotary), of which the first is ``offset``.
    """
    q, k, v = (torch.einsum("btd,hdk->bthk", x, W) for W in (layer.W_Q, layer.W_K, layer.W_V))
    if base is not None:
        q, k = rotate(q, offset=offset, base=base), rotate(k, offset=offset, base=base)
    return q, k, v


def share(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values [B, S, Hkv, K] for H query heads, [B, S, H, K]: head h reads group h // G."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


def writes(layer: Layer, o: Tensor) -> Tensor:
    """What each head adds to the residual stream: outputs [B, T, H, V] times its own slice of W_O, [B, T, H, d]."""
    return torch.einsum("bthv,hvd->bthd", o, layer.W_O)


def self_attention(
    layer: Layer, x: Tensor, mask: Tensor, *, base: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """The whole layer on tokens [B, T, d]: project, attend, write; heads meet only in the sum. Returns [B, T, d]."""
    q, k, v = project(layer, x, base=base)
    o, _ = attention(q, share(k, q.shape[2]), share(v, q.shape[2]), mask, bias=bias)
    return writes(layer, o).sum(2)


# ------------------------------------------------------------------------------------------------------------ positions


def sinusoids(positions: Tensor, d: int) -> Tensor:
    """A fixed vector for each position [T], added to the token: sines and cosines of ``p 10000^(-2i/d)``, [T, d]."""
    speed = 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)  # [d / 2]
    angle = positions[:, None] * speed
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def distance_bias(queries: Tensor, keys: Tensor, slopes: Tensor) -> Tensor:
    """Added to the scores: ``-slope (t - s)``, [H, T, S] from positions [T], [S] and slopes [H] (ALiBi, Press et al. 2022)."""
    return -slopes[:, None, None] * (queries[:, None] - keys)


# -------------------------------------------------------------------------------------------------------- the KV cache


class Cache(NamedTuple):
    """Keys and values of every token so far, [B, S, Hkv, K] and [B, S, Hkv, V]."""

    k: Tensor
    v: Tensor


def prefill(layer: Layer, x: Tensor, *, base: float | None = None) -> tuple[Tensor, Cache]:
    """The prompt [B, T, d] in one pass: outputs [B, T, d], and what the next token will need."""
    _, k, v = project(layer, x, base=base)
    return self_attention(layer, x, causal(x.shape[1]), base=base), Cache(k, v)


def decode(layer: Layer, x: Tensor, cache: Cache, *, base: float | None = None) -> tuple[Tensor, Cache]:
    """One more token [B, 1, d] after those of the cache: its output [B, 1, d] and the cache, one row longer.

    One query needs no mask: all that is in the cache is its past.
    """
    q, k, v = project(layer, x, offset=cache.k.shape[1], base=base)
    cache = Cache(torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1))
    o, _ = attention(q, share(cache.k, q.shape[2]), share(cache.v, q.shape[2]))
    return writes(layer, o).sum(2), cache


def cache_bytes(tokens: int, *, layers: int, n_kv_heads: int, d_head: int, number: int = 2) -> int:
    """Bytes of a KV cache: a key and a value for every token, layer and key-value head; ``number`` bytes an entry."""
    return 2 * tokens * layers * n_kv_heads * d_head * number


# ------------------------------------------------------------------------------------------------------------- gradient


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, d_out: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a loss whose gradient with respect to the outputs is ``d_out`` [B, T, H, V]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, pattern = attention(q, k, v, mask, scale=scale)
    agreement = torch.einsum("bthv,bshv->bhts", d_out, v)  # how much the loss rises with the weight of s
    average = torch.einsum("bthv,bthv->bht", d_out, o)[..., None]  # the same for the answer given now
    d_scores = pattern * (agreement - average)
    dq = scale * torch.einsum("bhts,bshk->bthk", d_scores, k)
    dk = scale * torch.einsum("bhts,bthk->bshk", d_scores, q)
    dv = torch.einsum("bhts,bthv->bshv", pattern, d_out)
    return dq, dk, dv
