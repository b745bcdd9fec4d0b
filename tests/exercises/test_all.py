"""Every exercise of every paper: its solution is accepted, and each wrong answer is told what is wrong with it.

The fake paper of the framework's own tests takes part, so that these tests are known to run.
"""

from functools import cache
from pathlib import Path

import pytest

from attnlab import exercises, papers
from tools.chapters import all_chapters

FAKE = "fake-paper"
exercises.__path__.append(str(Path(__file__).parent / "papers"))
EXERCISES = [(slug, exercise) for slug in exercises.slugs() for exercise in exercises.load(slug).values()]
exercises.__path__.pop()
BY_NAME = {(slug, exercise.number): exercise for slug, exercise in EXERCISES}
WRONG = [(slug, exercise, mistake) for slug, exercise in EXERCISES for mistake in exercise.wrong]


def name(parameter):
    return getattr(parameter, "title", parameter)


@cache
def success(slug, number):
    """Feedback on the solution, made once: a hard one takes seconds, and every wrong answer is compared with it."""
    exercise = BY_NAME[slug, number]
    return exercise.check(exercise.solved())


@pytest.mark.parametrize(("slug", "exercise"), EXERCISES, ids=name)
def test_the_solution_is_accepted(slug, exercise):
    feedback = success(slug, exercise.number)
    assert feedback.accepted, f"{slug}/{exercise.number}: {feedback}"
    assert feedback.text


@pytest.mark.parametrize(("slug", "exercise", "mistake"), WRONG, ids=name)
def test_a_wrong_answer_is_told_its_mistake(slug, exercise, mistake):
    feedback = exercise.check(exercise.wrong[mistake])
    assert feedback.status == "rejected", f"{slug}/{exercise.number} {mistake}: {feedback}"
    assert len(feedback.text.split()) >= 4, "feedback names the mistake"
    assert feedback.text != success(slug, exercise.number).text


@pytest.mark.parametrize(("slug", "exercise"), EXERCISES, ids=name)
def test_a_stub_raises_nothing(slug, exercise):
    for stub in (None, ...):
        assert exercise.check(stub).status == "nothing yet"


@pytest.mark.parametrize("slug", [slug for slug in exercises.slugs() if slug != FAKE])
def test_a_chapter_has_three_graded_exercises(slug):
    assert slug in papers.all() or slug in {chapter.slug for chapter in all_chapters()}
    found = exercises.load(slug).values()
    assert len(found) >= 3
    assert {exercise.difficulty for exercise in found} == {"easy", "medium", "hard"}
