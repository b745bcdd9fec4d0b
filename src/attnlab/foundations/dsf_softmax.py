"""How large the state of softmax attention must be: orders of the cut exponential, for random logits and for those of a real model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnlab.foundations.dsf_builders import feature_count

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.01
HIGHEST = 80  # orders beyond this are not tried


def needed_order(scores: Tensor, values: Tensor | None = None, *, tolerance: float = TOLERANCE) -> Tensor:
    """Smallest even order P at which attention with ``sum_{p <= P} s^p / p!`` for ``e^s`` is within ``tolerance``.

    Even orders only: an odd one can make weights, and the normaliser, negative.

    Args:
        scores: logits [..., T, T], of which the lower triangle counts, float64.
        values: [..., T, V]: outputs are compared, relative to the largest; none: the weights themselves, absolutely.

    Returns:
        orders [...]; :data:`HIGHEST` + 2 where none suffices.

    Raises:
        ValueError: scores that are not float64, whose sums of large terms with both signs would drown; visible scores or
            values that are not finite.
    """
    if scores.dtype != torch.float64:
        raise ValueError(f"scores: dtype {scores.dtype}, but large terms cancel here; cast to float64")
    above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(above, 0)  # whatever stood there, -inf too
    for name, x in (("scores", scores), ("values", values)):
        if x is not None and not x.isfinite().all():  # no order would ever suffice
            raise ValueError(f"{name}: NaN or infinite numbers where a query may read; leave such sequences out")
    exact = scores.masked_fill(above, -torch.inf).softmax(-1)
    term = torch.ones_like(scores).masked_fill(above, 0)
    total, found = term.clone(), torch.full(scores.shape[:-2], HIGHEST + 2)
    for order in range(HIGHEST + 1):
        if order:
            term = term * scores / order
            total = total + term
        if order % 2 == 0:
            close = _error(total / total.sum(-1, keepdim=True), exact, values) < tolerance
            found = torch.where(close & (found > HIGHEST), order, found)
            if bool((found <= HIGHEST).all()):
                break
    return found


def random_problem(size: float, seed: int, *, length: int = 24, width: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k [1, T, 1, K], scaled so that the largest visible logit has this size, and values [1, T, 1, 3], float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, length, 1, width, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, length, 1, 3, generator=generator, dtype=torch.float64)
    largest = logits(q, k).tril().abs().max()
    return q * size / largest, k, v


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores [B, H, T, T]."""
    return torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5


def order_frame(sizes: Sequence[float], seeds: Sequence[int], width: int = 2) -> pd.DataFrame:
    """One row a size of the logits and seed: ``size, seed, order, features``."""
    import pandas as pd

    rows = []
    for size in sizes:
        for seed in seeds:
            q, k, v = random_problem(size, seed, width=width)
            order = int(needed_order(logits(q, k), v.transpose(1, 2)))
            rows.append({"size": size, "seed": seed, "order": order, "features": feature_count(width, order)})
    return pd.DataFrame(rows)


def model_orders(bridge: Any, text: str) -> pd.DataFrame:
    """Every head of a real model on a text: ``layer, head, size, order, log10 features``.

    Softmax does not notice a number that is added to a row of logits, so each row is shifted to where the cut does best, with its
    largest and smallest logit equally far from 0; ``size`` is that distance, the largest of all rows. This needs the pattern alone.
    """
    import pandas as pd

    tokens = bridge.to_tokens(text)
    _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    patterns = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(bridge.cfg.n_layers)])
    scores = centred(patterns.double())  # [L, H, T, T]
    orders = needed_order(scores)
    sizes = scores.abs().amax((-1, -2))
    d_head = bridge.cfg.d_head
    return pd.DataFrame(
        [
            {
                "layer": layer,
                "head": head,
                "size": float(sizes[layer, head]),
                "order": int(orders[layer, head]),
                "log10 features": math.log10(feature_count(d_head, int(orders[layer, head]))),
            }
            for layer in range(orders.shape[0])
            for head in range(orders.shape[1])
        ]
    )


def centred(pattern: Tensor) -> Tensor:
    """Logits [..., T, T] that give this causal pattern, each row shifted so that its extremes are equally far from 0."""
    above = torch.ones(pattern.shape[-2:], dtype=torch.bool).triu(1)
    scores = pattern.clamp_min(torch.finfo(torch.float32).tiny).log()
    highest = scores.masked_fill(above, -torch.inf).amax(-1, keepdim=True)
    lowest = scores.masked_fill(above, torch.inf).amin(-1, keepdim=True)
    return (scores - (highest + lowest) / 2).masked_fill(above, 0)


def _error(found: Tensor, exact: Tensor, values: Tensor | None) -> Tensor:
    if values is None:
        return (found - exact).abs().amax((-1, -2))
    wanted = exact @ values
    return (found @ values - wanted).abs().amax((-1, -2)) / wanted.abs().amax((-1, -2))
