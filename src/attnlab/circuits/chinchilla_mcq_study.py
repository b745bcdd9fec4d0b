"""The experiment of the chapter ``circuits/chinchilla-mcq`` on its small models: behaviour, heads, ranks, label by label.

A number of a claim is made from one value a seed; its interval runs from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlab import claims
from attnlab.circuits import chinchilla_mcq_runs as runs
from attnlab.circuits.chinchilla_mcq import (
    DirectEffects,
    Sheet,
    centred,
    correct_letter_score,
    direct_effects,
    gold_matrix,
    heads_above,
    is_right,
    label_attention,
    restricted_loss,
)
from attnlab.circuits.metrics import Readout
from attnlab.circuits.model import HookedLM, Run
from attnlab.circuits.pairs import Pair, Pairs
from attnlab.circuits.subspaces import (
    Subspaces,
    compress,
    fit_heads,
    head_vectors,
    random_subspace,
    share_of,
    two_factor_shares,
)
from attnlab.data.choices import CONDITIONS, FACTS, LETTER, WORDS, Choices, choices

PROMPTS = 400
#: streams of prompts: those that subspaces are fitted on, and those that everything is measured on
FIT, MEASURE = 11, 12
RANDOM_DRAWS = 10


@dataclass(frozen=True, eq=False)
class Small:
    """One trained model and its prompts."""

    family: str
    seed: int
    model: HookedLM

    def drawn(self, condition: str, stream: int = MEASURE, n: int = PROMPTS) -> Choices:
        """Prompts of one condition, right lines balanced; equal calls give equal prompts."""
        made = runs.FAMILIES[self.family]
        return choices(np.random.default_rng(stream), n, condition, made.options, balanced=True, layout=made.layout)

    @cached_property
    def sheets(self) -> dict[str, Sheet]:
        """What is measured on, by condition."""
        return {name: Sheet.of(self.drawn(name)) for name in CONDITIONS}

    @cached_property
    def matrix(self) -> np.ndarray:
        """Attention to the labels on A to D in order, by right line, ``[L, H, k, k]``."""
        return gold_matrix(label_attention(self.model, self.sheets["ABCD"]), self.sheets["ABCD"].gold)

    @cached_property
    def heads(self) -> list[str]:
        """The correct-letter heads on A to D in order, the strongest first; chosen on prompts that are not measured on."""
        sheet = Sheet.of(self.drawn("ABCD", FIT))
        return heads_above(correct_letter_score(gold_matrix(label_attention(self.model, sheet), sheet.gold)))

    @cached_property
    def effects(self) -> DirectEffects:
        """Direct effects on A to D in order."""
        return direct_effects(self.model, self.sheets["ABCD"])

    @cached_property
    def subspaces(self) -> Subspaces:
        """Queries, keys and values of the correct-letter heads on A to D in order, fitted on other prompts."""
        return fit_heads(self.model, Sheet.of(self.drawn("ABCD", FIT)), self.heads)

    def accuracy(
        self, condition: str, subspaces: Subspaces | None = None, ranks: Mapping[str, int] | None = None
    ) -> float:
        """Percent right, with the correct-letter heads compressed if ``ranks`` are given."""
        return 100 * float(is_right(self.logits(condition, subspaces, ranks), self.sheets[condition].gold).mean())

    def logits(
        self, condition: str, subspaces: Subspaces | None = None, ranks: Mapping[str, int] | None = None
    ) -> Tensor:
        """Logits of the labels ``[N, k]``, compressed likewise; the run restarts at the lowest layer that is compressed."""
        model, sheet, base = self.model, self.sheets[condition], self.base(condition)
        final = base.resid[model.spec.n_layers]
        if ranks:
            edits = compress(model, sheet, self.subspaces if subspaces is None else subspaces, ranks)
            with torch.no_grad():
                run = model.resume(base, [min(edit.layer for edit in edits)], edits=edits)
            final = run.resid[model.spec.n_layers]
        return model.logits(model.readout(final), sheet.labels)

    @cache  # noqa: B019 - a handful of models live as long as the chapter
    def base(self, condition: str) -> Run:
        """The run with nothing changed."""
        with torch.no_grad():
            return self.model.run(self.sheets[condition].tokens)

    def lost(self, condition: str, ranks: Mapping[str, int], subspaces: Subspaces | None = None) -> float:
        """Points of accuracy that compression costs."""
        return self.accuracy(condition) - self.accuracy(condition, subspaces, ranks)

    def matrices(
        self, condition: str, subspaces: Subspaces | None = None, ranks: Mapping[str, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Where each correct-letter head looks, by right line ``[k, k]``, compressed likewise."""
        sheet = self.sheets[condition]
        chosen = self.subspaces if subspaces is None else subspaces
        edits = compress(self.model, sheet, chosen, ranks) if ranks else ()
        found = gold_matrix(label_attention(self.model, sheet, edits=edits), sheet.gold)
        return {head: found[tuple(map(int, head.split(".")))] for head in self.heads}

    def random(self, seed: int) -> Subspaces:
        """Random subspaces in place of the fitted ones."""
        return {
            head: {
                part: random_subspace(space, 1000 * seed + number) for number, (part, space) in enumerate(parts.items())
            }
            for head, parts in self.subspaces.items()
        }


def load(family: str) -> list[Small]:
    """The trained models of a family."""
    models = runs.load_models(family)
    return [
        Small(family, seed, HookedLM(model.bridge(f"{family}-{seed}")))
        for seed, model in zip(runs.FAMILIES[family].seeds, models, strict=True)
    ]


#: percent right on random letters from which on a model counts as one that has learnt the task
LEARNT = 90.0


def learnt(smalls: Sequence[Small]) -> list[Small]:
    """The models that can do the task; of the others there is no circuit to speak of."""
    return [small for small in smalls if small.accuracy("random") > LEARNT]


