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
