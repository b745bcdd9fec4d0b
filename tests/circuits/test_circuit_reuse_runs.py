"""The record of exact paths: its rows on a tiny model, and the comparison of an estimate with the exact scores."""

from __future__ import annotations

import json

import pytest

from attnlab import records
from attnlab.circuits import circuit_reuse_runs as runs


def test_a_perfect_estimate_agrees_and_a_reversed_one_does_not():
    exact = {f"0.{i}": float(i) for i in range(20)}
    assert runs.agreement(exact, exact) == {"rank correlation": pytest.approx(1), "heads": 2, "found": 2}
    shrunk = {head: 20.0 - value for head, value in exact.items()}
    assert runs.agreement(exact, shrunk)["rank correlation"] == pytest.approx(-1)
    assert runs.agreement(exact, shrunk)["found"] == 0


def test_every_measurement_has_a_score_for_every_head(lm, pairs, monkeypatch):
    monkeypatch.setattr(runs, "STAGE", 1)
    rows = list(runs.measure(lm, "tiny", pairs))
    assert [row["case"] for row in rows] == [
        "paths into the logits",
        "paths into queries",
        "exact patching, all positions",
        "EAP-IG",
    ]
    for row in rows:
        assert set(row["scores"]) == {str(head) for head in lm.spec.heads}
        assert row["pairs"] == len(pairs)
    assert json.loads(json.dumps(rows)) == rows


def test_pairs_that_the_seeds_cannot_share_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        runs.main(["--record", str(tmp_path / "r.json"), "--pairs", "10"])
    assert "--pairs 10 is no multiple of 3" in capsys.readouterr().err


def test_a_record_tells_which_heads_two_tasks_share(tmp_path):
    heads = [f"{i // 9}.{i % 9}" for i in range(30)]
    rows = [
        {"case": "paths", "task": task, "scores": {head: float(abs(i - best)) for i, head in enumerate(heads)}}
        for task, best in (("a", 0), ("b", 29))
    ]
    records.write(tmp_path / "r.json", rows, sources=[], command="-", commit="-")
    record = records.load("r", tmp_path)
    assert runs.shared(record, "a", "a", "paths") == 3
    assert runs.shared(record, "a", "b", "paths") == 0  # the strongest of one are the weakest of the other


def test_a_record_goes_on_where_it_stopped(lm, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "STAGE", 1)
    monkeypatch.setattr(runs, "pooled", lambda make, *_: make)
    path = tmp_path / "r.json"
    monkeypatch.setattr(runs, "TASKS", {"one": pairs})
    runs.write_record(path, lm, 3, command="-", commit="a")
    first = records.load("r", tmp_path)
    monkeypatch.setattr(runs, "TASKS", {"one": pairs, "two": pairs})
    runs.write_record(path, lm, 3, command="-", commit="b", resume=True)
    rows = records.load("r", tmp_path).rows
    assert rows[:4] == first.rows
    assert [row["task"] for row in rows] == ["one"] * 4 + ["two"] * 4
    del rows[2], rows[4:]
    records.write(path, rows, sources=runs.SOURCES, command="-", commit="c")
    runs.write_record(path, lm, 3, command="-", commit="d", resume=True)
    again = records.load("r", tmp_path).rows
    assert [*again[:2], *again[3:5]] == rows
    assert again[2]["scores"] == pytest.approx(first.rows[2]["scores"], abs=1e-5)
    assert [(row["task"], row["case"]) for row in again[:4]] == [(row["task"], row["case"]) for row in first.rows]
