"""Fixed decays of the papers: one log decay a head, at most 0."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from attnlab.mixers import checks

Schedule = Literal["paper", "fla", "alibi"]


def retnet_log_decay(heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet: head h = 0, 1, ... keeps ``1 - 2^(-5 - h)`` of its state a token (Sun et al. 2023, arXiv:2307.08621).

    Returns:
        Log decays [H].

    Raises:
        ValueError: no heads.
    """
    checks.at_least("heads", heads)
    return torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)], dtype=dtype)


def lightning_log_decay(
    heads: int, layer: int, layers: int, *, schedule: Schedule = "paper", dtype: torch.dtype = torch.float32
) -> Tensor:
    """TransNormerLLM: heads that remember for different times, longer in later layers (Qin et al. 2024, arXiv:2405.17381).

    Three schedules go by this name, and they are not one family:

    - ``"paper"``: ``-(8 h / H) (1 - l / L)`` with h = 1..H (eq. 10; the text does not say whether heads count from 0 or 1);
    - ``"fla"``: the same with h = 0..H-1, as flash-linear-attention has it, so head 0 forgets nothing;
    - ``"alibi"``: ``-2^(-8 h / H) (1 - l / (L - 1) + 1e-5)`` with h = 1..H, as in the code released with Lightning Attention:
      geometric in the head. Where H is no power of two, the slopes in between come from the next power, as in ALiBi.

    Args:
        heads: H.
        layer: l, from 0 to L - 1.
        layers: L; ``"alibi"`` needs at least 2.

    Returns:
        Log decays [H].

    Raises:
        ValueError: no heads or layers, a layer out of range, an unknown schedule, ``"alibi"`` with a single layer.
    """
    checks.at_least("heads", heads)
    checks.at_least("layers", layers)
    checks.one_of("schedule", schedule, ("paper", "fla", "alibi"))
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} must lie between 0 and layers - 1 = {layers - 1}")
    if schedule == "alibi":
        if layers == 1:
            raise ValueError("layers=1 divides by zero in the schedule 'alibi'; take 'paper' or 'fla'")
        slopes, depth = _alibi_slopes(heads), 1 - layer / (layers - 1) + 1e-5
    else:
        first = 1 if schedule == "paper" else 0
        slopes, depth = [8 * h / heads for h in range(first, first + heads)], 1 - layer / layers
    return torch.tensor([-slope * depth for slope in slopes], dtype=dtype)


def _alibi_slopes(heads: int) -> list[float]:
    """``2^(-8 h / H)`` for h = 1..H; the slopes that a power of two lacks are every second one of its double."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]
