"""The shell of language models: causality, sizes by formula, ALiBi and rotary against explicit sums, losses."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab import data
from attnlab.models.language import (
    MLP,
    SGLU,
    Decoder,
    SequenceModel,
    SoftmaxAttention,
    SwiGLU,
    distance_bias,
    rotary,
)
from attnlab.models.losses import target_accuracy, target_loss
from attnlab.models.sweep import count_parameters
from attnlab.models.training import TrainConfig, fit, held_out, seeded

SLOPES = [0.5, 0.25, 0.0]
KINDS = {
    "plain": {},
    "alibi": {"slopes": SLOPES},
    "rotary": {"rotary": True},
    "both": {"slopes": SLOPES, "rotary": True, "scale": 0.7},
}


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def attention(seed=0, **options):
    return seeded(lambda: SoftmaxAttention(12, 3, **options).double(), seed)


def decoder(seed=0, **options):
    options = {"make_mixer": lambda layer: SoftmaxAttention(12, 3), "max_length": 40} | options
    return seeded(lambda: Decoder(17, 12, 2, **options).double(), seed)


def by_hand(layer, x, *, slopes=None, turn=False, causal=True, scale=None):
    """The layer as loops over heads with an explicit bias."""
    _, length, width = x.shape
    d = width // 3
    q, k, v = (x @ piece.T for piece in layer.qkv.weight.split(width))
    if turn:
        q, k = (rotary(part.unflatten(-1, (3, d))).flatten(2) for part in (q, k))
    outputs = []
    for head in range(3):
        here = slice(head * d, (head + 1) * d)
        scores = q[..., here] @ k[..., here].mT * (d**-0.5 if scale is None else scale)
        for t in range(length):
            for s in range(length):
                if slopes is not None:
                    scores[:, t, s] -= slopes[head] * abs(t - s)
                if causal and s > t:
                    scores[:, t, s] = -math.inf
        outputs.append(scores.softmax(-1) @ v[..., here])
    return torch.cat(outputs, -1) @ layer.out.weight.T


class TestAttention:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("causal", [True, False])
    def test_it_equals_the_loops(self, kind, causal):
        options = KINDS[kind]
        layer, x = attention(causal=causal, **options), random(2, 13, 12)
        expected = by_hand(
            layer,
            x,
            slopes=options.get("slopes"),
            turn=options.get("rotary", False),
            causal=causal,
            scale=options.get("scale"),
        )
        assert (layer(x) - expected).abs().max() < 1e-12

    def test_slopes_of_zero_are_no_slopes(self):
        x = random(2, 37, 12)
        assert (attention(slopes=torch.zeros(3))(x) - attention()(x)).abs().max() < 1e-12

    def test_the_bias_of_slopes_is_the_decay_of_a_linear_mixer(self):
        """exp(bias) is gamma^(t - s) with log gamma = -slope, and 0 for what comes later."""
        decay = torch.tensor(SLOPES, dtype=torch.float64).neg().exp()
        bias = distance_bias(torch.tensor(SLOPES, dtype=torch.float64), 9)
        t = torch.arange(9)
        expected = (decay[:, None, None] ** (t[:, None] - t).clamp(min=0)).tril()
        assert (bias.exp() - expected).abs().max() < 1e-15

    def test_slopes_move_with_the_model_and_are_not_saved(self):
        layer = attention(slopes=SLOPES)
        assert layer.slopes.dtype == torch.float64
        assert set(layer.state_dict()) == {"qkv.weight", "out.weight"}

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"heads": 5}, "heads: 5 do not divide width=12"),
            ({"heads": 0}, "heads: a positive number is wanted, not 0"),
            ({"heads": 4, "rotary": True}, "rotary: it turns pairs of channels, and a head has 3"),
            ({"heads": 3, "slopes": [0.1, 0.2]}, "slopes: 3 finite numbers"),
            ({"heads": 2, "slopes": [0.1, -0.2]}, "slopes: 2 finite numbers of at least 0"),
            ({"heads": 1, "slopes": [math.nan]}, "slopes: 1 finite numbers"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(self, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            SoftmaxAttention(12, **change)


class TestRotary:
    def test_products_depend_on_the_distance_alone(self):
        q, k = (random(1, 1, 1, 20, seed=seed).expand(1, 63, 1, 20) for seed in (0, 1))
        scores = rotary(q)[0, :, 0] @ rotary(k)[0, :, 0].T  # [T, T], of one query and one key at every place
        for distance in range(-62, 63):
            diagonal = scores.diagonal(distance)
            assert (diagonal - diagonal[0]).abs().max() < 1e-12
        assert scores[0].std() > 0.1

    def test_it_turns_without_stretching_and_leaves_the_first_token(self):
        x = random(2, 37, 3, 12)
        turned = rotary(x)
        assert (turned.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-12
        assert torch.equal(turned[:, 0], x[:, 0])

    def test_the_angles_are_those_of_the_formula(self):
        x = random(1, 5, 1, 6)
        pair = torch.complex(x[..., :3], x[..., 3:])
        for i in range(3):
            for t in range(5):
                expected = pair[0, t, 0, i] * np.exp(1j * t * 100.0 ** (-2 * i / 6))
                found = rotary(x, base=100.0)[0, t, 0]
                assert abs(torch.complex(found[i], found[i + 3]) - expected) < 1e-12

    def test_low_precision_still_tells_neighbours_apart(self):
        """In bfloat16 the positions 1000 and 1001 are one number; the angles must not be computed in it."""
        ones = torch.ones(1, 1002, 1, 2, dtype=torch.bfloat16)
        turned = rotary(ones)[0, 1000:, 0].float()
        assert (turned[0] - turned[1]).abs().max() > 0.1


class TestDecoder:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("positions", ["learned", None])
    def test_the_future_changes_no_bit_of_the_past(self, kind, positions):
        model = decoder(make_mixer=lambda layer: SoftmaxAttention(12, 3, **KINDS[kind]), positions=positions)
        tokens = torch.from_numpy(np.random.default_rng(0).integers(17, size=(3, 37)))
        before = model(tokens)
        for place in (1, 20, 36):
            changed = tokens.clone()
            changed[:, place:] = (changed[:, place:] + 5) % 17
            after = model(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place:], before[:, place:])

    @pytest.mark.parametrize("positions", ["learned", None])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize(("mlp", "matrices"), [(MLP, 2), (SGLU, 3), (SwiGLU, 3)])
    def test_parameters_by_formula(self, positions, tied, mlp, matrices):
        vocab, width, layers, hidden, longest = 17, 12, 3, 20, 40
        model = Decoder(
            vocab,
            width,
            layers,
            lambda layer: SoftmaxAttention(width, 3),
            make_mlp=lambda layer: mlp(width, hidden),
            positions=positions,
            max_length=longest,
            tied=tied,
        )
        layer = 4 * width**2 + matrices * width * hidden + 2 * width
        ends = vocab * width * (1 if tied else 2) + (longest * width if positions else 0) + width
        assert count_parameters(model) == layers * layer + ends

    def test_the_published_sizes_of_a_small_transformer(self):
        """Two layers, D = 64, 103 characters, context 128, MLP 3.5 D, norms without gain."""
        model = Decoder(
            103,
            64,
            2,
            lambda layer: SoftmaxAttention(64, 4),
            make_mlp=lambda layer: MLP(64, 224),
            norm=partial(nn.RMSNorm, elementwise_affine=False),
            max_length=128,
        )
        assert count_parameters(model) == 2 * (4 * 64**2 + 2 * 64 * 224) + 2 * 103 * 64 + 128 * 64

    def test_it_is_the_sum_of_its_parts(self):
        model = decoder()
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        x = model.embedding.weight[tokens] + model.trunk.positions.weight[:5]
        for block in model.trunk.blocks:
            x = x + block.mixer(F.rms_norm(x, (12,), block.mixer_norm.weight))
            x = x + block.mlp(F.rms_norm(x, (12,), block.mlp_norm.weight))
        expected = F.rms_norm(x, (12,), model.trunk.norm.weight) @ model.head.weight.T
        assert (model(tokens) - expected).abs().max() < 1e-12

    def test_the_mixer_learns_its_layer(self):
        seen = []
        decoder(
            make_mixer=lambda layer: seen.append(("mixer", layer)) or nn.Identity(),
            make_mlp=lambda layer: seen.append(("mlp", layer)) or nn.Identity(),
        )
        assert seen == [("mixer", 0), ("mlp", 0), ("mixer", 1), ("mlp", 1)]

    def test_without_positions_order_is_up_to_the_mixer(self):
        """The mean of a prefix knows no order, so neither does the last token of a single layer."""

        class Mean(nn.Module):
            def forward(self, x):
                return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

        tokens, shuffled = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[3, 1, 4, 2, 5]])
        for positions, same in ((None, True), ("learned", False)):
            model = seeded(lambda p=positions: Decoder(9, 8, 1, lambda layer: Mean(), positions=p).double(), 0)
            assert torch.allclose(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-12) is same

    def test_tokens_at_one_place_add(self):
        model = decoder(positions=None)
        pairs = torch.tensor([[[3, 4], [5, 6]]])
        expected = model.head(model.trunk(model.embedding(pairs[..., 0]) + model.embedding(pairs[..., 1])))
        assert torch.equal(model(pairs), expected)

    @pytest.mark.parametrize("std", [None, 0.05])
    @pytest.mark.parametrize("tied", [False, True])
    def test_weights_are_drawn_as_said(self, std, tied):
        model = seeded(lambda: Decoder(300, 200, 2, lambda layer: nn.Identity(), tied=tied, init_std=std), 0)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                linear = isinstance(module, nn.Linear) or (tied and module is model.embedding)
                expected = std or (module.weight.shape[1] ** -0.5 if linear else 1.0)
                assert module.weight.std().item() == pytest.approx(expected, rel=0.02)
                assert abs(module.weight.mean().item()) < 4 * expected / module.weight.numel() ** 0.5

    def test_a_mixer_may_insist_on_its_own_weights(self):
        class Stubborn(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Linear(6, 6)
                self.plain = nn.Linear(6, 6)

            def init_weights(self):
                nn.init.constant_(self.gate.bias, 3.0)

        mixers = [block.mixer for block in Decoder(9, 6, 2, lambda layer: Stubborn()).trunk.blocks]
        assert all((mixer.gate.bias == 3).all() and (mixer.plain.bias == 0).all() for mixer in mixers)

    def test_tied_is_one_matrix(self):
        model = decoder(tied=True)
        assert model.head.weight is model.embedding.weight

    @pytest.mark.parametrize("change", [{"vocab": 0}, {"width": 0}, {"layers": 0}, {"max_length": 0}])
    def test_sizes_that_are_not_positive_are_refused(self, change):
        sizes = {"vocab": 5, "width": 4, "layers": 1, "make_mixer": lambda layer: nn.Identity()} | change
        with pytest.raises(ValueError, match=f"{next(iter(change))}: a positive number is wanted, not 0"):
            Decoder(**sizes)

    def test_input_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="x: 41 tokens, and positions were learned for max_length=40"):
            decoder()(torch.zeros(1, 41, dtype=torch.long))
        with pytest.raises(ValueError, match=r"tokens: .* is wanted, not \[1, 0\]"):
            decoder()(torch.zeros(1, 0, dtype=torch.long))
        with pytest.raises(ValueError, match=r"tokens: .* is wanted, not \[5\]"):
            decoder()(torch.zeros(5, dtype=torch.long))
        with pytest.raises(ValueError, match="positions: 'learned' or None is wanted, not 'sine'"):
            decoder(positions="sine")


class TestSequenceModel:
    def make(self, **options):
        return seeded(
            lambda: SequenceModel(
                2, 3, 12, 2, lambda layer: SoftmaxAttention(12, 3), max_length=40, **options
            ).double(),
            0,
        )

    def test_shapes_and_causality(self):
        model, x = self.make(), random(4, 37, 2)
        before = model(x)
        assert before.shape == (4, 37, 3)
        x[:, 20:] += 1
        assert torch.equal(model(x)[:, :20], before[:, :20])
        assert not torch.equal(model(x)[:, 20:], before[:, 20:])

    def test_parameters_by_formula(self):
        layer = 4 * 12**2 + 2 * 12 * 48 + 2 * 12
        assert count_parameters(self.make()) == 2 * layer + (2 + 1) * 12 + 40 * 12 + 12 + (12 + 1) * 3

    def test_the_size_of_an_input_is_not_lost(self):
        """A single layer without bias would pass the norm as a sign."""
        model = self.make(positions=None)
        assert (model(torch.ones(1, 1, 2).double()) - model(2 * torch.ones(1, 1, 2).double())).abs().max() > 1e-4

    def test_input_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"x: \[B, T, 2\] is wanted, not \[1, 4, 3\]"):
            self.make()(torch.zeros(1, 4, 3).double())
        with pytest.raises(ValueError, match="inputs: a positive number is wanted, not 0"):
            SequenceModel(0, 1, 4, 1, lambda layer: nn.Identity())


class TestMLPs:
    def test_values(self):
        x = random(2, 5, 6)
        mlp, sglu, swiglu = (seeded(lambda m=m: m(6, 7).double(), 0) for m in (MLP, SGLU, SwiGLU))
        assert torch.allclose(mlp(x), F.gelu(x @ mlp.up.weight.T) @ mlp.down.weight.T)
        gate, up, down = (part.weight.T for part in (swiglu.gate, swiglu.up, swiglu.down))
        assert torch.allclose(swiglu(x), (F.silu(x @ gate) * (x @ up)) @ down)
        assert torch.allclose(sglu(x), ((x @ gate) * (x @ up)) @ down)  # same seed, same matrices

    def test_sglu_is_bilinear(self):
        layer, x = seeded(lambda: SGLU(6, 7).double(), 0), random(3, 6)
        assert torch.allclose(layer(3 * x), 9 * layer(x))

    def test_another_activation(self):
        layer, x = seeded(lambda: MLP(6, 7, torch.relu).double(), 0), random(3, 6)
        assert torch.allclose(layer(x), (x @ layer.up.weight.T).clamp(min=0) @ layer.down.weight.T)


def test_attention_learns_recall():
    """One layer reads the value that stands at the place of the key."""

    def batches(rng):
        return data.paired_recall(rng, 32, pairs=3, keys=6, values=3)

    model = seeded(lambda: Decoder(10, 32, 1, lambda layer: SoftmaxAttention(32, 2), positions=None), 0)
    validation = held_out([batches(np.random.default_rng(9))], accuracy=target_accuracy)
    history = fit(model, batches, target_loss, TrainConfig(steps=150, lr=5e-3), evaluate=validation)
    assert history.final["accuracy"] > 0.9


def test_models_and_data_import_without_the_libraries_of_charts_and_pretrained_models():
    code = """
import sys
for name in ("altair", "transformers", "transformer_lens", "pandas", "scipy", "sklearn", "jaxtyping", "safetensors"):
    sys.modules[name] = None
import attnlab.data, attnlab.models.language, attnlab.models.sweep, attnlab.models.training
"""
    subprocess.run([sys.executable, "-c", code], check=True)
