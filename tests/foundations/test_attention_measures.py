"""What the introduction measures: counts against formulas, and a small Llama model read layer by layer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnlab.foundations import attention_from_scratch as at
from attnlab.foundations import attention_measures as measure

WORDS = ["a", " b", " a", " c", " b"]


def test_effective_keys_count_from_one_to_all() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    assert measure.effective_keys(rows).tolist() == pytest.approx([1, 4, 2])


def test_spread_holds_both_scales_of_every_width() -> None:
    table = measure.spread([4, 256], keys=64, queries=50).set_index(["width", "scale"])
    assert len(table) == 4
    assert table.loc[(256, "none"), "std"] == pytest.approx(16 * table.loc[(256, "K ** -0.5"), "std"])
    assert table.loc[(256, "none"), "effective"] < table.loc[(256, "K ** -0.5"), "effective"] <= 64


def test_costs_follow_the_formulas_of_the_page() -> None:
    size = {"n_heads": 9, "d_head": 64}
    prompt = measure.attention_cost(128, 128, n_kv_heads=9, **size)
    assert prompt.flops == 4 * 128**2 * 64 * 9
    assert prompt.intensity == pytest.approx(128 / 2)
    one = measure.attention_cost(1, 10**6, n_kv_heads=3, **size)
    assert one.intensity == pytest.approx(3, rel=1e-4)
    matrices = measure.projection_cost(1, d_model=576, n_kv_heads=3, **size)
    assert matrices.flops == 2 * 576 * (9 + 3 + 3 + 9) * 64


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_every_piece_is_timed_at_every_length() -> None:
    times = measure.time_lengths([4, 8], further=2, d_model=16, n_heads=2)
    assert set(times.piece) == {"projections", "prefill", "fused prefill", "decode"}
    assert sorted(times[times.piece == "decode"].length) == [8, 16]
    assert (times.ms > 0).all()


class Letters:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, return_tensors: str) -> object:
        ids = torch.tensor([[ord(word) - ord("a") for word in text.split()]])
        return type("Encoding", (), {"input_ids": ids})()

    def decode(self, ids: list[int]) -> str:
        return " " + chr(ids[0] + ord("a"))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=26,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_our_functions_are_those_of_a_llama_layer(llama: LlamaForCausalLM) -> None:
    reading = measure.read(llama, Letters(), "a b a c d e")
    assert reading.words == [" a", " b", " a", " c", " d", " e"]
    base, mask = measure.rotary_base(llama), at.causal(6)
    assert base == 100.0
    patterns = at.masked_softmax(measure.score_maps(llama, reading), mask)
    assert (patterns - torch.cat(reading.patterns)).abs().max() < 1e-5  # both in float32
    for number, (x, y) in enumerate(zip(reading.inputs, reading.outputs, strict=True)):
        layer = measure.llama_layer(llama, number)
        assert [tuple(W.shape) for W in layer] == [(6, 24, 8), (2, 24, 8), (2, 24, 8), (6, 8, 24)]
        assert (at.self_attention(layer, x, mask, base=base) - y).abs().max() < 1e-5
    assert not llama.model.layers[0].input_layernorm._forward_hooks  # they are taken off again


def test_habits_of_made_up_heads() -> None:
    first, own, before, copy = torch.zeros(4, 5, 5)
    first[:, 0] = 1
    own.fill_diagonal_(1)
    before[range(1, 5), range(4)] = 1
    before[0, 0] = 1
    copy[range(5), [0, 1, 0, 3, 1]] = 1  # the same word before, itself where there is none
    table = measure.habits(torch.stack([first, own, before, copy])[None], WORDS).set_index("head")
    assert table.loc["0.0", "first token"] == 1
    assert table.loc["0.1", "itself"] == 1
    assert table.loc["0.2", "token before"] == 1
    assert table.loc["0.3", "same word before"] == 1
    assert table.loc["0.2", "after the same word"] == pytest.approx(
        0.5
    )  # a c: yes, of two repeats one follows its copy
    assert table["all alike"].max() < 0.5


def test_extremes_name_no_head_twice() -> None:
    patterns = at.masked_softmax(torch.randn(2, 5, 5, 5, generator=torch.Generator().manual_seed(0)), at.causal(5))
    found = measure.extremes(measure.habits(patterns, WORDS))
    assert len(set(found.values())) == len(found) == 6


def test_a_sentence_without_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="words: no word occurs twice"):
        measure.habits(torch.full((1, 1, 2, 2), 0.5), ["a", " b"])
