"""The tasks of the circuits part as seeded generators of :class:`~attnlab.circuits.pairs.Pairs`.

- :func:`ioi`: indirect object identification (Wang et al. 2022, arXiv:2211.00593).
- :func:`colored_objects`: one-shot colour look-up (Merullo et al. 2024, arXiv:2310.08744, section 2; word lists as in their
  published generator).
- :func:`greater_than`: "from the year 1732 to the year 17" (Hanna et al. 2023, arXiv:2305.00586).
- :func:`docstring`: the next argument in a half-written Python docstring (Heimersheim & Janiak 2023).

Words that a tokenizer splits are left out, so a task adapts to the model; too few words left is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from attnlab.circuits.pairs import Pair, Pairs, spans_of

NAMES = [
    "Mary",
    "John",
    "Tom",
    "James",
    "Dan",
    "Martin",
    "Amy",
    "Sarah",
    "Anna",
    "David",
    "Robert",
    "Michael",
    "Jack",
    "Alice",
    "Paul",
    "Mark",
    "George",
    "Kate",
    "Peter",
    "Lucy",
    "Emma",
    "Laura",
    "Simon",
    "Adam",
    "Henry",
    "Jane",
    "Kevin",
    "Susan",
    "Frank",
    "Rachel",
]
PLACES = ["store", "garden", "school", "park", "station", "office"]
THINGS = ["drink", "book", "ring", "ball", "letter", "computer"]
#: {a} and {b} in the order of the first clause, {s} the repeated subject
IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "Then {a} and {b} had a long talk at the {place}. Afterwards {s} gave a {thing} to",
    "While {a} and {b} were working at the {place}, {s} handed a {thing} to",
)

OBJECTS = [
    "pencil",
    "notebook",
    "pen",
    "cup",
    "plate",
    "jug",
    "mug",
    "puzzle",
    "textbook",
    "leash",
    "necklace",
    "bracelet",
    "bottle",
    "ball",
    "envelope",
    "lighter",
    "bowl",
]
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black"]
SURFACES = ["table", "desk", "floor"]
SUBJECTS = ["there is", "you see", "I see"]

EVENTS = [
    "war",
    "siege",
    "trial",
    "strike",
    "voyage",
    "plague",
    "famine",
    "campaign",
    "dynasty",
    "project",
    "exhibition",
    "expedition",
    "reign",
    "drought",
    "negotiation",
    "occupation",
    "festival",
    "rebellion",
]

#: names of functions and arguments, and words to describe them with
CODE_NAMES = [
    "load",
    "size",
    "file",
    "last",
    "name",
    "key",
    "path",
    "data",
    "model",
    "target",
    "source",
    "index",
    "field",
    "image",
    "text",
    "value",
    "state",
    "node",
    "error",
    "user",
    "table",
    "line",
    "group",
    "token",
    "order",
    "result",
    "label",
    "color",
    "width",
    "depth",
]
DESCRIPTIONS = [
    "crime",
    "tree",
    "oil",
    "piece",
    "river",
    "sector",
    "gap",
    "music",
    "winter",
    "bread",
    "market",
    "stone",
    "garden",
    "hand",
    "paper",
    "summer",
]


def ioi(tokenizer: Any, n: int = 24, seed: int = 0, corruption: Literal["flip", "abc"] = "flip") -> Pairs:
    """Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

    Args:
        tokenizer: of the model; names of more than one token are left out.
        n: number of pairs; both name orders (ABBA, BABA) and the templates take turns.
        seed: of the generator.
        corruption: ``"flip"`` puts the indirect object in the place of the second subject, so that the answer flips
            (Merullo et al.); ``"abc"`` uses three new names, so that no name is repeated (Wang et al.).

    Positions: ``IO``, ``S1``, ``S2``, ``END``. Answer: the indirect object; foil: the subject.

    Raises:
        ValueError: if ``corruption`` is neither.
    """
    if corruption not in ("flip", "abc"):
        raise ValueError(
            f"corruption={corruption!r} is unknown; use 'flip' (the answer flips) or 'abc' (three new names)"
        )
    rng = random.Random(seed)
    names = _single_token_words(tokenizer, NAMES, needed=5)
    pairs = []
    for number in range(n):
        io, s, *others = rng.sample(names, 5)
        template = IOI_TEMPLATES[number % len(IOI_TEMPLATES)]
        fill = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        io_first = (number // len(IOI_TEMPLATES)) % 2 == 0
        order = dict(zip("ab", (io, s) if io_first else (s, io), strict=True))
        clean = template.format(**order, s=s, **fill)
        if corruption == "flip":
            corrupt = template.format(**order, s=io, **fill)
        else:
            corrupt = template.format(a=others[0], b=others[1], s=others[2], **fill)
        s1, s2 = spans_of(clean, s)
        pairs.append(Pair(clean, corrupt, [f" {io}"], [f" {s}"], {"IO": spans_of(clean, io), "S1": [s1], "S2": [s2]}))
    return Pairs(f"ioi-{corruption}", tokenizer, pairs, single_token=("IO", "S1", "S2"))


def colored_objects(tokenizer: Any, n: int = 24, seed: int = 0) -> Pairs:
    """One-shot colour look-up: three coloured objects, "What color is the mug?" and, on the next line, "A:" -> " Orange".

    The corrupt prompt asks for another of the three objects. Objects and colours of the question block differ from those
    of the example block.

    Positions: ``right`` (colour of the object asked for), ``wrong`` (the two others), ``object`` (in the question),
    ``END``; all in the question block. Answer: the capitalised colour; foil: the one right for the corrupt prompt;
    options: all three, right one first.
    """
    rng = random.Random(seed)
    objects = _single_token_words(tokenizer, OBJECTS, needed=6)
    colors = [c for c in _single_token_words(tokenizer, COLORS, needed=6) if _is_single(tokenizer, f" {c.title()}")]
    pairs = []
    for _ in range(n):
        named, hues = rng.sample(objects, 6), rng.sample(colors, 6)
        example = _block(rng, hues[:3], named[:3])
        question = _block(rng, hues[3:], named[3:])
        shown = rng.randrange(3)
        asked, other = rng.sample(range(3), 2)
        start = example(shown) + f" {hues[shown].title()}\n"
        clean, corrupt = start + question(asked), start + question(other)
        right, wrong = hues[3 + asked], [hues[3 + i] for i in range(3) if i != asked]
        thing = named[3 + asked]
        spans = {
            "right": spans_of(clean, right),
            "wrong": [span for hue in wrong for span in spans_of(clean, hue)],
            "object": spans_of(clean, thing)[-1:],
        }
        options = [f" {hue.title()}" for hue in (right, *wrong)]
        pairs.append(Pair(clean, corrupt, options[:1], [f" {hues[3 + other].title()}"], spans, options))
    return Pairs("colored-objects", tokenizer, pairs, single_token=("right", "wrong", "object"))


def greater_than(tokenizer: Any, n: int = 24, seed: int = 0, form: Literal["digit", "year"] = "digit") -> Pairs:
    """Greater-than: "The war lasted from the year 1732 to the year 17" -> anything later than 32.

    Args:
        tokenizer: of the model.
        n: number of pairs.
        seed: of the generator.
        form: ``"digit"`` for tokenizers that give every digit its own token (SmolLM2): the model predicts the tens digit,
            answers are the digits not below it. ``"year"`` for tokenizers with two-digit tokens (GPT-2): answers are
            the two-digit numbers above. The corrupt prompt starts in the year ..01.

    Positions: ``year`` (the tens digit, or the two-digit token, of the first year), ``END``. Several
    answers stand against several foils: :func:`~attnlab.circuits.metrics.prob_diff` is the metric of the paper,
    :func:`~attnlab.circuits.metrics.log_odds` the one for gradients, since it does not saturate.

    Raises:
        ValueError: if the tokenizer does not split years as ``form`` needs.
    """
    if form not in ("digit", "year"):
        raise ValueError(f"form={form!r} is unknown; use 'digit' (one token a digit) or 'year' (two-digit tokens)")
    rng = random.Random(seed)
    events = _single_token_words(tokenizer, EVENTS, needed=3)
    pairs = []
    for _ in range(n):
        year = rng.randrange(12, 88) if form == "year" else 10 * rng.randrange(2, 9) + rng.randrange(2, 9)
        text = f"The {rng.choice(events)} lasted from the year {{}} to the year 17"
        clean, corrupt = text.format(f"17{year:02d}"), text.format("1701")
        start = clean.index("17") + 2
        if form == "digit":
            tens = year // 10
            answers, foils = [str(d) for d in range(tens, 10)], [str(d) for d in range(tens)]
            spans = {"year": [(start, start + 1)]}
        else:
            answers, foils = [f"{y:02d}" for y in range(year + 1, 100)], [f"{y:02d}" for y in range(2, year + 1)]
            spans = {"year": [(start, start + 2)]}
        pairs.append(Pair(clean, corrupt, answers, foils, spans))
    return Pairs(f"greater-than-{form}", tokenizer, pairs, single_token=("year",))


def docstring(tokenizer: Any, n: int = 24, seed: int = 0) -> Pairs:
    """Next argument in a docstring: "def port(self, load, size, file, last, name): ... :param file: ... :param" -> " last".

    The signature has two arguments that the docstring passes over, three that it describes in order, of which the last is the
    answer, and one more. The corrupt prompt has other names everywhere, those of its docstring different from those of its
    signature ("random random" in Heimersheim & Janiak), so that nothing can be inferred.

    Positions: ``signature`` and ``param`` (the name before the answer, in the signature and in the docstring), ``END``. Answer:
    the next argument; foils: the other five. :func:`~attnlab.circuits.metrics.log_odds` compares it with all of them.
    """
    rng = random.Random(seed)
    names = _single_token_words(tokenizer, CODE_NAMES, needed=16)
    words = _single_token_words(tokenizer, DESCRIPTIONS, needed=7)
    pairs = []
    for _ in range(n):
        function, *rest = rng.sample(names, 15)
        arguments, others, described = rest[:6], rest[6:12], rest[12:14]
        text = [rng.choice(words) for _ in range(7)]

        def write(
            signature: Sequence[str], listed: Sequence[str], function: str = function, text: Sequence[str] = tuple(text)
        ) -> str:
            head = f'def {function}(self, {", ".join(signature)}):\n    """{" ".join(text[:3])}\n\n'
            lines = [f"    :param {name}: {' '.join(text[3 + 2 * i : 5 + 2 * i])}\n" for i, name in enumerate(listed)]
            return head + "".join(lines) + "    :param"

        clean, corrupt = write(arguments, arguments[2:4]), write(others, described)
        before = spans_of(clean, arguments[3])
        foils = [f" {name}" for name in arguments if name != arguments[4]]
        spans = {"signature": before[:1], "param": before[1:2]}
        pairs.append(Pair(clean, corrupt, [f" {arguments[4]}"], foils, spans))
    return Pairs("docstring", tokenizer, pairs, single_token=("signature", "param"))


def _block(rng: random.Random, hues: Sequence[str], named: Sequence[str]) -> Callable[[int], str]:
    """One question block as a function of which object is asked for."""
    surface, subject = rng.choice(SURFACES), rng.choice(SUBJECTS)
    first, second, third = (
        f"{'an' if hue[0] in 'aeiou' else 'a'} {hue} {thing}" for hue, thing in zip(hues, named, strict=True)
    )
    listed = f"{first}, {second}, and {third}"
    return lambda asked: f"Q: On the {surface}, {subject} {listed}. What color is the {named[asked]}?\nA:"


def _is_single(tokenizer: Any, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def _single_token_words(tokenizer: Any, words: Sequence[str], needed: int) -> list[str]:
    kept = [word for word in words if _is_single(tokenizer, f" {word}")]
    if len(kept) < needed:
        raise ValueError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} keeps {len(kept)} of {len(words)} words whole "
            f"({', '.join(words[:3])}, ...); the task needs {needed} words of one token"
        )
    return kept
