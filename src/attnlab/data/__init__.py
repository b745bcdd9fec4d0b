"""Data that needs no network: images that travel with the package, text of the standard library, generated tasks."""

from attnlab.data.forecasting import Forecast, sinusoids
from attnlab.data.images import Characters, Split, digits, fashion_mnist, omniglot
from attnlab.data.synthetic import IGNORE, Recall, key_value_recall, mqar, paired_recall
from attnlab.data.text import CharVocab, blocks, char_vocab, text, windows

__all__ = [
    "IGNORE",
    "CharVocab",
    "Characters",
    "Forecast",
    "Recall",
    "Split",
    "blocks",
    "char_vocab",
    "digits",
    "fashion_mnist",
    "key_value_recall",
    "mqar",
    "omniglot",
    "paired_recall",
    "sinusoids",
    "text",
    "windows",
]
