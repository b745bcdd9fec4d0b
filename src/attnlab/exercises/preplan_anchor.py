"""Exercises of the chapter ``circuits/preplan-anchor``."""

from attnlab.exercises.core import Exercise

EXERCISES: list[Exercise] = []
