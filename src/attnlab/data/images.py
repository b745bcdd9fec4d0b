"""Small image sets that travel with the package, and scikit-learn's digits. Nothing is downloaded."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
SHA256 = {
    "fashion_mnist_subset.npz": "4ca58c695f69bce2c6fb98705f88df2868257cbbc64e4b1f67b8a43cef9f0bdc",
    "omniglot_subset.npz": "d335f8543ed15e962ca8a1b7f8e60db8ec6502c28087fb7ad778fc7206f31682",
}
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class Split:
    """Labelled images in two parts. The arrays are read-only: copy what you change.

    Attributes:
        x_train: [N, H, W], grey levels.
        y_train: [N], the class of each image.
        x_test: [M, H, W].
        y_test: [M].
        classes: the name of each class.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.uint8]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.uint8]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Characters:
    """Handwritten characters. The arrays are read-only: copy what you change.

    Attributes:
        x: [N, 28, 28], grey levels, ink is bright.
        identity: [N], which of the 242 characters.
        drawer: [N], which of the 20 people drew it, from 1.
        alphabet: [N], which of the 8 alphabets, an index into ``alphabet_names``.
        alphabet_names: the alphabets.
    """

    x: NDArray[np.uint8]
    identity: NDArray[np.uint16]
    drawer: NDArray[np.uint8]
    alphabet: NDArray[np.uint8]
    alphabet_names: tuple[str, ...]


def fashion_mnist() -> Split:
    """14 000 images of clothing, 28 x 28, ten balanced classes: 1 200 for training and 200 for testing in each.

    Origin: Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747), (c) 2017 Zalando SE, MIT licence
    (``LICENSE.fashion-mnist`` beside this file). **The split is our own**: exact duplicates removed, then shuffled with
    a fixed seed; do not compare a score on it with published test scores to better than about one point. Yardsticks on
    this split: ridge classifier on pixels 80.6 %, five nearest neighbours 82.7 %.
    """
    arrays = _load("fashion_mnist_subset.npz")
    return Split(arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], FASHION_CLASSES)


def omniglot() -> Characters:
    """4 840 drawings: 242 characters of 8 alphabets, each drawn once by 20 people, 28 x 28.

    Origin: Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015), both small background sets, (c) 2015 Brenden Lake,
    MIT licence (``LICENSE.omniglot`` beside this file); box-downsampled from 105 x 105 and inverted. Within an alphabet
    every drawer drew every character in a personal style, so that the drawer plays the camera's part in retrieval
    experiments. Yardstick, cosine similarity of pixels, drawer 1 asks the others: mAP 0.084, rank-1 0.376.
    """
    arrays = _load("omniglot_subset.npz")
    names = tuple(map(str, arrays["alphabet_names"]))
    return Characters(arrays["x"], arrays["identity"], arrays["drawer"], arrays["alphabet"], names)


def digits() -> Split:
    """1 797 handwritten digits, 8 x 8, grey levels 0 to 16; the last 360 are for testing.

    Origin: Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), test part, UCI repository, as
    scikit-learn ships it (CC BY 4.0). The order is kept: neighbours are often by one hand, and shuffling would put that
    hand on both sides.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    held_out = 360
    return Split(
        _frozen(images[:-held_out]),
        _frozen(labels[:-held_out]),
        _frozen(images[-held_out:]),
        _frozen(labels[-held_out:]),
        tuple(map(str, range(10))),
    )


@cache
def _load(name: str) -> dict[str, NDArray]:
    """The arrays of one file, read-only, once a process; a file that is not the one we shipped raises."""
    file = FOLDER / name
    remedy = "install the package again (pip install --force-reinstall attnlab)"
    if not file.is_file():
        raise ValueError(f"{name}: the file is missing; {remedy}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{name}: its sha256 is {found[:12]}..., not {SHA256[name][:12]}...; {remedy}")
    with np.load(file, allow_pickle=False) as arrays:
        return {key: _frozen(arrays[key]) for key in arrays.files}


def _frozen(array: NDArray) -> NDArray:
    array.setflags(write=False)
    return array
