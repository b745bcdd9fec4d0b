"""Records are read with their provenance, and a file that is none says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnlab import records

RECORD: dict[str, Any] = {
    "schema": 1,
    "command": "python -m attnlab.kernels.bench",
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"platform": "Linux", "cpus": 16, "gpu": "Some GPU"},
    "versions": {"python": "3.12", "torch": "2.11"},
    "rows": [
        {"case": "speed", "impl": "ours", "shape": {"B": 2, "T": 64}, "ms": 1.5},
        {"case": "speed", "impl": "theirs", "shape": {"B": 2, "T": 64}, "skipped": "too slow"},
        {"claim": "some-paper/some-claim", "value": 1.0},
    ],
}


@pytest.fixture
def write(tmp_path: Path):
    """Write a record named "gpu" with some keys changed or (``...``) left out; returns its folder."""

    def write(**changes: Any) -> Path:
        data = {key: x for key, x in {**RECORD, **changes}.items() if x is not ...}
        (tmp_path / "gpu.json").write_text(json.dumps(data))
        return tmp_path

    return write


def test_a_record_that_does_not_exist_is_none(tmp_path: Path) -> None:
    assert records.load("gpu", tmp_path) is None
    assert records.load("gpu", tmp_path / "nowhere") is None
    assert records.load("no-such-record") is None


def test_sizes_become_columns_and_claims_are_no_measurements(write) -> None:
    record = records.load("gpu", write())
    assert record is not None
    frame = record.frame()
    assert frame[["impl", "B", "T"]].to_numpy().tolist() == [["ours", 2, 64], ["theirs", 2, 64]]
    assert frame.ms.tolist()[0] == 1.5
    assert frame.ms.isna().tolist() == [False, True]
    assert "shape" not in frame
    assert "claim" not in frame


def test_the_origin_names_machine_date_command_and_commit(write) -> None:
    record = records.load("gpu", write())
    assert record is not None
    assert record.origin == (
        "Some GPU, 2026-01-02, `python -m attnlab.kernels.bench` at 0123456789 (python 3.12, torch 2.11)"
    )


def test_a_commit_that_was_changed_stays_marked(write) -> None:
    record = records.load("gpu", write(commit="0123456789abcdef-changed"))
    assert record is not None
    assert "at 0123456789-changed (" in record.origin
    record = records.load("gpu", write(machine={"platform": "Linux", "cpus": 2, "gpu": None}))
    assert record is not None
    assert record.origin.startswith("no GPU, 2 CPUs, 2026-01-02, ")


def test_it_tells_which_measured_files_have_changed(write) -> None:
    name = "kernels/decay_sweep.py"
    (digest,) = records.digests([name]).values()
    assert len(digest) == 64
    for sources, changed in (
        ({}, []),
        ({name: digest}, []),
        ({name: "0" * 64, "kernels/gone.py": digest}, [name, "kernels/gone.py"]),
    ):
        record = records.load("gpu", write(sources=sources))
        assert record is not None
        assert record.changed() == changed


def test_what_is_no_record_is_named(write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gpu\.json: schema 2, but this version reads 1"):
        records.load("gpu", write(schema=2))
    with pytest.raises(ValueError, match=r"gpu\.json: no record without machine, rows"):
        records.load("gpu", write(machine=..., rows=...))
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(ValueError, match="schema 'list'"):
        records.load("gpu", tmp_path)
    (tmp_path / "gpu.json").write_text("{")
    with pytest.raises(ValueError, match=r"gpu\.json: no JSON"):
        records.load("gpu", tmp_path)


def test_the_records_of_this_checkout_are_readable() -> None:
    for path in records.FOLDER.glob("*.json"):
        assert records.load(path.stem) is not None


def test_cells_that_no_table_breaks():
    assert records.unbroken(["0.36", "1.41"]) == "0.36\N{NARROW NO-BREAK SPACE}/\N{NARROW NO-BREAK SPACE}1.41"
