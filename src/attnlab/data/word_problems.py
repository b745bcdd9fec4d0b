"""Arithmetic word problems with the step-by-step answers that SmolLM2-135M-Instruct gave to them.

The answers are data: greedy, made once by ``python -m attnlab.circuits.preplan_anchor_runs --answers FILE`` and stored beside
this module, because generating them costs minutes and reading them one forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("word_problems.json")
#: what is asked after each problem
REQUEST = "Explain each step of your reasoning in a full sentence, then give the final answer."

#: problem and true result; more than are needed, since short answers are passed over
PROBLEMS: tuple[tuple[str, int], ...] = (
    ("A baker fills 6 trays with 12 rolls each and sells 45 rolls. How many rolls are left?", 27),
    ("Nora has 14 red marbles and twice as many blue ones. How many marbles does she have?", 42),
    ("A bus starts with 23 people. At the first stop 9 get off and 4 get on. How many people are on the bus?", 18),
    ("A gardener plants 5 rows of 8 tulips. 7 tulips are eaten by deer. How many tulips remain?", 33),
    ("Tickets cost 9 dollars for adults and 5 dollars for children. What do 2 adults and 3 children pay?", 33),
    ("Omar reads 15 pages a day for 6 days. The book has 120 pages. How many pages are left to read?", 30),
    ("A farmer has 36 eggs and packs them in boxes of 6. He sells each box for 3 dollars. How much does he earn?", 18),
    ("Lena saves 8 dollars a week. After 7 weeks she buys a bag for 20 dollars. How much money is left?", 36),
    ("A train travels 60 miles an hour for 3 hours and then 40 miles more. How far does it travel?", 220),
    ("There are 48 pencils for 4 classes. Each class gives 3 pencils away. How many does each class keep?", 9),
    ("A tank holds 90 liters. Every hour 7 liters leak out. How many liters are in the tank after 5 hours?", 55),
    ("Pia bakes 30 cookies. She eats 4 and shares the rest among 2 friends. How many does each friend get?", 13),
    ("A shelf has 3 boards with 11 books each. Someone borrows 5 books. How many books are on the shelf?", 28),
    (
        "A painter needs 2 liters of paint for a room. A house has 9 rooms and he has 10 liters. How many are missing?",
        8,
    ),
    ("Jonas runs 4 kilometers on each of 5 days and 10 kilometers on Sunday. How far does he run in all?", 30),
    ("A shop sells 17 lamps on Monday and 8 more than that on Tuesday. How many lamps does it sell in both days?", 42),
    ("A rope of 50 meters is cut into 5 equal parts. Each part loses 2 meters. How long is a part now?", 8),
    ("In a zoo there are 12 monkeys, half as many lions and 3 bears. How many animals are there?", 21),
    ("Mia buys 4 notebooks for 3 dollars each and pays with a 20 dollar bill. How much change does she get?", 8),
    ("A school has 5 classes with 24 pupils each. 13 pupils are ill today. How many pupils are in school?", 107),
    ("A fisherman catches 7 fish each day for 4 days and gives 9 fish away. How many fish does he keep?", 19),
    ("A hotel has 8 floors with 6 rooms each. 19 rooms are taken. How many rooms are free?", 29),
    ("Eva picks 25 apples and her brother picks 11 fewer. How many apples do they pick together?", 39),
    ("A box holds 16 candles. A church buys 3 boxes and burns 20 candles. How many candles are left?", 28),
    ("A phone costs 150 dollars. Ben pays 30 dollars at once and the rest in 4 equal parts. How large is a part?", 30),
    ("A cook uses 3 eggs for each cake. He has 26 eggs and bakes 7 cakes. How many eggs remain?", 5),
    ("A theater has 10 rows of 15 seats. 64 seats are empty. How many people are in the theater?", 86),
    ("Ken has 45 stamps. He gives 9 to each of 3 friends. How many stamps does he keep?", 18),
)


class Answer(NamedTuple):
    """One stored answer."""

    problem: str
    result: int  # the true one
    text: str  # what the model said
    prompt: list[int]  # tokens of the chat template with the problem
    response: list[int]  # tokens of the answer, the end token included if it came


def message(problem: str) -> list[dict[str, str]]:
    """The conversation that asks one problem."""
    return [{"role": "user", "content": f"{problem} {REQUEST}"}]


def load(path: Path = FILE) -> tuple[list[Answer], dict[str, Any]]:
    """The stored answers, and how they were made: model, hash of its weights, command.

    Raises:
        ValueError: a file that is missing or no file of answers.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [Answer(**row) for row in data["answers"]], data["made"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"path: {path.name} holds no stored answers ({error}); make it with --answers") from error
