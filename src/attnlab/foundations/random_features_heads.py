"""Query-key products of a trained model, for the chapter ``foundations/random-features``: does their diagonal stand out?

The product ``W_Q W_Kᵀ`` [d, d] of a head says what a token x as a query gives a token y as a key, ``xᵀ W_Q W_Kᵀ y / sqrt(K)``, if
both stand at the same place: before rotary positions turn them. It has rank K and is never needed whole, except to be shuffled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnlab import claims, lab
from attnlab.foundations.attention_measures import habits, llama_layer, read, rotary_base
from attnlab.mixers import rotate

OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64)
SHUFFLES = 200


def diagonal_ratio(W_Q: Tensor, W_K: Tensor) -> Tensor:
    """Mean of the diagonal of ``W_Q W_Kᵀ`` over the standard deviation off it, without the product itself.

    Args:
        W_Q, W_K: [..., d, K]; a head's query projection and the key projection it uses.

    Returns:
        ratios [...]; a matrix of independent entries has 0, give or take ``d**-0.5``.

    Raises:
        ValueError: shapes that differ, or a single coordinate.
    """
    if W_Q.shape != W_K.shape or W_Q.shape[-2] < 2:
        raise ValueError(f"W_Q {tuple(W_Q.shape)} and W_K {tuple(W_K.shape)} must be the same [..., d, K] with d >= 2")
    total = (W_Q.sum(-2) * W_K.sum(-2)).sum(-1)
    squares = ((W_Q.mT @ W_Q) * (W_K.mT @ W_K)).sum((-2, -1))
    return _standing_out((W_Q * W_K).sum(-1), total, squares)


def shuffled_ratios(W_Q: Tensor, W_K: Tensor, shuffles: int, generator: torch.Generator) -> Tensor:
    """``diagonal_ratio`` after the input coordinates of the keys were shuffled, [shuffles]: the same numbers, no diagonal."""
    d = W_Q.shape[-2]
    product = W_Q @ W_K.mT  # [d, d]
    order = torch.stack([torch.randperm(d, generator=generator) for _ in range(shuffles)])
    return _standing_out(product[torch.arange(d), order], product.sum(), product.square().sum())


def _standing_out(diagonal: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Mean of a diagonal [..., d] over the standard deviation off it, from the sum and the sum of squares of the whole matrix."""
    d = diagonal.shape[-1]
    mean = (total - diagonal.sum(-1)) / (d * (d - 1))
    square = (squares - diagonal.square().sum(-1)) / (d * (d - 1))
    return diagonal.mean(-1) / (square - mean**2).sqrt()


def turned(W_K: Tensor, offset: int, base: float) -> Tensor:
    """Keys as a query ``offset`` tokens later sees them after rotary positions: [..., d, K]."""
    flat = W_K.reshape(-1, 1, 1, W_K.shape[-1])  # one "sequence" a row, so that all turn by the same angle
    return rotate(flat, offset=-offset, base=base).reshape(W_K.shape)


def heads_frame(model: Any, shuffles: int = SHUFFLES, seed: int = 0, gains: bool = False) -> pd.DataFrame:
    """One row for every query head of a Hugging Face Llama model.

    Columns: ``layer, head, name, ratio, limit`` (the 99th percentile of its shuffles), ``low limit`` (the first percentile),
    ``shuffled`` (one further shuffle), and ``at 0, at 1, ...``: the ratio for a key so many tokens back.

    Args:
        gains: multiply both projections by the gains of the norm in front, as the layer does.
    """
    generator = torch.Generator().manual_seed(seed)
    base = rotary_base(model)
    rows = []
    for layer in lab.progress(range(model.config.num_hidden_layers), "layers"):
        weights = llama_layer(model, layer)
        gain = model.model.layers[layer].input_layernorm.weight.detach()[:, None] if gains else 1.0
        share = len(weights.W_Q) // len(weights.W_K)
        for head, W_Q in enumerate(weights.W_Q * gain):
            W_K = weights.W_K[head // share] * gain
            null = shuffled_ratios(W_Q, W_K, shuffles + 1, generator)
            row = {"layer": layer, "head": head, "name": f"{layer}.{head}", "ratio": float(diagonal_ratio(W_Q, W_K))}
            low, high = np.quantile(null[:-1].numpy(), [0.01, 0.99])
            row |= {"low limit": float(low), "limit": float(high), "shuffled": float(null[-1])}
            rows.append(row | {f"at {t}": float(diagonal_ratio(W_Q, turned(W_K, t, base))) for t in OFFSETS})
    return pd.DataFrame(rows)


def verdict(heads: pd.DataFrame) -> dict[str, Any]:
    """Arguments of ``claims.check`` for the claim on real heads: the share above the limit, with an interval over layers."""

    def share(column: str) -> tuple[float, tuple[float, float]]:
        by_layer = (heads[column] > heads["limit"]).groupby(heads.layer).mean().to_numpy()
        return float(by_layer.mean()), claims.bootstrap_mean(by_layer)

    value, interval = share("ratio")
    return {"value": value, "interval": interval, "controls": {"shuffled": share("shuffled")}}


def with_habits(heads: pd.DataFrame, model: Any, tokenizer: Any, text: str) -> pd.DataFrame:
    """The rows of ``heads_frame`` with what each head does on a text: columns of ``habits``, each a share of its weight."""
    reading = read(model, tokenizer, text)
    shares = habits(torch.stack([pattern[0] for pattern in reading.patterns]), reading.words)
    return heads.merge(shares.rename(columns={"head": "name"}), on="name")


def rank_correlation(x: pd.Series, y: pd.Series) -> float:
    """Spearman's: 1 if both order the heads alike, 0 if one says nothing about the other."""
    return float(x.corr(y, method="spearman"))
