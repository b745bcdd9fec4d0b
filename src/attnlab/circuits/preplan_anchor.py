"""Attention Illuminates LLM Reasoning: the Preplan-and-Anchor Rhythm (Li et al. 2025, arXiv:2510.13554).

Taught in the chapter ``circuits/preplan-anchor``. Here: reading stored answers with a real model. The two numbers stand in
:mod:`attnlab.circuits.rhythm`, the weights in :mod:`attnlab.circuits.credit`, the model in which anchors are tested exactly in
:mod:`attnlab.circuits.chain_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnlab.circuits import rhythm
from attnlab.circuits.model import HOOKS, HookedLM
from attnlab.data.word_problems import Answer

#: what is taken out of the maps: nothing, or the first token and the rest of the chat template
SINKS = ("kept", "removed")


def template_columns(tokenizer: Any, answer: Answer) -> list[int]:
    """Positions of the prompt that are the chat template and not the problem: the header with the sink, and the turn to the answer.

    Raises:
        ValueError: a prompt that is no conversation of a header, one message and the turn.
    """
    opens, closes = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    starts = [i for i, token in enumerate(answer.prompt) if token == opens]
    ends = [i for i, token in enumerate(answer.prompt) if token == closes]
    if len(starts) < 2 or not ends or not starts[-2] < ends[-1] < starts[-1]:
        raise ValueError(f"answer: the prompt of {answer.problem[:40]!r} has no user message between template marks")
    first = starts[-2] + 3  # the mark, the word "user", the line break
    return [*range(first), *range(ends[-1], len(answer.prompt))]


def all_spans(model: HookedLM, answers: Sequence[Answer]) -> tuple[dict[str, Tensor], float]:
    """Mean span of every head over the answers, ``[L, H]`` for each of :data:`SINKS`, and the attention that token 0 gets.

    One forward pass an answer; never more than one layer's maps exist at a time.
    """
    spec = model.spec
    spans = {sink: torch.zeros(spec.n_layers, spec.n_heads, dtype=torch.float64) for sink in SINKS}
    first = 0.0
    for answer in answers:
        start, columns = len(answer.prompt), template_columns(model.tokenizer, answer)

        def note(layer: int, maps: Tensor, start: int = start, columns: list[int] = columns) -> None:
            nonlocal first
            spans["kept"][layer] += rhythm.head_spans(maps, start).cpu()
            spans["removed"][layer] += rhythm.head_spans(rhythm.without_columns(maps, columns), start).cpu()
            first += float(maps[:, start:, 0].mean()) / (spec.n_layers * len(answers))

        each_layer(model, _tokens(answer), note)
    return {sink: table / len(answers) for sink, table in spans.items()}, first


@dataclass(frozen=True)
class Reading:
    """One answer read with one treatment of the sink. Series are ``[R]``, one number a token of the answer.

    ``local`` and ``far`` are the group means ``[N, N]`` over the whole sequence, from which the series come.
    """

    words: list[str]
    start: int
    local: Tensor
    far: Tensor
    entropy: dict[str, np.ndarray]  # by alignment

    def waad(self, window: int = rhythm.WINDOW) -> np.ndarray:
        """How far local heads look back at each token of the answer, in tokens."""
        return rhythm.waad_banded(self.local, window)[self.start :].double().numpy()

    def fai(self, horizon: tuple[int, int | None] = (rhythm.HORIZON[0], None)) -> np.ndarray:
        """How much later tokens look at each token of the answer; NaN for the last ones."""
        return rhythm.fai_banded(self.far, self.start, horizon)[self.start :].double().numpy()


def read_answer(model: HookedLM, answer: Answer, groups: Mapping[str, rhythm.Groups]) -> dict[str, Reading]:
    """One forward pass over problem and answer: both group means and the entropies, for each treatment of the sink in ``groups``."""
    start, columns = len(answer.prompt), template_columns(model.tokenizer, answer)
    tokens = _tokens(answer)
    blank = torch.zeros(
        tokens.shape[1], tokens.shape[1], dtype=next(model.bridge.parameters()).dtype, device=model.device
    )
    sums = {sink: [blank.clone(), blank.clone()] for sink in groups}

    def add(layer: int, maps: Tensor) -> None:
        for sink, pair in groups.items():
            for total, group in zip(sums[sink], pair, strict=True):
                if heads := [head for at, head in group if at == layer]:
                    chosen = maps[heads]
                    chosen = rhythm.without_columns(chosen, columns) if sink == "removed" else chosen
                    total += chosen.sum(0) / len(group)

    logits = each_layer(model, tokens, add)[
        0, start - 1 :
    ].float()  # from the row that predicts the first token of the answer
    entropy: dict[str, np.ndarray] = {
        "input": rhythm.token_entropy(logits, "input")[1:].double().numpy(),
        "prediction": rhythm.token_entropy(logits, "prediction")[1:].double().numpy(),
    }
    words = [model.tokenizer.decode([token]) for token in answer.response]
    return {sink: Reading(words, start, local.cpu(), far.cpu(), entropy) for sink, (local, far) in sums.items()}


def each_layer(model: HookedLM, tokens: Tensor, note: Callable[[int, Tensor], None]) -> Tensor:
    """Run the model once and call ``note(layer, maps [H, N, N])`` as each layer's maps appear; returns the logits ``[1, N, V]``."""

    def hook(maps: Tensor, hook: Any, layer: int) -> None:
        if maps is None or maps.shape[-1] != tokens.shape[1]:
            rhythm.check_maps(maps, 0)
        note(layer, maps[0])

    hooks = [(HOOKS["pattern"].format(layer), partial(hook, layer=layer)) for layer in range(model.spec.n_layers)]
    with torch.no_grad():
        return model.bridge.run_with_hooks(tokens.to(model.device), fwd_hooks=hooks)


