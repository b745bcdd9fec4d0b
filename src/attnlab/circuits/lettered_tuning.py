"""Teach a pretrained model to answer by letter, with a low-rank change of its attention weights that is small enough to be kept.

Every chosen projection ``W`` becomes ``W + B A`` with ``A`` [r, in] and ``B`` [out, r]; ``B`` starts at 0, so the model starts as it was.
Taught in the chapter ``circuits/chinchilla-mcq``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.circuits.lettered import Asked, sheets
from attnlab.data.choices import FACTS, LETTERS
from attnlab.models.run import History, TrainConfig
from attnlab.models.training import fit, seeded

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRank(nn.Module):
    """A frozen linear layer plus a trainable change of rank ``rank``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(linear.in_features, linear.out_features):
            raise ValueError(
                f"rank: from 1 to {min(linear.in_features, linear.out_features)} is wanted for a layer of "
                f"{linear.in_features} to {linear.out_features}, not {rank}"
            )
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features).to(linear.weight) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return self.linear(x) + (x @ self.down.T) @ self.up.T

    def merged(self) -> nn.Linear:
        """One plain layer that computes the same."""
        with torch.no_grad():
            self.linear.weight += self.up @ self.down
        return self.linear


def attach(model: Any, rank: int, first_layer: int = 0, seed: int = 0) -> Any:
    """Freeze a Llama model and give the attention of its layers from ``first_layer`` on a trainable change; the model itself.

    Raises:
        ValueError: a layer that the model does not have, or a rank that does not fit.
    """
    layers = model.model.layers
    if not 0 <= first_layer < len(layers):
        raise ValueError(f"first_layer: from 0 to {len(layers) - 1} is wanted, not {first_layer}")
    model.requires_grad_(False)

    def change() -> Any:
        for layer in layers[first_layer:]:
            for name in PROJECTIONS:
                setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name), rank))
        return model

    return seeded(change, seed)


def merge(model: Any) -> Any:
    """Add every change to its weight, so that the model is a plain one again; the model itself."""
    for layer in model.model.layers:
        for name in PROJECTIONS:
            if isinstance(found := getattr(layer.self_attn, name), LowRank):
                setattr(layer.self_attn, name, found.merged())
    return model


def save_change(model: Any, path: Path, made: Mapping[str, Any]) -> None:
    """Write the changes alone, in half precision, with how they were ``made``."""
    from safetensors.torch import save_file

    parts = {name: value for name, value in model.named_parameters() if name.endswith((".down", ".up"))}
    save_file(
        {name: value.detach().half().contiguous() for name, value in parts.items()},
        str(path),
        {"made": json.dumps(dict(made))},
    )


def load_change(model: Any, path: Path) -> Any:
    """Add the changes that :func:`save_change` wrote to a plain model; the model itself.

    Raises:
        ValueError: a file that is missing or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        parts = load_file(str(path))
        with torch.no_grad():
            for name in sorted(name.removesuffix(".up") for name in parts if name.endswith(".up")):
                weight = model.get_submodule(name).weight
                weight += (parts[f"{name}.up"].float() @ parts[f"{name}.down"].float()).to(weight)
    except (OSError, SafetensorError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"path: {path} holds no change of this model ({error}); make it with save_change") from error
    return model


def teach(
    model: Any,
    tokenizer: Any,
    facts: Sequence[tuple[str, str]],
    config: TrainConfig,
    *,
    batch: int = 16,
    random_share: float = 0.5,
    progress: bool = True,
) -> History:
    """Train the attached changes on lettered questions about ``facts``, the right letter as the target, prompts of one length a batch."""
    made = _same_length(tokenizer, facts)

    def batches(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        asked = [_draw(rng, made, random_share) for _ in range(batch)]
        ((_, sheet),) = sheets(tokenizer, asked, size=batch)
        return sheet.tokens, sheet.answers

    def loss(network: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        logits = network(input_ids=given[0], use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1].float(), given[1])

    return fit(model, batches, loss, config, progress=progress)


def split_facts(seed: int = 0, held_out: int = 10) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Facts to train on and facts that are only ever asked in the test."""
    order = np.random.default_rng(seed).permutation(len(FACTS))
    shuffled = [FACTS[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def _same_length(tokenizer: Any, facts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Facts whose country and capital are one token each, so that all prompts have one length."""

    def single(word: str) -> bool:
        return len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1

    found = [(country, capital) for country, capital in facts if single(country) and single(capital)]
    if len(found) < 4:
        raise ValueError(f"facts: {len(found)} have one token for country and capital; at least 4 are wanted")
    return found


def _draw(rng: np.random.Generator, facts: Sequence[tuple[str, str]], random_share: float) -> Asked:
    chosen = [facts[i] for i in rng.permutation(len(facts))[:4]]
    gold = int(rng.integers(4))
    random = rng.random() < random_share
    labels = [LETTERS[i] for i in rng.permutation(len(LETTERS))[:4]] if random else LETTERS[:4]
    return Asked(chosen[gold][0], tuple(capital for _, capital in chosen), tuple(labels), gold)
