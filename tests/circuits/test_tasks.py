"""The three tasks on toy tokenizers and on SmolLM2's: texts, answers, positions, seeds, refusals."""

from __future__ import annotations

import pytest

from attnlab.circuits import tasks

N = 18


@pytest.fixture(params=["toy_digits", pytest.param("smollm2_tokenizer", marks=pytest.mark.model)])
def tokenizer(request):
    """A tokenizer with one token a digit: the toy, and the real one."""
    return request.getfixturevalue(request.param)


def words_at(pairs, number, name):
    words = pairs.words(number)
    return [words[position].strip() for position in pairs.position(number, name)]


def make(kind, tokenizer, **options):
    return getattr(tasks, kind)(tokenizer, N, **options)


KINDS = [
    ("ioi", {}),
    ("ioi", {"corruption": "abc"}),
    ("colored_objects", {}),
    ("greater_than", {}),
    ("docstring", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_seed_fixes_a_task(tokenizer, kind, options):
    one, same, other = (make(kind, tokenizer, seed=seed, **options) for seed in (0, 0, 1))
    assert one.pairs == same.pairs
    assert one.digest == same.digest != other.digest
    assert len(one) == N


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_tokens_read_back_as_the_prompts_with_nothing_in_front(tokenizer, kind, options):
    pairs = make(kind, tokenizer, **options)
    for batch in pairs.batches():
        for row, number in enumerate(batch.index.tolist()):
            assert tokenizer.decode(batch.clean[row]) == pairs.pairs[number].clean
            assert tokenizer.decode(batch.corrupt[row]) == pairs.pairs[number].corrupt


@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_ioi_names_stand_where_the_positions_say(tokenizer, corruption):
    pairs = tasks.ioi(tokenizer, N, corruption=corruption)
    for number, pair in enumerate(pairs.pairs):
        io, s = pair.answers[0].strip(), pair.foils[0].strip()
        assert io != s
        assert words_at(pairs, number, "IO") == [io]
        assert words_at(pairs, number, "S1") == words_at(pairs, number, "S2") == [s]
        assert pairs.position(number, "S1") < pairs.position(number, "S2") < pairs.position(number, "END")
        assert pairs.position(number, "IO") < pairs.position(number, "S2")
        assert words_at(pairs, number, "END") == ["to"]


def test_flipping_changes_one_token_the_second_subject(tokenizer):
    pairs = tasks.ioi(tokenizer, N)
    for batch in pairs.batches():
        assert (batch.clean != batch.corrupt).equal(batch.mask("S2"))
        io = batch.clean[batch.mask("IO")]
        assert io.equal(batch.corrupt[batch.mask("S2")])


def test_new_names_change_three_tokens_and_repeat_none(tokenizer):
    pairs = tasks.ioi(tokenizer, N, corruption="abc")
    for batch in pairs.batches():
        names = batch.mask("IO") | batch.mask("S1") | batch.mask("S2")
        assert (batch.clean != batch.corrupt).equal(names)
        new = batch.corrupt[names].view(len(batch), 3).tolist()
        old = batch.clean[names].view(len(batch), 3).tolist()
        assert all(len(set(a) | set(b)) == 5 for a, b in zip(new, old, strict=True))


def test_templates_and_name_orders_take_turns(tokenizer):
    pairs = tasks.ioi(tokenizer, N)
    starts = [pair.clean.split()[0] for pair in pairs.pairs]
    assert all(starts.count(word) == N // 3 for word in ("When", "Then", "While"))
    io_first = [pairs.position(i, "IO") < pairs.position(i, "S1") for i in range(N)]
    assert sum(io_first) == N // 2
    for template in range(3):  # both orders occur in every template
        assert len(set(io_first[template::3])) == 2


def test_colored_objects_asks_for_one_of_three(tokenizer):
    pairs = tasks.colored_objects(tokenizer, N)
    for number, pair in enumerate(pairs.pairs):
        colors = [option.strip().lower() for option in pair.options]
        question = pair.clean.split("\n")[-2]
        assert len(set(colors)) == 3
        assert pair.options[0] == pair.answers[0]
        assert pair.answers[0] == f" {colors[0].title()}"
        assert pair.foils[0] in pair.options[1:]
        thing = question.removesuffix("?").split()[-1]
        assert f"{colors[0]} {thing}" in question
        assert words_at(pairs, number, "right") == [colors[0]]
        assert sorted(words_at(pairs, number, "wrong")) == sorted(colors[1:])
        assert words_at(pairs, number, "object") == [thing]
        assert words_at(pairs, number, "END") == [":"]


def test_colored_objects_positions_lie_in_the_question_block(tokenizer):
    pairs = tasks.colored_objects(tokenizer, N)
    for number, pair in enumerate(pairs.pairs):
        example, question = pair.clean.index("Q:"), pair.clean.rindex("Q:")
        assert example < question
        before = len(tokenizer(pair.clean[:question], add_special_tokens=False)["input_ids"])
        marked = [p for name in ("right", "wrong", "object") for p in pairs.position(number, name)]
        assert min(marked) > before
        shown = pair.clean[:question].lower()
        assert not any(option.strip().lower() in shown for option in pair.options)


def test_colored_objects_prompts_differ_in_the_object_asked_for(tokenizer):
    pairs = tasks.colored_objects(tokenizer, N)
    for batch in pairs.batches():
        assert (batch.clean != batch.corrupt).equal(batch.mask("object"))
    for pair in pairs.pairs:
        thing = pair.corrupt.removesuffix("?\nA:").split()[-1]
        assert f"{pair.foils[0].strip().lower()} {thing}" in pair.corrupt.split("\n")[-2]


def test_greater_than_by_digit(tokenizer):
    pairs = tasks.greater_than(tokenizer, N)
    for number, pair in enumerate(pairs.pairs):
        year = pair.clean[pair.clean.index("17") + 2 :][:2]
        assert pair.answers == [str(d) for d in range(int(year[0]), 10)]
        assert pair.foils == [str(d) for d in range(int(year[0]))]
        assert words_at(pairs, number, "year") == [year[0]]
        assert words_at(pairs, number, "END") == ["7"]
        assert "1701" in pair.corrupt
        assert int(year[0]) >= 2
        assert int(year[1]) >= 2  # so that both digits differ from 01


def test_greater_than_by_year(toy_years):
    pairs = tasks.greater_than(toy_years, N, form="year")
    for number, pair in enumerate(pairs.pairs):
        year = int(pair.clean[pair.clean.index("17") + 2 :][:2])
        assert [int(answer) for answer in pair.answers] == list(range(year + 1, 100))
        assert [int(foil) for foil in pair.foils] == list(range(2, year + 1))
        assert words_at(pairs, number, "year") == [f"{year:02d}"]
        assert words_at(pairs, number, "END") == ["17"]
        assert pairs.position(number, "year")[0] < pairs.position(number, "END")[0]
    for batch in pairs.batches():
        assert (batch.clean != batch.corrupt).equal(batch.mask("year"))


def test_docstring_asks_for_the_argument_after_the_last_described(tokenizer):
    pairs = tasks.docstring(tokenizer, N)
    for number, pair in enumerate(pairs.pairs):
        signature = pair.clean[pair.clean.index("self, ") + 6 : pair.clean.index("):")].split(", ")
        described = [line.split()[1].rstrip(":") for line in pair.clean.splitlines() if line.startswith("    :param ")]
        assert described == signature[2:4]
        assert pair.answers == [f" {signature[4]}"]
        assert pair.foils == [f" {name}" for name in signature if name != signature[4]]
        assert words_at(pairs, number, "signature") == words_at(pairs, number, "param") == [signature[3]]
        assert words_at(pairs, number, "END") == ["param"]
        names = pair.corrupt[pair.corrupt.index("self, ") + 6 : pair.corrupt.index("):")].split(", ")
        other = [line.split()[1].rstrip(":") for line in pair.corrupt.splitlines() if line.startswith("    :param ")]
        assert (
            len({*signature, *names, *other}) == 14
        )  # nothing of the clean prompt is left, nothing of one part in the other


def test_a_form_that_the_tokenizer_does_not_speak_is_refused(toy_digits, toy_years):
    with pytest.raises(ValueError, match="pair 0 of 'greater-than-year'"):
        tasks.greater_than(toy_digits, 3, form="year")
    with pytest.raises(ValueError, match="pair 0 of 'greater-than-digit'"):
        tasks.greater_than(toy_years, 3, form="digit")


@pytest.mark.parametrize("kind", ["ioi", "colored_objects", "greater_than", "docstring"])
def test_a_tokenizer_that_splits_the_words_is_refused(toy_letters, kind):
    with pytest.raises(ValueError, match=r"keeps 0 of \d+ words whole .*needs \d+ words of one token"):
        getattr(tasks, kind)(toy_letters, 3)


def test_unknown_options_are_refused(toy_digits):
    with pytest.raises(ValueError, match="corruption='swap' is unknown"):
        tasks.ioi(toy_digits, corruption="swap")
    with pytest.raises(ValueError, match="form='month' is unknown"):
        tasks.greater_than(toy_digits, form="month")


@pytest.mark.parametrize("kind", ["ioi", "colored_objects", "greater_than", "docstring"])
def test_no_pairs_are_refused(toy_digits, kind):
    with pytest.raises(ValueError, match="is empty"):
        getattr(tasks, kind)(toy_digits, 0)
