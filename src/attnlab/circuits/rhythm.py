"""Two numbers a token from attention maps: how far local heads look back (WAAD), how much later tokens look at it (FAI).

Maps are ``[..., N, N]``, lower triangular, rows sum to 1; row ``t`` is the query at position ``t``. The first ``start`` positions
are the prompt; a response is ``start .. N - 1``. Positions count from 0.
Source: Li et al. 2025, equations 7 and 8, definitions 4.1 and 4.2.

The second half compares the peaks of two such series with what chance would do. Free shuffling breaks the autocorrelation and
makes neighbouring peaks look like a discovery; a circular shift keeps each series as smooth as it is and breaks only their
alignment. Series there are plain arrays, one a response; NaN (no FAI) is no peak and drops out of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

WINDOW, HORIZON = 10, (10, 50)
Groups = tuple[list[tuple[int, int]], list[tuple[int, int]]]  # (layer, head) of the local and of the global heads


def head_spans(maps: Tensor, start: int = 0) -> Tensor:
    """Mean distance that each head looks back from the response, equation 7: ``[..., N, N]`` to ``[...]``."""
    check_maps(maps, start)
    return (maps * distances(maps)).sum(-1)[..., start:].mean(-1)


def group_heads(spans: Tensor, share: float = 0.3) -> Groups:
    """The ``floor(share * L * H)`` heads with the shortest and with the longest spans ``[L, H]``; ties go to the earlier head.

    Raises:
        ValueError: a share that leaves a group empty or makes the two overlap, spans that are no finite table.
    """
    if spans.ndim != 2 or not bool(torch.isfinite(spans).all()):
        raise ValueError(f"spans must be a finite table [layers, heads], got shape {tuple(spans.shape)}")
    size = int(share * spans.numel() + 1e-9)
    if not 1 <= size <= spans.numel() // 2:
        raise ValueError(
            f"share={share} of {spans.numel()} heads is {size} a group; 1 to {spans.numel() // 2} would do"
        )
    order = spans.flatten().argsort(stable=True).tolist()
    local, far = ([divmod(i, spans.shape[1]) for i in sorted(part)] for part in (order[:size], order[-size:]))
    return local, far


def without_columns(maps: Tensor, columns: int | Sequence[int]) -> Tensor:
    """Maps in which nobody attends to some columns (an ``int``: the first so many); the rest of each row is scaled to 1.

    A row that loses everything (the removed tokens' own rows) becomes attention to itself. This takes the attention sink and
    the header of a chat template out of spans, WAAD and FAI.
    """
    check_maps(maps, 0)
    gone = list(range(columns)) if isinstance(columns, int) else list(columns)
    if gone and not 0 <= min(gone) <= max(gone) < maps.shape[-1] - 1:
        raise ValueError(f"columns={gone} must lie from 0 to {maps.shape[-1] - 2}: the last token must keep something")
    kept = maps.clone()
    kept[..., gone] = 0
    mass = kept.sum(-1, keepdim=True)
    own = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    return torch.where(mass > 0, kept / mass.clamp_min(torch.finfo(maps.dtype).tiny), own)


def waad(local: Tensor, window: int = WINDOW) -> Tensor:
    """How far local heads look back, definition 4.1: sum of ``A[t, s] * min(t - s, window)``, ``[..., N, N]`` to ``[..., N]``."""
    check_maps(local, 0)
    check_window(window)
    return (local * distances(local).clamp(max=window)).sum(-1)


def waad_banded(local: Tensor, window: int = WINDOW) -> Tensor:
    """The same from the last ``window`` diagonals: ``window - sum_j (window - j) A[t, t - j]``, since a row sums to 1."""
    check_maps(local, 0)
    check_window(window)
    result = torch.full_like(local[..., 0], window)
    for j in range(min(window, local.shape[-1])):
        result[..., j:] -= (window - j) * local.diagonal(-j, -2, -1)
    return result


def fai(far: Tensor, start: int = 0, horizon: tuple[int, int | None] = HORIZON) -> Tensor:
    """How much later tokens of the response look at a token, definition 4.2: ``[..., N, N]`` to ``[..., N]``.

    The mean of column ``s`` over rows ``t`` of the response with ``s + low <= t <= s + high``; ``high`` None runs to the end.
    A token with no such row has no FAI: NaN, to be left out and not to be taken for 0.
    """
    check_maps(far, start)
    check_horizon(horizon, far.shape[-1] - start)
    low, high = horizon
    index = torch.arange(far.shape[-1], device=far.device)
    ahead = index[:, None] - index  # row t, column s: negative above the diagonal, which no horizon takes in
    read = (ahead >= low) & (index[:, None] >= start)
    if high is not None:
        read &= ahead <= high
    return (far * read).sum(-2) / read.sum(-2)  # 0 / 0 is NaN


def fai_banded(far: Tensor, start: int = 0, horizon: tuple[int, int | None] = HORIZON) -> Tensor:
    """The same from the diagonals ``low .. high`` alone."""
    check_maps(far, start)
    check_horizon(horizon, far.shape[-1] - start)
    n = far.shape[-1]
    total, count = torch.zeros_like(far[..., 0, :]), torch.zeros_like(far[..., 0, :])
    for j in range(horizon[0], min(n - 1, n if horizon[1] is None else horizon[1]) + 1):
        first = max(0, start - j)  # column s is read from row s + j, which must lie in the response
        total[..., first : n - j] += far.diagonal(-j, -2, -1)[..., first:]
        count[..., first : n - j] += 1
    return total / count


def token_entropy(logits: Tensor, align: Literal["input", "prediction"] = "input") -> Tensor:
    """Entropy in nats of the model's next-token distribution, ``[..., N, V]`` to ``[..., N]``.

    Row ``t`` reads token ``t`` and predicts token ``t + 1``. With ``align="input"`` position ``t`` gets the entropy of the
    distribution that token ``t`` was drawn from (row ``t - 1``; position 0 is NaN), with ``"prediction"`` that of row ``t``.
    """
    if align not in ("input", "prediction"):
        raise ValueError(
            f"align={align!r} is unknown; use 'input' (token t's own distribution) or 'prediction' (the next's)"
        )
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).nan_to_num(0.0).sum(-1)
    if align == "prediction":
        return entropy
    return torch.cat([torch.full_like(entropy[..., :1], torch.nan), entropy[..., :-1]], -1)


def uniform_maps(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Attention that is uniform over the past, ``[n, n]``: what position alone gives."""
    return torch.ones(n, n, dtype=dtype).tril() / torch.arange(1, n + 1, dtype=dtype)[:, None]


def distances(maps: Tensor) -> Tensor:
    """``t - s`` for row ``t`` and column ``s``, ``[N, N]``; 0 above the diagonal."""
    index = torch.arange(maps.shape[-1], device=maps.device)
    return (index[:, None] - index).clamp(min=0)


def check_maps(maps: Tensor | None, start: int) -> None:
    """Refuse what is no attention map, with the remedy.

    Raises:
        ValueError: None (a fused kernel forms no map), not square, not causal, rows that do not sum to 1, an empty response.
    """
    if maps is None:
        raise ValueError("maps is None: fused attention forms no map; load the model with attn_implementation='eager'")
    if maps.ndim < 2 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"maps must be [..., N, N], got shape {tuple(maps.shape)}")
    if not 0 <= start < maps.shape[-1]:
        raise ValueError(
            f"start={start} leaves no response in {maps.shape[-1]} tokens; 0 to {maps.shape[-1] - 1} would do"
        )
    if float(maps.triu(1).abs().amax()) > 0:
        raise ValueError("maps: a token attends to a later one; give the maps of a causal model, after the mask")
    if not bool(((maps.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError("maps: rows must sum to 1; renormalise what was masked, and leave padding out")


def check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 token")


def check_horizon(horizon: tuple[int, int | None], length: int) -> None:
    low, high = horizon
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"horizon={horizon} must be (low, high) with 0 <= low <= high, or high None for the end")
    if length < low + 2:
        raise ValueError(
            f"horizon={horizon}: a response of {length} tokens is too short, at least {low + 2} are needed"
        )


# ---------------------------------------------------------------------------------------------------- peaks and chance


def peaks(series: np.ndarray, quantile: float = 0.8) -> np.ndarray:
    """Local maxima ``[N]`` (bool) above a quantile of the series; of a plateau its first token; ends count; NaN never.

    Raises:
        ValueError: fewer than three finite values, or a quantile outside ``[0, 1)``.
    """
    x = np.asarray(series, dtype=float)
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile={quantile} must lie in [0, 1)")
    if x.ndim != 1 or np.isfinite(x).sum() < 3:
        raise ValueError(f"series of shape {x.shape} has too few finite values for peaks; at least 3 are needed")
    heights = np.where(np.isfinite(x), x, -np.inf)
    starts = np.flatnonzero(np.concatenate([[True], heights[1:] != heights[:-1]]))  # the first token of every plateau
    levels = np.concatenate([[-np.inf], heights[starts], [-np.inf]])
    found = np.zeros(len(x), dtype=bool)
    found[starts] = (levels[1:-1] > levels[:-2]) & (levels[1:-1] > levels[2:])
    return found & (heights > np.nanquantile(x, quantile))


def lift(marked: np.ndarray, series: np.ndarray) -> float:
    """Mean of a series at marked tokens minus its mean over all; NaN where nothing finite is marked."""
    x, at = np.asarray(series, dtype=float), np.asarray(marked, dtype=bool)
    some = x[at & np.isfinite(x)]
    return float(some.mean() - np.nanmean(x)) if some.size else float("nan")


def follows(first: np.ndarray, second: np.ndarray, within: int = 2) -> float:
    """Share of the tokens marked in ``first`` with one marked in ``second`` at 0 to ``within`` tokens after; NaN if none is."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if within < 0:
        raise ValueError(f"within={within} must be 0 tokens or more")
    near = b.copy()
    for j in range(1, within + 1):
        near[:-j] |= b[j:]
    return float(near[a].mean()) if a.any() else float("nan")


@dataclass(frozen=True)
class ShiftTest:
    """A statistic of pairs of series, and the same after circular shifts.

    Attributes:
        each: the statistic of every response, ``[R]``.
        null: means over the responses under random shifts, ``[draws]``.
    """

    each: np.ndarray
    null: np.ndarray

    @property
    def value(self) -> float:
        """Mean over the responses."""
        return float(np.nanmean(self.each))

    @property
    def p(self) -> float:
        """One-sided: how often a shift does as well; the observed value counts as one of the shifts."""
        return float((1 + (self.null >= self.value).sum()) / (1 + len(self.null)))

    def band(self, level: float = 0.98) -> tuple[float, tuple[float, float]]:
        """Mean of the null and its central interval."""
        low, high = np.quantile(self.null, [(1 - level) / 2, (1 + level) / 2])
        return float(self.null.mean()), (float(low), float(high))


def shift_test(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[np.ndarray, np.ndarray], float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> ShiftTest:
    """The statistic of (fixed, shifted) series, one pair a response, against independent random circular shifts of the second.

    Every shift of every response (1 to N - 1) is computed once; a draw takes one of them a response and averages.

    Raises:
        ValueError: no pair, or two series of different lengths.
    """
    if not pairs:
        raise ValueError("pairs is empty; give one pair of series a response")
    for i, (a, b) in enumerate(pairs):
        if len(a) != len(b) or len(a) < 3:
            raise ValueError(
                f"pairs[{i}]: series of {len(a)} and {len(b)} tokens; equal lengths of at least 3 are needed"
            )
    each = np.array([statistic(a, b) for a, b in pairs])
    table = [np.array([statistic(a, np.roll(b, j)) for j in range(1, len(b))]) for a, b in pairs]
    rng = np.random.default_rng(seed)
    drawn = np.stack([shifts[rng.integers(len(shifts), size=draws)] for shifts in table])
    return ShiftTest(each, np.nanmean(drawn, axis=0))


def shuffle_test(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[np.ndarray, np.ndarray], float],
    *,
    draws: int = 500,
    seed: int = 0,
) -> ShiftTest:
    """The same against free shuffling of the second series, as in the paper: its null is too narrow where both series are smooth."""
    rng = np.random.default_rng(seed)
    null = [np.nanmean([statistic(a, rng.permutation(b)) for a, b in pairs]) for _ in range(draws)]
    return ShiftTest(np.array([statistic(a, b) for a, b in pairs]), np.array(null))
