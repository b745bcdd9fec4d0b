"""Generated tasks that several chapters share. Each takes the generator it draws from: same seed, same data."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # a target that counts for nothing: the default ``ignore_index`` of torch's cross entropy


class Recall(NamedTuple):
    """A batch of recall sequences: ``tokens`` [B, T] and ``targets`` [B, T], which are ``IGNORE`` off the queries.

    In :func:`paired_recall` the tokens are [B, T, 2], two at every place.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


def mqar(rng: np.random.Generator, batch: int, pairs: int, length: int, vocab: int) -> Recall:
    """Multi-query associative recall: key-value pairs, then every key again at a random place, asking for its value.

    ``k1 v1 k2 v2 ... . . k2 . k1 .`` where ``.`` is the filler, token 0. The target at a query is the value that the
    key came with; guessing among the values is right once in ``vocab // 2`` times. The task measures how many pairs a
    model's state can hold (after Arora et al. 2023, "Zoology", arXiv:2312.04927).

    Args:
        rng: draws keys, values and places.
        batch: B, sequences.
        pairs: pairs a sequence, each asked for once.
        length: T, tokens; at least ``3 * pairs``.
        vocab: tokens in all: filler 0, keys from 1 to ``vocab // 2 - 1``, values from ``vocab // 2`` on.

    Raises:
        ValueError: a size that is not positive, a sequence too short or a vocabulary too small for the pairs.
    """
    for name, size in {"batch": batch, "pairs": pairs, "length": length, "vocab": vocab}.items():
        if size <= 0:
            raise ValueError(f"{name}: a positive number is wanted, not {size}")
    if length < 3 * pairs:
        raise ValueError(f"length: {pairs} pairs and their queries need at least {3 * pairs} tokens, not {length}")
    first_value = vocab // 2
    if pairs > first_value - 1:
        raise ValueError(f"vocab: {pairs} different keys need at least {2 * (pairs + 1)} tokens, not {vocab}")

    keys = 1 + _distinct(rng, batch, first_value - 1, pairs)  # [B, pairs]
    values = rng.integers(first_value, vocab, size=(batch, pairs))
    places = 2 * pairs + _distinct(rng, batch, length - 2 * pairs, pairs)

    tokens = np.zeros((batch, length), dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(tokens, places, keys, axis=1)
    targets = np.full((batch, length), IGNORE, dtype=np.int64)
    np.put_along_axis(targets, places, values, axis=1)
    return Recall(tokens, targets)


def key_value_recall(rng: np.random.Generator, batch: int, pairs: int, keys: int, values: int) -> Recall:
    """Key-value pairs, then one of their keys: tell its value. ``k1 v1 k2 v2 ... kn vn k2``.

    A model must look for what the query names. The yardstick is to name the most frequent value without regard to the
    query: it is right more often than once in ``values`` times, 0.41 of the time for 4 pairs and 8 values.

    Args:
        rng: draws keys, values and queries.
        batch: B, sequences.
        pairs: pairs a sequence, with different keys; T is ``2 * pairs + 1``.
        keys: tokens ``0 .. keys - 1``.
        values: tokens ``keys .. keys + values - 1``, so the vocabulary is ``keys + values``.

    Raises:
        ValueError: a size that is not positive, or fewer keys than pairs.
    """
    named, told, asked, answer = _pairs_and_query(rng, batch, pairs, keys, values)
    tokens = np.empty((batch, 2 * pairs + 1), dtype=np.int64)
    tokens[:, 0:-1:2] = named
    tokens[:, 1::2] = told
    tokens[:, -1] = asked
    return Recall(tokens, _only_last(answer, tokens.shape[1]))


def paired_recall(rng: np.random.Generator, batch: int, pairs: int, keys: int, values: int) -> Recall:
    """The same question with key and value at one place: ``(k1, v1) ... (kn, vn) (k2, blank)``, T = ``pairs + 1``.

    A model adds the two embeddings of a place, so that one layer of attention suffices: in :func:`key_value_recall` a
    value stands beside its key, and a first layer has to bring them together.

    Args:
        rng: draws keys, values and queries.
        batch: B, sequences.
        pairs: pairs a sequence, with different keys.
        keys: tokens ``0 .. keys - 1``.
        values: tokens ``keys .. keys + values - 1``; the blank is ``keys + values``, the last of the vocabulary.

    Returns:
        tokens [B, T, 2] and targets [B, T].

    Raises:
        ValueError: a size that is not positive, or fewer keys than pairs.
    """
    named, told, asked, answer = _pairs_and_query(rng, batch, pairs, keys, values)
    blank = np.full((batch, 1), keys + values, dtype=np.int64)
    tokens = np.stack([np.hstack([named, asked[:, None]]), np.hstack([told, blank])], axis=2)
    return Recall(tokens, _only_last(answer, pairs + 1))


def _pairs_and_query(
    rng: np.random.Generator, batch: int, pairs: int, keys: int, values: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Keys and values [batch, pairs], the key asked for and its value [batch]."""
    for name, size in {"batch": batch, "pairs": pairs, "keys": keys, "values": values}.items():
        if size <= 0:
            raise ValueError(f"{name}: a positive number is wanted, not {size}")
    if pairs > keys:
        raise ValueError(f"keys: {pairs} pairs need as many different keys, not {keys}")
    named = _distinct(rng, batch, keys, pairs)
    told = rng.integers(keys, keys + values, size=(batch, pairs))
    row, column = np.arange(batch), rng.integers(pairs, size=batch)
    return named, told, named[row, column], told[row, column]


def _only_last(answer: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Targets [B, length]: the answer [B] at the end, nothing before."""
    targets = np.full((len(answer), length), IGNORE, dtype=np.int64)
    targets[:, -1] = answer
    return targets


def _distinct(rng: np.random.Generator, batch: int, below: int, count: int) -> NDArray[np.int64]:
    """Rows [batch, count] of different numbers below ``below``, in random order."""
    return rng.random((batch, below)).argsort(axis=1)[:, :count]