def _tokens(answer: Answer) -> Tensor:
    return torch.tensor([[*answer.prompt, *answer.response]])


# --------------------------------------------------------------------------------------------------- the rhythm over answers


def rhythm_pairs(
    readings: Sequence[Reading], align: Literal["input", "prediction"] = "input", quantile: float = 0.8
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """The series behind the two statistics, one pair an answer: peaks of WAAD with entropies, peaks of WAAD with peaks of FAI.

    Only tokens that have an FAI take part in the second: nothing could follow a peak in the last ten.
    """
    entropy, anchors = [], []
    for reading in readings:
        waad, fai = reading.waad(), reading.fai()
        entropy.append((rhythm.peaks(waad, quantile), reading.entropy[align]))
        some = np.isfinite(fai)
        anchors.append((rhythm.peaks(waad[some], quantile), rhythm.peaks(fai[some], quantile)))
    return {"entropy": entropy, "follows": anchors}


def rhythm_tests(
    readings: Sequence[Reading],
    align: Literal["input", "prediction"] = "input",
    quantile: float = 0.8,
    test: Callable[..., rhythm.ShiftTest] = rhythm.shift_test,
) -> dict[str, rhythm.ShiftTest]:
    """The two statistics of the paper's table 2 against chance: entropy at peaks of WAAD in nats, share of peaks that FAI follows.

    ``test`` is :func:`~attnlab.circuits.rhythm.shift_test`, or :func:`~attnlab.circuits.rhythm.shuffle_test` for the paper's null.
    """
    pairs = rhythm_pairs(readings, align, quantile)
    return {"entropy": test(pairs["entropy"], rhythm.lift), "follows": test(pairs["follows"], rhythm.follows)}


NAMES = {"entropy": "entropy at WAAD peaks, nats above mean", "follows": "WAAD peaks that FAI follows, %"}
UNITS = {"entropy": 1.0, "follows": 100.0}


def rhythm_row(name: str, test: rhythm.ShiftTest, **more: str) -> dict[str, Any]:
    """One line of a table: the statistic, the middle 98% of its null, and p."""
    low, high = test.band()[1]
    unit = UNITS[name]
    measured = {"measured": unit * test.value, "null, 1%": unit * low, "null, 99%": unit * high, "p": test.p}
    return {"statistic": NAMES[name], **more, **measured}


def rhythm_table(readings: Mapping[str, Sequence[Reading]]) -> pd.DataFrame:
    """Both statistics for every treatment of the sink and both alignments of the entropy, against circular shifts."""
    rows = []
    for sink, each in readings.items():
        for align in ("input", "prediction"):
            for name, test in rhythm_tests(each, align).items():
                if name == "entropy" or align == "input":  # the second statistic does not use the entropy
                    rows.append(rhythm_row(name, test, sink=sink, align=align if name == "entropy" else "-"))
    return pd.DataFrame(rows).sort_values(["statistic", "align"], kind="stable", ignore_index=True)


def shuffled(answer: Answer, seed: int = 0) -> Answer:
    """The same tokens of the answer in random order: the same words, no reasoning and no language."""
    order = np.random.default_rng(seed).permutation(len(answer.response))
    return answer._replace(response=[answer.response[i] for i in order])


def as_answers(tokenizer: Any, passages: Sequence[tuple[str, str]]) -> list[Answer]:
    """Texts by people as if the model had given them: one conversation for each (request, text)."""
    answers = []
    for request, text in passages:
        message = [{"role": "user", "content": request}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        response = tokenizer(text, add_special_tokens=False)["input_ids"]
        answers.append(Answer(request, 0, text, list(prompt), list(response)))
    return answers


def top_words(
    readings: Sequence[Reading], series: Callable[[Reading], np.ndarray], n: int = 12
) -> list[tuple[str, int]]:
    """The words that stand most often at the peaks of a series, with how often."""
    counts: dict[str, int] = {}
    for reading in readings:
        for i in np.flatnonzero(rhythm.peaks(series(reading))):
            counts[reading.words[i]] = counts.get(reading.words[i], 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n]
