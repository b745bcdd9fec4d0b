import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from attnlab import data
from attnlab.data import images


def test_fashion_mnist_is_balanced_and_disjoint():
    split = data.fashion_mnist()
    assert split.x_train.shape == (12000, 28, 28)
    assert split.x_test.shape == (2000, 28, 28)
    assert split.x_train.dtype == np.uint8
    assert np.bincount(split.y_train).tolist() == [1200] * 10
    assert np.bincount(split.y_test).tolist() == [200] * 10
    assert len(split.classes) == 10
    train = {image.tobytes() for image in split.x_train}
    assert not any(image.tobytes() in train for image in split.x_test)


def test_fashion_mnist_is_as_hard_as_its_yardstick():
    """Five nearest neighbours are right on 82.7 % of all test images; on 500 of them, two standard errors are 3.4."""
    split = data.fashion_mnist()
    pixels = split.x_train.reshape(-1, 784).astype(np.float32), split.x_test[:500].reshape(-1, 784).astype(np.float32)
    score = KNeighborsClassifier(5, algorithm="brute", n_jobs=1).fit(pixels[0], split.y_train)
    assert score.score(pixels[1], split.y_test[:500]) == pytest.approx(0.827, abs=0.034)


def test_every_drawer_drew_every_character_once():
    characters = data.omniglot()
    assert characters.x.shape == (4840, 28, 28)
    assert np.unique(characters.drawer).tolist() == list(range(1, 21))
    pairs = set(zip(characters.identity.tolist(), characters.drawer.tolist(), strict=True))
    assert len(pairs) == 242 * 20
    assert len(characters.alphabet_names) == 8
    assert np.unique(characters.alphabet).tolist() == list(range(8))


def test_ink_is_bright():
    assert 0 < data.omniglot().x.mean() < 64


def test_digits_are_a_task_that_a_line_nearly_solves():
    split = data.digits()
    assert (split.x_train.shape, split.x_test.shape) == ((1437, 8, 8), (360, 8, 8))
    assert split.x_train.max() == 16
    fitted = RidgeClassifier().fit(split.x_train.reshape(-1, 64), split.y_train)
    assert fitted.score(split.x_test.reshape(-1, 64), split.y_test) > 0.85


@pytest.mark.parametrize("load", [data.fashion_mnist, data.digits])
def test_nobody_changes_what_others_load(load):
    with pytest.raises(ValueError, match="read-only"):
        load().x_train[0, 0, 0] = 1


class TestIntegrity:
    @pytest.fixture(autouse=True)
    def own_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "FOLDER", tmp_path)
        images._load.cache_clear()
        yield tmp_path
        images._load.cache_clear()

    def test_another_file_is_refused_with_the_remedy(self, own_folder):
        np.savez(own_folder / "omniglot_subset.npz", x=np.zeros(3))
        with pytest.raises(ValueError, match=r"omniglot_subset.npz: its sha256 is .* install the package again"):
            data.omniglot()

    def test_a_missing_file_is_refused_with_the_remedy(self):
        with pytest.raises(ValueError, match=r"fashion_mnist_subset.npz: the file is missing; install"):
            data.fashion_mnist()


def test_the_licences_travel_with_the_images():
    assert "2017 Zalando" in (images.FOLDER / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "2015 Brenden Lake" in (images.FOLDER / "LICENSE.omniglot").read_text(encoding="utf-8")
