"""Targets against their definitions, and ranges that keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from attnlab.data import list_tasks


def lists(batch=40, length=7, limit=2.0, seed=3):
    return list_tasks.ranged(np.random.default_rng(seed), batch, length, limit)


def best_run(numbers):
    return max(sum(numbers[i:j]) for i in range(len(numbers)) for j in range(i + 1, len(numbers) + 1))


DEFINITIONS = {
    "cumulative sum": sum,
    "cumulative min": min,
    "cumulative median": np.median,
    "max subarray": best_run,
}


@pytest.mark.parametrize("task", DEFINITIONS)
def test_cumulative_targets_are_their_definition_of_every_prefix(task):
    x = lists()
    wanted = [[DEFINITIONS[task](row[: i + 1]) for i in range(len(row))] for row in x.tolist()]
    np.testing.assert_allclose(list_tasks.TASKS[task](x), wanted, atol=1e-12)


def test_known_values():
    assert list_tasks.cumulative_median(np.array([[1.0, 2.0]]))[0, 1] == 1.5
    assert list_tasks.max_subarray(np.array([[-1.0, -2.0]])).tolist() == [[-1, -1]]
    assert list_tasks.sort(np.array([[3.0, -1.0, 2.0]])).tolist() == [[-1, 2, 3]]


@pytest.mark.parametrize("task", list_tasks.TASKS)
def test_targets_scale_with_their_input(task):
    x = lists()
    np.testing.assert_allclose(list_tasks.TASKS[task](4 * x), 4 * list_tasks.TASKS[task](x))


def test_ranges_beyond_training_are_all_new_and_within_the_limit():
    drawn = list_tasks.ranged(np.random.default_rng(0), 500, 200, 4.0, beyond=2.0)
    assert np.abs(drawn).max() <= 4
    assert (np.abs(drawn).max(axis=1) > 1.9).all()  # 200 numbers come close to the ends of their range
    near = list_tasks.ranged(np.random.default_rng(0), 500, 200, 2.0)
    assert np.abs(near).max() <= 2
    assert near.std(axis=1).min() < 0.05 < near.std(axis=1).max()  # narrow ranges and wide ones


def test_the_same_seed_draws_the_same_and_shapes_are_token_major():
    one, two = (list_tasks.draw(np.random.default_rng(5), "sort", 3, 4, 2.0) for _ in range(2))
    assert (one.inputs == two.inputs).all()
    assert one.inputs.shape == one.targets.shape == (3, 4, 1)


def test_a_pointer_names_the_place_of_its_target():
    batch = list_tasks.lookup(np.random.default_rng(1), 20, 5, 2.0)
    assert batch.inputs.shape == (20, 5, 6)
    pointers = batch.inputs[..., 1:]
    assert (pointers.sum(-1) == 1).all()
    np.testing.assert_array_equal(batch.targets[..., 0], np.einsum("bij,bj->bi", pointers, batch.inputs[..., 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length: a positive number is wanted, not 0"),
        ({"batch": -1}, "batch: a positive number"),
        ({"limit": np.nan}, "limit: a positive number is wanted, not nan"),
        ({"beyond": 2.0}, "limit: 2.0 leaves no ranges beyond 2.0; at least 2.02 is wanted"),
    ],
)
def test_what_cannot_be_drawn_is_named(change, message):
    arguments = {"batch": 2, "length": 3, "limit": 2.0} | change
    with pytest.raises(ValueError, match=message):
        list_tasks.ranged(np.random.default_rng(0), **arguments)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task: 'product' is unknown; choose one of cumulative sum"):
        list_tasks.draw(np.random.default_rng(0), "product", 1, 2, 1.0)
