"""Exercises of the chapter ``circuits/thinking-sparks``."""

from attnlab.exercises.core import Exercise

EXERCISES: list[Exercise] = []
