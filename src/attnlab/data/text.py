"""Text without a download: the source of Python's standard library, and its vocabulary of characters.

It is prose (docstrings, comments) woven into a strict grammar (code), a few megabytes long, and on every machine that
can run this. Its licence is the Python Software Foundation License; it is read in place and never redistributed.
"""

import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

EVERY = 10  # each tenth module is for validation


class CharVocab:
    """The characters that :func:`text` consists of: newline and printable ASCII, 96 in all, numbered in that order."""

    characters = "\n" + "".join(map(chr, range(32, 127)))

    def __init__(self) -> None:
        self._index = {character: index for index, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Numbers [len(text)] of a text; a character outside the vocabulary raises a ``ValueError``."""
        if strange := sorted(set(text) - self._index.keys()):
            raise ValueError(f"text: the vocabulary is newline and printable ASCII, it lacks {strange[:5]!r}")
        return np.fromiter((self._index[character] for character in text), dtype=np.int64, count=len(text))

    def decode(self, numbers: NDArray[np.integer]) -> str:
        """The text of numbers [T], each at least 0 and below ``len(char_vocab)``."""
        array = np.asarray(numbers)
        if array.ndim != 1 or (array.size and not 0 <= array.min() <= array.max() < len(self)):
            raise ValueError(f"numbers: a row of integers from 0 to {len(self) - 1} is wanted, not {numbers!r}")
        return "".join(self.characters[number] for number in array)


char_vocab = CharVocab()


def text(n_chars: int | None = None, split: Literal["train", "validation"] = "train") -> str:
    """The top-level modules of the standard library, one after the other in the order of their names.

    Args:
        n_chars: only so many characters from the start; left out, all (about 4 million for training).
        split: ``train``, or ``validation``: every tenth module. No file is in both; related modules share under 1 %.

    Returns:
        text in the characters of :data:`char_vocab`; others (0.02 %, mostly names of people) become ``?``. It is the
        same on all machines with the same version of Python, as long as nobody has patched its library.

    Raises:
        ValueError: an unknown split, or more characters than there are.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: 'train' or 'validation' is wanted, not {split!r}")
    whole = _text(split)
    if n_chars is None:
        return whole
    if not 0 < n_chars <= len(whole):
        raise ValueError(f"n_chars: from 1 to {len(whole)} characters are there for {split}, not {n_chars!r}")
    return whole[:n_chars]


def windows(rng: np.random.Generator, ids: NDArray[np.integer], batch: int, length: int) -> NDArray[np.int64]:
    """Random pieces of a long row of tokens, for training a language model.

    Args:
        rng: draws where they begin, every place with the same chance.
        ids: [N], such as ``char_vocab.encode(text())``.
        batch: B, pieces.
        length: T, predictions a piece.

    Returns:
        [B, T + 1]: inputs are all but the last column, targets all but the first.

    Raises:
        ValueError: a size that is not positive, or a row too short for one piece.
    """
    if batch <= 0:
        raise ValueError(f"batch: a positive number is wanted, not {batch}")
    _check_pieces(ids, length)
    starts = rng.integers(len(ids) - length, size=batch)
    return ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def blocks(ids: NDArray[np.integer], length: int, count: int | None = None) -> NDArray[np.int64]:
    """Pieces one after the other, for evaluation: each token is predicted once, as far as whole pieces reach.

    Args:
        ids: [N].
        length: T, predictions a piece.
        count: only so many pieces from the start; left out, all of them.

    Returns:
        [B, T + 1]; the last token of a piece is the first of the next.

    Raises:
        ValueError: a length that is not positive, or more pieces than there are.
    """
    _check_pieces(ids, length)
    whole = (len(ids) - 1) // length
    count = whole if count is None else count
    if not 0 < count <= whole:
        raise ValueError(f"count: from 1 to {whole} pieces of {length} are there, not {count}")
    return ids[np.arange(count)[:, None] * length + np.arange(length + 1)].astype(np.int64)


def _check_pieces(ids: NDArray[np.integer], length: int) -> None:
    if length <= 0:
        raise ValueError(f"length: a positive number is wanted, not {length}")
    if ids.ndim != 1 or len(ids) <= length:
        raise ValueError(f"ids: a row of at least {length + 1} tokens is wanted, not {list(ids.shape)}")


@cache
def _text(split: str) -> str:
    files = _modules()
    validation = files[EVERY - 1 :: EVERY]
    chosen = validation if split == "validation" else [file for file in files if file not in validation]
    return "\n".join(_ascii(file.read_text(encoding="utf-8", errors="replace")) for file in chosen)


def _modules() -> list[Path]:
    """Files of the library's top-level modules. Names are checked because a system may keep its own files there."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in folder.glob("*.py") if file.stem in sys.stdlib_module_names)
    if not files:
        raise ValueError(f"text: this Python keeps no source of its standard library in {folder}")
    return files


def _ascii(raw: str) -> str:
    plain = raw.expandtabs(4)
    strange = "".join(set(plain) - set(char_vocab.characters))
    return plain.translate(str.maketrans(strange, "?" * len(strange)))
