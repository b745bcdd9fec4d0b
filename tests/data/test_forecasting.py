import numpy as np
import pytest

from attnlab import data


def draw(seed=0, batch=40, length=37, **options):
    return data.sinusoids(np.random.default_rng(seed), batch, length, **options)


def test_targets_are_the_inputs_one_step_later():
    inputs, targets = draw()
    assert inputs.shape == targets.shape == (40, 37, 1)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_without_noise_every_row_is_a_sinusoid():
    """x[t+1] + x[t-1] = 2 cos(2 pi f) x[t] for one f in each row."""
    inputs, targets = draw(noise=0.0, length=63)
    series = np.concatenate([inputs, targets[:, -1:]], axis=1)[..., 0]
    around, middle = series[:, 2:] + series[:, :-2], series[:, 1:-1]
    factor = (around * middle).sum(1) / (middle**2).sum(1)
    assert np.abs(around - factor[:, None] * middle).max() < 1e-12
    frequencies = np.arccos(factor / 2) / (2 * np.pi)
    assert 0.05 <= frequencies.min() < 0.07 < 0.18 < frequencies.max() <= 0.2
    assert np.abs(series).max() <= 1.5


def test_the_spread_is_that_of_amplitude_and_noise():
    """Mean square A^2 / 2 + noise^2; four standard errors over 4000 series."""
    inputs, _ = draw(batch=4000, amplitude=(2.0, 2.0), noise=0.5)
    means = (inputs**2).mean((1, 2))
    assert abs(means.mean() - (2.0 + 0.25)) < 4 * means.std() / 4000**0.5


def test_the_generator_decides():
    assert np.array_equal(draw(3).inputs, draw(3).inputs)
    assert not np.array_equal(draw(3).inputs, draw(4).inputs)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch": 0}, "batch: a positive number is wanted, not 0"),
        ({"length": -1}, "length: a positive number is wanted, not -1"),
        ({"frequency": (0.3, 0.1)}, r"frequency: \(lowest, highest\) .* not \(0.3, 0.1\)"),
        ({"frequency": (0.1, 0.5)}, "frequency: .* below 0.5"),
        ({"amplitude": (-1.0, 1.0)}, "amplitude: .* at least 0"),
        ({"noise": -0.1}, "noise: a standard deviation of at least 0 is wanted, not -0.1"),
        ({"noise": float("nan")}, "noise: .* not nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw(**change)
