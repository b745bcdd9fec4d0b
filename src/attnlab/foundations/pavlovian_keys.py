"""Are the keys of a trained head like random directions? A look at SmolLM2 for the chapter ``foundations/pavlovian``.

The heads are softmax heads and were never trained as linear stores: what is measured is how much cross-talk their keys and values
would bring to one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from attnlab.foundations.pavlovian_capacity import noise_power, sphere

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def keys_and_values(bridge: TransformerBridge, text: str, tokens: int = 128) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of every key head on the first tokens of a text, without the very first: two [heads, tokens, K].

    The first token is left out since many heads rest on it and give it a key of its own kind.

    Raises:
        ValueError: a text with too few tokens.
    """
    ids = bridge.to_tokens(text)[:, : tokens + 1]
    if ids.shape[1] <= tokens:
        raise ValueError(f"text: {ids.shape[1]} tokens, but {tokens + 1} are wanted; give a longer one")
    names = [
        [f"blocks.{layer}.attn.{hook}" for layer in range(bridge.cfg.n_layers)] for hook in ("hook_rot_k", "hook_v")
    ]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in {*names[0], *names[1]})
    k, v = (torch.cat([cache[name][0].transpose(0, 1) for name in hooks])[:, 1:].float() for hooks in names)
    return k, v


def geometry(k: Tensor, v: Tensor, centre: bool = False) -> pd.DataFrame:
    """How alike the keys [heads, n, K] of each head are, and the cross-talk of a Hebbian store of its unit keys and values.

    Columns, one row a head: ``cosine`` (mean over pairs), ``dimension`` (1 over the mean squared cosine: K for random directions),
    ``noise`` (median noise power over the pairs), ``from K`` and ``from cosines`` (what ``(n - 1) / K`` and ``(n - 1)`` times the
    mean squared cosine predict).

    Args:
        centre: subtract the mean over the tokens from keys and from values first.
    """
    k, v = ((x - x.mean(-2, keepdim=True) if centre else x) for x in (k, v))
    k, v = (x / x.norm(dim=-1, keepdim=True) for x in (k, v))
    n, width = k.shape[-2:]
    pairs = n * (n - 1)
    cosine = k @ k.mT - torch.eye(n)
    squared = cosine.square().sum((-2, -1)) / pairs
    return pd.DataFrame(
        {
            "cosine": (cosine.sum((-2, -1)) / pairs).tolist(),
            "dimension": (1 / squared).tolist(),
            "noise": noise_power(k, v).median(-1).values.tolist(),
            "from K": (n - 1) / width,
            "from cosines": ((n - 1) * squared).tolist(),
        }
    )


def comparison(k: Tensor, v: Tensor, seed: int = 0) -> pd.DataFrame:
    """Median over heads of :func:`geometry`: as they are, centred, and random directions of the same size."""
    random = torch.Generator().manual_seed(seed)
    tables = {
        "SmolLM2": geometry(k, v),
        "SmolLM2, centred": geometry(k, v, centre=True),
        "random directions": geometry(sphere(random, *k.shape), sphere(random, *v.shape)),
    }
    return pd.DataFrame({name: table.median() for name, table in tables.items()}).T.rename_axis("keys").reset_index()