def over_seeds(smalls: Sequence[Small], value: Callable[[Small], float]) -> dict[str, Any]:
    """``value`` and ``interval`` for :func:`attnlab.claims.check`: mean, lowest and highest seed."""
    mean, interval = claims.mean_and_range(value(small) for small in smalls)
    return {"value": mean, "interval": interval}


def control(smalls: Sequence[Small], value: Callable[[Small], float]) -> tuple[float, tuple[float, float]]:
    """The same as a control."""
    found = over_seeds(smalls, value)
    return found["value"], found["interval"]


def share_of_heads(small: Small) -> float:
    """Percent of the direct effect that the correct-letter heads write; 0 if there are none."""
    return 100 * small.effects.share(small.heads) if small.heads else 0.0


def share_of_any(small: Small) -> float:
    """Percent that as many heads would write if all heads wrote alike."""
    heads = [str(node) for node in small.model.spec.heads]
    return 100 * small.effects.share(heads) * len(small.heads) / len(heads)


def text_score(small: Small) -> np.ndarray:
    """The correct-letter score with the texts in place of the labels, ``[L, H]``: heads that read the answer where its text stands."""
    drawn, sheet = small.drawn("ABCD"), small.sheets["ABCD"]
    at = torch.as_tensor(drawn.text_at).expand(len(sheet), -1)
    return correct_letter_score(gold_matrix(label_attention(small.model, sheet, at), sheet.gold))


def random_lost(small: Small, condition: str, ranks: Mapping[str, int]) -> list[float]:
    """Points that random subspaces of the same ranks cost, one a draw."""
    return [small.lost(condition, ranks, small.random(draw)) for draw in range(RANDOM_DRAWS)]


def enough(small: Small, condition: str = "ABCD", parts: Sequence[str] = ("q", "k"), within: float = 2.0) -> int:
    """The smallest rank from which on accuracy stays within some points of the whole head's."""
    size = small.model.spec.d_head
    for rank in range(size, -1, -1):
        if small.lost(condition, dict.fromkeys(parts, rank)) > within:
            return rank + 1
    return 0


def crossed(small: Small, copies: int = 4) -> Sheet:
    """Prompts in which every order of the first letters meets every right line equally often: place, letter and right are independent."""
    lines = runs.FAMILIES[small.family].options
    orders = np.array(list(permutations(range(lines))))
    drawn = small.drawn("ABCD", MEASURE, n=copies * lines * len(orders))
    labels = LETTER + orders[(np.arange(len(drawn.gold)) // lines) % len(orders)]
    tokens = drawn.tokens.copy()
    tokens[:, drawn.label_at] = labels
    return Sheet.of(drawn._replace(tokens=tokens, labels=labels))


def key_shares(small: Small) -> list[dict[str, Any]]:
    """What the keys and values of each correct-letter head vary with, on :func:`crossed` prompts: place, letter, being right, rest."""
    sheet = crossed(small)
    place = torch.arange(sheet.labels.shape[1]).expand_as(sheet.labels)
    right = (place == sheet.gold[:, None]).long()
    rows = []
    for head, tables in head_vectors(small.model, sheet, small.heads).items():
        for part, name in (("k", "keys"), ("v", "values")):
            vectors = tables[part].flatten(0, 1)
            both = two_factor_shares(vectors, place.flatten(), sheet.labels.flatten())
            known = share_of(vectors, right.flatten())
            shares = {
                "right or wrong": known,
                "place": both["place"],
                "letter": both["letter"],
                "rest": both["rest"] - known,
            }
            rows.append({"model": f"{small.family} {small.seed}", "head": head, "part": name, **shares})
    return rows


PARTS: Mapping[str, tuple[str, ...]] = {
    "queries": ("q",),
    "keys": ("k",),
    "values": ("v",),
    "queries and keys": ("q", "k"),
    "all three": ("q", "k", "v"),
}


def rank_rows(small: Small, conditions: Sequence[str], ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy and loss against rank, one row a condition, part and rank."""
    rows = []
    for condition in conditions:
        gold = small.sheets[condition].gold
        for name, parts in PARTS.items():
            for rank in ranks:
                logits = small.logits(condition, None, dict.fromkeys(parts, rank))
                rows.append(
                    {
                        "model": small.family,
                        "seed": small.seed,
                        "condition": condition,
                        "part": name,
                        "rank": rank,
                        "accuracy": 100 * float(is_right(logits, gold).mean()),
                        "loss": float(restricted_loss(logits, gold).mean()),
                    }
                )
    return rows


# ----------------------------------------------------------------------------------------------- total against direct


def centred_logit(end: Readout) -> Tensor:
    """A metric: logit of the right option minus the mean over all ``options`` of the pair, ``[R]``."""
    return centred(end.logit(end.batch.options))[:, 0]  # the right one stands first


def pairs_of(drawn: Choices, tokenizer: Any, name: str = "choices") -> Pairs:
    """Each prompt beside one that asks for another of its lines: same lines and labels, another answer."""
    made = []
    for number, gold in enumerate(drawn.gold.tolist()):
        words = drawn.words(number)
        lines = drawn.labels.shape[1]
        other = (gold + 1 + number % (lines - 1)) % lines
        text = words[drawn.text_at[other]]
        country = next(country for country, capital in FACTS if capital == text)
        labels = [WORDS[token - 1] for token in drawn.labels[number]]
        order = [gold, *(line for line in range(lines) if line != gold)]
        made.append(
            Pair(
                " ".join(words),
                " ".join([words[0], country, *words[2:]]),
                [labels[gold]],
                [labels[other]],
                options=[labels[line] for line in order],
            )
        )
    return Pairs(name, tokenizer, made)
