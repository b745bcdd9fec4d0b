"""Pairs of prompts that differ in one thing: what circuit analysis patches from one run into the other.

A pair is a *clean* prompt, a *corrupt* (counterfactual) prompt of the same length in tokens, the tokens that are right
after the clean prompt (``answers``), the tokens to compare them with (``foils``), and named positions ("S2", "END").
Lengths may differ between pairs: batches hold pairs of one length, so that nothing is ever padded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAD = -1  # fills token lists and position lists of unequal length


@dataclass(frozen=True)
class Pair:
    """One pair as text. ``spans`` names stretches of characters of the clean prompt, several a name if need be."""

    clean: str
    corrupt: str
    answers: Sequence[str]
    foils: Sequence[str]
    spans: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    options: Sequence[str] = ()  # the candidates of a multiple choice, right one first


@dataclass(frozen=True)
class Batch:
    """Pairs of equal length ``T`` as tensors; ``index`` says which pairs of the data set they are."""

    clean: Tensor  # [B, T]
    corrupt: Tensor  # [B, T]
    answers: Tensor  # [B, A] token ids, PAD where a pair has fewer
    foils: Tensor  # [B, F]
    options: Tensor  # [B, O]
    positions: Mapping[str, Tensor]  # name -> [B, k] positions, PAD where a pair has fewer
    index: Tensor  # [B]

    def __len__(self) -> int:
        return len(self.clean)

    def mask(self, positions: str | int) -> Tensor:
        """Where to patch, ``[B, T]`` bool: ``"all"``, a named position such as ``"END"``, or an index counted from 0 (or from the end).

        Raises:
            ValueError: if the name is unknown or the index lies outside the prompt.
        """
        size, length = self.clean.shape
        if positions == "all":
            return torch.ones(size, length, dtype=torch.bool)
        if isinstance(positions, int):
            if not -length <= positions < length:
                raise ValueError(f"positions={positions} lies outside a prompt of {length} tokens (0 to {length - 1})")
            where = torch.full((size, 1), positions % length)
        elif positions in self.positions:
            where = self.positions[positions]
        else:
            raise ValueError(
                f"positions={positions!r} is unknown; use 'all', an index or one of {sorted(self.positions)}"
            )
        # one spare column takes the PADs, which index -1
        return torch.zeros(size, length + 1, dtype=torch.bool).scatter_(1, where % (length + 1), True)[:, :length]


class Pairs:
    """A checked data set of pairs, tokenised without a beginning-of-sequence token.

    Args:
        name: what the data set is called in tables and records.
        tokenizer: a fast Hugging Face tokenizer.
        pairs: the pairs as text.
        single_token: spans that must cover exactly one token.

    Raises:
        ValueError: on an empty data set, prompts of unequal length, clean equal to corrupt, answers or foils that are
            not one token, an answer that is also a foil, or a span that is not whole tokens; the message names the pair.
    """

    def __init__(self, name: str, tokenizer: Any, pairs: Sequence[Pair], single_token: Sequence[str] = ()) -> None:
        if not pairs:
            raise ValueError(f"pairs of {name!r} is empty; give at least one clean/corrupt pair")
        self.name, self.tokenizer, self.pairs = name, tokenizer, list(pairs)
        self._encoded = [self._encode(number, pair, single_token) for number, pair in enumerate(self.pairs)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        lengths = sorted({len(item["clean"]) for item in self._encoded})
        return f"Pairs({self.name!r}, {len(self)} pairs, {lengths[0]}-{lengths[-1]} tokens)"

    @property
    def digest(self) -> str:
        """A hash of the texts, for records: equal digests mean equal data."""
        text = repr([(p.clean, p.corrupt, tuple(p.answers), tuple(p.foils)) for p in self.pairs])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def subset(self, numbers: Sequence[int]) -> Pairs:
        """The chosen pairs, in the given order."""
        chosen = object.__new__(Pairs)
        chosen.name, chosen.tokenizer = self.name, self.tokenizer
        chosen.pairs = [self.pairs[i] for i in numbers]
        chosen._encoded = [self._encoded[i] for i in numbers]
        return chosen

    def words(self, number: int) -> list[str]:
        """The clean prompt of one pair, token by token."""
        return [self.tokenizer.decode([t]) for t in self._encoded[number]["clean"]]

    def position(self, number: int, name: str) -> list[int]:
        """The token positions that a name stands for in one pair."""
        return list(self._encoded[number]["positions"][name])

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """Batches of at most ``size`` pairs of equal length; every pair occurs once."""
        by_length: dict[int, list[int]] = {}
        for number, item in enumerate(self._encoded):
            by_length.setdefault(len(item["clean"]), []).append(number)
        for numbers in by_length.values():
            for start in range(0, len(numbers), size):
                yield self._batch(numbers[start : start + size])

    def _batch(self, numbers: list[int]) -> Batch:
        items = [self._encoded[i] for i in numbers]

        def table(key: str) -> Tensor:
            return _padded([item[key] for item in items])

        names = sorted(set.intersection(*(set(item["positions"]) for item in items)))
        return Batch(
            clean=table("clean"),
            corrupt=table("corrupt"),
            answers=table("answers"),
            foils=table("foils"),
            options=table("options"),
            positions={name: _padded([item["positions"][name] for item in items]) for name in names},
            index=torch.tensor(numbers),
        )

    def _encode(self, number: int, pair: Pair, single_token: Sequence[str]) -> dict[str, Any]:
        where = f"pair {number} of {self.name!r}"
        clean, corrupt = self._tokens(pair.clean), self._tokens(pair.corrupt)
        if clean == corrupt:
            raise ValueError(f"{where}: clean and corrupt are the same prompt {pair.clean!r}; nothing could be patched")
        if len(clean) != len(corrupt):
            raise ValueError(
                f"{where}: clean has {len(clean)} tokens and corrupt {len(corrupt)} ({pair.clean!r} / {pair.corrupt!r}); "
                "choose words of the same number of tokens"
            )
        answers, foils, options = (
            [self._single(where, word) for word in words] for words in (pair.answers, pair.foils, pair.options)
        )
        if not answers or not foils:
            raise ValueError(f"{where}: answers and foils need at least one token each")
        if both := set(answers) & set(foils):
            raise ValueError(f"{where}: {self.tokenizer.decode(sorted(both)[:1])!r} is both answer and foil")
        positions = {name: self._positions(where, pair.clean, name, spans) for name, spans in pair.spans.items()}
        for name in single_token:
            if len(positions[name]) != len(pair.spans[name]):
                words = ", ".join(repr(pair.clean[a:b]) for a, b in pair.spans[name])
                raise ValueError(f"{where}: {name} ({words}) is not one token each; choose another word")
        positions["END"] = [len(clean) - 1]
        return {
            "clean": clean,
            "corrupt": corrupt,
            "answers": answers,
            "foils": foils,
            "options": options,
            "positions": positions,
        }

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _single(self, where: str, word: str) -> int:
        tokens = self._tokens(word)
        if len(tokens) != 1:
            raise ValueError(
                f"{where}: answer {word!r} is {len(tokens)} tokens; metrics read one token, choose another word"
            )
        return tokens[0]

    def _positions(self, where: str, text: str, name: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens whose characters lie in one of the spans (a token may bring the space before the word along)."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found = [i for i, (_, end) in enumerate(offsets) if any(a < end <= b for a, b in spans)]
        if not found:
            raise ValueError(f"{where}: no token ends inside {name} = {[text[a:b] for a, b in spans]}")
        return found


def spans_of(text: str, word: str) -> list[tuple[int, int]]:
    """Where ``word`` stands in ``text`` as a whole word, as character spans."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )
