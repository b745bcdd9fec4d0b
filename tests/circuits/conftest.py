"""Tiny float64 models, pairs of random words and toy tokenizers that the tests of the circuits part share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from attnlab.circuits import Batch, HookedLM, Pair, Pairs, tasks
from attnlab.models import pretrained
from attnlab.models.pretrained import tiny, tiny_gpt2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are faster, and timed alike, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _zero_mlps(bridge: Any, layers: Sequence[int]) -> None:
    """Make the MLPs of some Llama layers write nothing."""
    hit = 0
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if any(f"layers.{layer}." in name for layer in layers) and "down_proj" in name:
                parameter.zero_()
                hit += 1
    assert hit == len(layers)


@pytest.fixture(scope="session")
def lm() -> HookedLM:
    """Llama, 3 layers, 6 query heads in 2 groups."""
    return HookedLM(tiny(n_layers=3, n_heads=6, n_kv_heads=2, d_model=48))


@pytest.fixture(scope="session")
def gpt2() -> HookedLM:
    """GPT-2, 3 layers, 4 heads: LayerNorm, biases, learned positions."""
    return HookedLM(tiny_gpt2(n_layers=3, n_heads=4, d_model=32))


@pytest.fixture(scope="session")
def one_layer() -> HookedLM:
    """Llama, one layer whose MLP writes nothing: attention only."""
    bridge = tiny(n_layers=1, n_heads=6, n_kv_heads=2, d_model=48, seed=3)
    _zero_mlps(bridge, [0])
    return HookedLM(bridge)


@pytest.fixture
def linear_end() -> HookedLM:
    """Llama whose last MLP writes nothing and whose readout has no norm: logits are linear in the last layer's heads."""
    bridge = tiny(n_layers=2, n_heads=6, n_kv_heads=2, d_model=48, seed=5)
    _zero_mlps(bridge, [1])
    model = HookedLM(bridge)
    model.readout = lambda resid: resid[:, -1]  # type: ignore[method-assign]
    return model


@pytest.fixture(params=["lm", "gpt2"])
def any_lm(request: pytest.FixtureRequest) -> HookedLM:
    """Both kinds of model in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def make_pairs(lm: HookedLM) -> Callable[..., Pairs]:
    """Pairs of random words of the tiny models, of the given lengths, with the positions ``mid`` (one) and ``two``."""

    def make(lengths: Sequence[int] = (7, 7, 7), seed: int = 0, name: str = "random words") -> Pairs:
        rng = random.Random(seed)
        pairs = []
        for length in lengths:
            words = [f"t{rng.randrange(2, 64)}" for _ in range(length)]
            starts = [sum(len(word) + 1 for word in words[:i]) for i in range(length)]
            spans = [(start, start + len(word)) for start, word in zip(starts, words, strict=True)]
            mid = rng.randrange(1, length - 2)  # differs from pair to pair; here the corrupt prompt differs as well
            corrupt = list(words)
            corrupt[mid] = rng.choice([f"t{i}" for i in range(2, 64) if f"t{i}" != words[mid]])
            answer, foil, third = (f"t{i}" for i in rng.sample(range(2, 64), 3))
            pairs.append(
                Pair(
                    " ".join(words),
                    " ".join(corrupt),
                    [answer],
                    [foil],
                    {"mid": [spans[mid]], "two": [spans[mid], spans[length - 2]]},
                    [answer, foil, third],
                )
            )
        return Pairs(name, lm.tokenizer, pairs)

    return make


@pytest.fixture(scope="session")
def pairs(make_pairs: Callable[..., Pairs]) -> Pairs:
    """Three pairs of seven tokens."""
    return make_pairs()


@pytest.fixture(scope="session")
def batch(pairs: Pairs) -> Batch:
    """The three pairs as one batch."""
    (only,) = pairs.batches()
    return only


@pytest.fixture(scope="session")
def naive_diff() -> Callable[..., torch.Tensor]:
    """Reference: logit difference of a whole forward pass of the bridge with plain hooks, ``[B]``."""

    def run(model: HookedLM, tokens: torch.Tensor, batch: Batch, hooks: Sequence[tuple[str, Any]] = ()) -> torch.Tensor:
        with torch.no_grad():
            end = model.bridge.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1]
        rows = torch.arange(len(end))
        return end[rows, batch.answers[:, 0]] - end[rows, batch.foils[:, 0]]

    return run


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, torch.Tensor]]:
    """Reference: the activations of plain hooks in one forward pass of the bridge (with further hooks before them)."""

    def run(
        model: HookedLM, tokens: torch.Tensor, names: Sequence[str], hooks: Sequence[tuple[str, Any]] = ()
    ) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        def keep(act: torch.Tensor, hook: Any, name: str) -> None:
            kept[name] = act.detach().clone()

        keeping = [(name, lambda act, hook, name=name: keep(act, hook, name)) for name in names]
        with torch.no_grad():
            model.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *keeping])
        return kept

    return run


# ------------------------------------------------------------------------------------------------ toy tokenizers


def _corpus() -> list[str]:
    """All words and sentences that the three tasks can make."""
    fills = [*tasks.NAMES, *tasks.PLACES, *tasks.THINGS, *tasks.OBJECTS, *tasks.COLORS, *tasks.SURFACES, *tasks.EVENTS]
    texts = [f"{word} {word}" for word in fills]
    texts += [f" {color.title()}\nQ: On the" for color in tasks.COLORS]
    texts += [template.format(a="a", b="b", s="s", place="p", thing="t") for template in tasks.IOI_TEMPLATES]
    texts += [f"{subject} a an, and What color is the?\nA:" for subject in ("x there is", "x you see", "x I see")]
    texts += [f"{word} {word}" for word in (*tasks.CODE_NAMES, *tasks.DESCRIPTIONS)]
    texts += ['def x(self, x, x):\n    """x x\n\n    :param x: x\n    :param']
    texts += ["The war lasted from the year", "Afterwards"]
    texts += [f"17{year:02d} {year:02d} to the year 17" for year in range(100)]
    return texts


def _word_level(numbers: str) -> Any:
    """A fast tokenizer that keeps every word (with the space before it) whole; ``numbers`` is the pattern of a number."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{numbers}| ?\p{{L}}+|\n|[^\s\p{{L}}\p{{N}}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = sorted({word for text in _corpus() for word, _ in split.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


@pytest.fixture(scope="session")
def toy_digits() -> Any:
    """Words whole, every digit a token and the space before a number another one, as in SmolLM2."""
    return _word_level(r" (?=\p{N})|\p{N}")


@pytest.fixture(scope="session")
def toy_years() -> Any:
    """Words whole, years in tokens of two digits, as in GPT-2."""
    return _word_level(r" ?\p{N}{2}")


@pytest.fixture(scope="session")
def toy_letters() -> Any:
    """Every character a token: no word is whole."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for text in _corpus() for letter in text})
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(["<unk>", *letters])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


@pytest.fixture(scope="session")
def toy_lm(toy_digits: Any) -> HookedLM:
    """A tiny Llama that reads the toy tokenizer."""
    bridge = tiny(n_layers=3, n_heads=6, n_kv_heads=2, d_model=48, vocab=len(toy_digits))
    bridge._tokenizer = toy_digits  # its setter would reload the tokenizer with a BOS
    return HookedLM(bridge)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2, loaded once."""
    try:
        return pretrained.load("smollm2-135m-instruct").tokenizer
    except pretrained.ModelUnavailable as error:
        pytest.skip(str(error))
