"""Generated series whose next value is to be told. Each function takes the generator it draws from."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Forecast(NamedTuple):
    """A batch of series: ``inputs`` [B, T, 1] and ``targets`` [B, T, 1], the value that follows each input."""

    inputs: NDArray[np.float64]
    targets: NDArray[np.float64]


def sinusoids(
    rng: np.random.Generator,
    batch: int,
    length: int,
    *,
    frequency: tuple[float, float] = (0.05, 0.2),
    amplitude: tuple[float, float] = (0.5, 1.5),
    noise: float = 0.2,
) -> Forecast:
    """Sinusoids of random frequency, phase and amplitude, each uniform, plus white noise: tell the next value.

    Nobody can do better than a mean squared error of ``noise ** 2``. Repeating the last value costs twice that and what
    a sinusoid moves in a step besides; predicting 0 costs half the mean squared amplitude and the noise.

    Args:
        rng: draws everything.
        batch: B, series.
        length: T, predictions a series.
        frequency: lowest and highest, in cycles a step, below 0.5.
        amplitude: lowest and highest.
        noise: standard deviation.

    Raises:
        ValueError: a size that is not positive, a range that is none, negative noise.
    """
    for name, size in {"batch": batch, "length": length}.items():
        if size <= 0:
            raise ValueError(f"{name}: a positive number is wanted, not {size}")
    if not 0 <= frequency[0] <= frequency[1] < 0.5:
        raise ValueError(f"frequency: (lowest, highest) from 0 to below 0.5 cycles a step is wanted, not {frequency}")
    if not 0 <= amplitude[0] <= amplitude[1] < math.inf:
        raise ValueError(f"amplitude: (lowest, highest), at least 0 and finite, is wanted, not {amplitude}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: a standard deviation of at least 0 is wanted, not {noise}")

    cycles = rng.uniform(*frequency, size=(batch, 1)) * np.arange(length + 1)  # [B, T + 1]
    turns = cycles + rng.uniform(size=(batch, 1))
    clean = rng.uniform(*amplitude, size=(batch, 1)) * np.sin(2 * math.pi * turns)
    series = (clean + noise * rng.standard_normal((batch, length + 1)))[..., None]  # [B, T + 1, 1]
    return Forecast(series[:, :-1], series[:, 1:])
