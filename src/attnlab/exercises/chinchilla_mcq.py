"""Exercises of the chapter ``circuits/chinchilla-mcq``."""

from attnlab.exercises.core import Exercise

EXERCISES: list[Exercise] = []
