import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from attnlab import data

module = import_module("attnlab.data.text")  # `data.text` is the function


def test_all_of_it_is_in_the_vocabulary():
    assert set(data.text()) == set(data.char_vocab.characters)
    assert data.text().count("?") < 0.001 * len(data.text())


def test_a_shorter_text_is_the_beginning():
    assert data.text(1000) == data.text()[:1000]
    assert data.text(1000).startswith('"""')


def test_the_splits_share_nearly_nothing():
    train, validation = data.text(), data.text(split="validation")
    assert 0.05 < len(validation) / len(train) < 0.3
    # Related modules share passages (wave took over chunk, posixpath mirrors ntpath); more than 1 % would be a leak.
    blocks = [validation[start : start + 300] for start in range(0, len(validation) - 300, 300)]
    assert sum(block in train for block in blocks) < 0.01 * len(blocks)


def test_another_process_reads_the_same_text():
    code = "import hashlib; from attnlab import data; print(hashlib.sha256(data.text().encode()).hexdigest())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65


@pytest.mark.parametrize("wrong", [0, -1, 10**9])
def test_a_length_that_is_not_there_is_refused(wrong):
    with pytest.raises(ValueError, match="n_chars: from 1 to"):
        data.text(wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: 'train' or 'validation' is wanted, not 'test'"):
        data.text(split="test")


def test_files_of_the_system_are_left_out(tmp_path, monkeypatch):
    for name in ("abc.py", "bisect.py", "sitecustomize.py", "notes.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [file.name for file in module._modules()] == ["abc.py", "bisect.py"]


def test_a_python_without_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="keeps no source"):
        module._modules()


def test_strange_characters_and_tabs():
    assert module._ascii("é\tx\r∑") == "?   x??"


class TestVocabulary:
    def test_decoding_undoes_encoding(self):
        piece = data.text(5000)
        numbers = data.char_vocab.encode(piece)
        assert numbers.shape == (5000,)
        assert numbers.dtype == np.int64
        assert data.char_vocab.decode(numbers) == piece

    def test_it_counts_from_newline_to_tilde(self):
        assert len(data.char_vocab) == 96
        assert data.char_vocab.encode("\n ~").tolist() == [0, 1, 95]
        assert data.char_vocab.encode("").shape == (0,)
        assert data.char_vocab.decode(np.array([], dtype=int)) == ""

    def test_a_strange_character_is_named(self):
        with pytest.raises(ValueError, match="it lacks \\['é'\\]"):
            data.char_vocab.encode("café")

    @pytest.mark.parametrize("wrong", [[96], [-1], [[0]]])
    def test_numbers_without_a_character_are_refused(self, wrong):
        with pytest.raises(ValueError, match="integers from 0 to 95"):
            data.char_vocab.decode(np.array(wrong))


class TestPieces:
    ids = np.arange(100, 137)

    def test_windows_are_consecutive_and_begin_everywhere(self):
        found = data.windows(np.random.default_rng(0), self.ids, 2000, 8)
        assert found.shape == (2000, 9)
        assert found.dtype == np.int64
        assert (np.diff(found, axis=1) == 1).all()
        assert set(found[:, 0]) == set(range(100, 129))
        assert found.max() == 136

    def test_the_generator_decides(self):
        first, second, third = (data.windows(np.random.default_rng(seed), self.ids, 5, 4) for seed in (1, 1, 2))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)

    @pytest.mark.parametrize("length", [1, 4, 5, 36])
    def test_blocks_predict_each_token_once(self, length):
        found = data.blocks(self.ids, length)
        predicted = found[:, 1:].ravel()
        assert np.array_equal(predicted, self.ids[1 : 1 + len(predicted)])
        assert len(self.ids) - 1 - len(predicted) < length
        assert np.array_equal(found[1:, 0], found[:-1, -1])

    def test_fewer_blocks_are_the_first(self):
        assert np.array_equal(data.blocks(self.ids, 5, 3), data.blocks(self.ids, 5)[:3])

    def test_pieces_are_copies(self):
        ids = self.ids.copy()
        data.windows(np.random.default_rng(0), ids, 3, 4)[:] = 0
        data.blocks(ids, 4)[:] = 0
        assert np.array_equal(ids, self.ids)

    @pytest.mark.parametrize("pieces", [lambda ids, n: data.windows(np.random.default_rng(0), ids, 2, n), data.blocks])
    def test_a_row_that_is_too_short_is_refused(self, pieces):
        assert pieces(self.ids, 36).shape[1] == 37
        with pytest.raises(ValueError, match=r"ids: a row of at least 38 tokens is wanted, not \[37\]"):
            pieces(self.ids, 37)
        with pytest.raises(ValueError, match="length: a positive number is wanted, not 0"):
            pieces(self.ids, 0)
        with pytest.raises(ValueError, match="ids: a row"):
            pieces(self.ids[None], 2)

    def test_counts_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="batch: a positive number is wanted, not 0"):
            data.windows(np.random.default_rng(0), self.ids, 0, 4)
        with pytest.raises(ValueError, match="count: from 1 to 9 pieces of 4 are there, not 10"):
            data.blocks(self.ids, 4, 10)
