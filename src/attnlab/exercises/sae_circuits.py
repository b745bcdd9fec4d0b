"""Exercises of the chapter ``circuits/sae-circuits``."""

from attnlab.exercises.core import Exercise

EXERCISES: list[Exercise] = []
