"""Data that needs no network: images that travel with the package, text of the standard library, generated tasks."""

from attnlab.data.images import Characters, Split, digits, fashion_mnist, omniglot
from attnlab.data.synthetic import IGNORE, Recall, mqar
from attnlab.data.text import CharVocab, char_vocab, text

__all__ = [
    "IGNORE",
    "CharVocab",
    "Characters",
    "Recall",
    "Split",
    "char_vocab",
    "digits",
    "fashion_mnist",
    "mqar",
    "omniglot",
    "text",
]
