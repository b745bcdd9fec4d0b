"""Small decoders over words: the bridge equals the module, files come back whole, bad sizes are named."""

import pytest
import torch

from attnlab.circuits import HookedLM
from attnlab.models.word_model import WordModel

WORDS = ["red", "blue", "is", "=", "7"]
SIZES = {"n_layers": 2, "n_heads": 3, "d_model": 24, "d_mlp": 10, "context": 9}


@pytest.fixture(scope="module")
def model():
    return WordModel(WORDS, **SIZES, seed=3)


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([[1, 3, 2, 4, 5, 1, 1], [5, 5, 4, 3, 2, 1, 2]])


def test_tokens_are_the_words_in_order(model):
    assert model.tokenizer("red is blue = 7")["input_ids"] == [1, 3, 2, 4, 5]


def test_the_bridge_gives_the_same_logits_and_is_a_copy(model, tokens):
    wanted = model(tokens)
    bridge = model.bridge()
    torch.testing.assert_close(bridge(tokens), wanted, rtol=0, atol=1e-5)
    lm = HookedLM(bridge)
    assert (lm.spec.n_layers, lm.spec.n_heads, lm.spec.d_head) == (2, 3, 8)
    with torch.no_grad():
        next(bridge.parameters()).add_(1.0)
    torch.testing.assert_close(model(tokens), wanted)


def test_without_an_mlp_only_attention_writes(tokens):
    model = WordModel(WORDS, **(SIZES | {"d_mlp": 0}))
    run = HookedLM(model.bridge()).run(tokens, capture=["mlp_out"])
    assert run.stack("mlp_out").abs().max() == 0
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 2 * 4
    assert all(".mlp." in name for name in frozen)


def test_the_seed_decides_the_weights_and_leaves_the_stream_alone(tokens):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = (WordModel(WORDS, **SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first(tokens), second(tokens))
    assert not torch.equal(first(tokens), other(tokens))


def test_a_file_comes_back_bit_for_bit(model, tokens, tmp_path):
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(WordModel.load(tmp_path / "m.safetensors")(tokens), model(tokens))


def test_the_deviation_of_the_first_weights_is_chosen_and_kept(tmp_path):
    model = WordModel(WORDS, **(SIZES | {"d_model": 96, "init_std": 0.1}))
    assert abs(float(model.network.transformer.h[0].attn.c_attn.weight.detach().std()) - 0.1) < 0.005
    model.save(tmp_path / "m.safetensors")
    assert WordModel.load(tmp_path / "m.safetensors").settings["init_std"] == 0.1


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: .*bad\.safetensors is no saved WordModel"):
        WordModel.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "d_model must be a multiple of n_heads, got 24 for 5 heads"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"d_mlp": -1}, "d_mlp must be at least 0, got -1"),
        ({"init_std": 0.0}, "init_std must be a positive number, got 0.0"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        WordModel(WORDS, **(SIZES | change))


@pytest.mark.parametrize("words", [[], ["a", "a"], ["a b"], ["<end>"], [""]])
def test_bad_words_are_named(words):
    with pytest.raises(ValueError, match="words must be distinct"):
        WordModel(words, **SIZES)
