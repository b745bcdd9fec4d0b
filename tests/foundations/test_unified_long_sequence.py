"""Every mixer is its matrix times its values, and the matrices have the structure that the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from attnlab.data import IGNORE
from attnlab.foundations import unified_long_sequence as chapter
from attnlab.foundations import unified_long_sequence_runs as runs

CAUSAL = [name for name, kind in chapter.MIXERS.items() if kind.causal]


def tokens(length=21, width=6, batch=2):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in chapter.MIXERS if not name.startswith("token MLP")])
@pytest.mark.parametrize("length", [1, 2, 21])
def test_the_fast_form_is_the_matrix_times_the_values(name, length):
    mixer, x = chapter.build(name, 6, length).double(), tokens(length)
    torch.testing.assert_close(mixer(x), mixer.mix(x).output(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mixers_do_not_see_the_future(name):
    mixer, x = chapter.build(name, 6, 21).double(), tokens()
    changed = x.clone()
    changed[:, 13:] += 1
    torch.testing.assert_close(mixer(changed)[:, :13], mixer(x)[:, :13], rtol=0, atol=1e-12)
    assert not torch.allclose(mixer(changed)[:, 13:], mixer(x)[:, 13:])


def test_fourier_mixing_sees_everything():
    mixer, x = chapter.build("Fourier (FNet)", 6, 21).double(), tokens()
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(mixer(changed)[:, 0], mixer(x)[:, 0])
    matrix = mixer.mix(x).matrix[0]
    torch.testing.assert_close(matrix @ matrix.conj().T, 21 * torch.eye(21, dtype=matrix.dtype), rtol=0, atol=1e-9)


def test_the_table_says_what_the_matrices_are():
    table = pd.DataFrame([chapter.properties(name) for name in chapter.MIXERS]).set_index("mixer")
    assert table["M φ(X) − fast form"].dropna().max() < 1e-9
    assert table.index[table["M φ(X) − fast form"].isna()].tolist() == ["token MLP (MLP-Mixer)"]
    assert table.index[table["rank past to future"].isna()].tolist() == ["token MLP (MLP-Mixer)"]
    assert table.asks.tolist() == [kind.asks for kind in chapter.MIXERS.values()]
    assert table.causal.tolist() == [kind.causal for kind in chapter.MIXERS.values()]
    assert table["rows sum to 1"].tolist() == [True, True, True, False, False, False, False, False]
    assert set(table.index[table.Toeplitz]) == {"state space (LTI)", "convolution"}
    handed = table["rank past to future"]
    assert handed["softmax attention"] == 24  # every token of the past may be needed
    assert handed["linear attention"] <= 8  # D features
    assert handed["gated (selective SSM)"] <= 16  # N states
    assert handed["state space (LTI)"] <= 16


def test_a_short_kernel_makes_a_band():
    mixer = chapter.ConvolutionMixer(6, 21, reach=3).double()
    matrix = mixer.mix(tokens()).matrix[0]
    assert (matrix.tril(-3) == 0).all()
    torch.testing.assert_close(mixer(tokens()), mixer.mix(tokens()).output(), rtol=0, atol=1e-12)


def test_a_state_space_is_a_recurrence():
    mixer = chapter.build("state space (LTI)", 4, 15).double()
    x = tokens(15, 4)
    keep, v = (-mixer.rate.exp()).exp(), mixer.v(x)
    state, outputs = torch.zeros(2, 4, len(keep), dtype=torch.float64), []
    for t in range(15):
        state = state * keep + v[:, t, :, None]
        outputs.append(state @ mixer.read)
    torch.testing.assert_close(mixer(x), torch.stack(outputs, 1), rtol=0, atol=1e-12)


def test_influence_is_what_a_change_does():
    felt = chapter.influence("convolution", 9, width=4, length=12)
    assert felt.shape == (12,)
    assert (felt[10:] < 1e-12).all()
    mixer = chapter.build("convolution", 4, 12).double()
    wanted = mixer.kernel[:10].flip(0).abs() * mixer.v.weight.norm()
    torch.testing.assert_close(felt[:10], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chapter.build("wavelets", 4, 8), "name='wavelets' is unknown; use one of softmax attention"),
        (lambda: chapter.SoftmaxMixer(0, 8), "width=0 must be at least 1"),
        (lambda: chapter.ConvolutionMixer(4, 8, reach=9), "reach=9 must lie between 1 and length=8"),
        (
            lambda: chapter.TokenMLPMixer(6, 8)(torch.zeros(1, 9, 6)),
            "x: 9 tokens, but this mixer has weights for length=8",
        ),
    ],
)
def test_what_cannot_be_built_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- the experiment


@pytest.mark.parametrize("question", runs.QUESTIONS)
def test_both_questions_show_the_same_tokens_and_ask_at_the_end(question):
    setting = runs.Setting()
    batch = setting.draw(question, np.random.default_rng(3), 50)
    same = setting.draw("recall", np.random.default_rng(3), 50)
    assert (batch.tokens == same.tokens).all()
    assert (batch.targets[:, :-1] == IGNORE).all()
    for row, target in zip(batch.tokens, batch.targets[:, -1], strict=True):
        wanted = {int(value) for key, value in row[:-1] if key == row[-1, 0]} if question == "recall" else {row[0, 1]}
        assert wanted == {target}


@pytest.mark.parametrize("mixer", runs.TRAINED)
def test_a_few_updates_lower_the_loss_of_every_mixer(mixer):
    row = runs.Setting(pairs=3, keys=4, values=2, width=8, layers=1, steps=20, batch=8).train(mixer, "recall", 5)
    assert 0 <= row["accuracy"] <= 1
    assert row["seed"] == 5


def test_the_advantage_is_over_the_better_fixed_mixer():
    rows = [
        {"mixer": mixer, "question": "recall", "seed": seed, "accuracy": base + seed / 100}
        for seed in (0, 1)
        for mixer, base in zip(runs.TRAINED, (0.9, 0.5, 0.3, 0.2), strict=True)
    ]
    value, (low, high) = runs.advantage(pd.DataFrame(rows), "recall")
    assert (value, low, high) == pytest.approx((60, 60, 60))


def test_the_blind_answer_of_one_pair_is_always_right():
    assert runs.blind(runs.Setting(pairs=1), draws=10) == 1
    assert runs.blind(runs.Setting(pairs=2, values=2), draws=4000) == pytest.approx(0.75, abs=0.02)
