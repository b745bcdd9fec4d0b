from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from attnlab import exercises
from attnlab.exercises import Feedback, accept, reject
from attnlab.exercises.core import is_stub

DOUBLE, TOTAL = "fake-paper/1", "fake-paper/2"


@pytest.fixture(autouse=True)
def fake_paper(monkeypatch):
    monkeypatch.setattr(exercises, "__path__", [*exercises.__path__, str(Path(__file__).parent / "papers")])


class TestFinding:
    def test_papers_are_found_without_being_imported(self):
        assert "fake-paper" in exercises.slugs()
        assert "core" not in exercises.slugs()

    def test_exercises_come_by_number(self):
        assert {number: e.title for number, e in exercises.load("fake-paper").items()} == {
            1: "Double a number",
            2: "Add up",
        }

    @pytest.mark.parametrize("name", ["fake-paper/3", "fake-paper/", "fake-paper", "fake-paper/01", "fake-paper/one"])
    def test_an_unknown_number_is_answered_with_what_exists(self, name):
        with pytest.raises(ValueError, match=f"'{name}' does not exist; fake-paper has 1, 2"):
            exercises.check(name, 1)

    def test_an_unknown_paper_is_answered_with_close_ones(self):
        with pytest.raises(ValueError, match=r"'fake-papr' has no exercises; did you mean 'fake-paper'"):
            exercises.solution("fake-papr/1")

    def test_numbers_have_no_gap(self, monkeypatch):
        import attnlab.exercises.fake_paper as module

        monkeypatch.setattr(module, "EXERCISES", [replace(module.EXERCISES[0], number=2)])
        with pytest.raises(ValueError, match=r"fake-paper must number its exercises 1, 2, 3, ... in order, not 2"):
            exercises.load("fake-paper")


class TestFeedback:
    def test_a_right_answer_is_accepted(self):
        feedback = exercises.check(DOUBLE, lambda x: x + x)
        assert feedback.accepted
        assert feedback.hints == ()
        assert repr(feedback) == "✓ Accepted (fake-paper/1: Double a number)\n  Three doubled is six."

    def test_a_mistake_is_named_and_hints_are_offered(self):
        feedback = exercises.check(DOUBLE, lambda x: x**2)
        assert feedback.status == "rejected"
        assert "squares" in repr(feedback)
        assert "2 hint(s)" in repr(feedback)
        page = feedback._repr_html_()
        assert 'class="attnlab-feedback" data-status="rejected"' in page
        assert "<details><summary>Hint 1</summary><p>What is &lt;twice&gt; three?</p></details>" in page

    def test_text_is_escaped(self):
        assert "a &lt; b" in accept("a < b")._repr_html_()

    def test_feedback_is_no_truth_value(self):
        with pytest.raises(TypeError, match=r"feedback\.accepted"):
            bool(accept("fine"))

    def test_what_raises_is_told_with_its_line(self):
        def double(x):
            half = x / 0
            return half * 4

        feedback = exercises.check(DOUBLE, double)
        assert feedback.status == "rejected"
        assert "ZeroDivisionError: division by zero, in line " in feedback.text
        assert feedback.text.endswith("of double: half = x / 0")

    def test_the_readers_line_is_told_not_the_librarys(self):
        def double(x):
            return Path(x)

        assert exercises.check(DOUBLE, double).text.endswith("of double: return Path(x)")

    def test_a_method_a_partial_and_an_instance_are_functions_too(self):
        class Doubler:
            def __call__(self, x):
                return self.scale(x, 0)

            def once(self, x):
                return self.scale(x, 0)

            def scale(self, x, by):
                return x / by

        for answer in (Doubler(), Doubler().once, partial(Doubler().scale, by=0)):
            assert exercises.check(DOUBLE, answer).text.endswith("of scale: return x / by")

    def test_a_wrong_signature_has_no_line_of_the_readers(self):
        text = exercises.check(DOUBLE, lambda: 1).text
        assert text.startswith("The checker could not work with your answer (function). TypeError:")

    def test_a_value_that_the_checker_cannot_use_is_described(self):
        text = exercises.check(TOTAL, 10).text
        assert text.startswith("The checker could not work with your answer (int). AttributeError: 'int' object has no")

    def test_value_for_function_and_function_for_value(self):
        assert "wants a function, not int" in exercises.check(DOUBLE, 6).text
        assert "wants a value, but solve is a function" in exercises.check(TOTAL, solve).text

    @pytest.mark.parametrize("name", [DOUBLE, TOTAL])
    @pytest.mark.parametrize("answer", [None, ...])
    def test_nothing_is_not_checked(self, name, answer):
        assert exercises.check(name, answer).status == "nothing yet"
        assert exercises.check(name).status == "nothing yet"

    def test_an_unimplemented_function_is_not_checked(self):
        def double(x):
            raise NotImplementedError("to do")

        assert exercises.check(DOUBLE, double).status == "nothing yet"

    def test_interrupting_is_not_swallowed(self):
        def double(x):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            exercises.check(DOUBLE, double)


def solve():
    return "10"


class TestStubs:
    def test_functions_without_a_body_are_stubs(self):
        scale = 2

        def dots(x): ...

        def documented(x):
            """What it should do."""

        def returns_dots(x):
            return ...

        assert all(map(is_stub, (dots, documented, returns_dots)))

        def constant(x):
            return 3

        def quotes_itself(x):
            """doc"""
            return "doc"

        def closes(x):
            return scale

        assert not any(map(is_stub, (constant, quotes_itself, closes, lambda x: x, len, dict, 0, "", [])))


class TestSolutions:
    def test_the_solution_is_shown_behind_a_fold_as_it_is_written(self):
        shown = exercises.solution(DOUBLE)
        assert repr(shown) == 'def solve_double(x):\n    """Twice x."""\n    return 2 * x  # by definition\n'
        page = shown._repr_html_()
        assert page.startswith('<details class="attnlab-solution"><summary>Solution of fake-paper/1: Double a number')
        assert 'class="attnlab-source highlight"' in page

    def test_the_right_answer_is_the_function_or_what_it_returns(self):
        both = exercises.load("fake-paper")
        assert both[1].solved() is both[1].solution
        assert both[2].solved() == "10"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"difficulty": "nasty"}, "difficulty: easy, medium or hard"),
        ({"answer_is": "tensor"}, "answer_is: function or value"),
        ({"minutes": 0}, "minutes: a positive number"),
        ({"wrong": {}}, "wrong: exercise 1 needs a wrong answer"),
    ],
)
def test_an_exercise_out_of_order_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(exercises.load("fake-paper")[1], **change)


def test_reject_and_accept_differ_in_status_only():
    assert reject("x") == Feedback("rejected", "x")
    assert accept("x") == Feedback("accepted", "x")
