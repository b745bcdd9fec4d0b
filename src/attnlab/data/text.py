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
