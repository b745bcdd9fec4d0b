"""The same questions for a pretrained model: lettered options as text, answered by letter or by text.

Each country comes with one set of options, and its capital stands once in every line: whoever always says the same line is right once
in ``k`` times, by construction. Taught in the chapter ``circuits/chinchilla-mcq``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab.circuits.chinchilla_mcq import Sheet
from attnlab.circuits.model import HookedLM
from attnlab.data.choices import FACTS, LETTERS

#: examples that stand before a question: country, options, and the right line, each line once; none of them is asked
EXAMPLES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("Thailand", ("Seoul", "Doha", "Bangkok", "Quito"), 2),
    ("Ukraine", ("Kiev", "Manila", "Dakar", "Prague"), 0),
    ("Vietnam", ("Zagreb", "Caracas", "Amman", "Hanoi"), 3),
    ("Colombia", ("Jakarta", "Bogota", "Minsk", "Algiers"), 1),
)


@dataclass(frozen=True)
class Asked:
    """One question: the ``country``, its ``options`` in the order of the lines, the label of each line, and the ``gold`` line."""

    country: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int

    @property
    def prompt(self) -> str:
        """The question with lettered lines, up to the bracket after which the letter comes."""
        lines = [f"({label}) {option}" for label, option in zip(self.labels, self.options, strict=True)]
        return "\n".join([question(self.country), *lines, "Answer: ("])


def question(country: str) -> str:
    """The question alone."""
    return f"Question: What is the capital of {country}?"


def lettered_examples(count: int = len(EXAMPLES)) -> str:
    """Answered questions to put before one that is asked by letter."""
    shown = [(Asked(country, options, LETTERS[:4], gold), gold) for country, options, gold in EXAMPLES[:count]]
    return "".join(f"{asked.prompt}{asked.labels[gold]}) {asked.options[gold]}\n\n" for asked, gold in shown)


def plain_examples(count: int = len(EXAMPLES)) -> str:
    """The same questions without options, to put before one that is asked by text."""
    return "".join(f"{question(country)}\nAnswer: {options[gold]}\n\n" for country, options, gold in EXAMPLES[:count])


def questionnaire(
    facts: Sequence[tuple[str, str]] = FACTS, *, options: int = 4, condition: str = "ABCD", seed: int = 0
) -> list[Asked]:
    """Every country ``options`` times, its capital once in every line, the other options the same.

    Args:
        facts: countries and capitals.
        options: lines of a question.
        condition: ``ABCD`` letters in order, ``shuffled`` or ``random`` letters; as in :mod:`attnlab.data.choices`.
        seed: draws the other options and the letters.

    Raises:
        ValueError: fewer facts than lines, or an unknown condition.
    """
    if not 2 <= options <= len(facts):
        raise ValueError(f"options: from 2 to the number of facts ({len(facts)}) are wanted, not {options}")
    if condition not in ("ABCD", "shuffled", "random"):
        raise ValueError(f"condition: ABCD, shuffled or random is wanted, not {condition!r}")
    rng = np.random.default_rng(seed)
    asked = []
    for country, capital in facts:
        others = [text for _, text in facts if text != capital]
        wrong = [others[i] for i in rng.permutation(len(others))[: options - 1]]
        for gold in range(options):
            pool = LETTERS if condition == "random" else LETTERS[:options]
            labels = pool[:options] if condition == "ABCD" else [pool[i] for i in rng.permutation(len(pool))[:options]]
            asked.append(Asked(country, (*wrong[:gold], capital, *wrong[gold:]), tuple(labels), gold))
    return asked


def sheets(
    tokenizer: Any, asked: Sequence[Asked], before: str = "", size: int = 40
) -> Iterator[tuple[list[int], Sheet]]:
    """The prompts as sheets of one length each, with the numbers of their questions; nothing is padded.

    Raises:
        ValueError: a label that is not one token after the prompt, or no token of its own in it.
    """
    encoded = [_encode(tokenizer, before, item) for item in asked]
    by_length: dict[int, list[int]] = {}
    for number, (tokens, _, _) in enumerate(encoded):
        by_length.setdefault(len(tokens), []).append(number)
    for group in by_length.values():
        for start in range(0, len(group), size):
            numbers = group[start : start + size]
            chosen = [encoded[i] for i in numbers]
            prompts, labels, places = (torch.tensor([item[part] for item in chosen]) for part in range(3))
            yield numbers, Sheet(prompts, labels, places, torch.tensor([asked[i].gold for i in numbers]))


def by_letter(model: HookedLM, asked: Sequence[Asked], before: str = "") -> Tensor:
    """Logits of the letters of each question, ``[N, k]``; the examples ``before`` run once."""
    result = torch.empty(len(asked), len(asked[0].labels))
    prefix = _shared(model.tokenizer, [before + item.prompt for item in asked], before)
    with torch.no_grad():
        base = model.run(torch.tensor([prefix])) if prefix else None
        for numbers, sheet in sheets(model.tokenizer, asked, before):
            run = model.run(sheet.tokens, base=base, first=len(prefix))
            normed = model.readout(run.resid[model.spec.n_layers])
            result[numbers] = model.logits(normed, sheet.labels.to(normed.device)).cpu()
    return result


def by_text(model: HookedLM, asked: Sequence[Asked], before: str = "") -> Tensor:
    """Mean log probability a token of each option's text after the bare question, ``[N, k]`` in nats: the cloze control."""
    wanted = sorted({(item.country, option) for item in asked for option in item.options})
    found: dict[tuple[str, str], float] = {}
    encoded = []
    for country, option in wanted:
        start = _tokens(model.tokenizer, f"{before}{question(country)}\nAnswer:")
        whole = _tokens(model.tokenizer, f"{before}{question(country)}\nAnswer: {option}")
        encoded.append((whole, len(start)))
    prefix = _shared(model.tokenizer, [f"{before}{question(item.country)}" for item in asked], before)
    with torch.no_grad():
        base = model.run(torch.tensor([prefix])) if prefix else None
        for numbers in _alike(encoded, size=40):
            tokens, begin = torch.tensor([encoded[i][0] for i in numbers]), encoded[numbers[0]][1]
            run = model.run(tokens, base=base, first=len(prefix))
            resid = run.resid[model.spec.n_layers][:, begin - 1 - len(prefix) : -1]  # predicts the option's tokens
            normed = model.bridge.ln_final(resid)
            for step in range(normed.shape[1]):
                logs = model.logits(normed[:, step]).log_softmax(-1)
                target = tokens[:, begin + step].to(logs.device)
                for number, value in zip(numbers, logs.gather(1, target[:, None])[:, 0].tolist(), strict=True):
                    found[wanted[number]] = found.get(wanted[number], 0.0) + value / normed.shape[1]
    return torch.tensor([[found[item.country, option] for option in item.options] for item in asked])


