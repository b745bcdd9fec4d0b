"""Oracles of ``attnlab.foundations.attention_from_scratch``: torch's own attention, in float64, at awkward sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.foundations import attention_from_scratch as at

EXACT = 1e-12  # float64 sums of at most a hundred terms of size 1

Draw = Callable[..., Tensor]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: object) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how).transpose(1, 2)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() < EXACT


class TestLookup:
    def test_sharpness_leads_from_the_mean_to_the_best_match(self, draw: Draw) -> None:
        keys, values = F.normalize(draw(7, 5), dim=-1), draw(7, 3)
        assert close(at.soft_lookup(keys[2], keys, values, 0.0), values.mean(0))
        assert close(at.soft_lookup(keys[2], keys, values, 1e4), values[2])


class TestAttention:
    @pytest.mark.parametrize(("T", "S", "H", "K", "V"), [(1, 1, 1, 1, 1), (37, 63, 3, 12, 5), (5, 100, 2, 60, 7)])
    def test_equals_torch(self, draw: Draw, T: int, S: int, H: int, K: int, V: int) -> None:
        q, k, v = draw(2, T, H, K), draw(2, S, H, K), draw(2, S, H, V)
        o, pattern = at.attention(q, k, v)
        assert close(o, sdpa(q, k, v))
        assert pattern.shape == (2, H, T, S)
        assert close(pattern.sum(-1), torch.ones(2, H, T).double())
        bias = draw(H, T, S)
        assert close(at.attention(q, k, v, scale=0.3, bias=bias)[0], sdpa(q, k, v, bias, scale=0.3))

    @pytest.mark.parametrize(
        "mask", [at.causal(37), at.window(37, 5), at.causal(37) & at.real_tokens(torch.tensor([37, 9]), 37)]
    )
    def test_masks_equal_torch(self, draw: Draw, mask: Tensor) -> None:
        q, k, v = draw(2, 37, 3, 8), draw(2, 37, 3, 8), draw(2, 37, 3, 8)
        assert close(at.attention(q, k, v, mask)[0], sdpa(q, k, v, mask))

    def test_a_row_without_keys_is_zero_and_harms_no_gradient(self, draw: Draw) -> None:
        q, k, v = (draw(1, 4, 1, 3).requires_grad_() for _ in range(3))
        mask = at.causal(4).clone()
        mask[2] = False
        o, pattern = at.attention(q, k, v, mask)
        assert not o[:, 2].any()
        assert not pattern[:, :, 2].any()
        assert close(o[:, [0, 1, 3]], sdpa(q, k, v, at.causal(4))[:, [0, 1, 3]])

    def test_scores_of_an_infinite_size_never_mix_in_what_is_masked(self, draw: Draw) -> None:
        q, k, v = draw(1, 3, 1, 4), draw(1, 3, 1, 4), draw(1, 3, 1, 2)
        changed = v.clone()
        changed[:, 2] = 1e300
        assert torch.equal(
            at.attention(q, k, v, at.causal(3))[0][:, :2], at.attention(q, k, changed, at.causal(3))[0][:, :2]
        )

    def test_bad_input_is_named(self, draw: Draw) -> None:
        q, k = draw(1, 3, 2, 4), draw(1, 3, 2, 4)
        with pytest.raises(ValueError, match=r"mask: dtype torch\.float64; pass booleans"):
            at.attention(q, k, k, at.causal(3).double())
        with pytest.raises(ValueError, match=r"k: shape \(1, 3, 2, 5\)"):
            at.attention(q, draw(1, 3, 2, 5), k)
        with pytest.raises(ValueError, match=r"dtype torch\.bfloat16"):
            at.attention(*(x.bfloat16() for x in (q, k, k)))


class TestMasks:
    def test_causal_ends_at_the_last_key(self) -> None:
        assert at.causal(2, 4).tolist() == [[True, True, True, False], [True] * 4]
        assert at.causal(1).tolist() == [[True]]
        with pytest.raises(ValueError, match="queries: 5 queries over 4 keys"):
            at.causal(5, 4)

    def test_window(self) -> None:
        assert at.window(3, 1).equal(torch.eye(3, dtype=torch.bool))
        assert at.window(5, 5).equal(at.causal(5))
        assert at.window(5, 2).sum().item() == 9
        with pytest.raises(ValueError, match="width: a window of 6 over 5 tokens"):
            at.window(5, 6)

    def test_padding(self) -> None:
        assert at.real_tokens(torch.tensor([2, 0]), 3)[:, 0, 0].tolist() == [[True, True, False], [False] * 3]


class TestLayer:
    def test_the_sum_of_writes_is_the_concatenation_times_the_matrix(self, draw: Draw) -> None:
        layer, o = at.random_layer(24, 3), draw(2, 5, 3, 8)
        assert close(at.writes(layer, o).sum(2), o.flatten(2) @ layer.W_O.flatten(0, 1))

    @pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
    def test_shared_heads_equal_torch(self, draw: Draw, n_kv_heads: int) -> None:
        layer, x = at.random_layer(48, 6, n_kv_heads), draw(2, 19, 48)
        q, k, v = at.project(layer, x)
        o = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        assert close(at.self_attention(layer, x, at.causal(19)), o.flatten(2) @ layer.W_O.flatten(0, 1))

    def test_unit_tokens_give_outputs_of_unit_size(self, draw: Draw) -> None:
        layer, x = at.random_layer(256, 4), draw(1, 50, 256)
        y = at.self_attention(layer, x, torch.eye(50, dtype=torch.bool))
        assert 0.8 < y.std().item() < 1.2

    def test_heads_must_share_evenly(self) -> None:
        with pytest.raises(ValueError, match="n_kv_heads: 6 query heads cannot share 4 evenly"):
            at.random_layer(48, 6, 4)

    def test_without_a_mask_tokens_are_a_set(self, draw: Draw) -> None:
        layer, x, shuffle = at.random_layer(24, 3), draw(1, 19, 24), torch.randperm(19)
        everybody = torch.ones(19, 19, dtype=torch.bool)
        assert close(
            at.self_attention(layer, x[:, shuffle], everybody), at.self_attention(layer, x, everybody)[:, shuffle]
        )


class TestPositions:
    def test_rotary_and_bias_see_distances_only(self, draw: Draw) -> None:
        layer, x = at.random_layer(24, 3), draw(1, 19, 24)
        here, there = (at.scores(*at.project(layer, x, offset=n, base=100.0)[:2]) for n in (0, 100))
        assert close(here, there)
        t, slopes = torch.arange(19), torch.tensor([0.5, 0.25])
        bias = at.distance_bias(t, t, slopes)
        assert torch.equal(bias, at.distance_bias(t + 100, t + 100, slopes))
        assert bias[1, 7, 3].item() == -1.0

    def test_sinusoids_know_the_distance_of_two_places(self) -> None:
        p = at.sinusoids(torch.arange(30), 16)
        products = p @ p.T
        assert close(products.diagonal(3), products[0, 3].expand(27))
        assert p[0].tolist() == [0.0, 1.0] * 8


class TestCache:
    @pytest.mark.parametrize("base", [None, 10_000.0])
    @pytest.mark.parametrize("prompt", [1, 8, 18])
    def test_prefill_and_decode_equal_the_full_pass(self, draw: Draw, prompt: int, base: float | None) -> None:
        layer, x = at.random_layer(48, 6, 2), draw(2, 19, 48)
        outputs, cache = at.prefill(layer, x[:, :prompt], base=base)
        pieces = [outputs]
        for t in range(prompt, 19):
            y, cache = at.decode(layer, x[:, t : t + 1], cache, base=base)
            pieces.append(y)
        assert close(torch.cat(pieces, 1), at.self_attention(layer, x, at.causal(19), base=base))
        assert cache.k.shape == (2, 19, 2, 8)
        counted = sum(y.nbytes for y in cache)
        assert counted == 2 * at.cache_bytes(19, layers=1, n_kv_heads=2, d_head=8, number=8)  # a batch of 2


class TestGradient:
    @pytest.mark.parametrize("scale", [None, 0.7])
    def test_equals_autograd(self, draw: Draw, scale: float | None) -> None:
        q, k, v = (draw(2, 19, 3, width).requires_grad_() for width in (8, 8, 5))
        d_out = draw(2, 19, 3, 5)
        wanted = torch.autograd.grad(sdpa(q, k, v, at.window(19, 4), scale=scale), (q, k, v), d_out)
        found = at.gradients(q, k, v, at.window(19, 4), d_out, scale=scale)
        for name, ours, theirs in zip(("dq", "dk", "dv"), found, wanted, strict=True):
            assert close(ours, theirs), name
