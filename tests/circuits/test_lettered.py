"""Lettered questions as text: tokens, shared examples, cloze scores, and low-rank changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attnlab.circuits import HookedLM, lettered, lettered_tuning
from attnlab.circuits.chinchilla_mcq import label_logits
from attnlab.data.choices import FACTS
from attnlab.models import pretrained


@pytest.fixture(scope="module")
def model():
    try:
        return HookedLM(pretrained.load("smollm2-135m-instruct"))
    except pretrained.ModelUnavailable as error:
        pytest.skip(str(error))


def few(n: int = 2, condition: str = "ABCD"):
    return lettered.questionnaire(FACTS[13 : 13 + max(n, 4)], condition=condition)[: 4 * n]


def test_every_capital_stands_once_in_every_line():
    asked = lettered.questionnaire()
    assert len(asked) == 160
    capitals = dict(FACTS)
    for start in range(0, 160, 4):
        four = asked[start : start + 4]
        assert {item.country for item in four} == {four[0].country}
        assert [item.gold for item in four] == [0, 1, 2, 3]
        assert [item.options[item.gold] for item in four] == [capitals[four[0].country]] * 4
        assert len({frozenset(item.options) for item in four}) == 1


def test_the_examples_use_every_letter_once_and_ask_nothing_that_is_asked():
    assert sorted(gold for *_, gold in lettered.EXAMPLES) == [0, 1, 2, 3]
    used = {text for country, options, _ in lettered.EXAMPLES for text in (country, *options)}
    assert not used & {word for fact in FACTS for word in fact}


def test_labels_are_found_as_tokens(model):
    asked = few(2, "random")
    for numbers, sheet in lettered.sheets(model.tokenizer, asked):
        for row, number in enumerate(numbers):
            item = asked[number]
            decode = model.tokenizer.decode
            assert [decode([t]) for t in sheet.labels[row].tolist()] == list(item.labels)
            assert [decode([int(sheet.tokens[row, at])]) for at in sheet.label_at[row].tolist()] == list(item.labels)
            assert decode(sheet.tokens[row].tolist()) == item.prompt
            assert int(sheet.gold[row]) == item.gold


def test_shared_examples_change_nothing_but_the_time(model):
    asked, before = few(1), lettered.lettered_examples(1)
    shared = lettered.by_letter(model, asked, before)
    for numbers, sheet in lettered.sheets(model.tokenizer, asked, before):
        torch.testing.assert_close(shared[numbers], label_logits(model, sheet), atol=1e-3, rtol=0)


def test_cloze_scores_are_mean_log_probabilities(model):
    asked = few(1)
    scores = lettered.by_text(model, asked)
    country, option = asked[0].country, asked[0].options[1]
    start = model.tokenizer(f"{lettered.question(country)}\nAnswer:", add_special_tokens=False)["input_ids"]
    whole = model.tokenizer(f"{lettered.question(country)}\nAnswer: {option}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model.bridge(torch.tensor([whole]))[0].log_softmax(-1)
    wanted = np.mean([float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))])
    assert float(scores[0, 1]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"options": 41}, "options: from 2 to"), ({"condition": "digits"}, "condition: ABCD, shuffled or random")],
)
def test_a_questionnaire_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        lettered.questionnaire(**change)


def test_a_label_of_two_tokens_is_refused(model):
    asked = [lettered.Asked("France", ("Rome", "Paris"), ("AQZX", "B"), 1)]
    with pytest.raises(ValueError, match="'AQZX' is not one token"):
        list(lettered.sheets(model.tokenizer, asked))


# ------------------------------------------------------------------------------------------------------ low-rank changes


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def output(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_a_change_starts_at_nothing_and_merges_exactly(tmp_path):
    plain, model = llama(), llama()
    lettered_tuning.attach(model, rank=3, first_layer=1)
    torch.testing.assert_close(output(model), output(plain))
    trainable = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"down", "up"}
    for module in model.modules():
        if isinstance(module, lettered_tuning.LowRank):
            nn.init.normal_(module.up)
    lettered_tuning.save_change(model, tmp_path / "change.safetensors", {"seed": 0})
    changed = output(model)
    assert (changed - output(plain)).abs().max() > 0.1
    torch.testing.assert_close(output(lettered_tuning.merge(model)), changed, atol=1e-5, rtol=0)
    loaded = lettered_tuning.load_change(plain, tmp_path / "change.safetensors")
    torch.testing.assert_close(output(loaded), changed, atol=2e-2, rtol=0)  # kept in half precision


def test_what_is_no_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no change"):
        lettered_tuning.load_change(llama(), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="first_layer: from 0 to 1"):
        lettered_tuning.attach(llama(), rank=2, first_layer=2)
    with pytest.raises(ValueError, match="rank: from 1 to 12"):
        lettered_tuning.LowRank(nn.Linear(12, 24), 13)


def test_the_test_asks_about_other_countries():
    taught, asked = lettered_tuning.split_facts(seed=1)
    assert len(asked) == 10
    assert not set(taught) & set(asked)
    assert len(taught) + len(asked) == len(FACTS)