def _shared(tokenizer: Any, texts: Sequence[str], before: str) -> list[int]:
    """Tokens that end inside ``before`` and begin every text; line breaks may join otherwise than they do at the end of a text."""
    coded = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    shared = [
        token for token, (_, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True) if end <= len(before)
    ]
    if any(_tokens(tokenizer, text)[: len(shared)] != shared for text in texts):
        raise ValueError("before: its last token joins the question that follows; end it with a line break")
    return shared


def _alike(encoded: Sequence[tuple[list[int], int]], size: int) -> Iterator[list[int]]:
    """Numbers of sequences that have the same length and the same beginning of the answer."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (tokens, begin) in enumerate(encoded):
        groups.setdefault((len(tokens), begin), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _encode(tokenizer: Any, before: str, item: Asked) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the prompt, label tokens, and where the labels stand."""
    text = before + item.prompt
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(coded["input_ids"]), [tuple(span) for span in coded["offset_mapping"]]
    labels, places = [], []
    for label in item.labels:
        after = _tokens(tokenizer, text + label)
        if after[:-1] != tokens:
            raise ValueError(f"labels: {label!r} is not one token after the prompt; choose another label")
        start = len(before) + item.prompt.index(f"({label})") + 1
        try:
            places.append(offsets.index((start, start + len(label))))
        except ValueError:
            raise ValueError(f"labels: {label!r} has no token of its own in {item.prompt!r}") from None
        labels.append(after[-1])
    return tokens, labels, places


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
