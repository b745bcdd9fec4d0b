"""The command: exit codes, messages, files that are never lost, and a resumed run that equals a straight one in every bit."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnlab.circuits import HookedLM, checkpoint, from_json, ungrouped
from attnlab.circuits.__main__ import main
from attnlab.circuits.checkpoint import CheckpointError
from attnlab.circuits.pair_files import EXAMPLE
from attnlab.circuits.work import EdgeWork, Work
from attnlab.models import pretrained

ROWS = [
    ("t2 t3 t4 t5", "t2 t9 t4 t5", "t6", "t7"),
    ("t8 t3 t4 t5 t6", "t8 t9 t4 t5 t6", "t10", "t7"),
    ("t12 t3 t14 t5", "t12 t9 t14 t5", "t6", "t11"),
    ("t12 t13 t14 t15", "t12 t9 t14 t15", "t20", "t21"),
    ("t30 t31 t32 t33", "t30 t9 t32 t33", "t40", "t41"),
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("clean", "corrupt", "answer", "foil"), *ROWS])
    return path


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setenv("ATTNLAB_THREADS", "1")


def arguments(table: Path, out: str, *more: str) -> list[str]:
    return [str(table), "--model", "tiny-random", "--device", "cpu", "--out", str(table.with_name(out)), *more]


def test_a_circuit_file_that_its_model_reads_back(table, capsys):
    assert main(arguments(table, "c.json", "--evaluate", "--top-n", "60")) == 0
    said = capsys.readouterr()
    assert "faithfulness" in said.out
    assert "logit_diff, resample ablation, on the same pairs, which flatters" in said.out
    assert "EAP-IG" in said.err
    text = table.with_name("c.json").read_text()
    document = json.loads(text)
    assert document["method"]["steps"] == 5
    assert document["task"] == {"name": "pairs", "n": 5, "hash": document["task"]["hash"]}
    assert document["eval"]["same_pairs"] is True
    assert document["eval"]["curve"][-1]["faithfulness"] == pytest.approx(document["eval"]["curve"][-1]["faithfulness"])
    back = from_json(text, ungrouped(HookedLM(pretrained.tiny())))
    assert len(back.graph) == document["eval"]["n_edges"]
    assert not list(table.parent.glob("*.checkpoint"))
    assert not list(table.parent.glob("*.tmp"))


@pytest.mark.parametrize("method", ["eap", "attribution", "patch"])
def test_every_method_writes_its_scores(table, method):
    assert main(arguments(table, "c.json", "--method", method, "--top-n", "5" if method != "eap" else "60")) == 0
    document = json.loads(table.with_name("c.json").read_text())
    assert all("score" in node for node in document["nodes"] if node["kind"] == "head")
    if method != "eap":
        assert len([node for node in document["nodes"] if node["kind"] == "head"]) == 5


@pytest.mark.parametrize(
    ("suffix", "start"), [("dot", "digraph circuit {"), ("csv", "edge,source,destination,port,score,in")]
)
def test_other_formats_by_suffix(table, suffix, start):
    assert main(arguments(table, f"c.{suffix}", "--method", "eap")) == 0
    assert table.with_name(f"c.{suffix}").read_text().startswith(start)


def test_the_format_argument_wins_and_heads_have_a_table(table):
    assert main(arguments(table, "c.txt", "--method", "attribution", "--format", "csv", "--threshold", "0.01")) == 0
    lines = table.with_name("c.txt").read_text().splitlines()
    assert lines[0] == "node,score,layer,head,in"
    assert len(lines) == 1 + 12
    assert {line.rsplit(",", 1)[1] for line in lines[1:]} <= {"True", "False"}


def test_evaluation_on_other_pairs(table, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"clean": "t2 t4", "corrupt": "t3 t4", "answer": "t6", "foil": "t7"}]))
    assert main(arguments(table, "c.json", "--method", "eap", "--evaluate", str(other))) == 0
    found = json.loads(table.with_name("c.json").read_text())["eval"]
    assert found["same_pairs"] is False
    assert found["pairs"]["name"] == "other"
    assert (found["metric"], found["ablation"]) == ("logit_diff", "resample")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3", "--method", "eap"], "--steps belongs to --method eap-ig, not to eap"),
        (["--positions", "END"], "--positions belongs to heads"),
        (["--metric", "accuracy"], "--metric accuracy has no gradient; use --method patch"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--model", "No Such Model!"], "--model: name='No Such Model!'"),
        (["--evaluate", "none.csv"], "none.csv: 1 problem, nothing was run"),
    ],
)
def test_what_cannot_be_used_ends_with_2(table, capsys, more, message):
    assert main(arguments(table, "c.json", *more)) == 2
    assert message in capsys.readouterr().err
    assert list(table.parent.glob("c.json*")) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-n", "0"], "'0' is no whole number of at least 1"),
        (["--threshold", "-1"], "'-1' is no positive number"),
        (["--threshold", "much"], "'much' is no number"),
        (["--every", "-3"], "'-3' is no number of seconds"),
        (["--metric", "beauty"], "invalid choice: 'beauty'"),
        (["--top-n", "3", "--threshold", "1"], "not allowed with argument"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_arguments_that_are_none(table, capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments(table, "c.json", *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said(table, tmp_path, capsys):
    assert main([]) == 2
    assert "no pairs are given; name a CSV or JSON file, --example prints one" in capsys.readouterr().err
    assert main([str(table)]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert main([str(table), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([str(table), "--out", str(tmp_path / "no" / "c.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_bad_pairs_are_all_said_and_nothing_runs(table, capsys):
    with table.open("a") as file:
        file.write("t2 t3,t2,t6,t7\nt2 t3,t2 t3,t6 t8,\n")
    assert main(arguments(table, "c.json")) == 2
    said = capsys.readouterr().err
    assert "2 problems, nothing was run" in said
    assert f"{table}, row 6 (line 7), column corrupt: clean has 2 tokens and corrupt 1" in said
    assert f"{table}, row 7 (line 8), column foil: the cell is empty" in said


def test_a_file_is_never_replaced_unasked(table, capsys):
    out = table.with_name("c.json")
    out.write_text("mine")
    assert main(arguments(table, "c.json", "--method", "eap")) == 2
    assert "exists; name another file, or replace it with --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(arguments(table, "c.json", "--method", "eap", "--force")) == 0
    assert json.loads(out.read_text())["schema"] == 1


def test_work_that_fails_ends_with_1(table, capsys):
    assert main(arguments(table, "c.json", "--method", "eap", "--threshold", "1e9")) == 1
    assert "no edge is left" in capsys.readouterr().err
    assert not table.with_name("c.json").exists()
    assert main(arguments(table, "d.json", "--method", "attribution", "--top-n", "99")) == 1
    assert "12 have a score" in capsys.readouterr().err


def test_the_example_is_printed(capsys):
    assert main(["--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


# ------------------------------------------------------------------------------------------- interrupted and resumed


def interrupt_after(monkeypatch, kind: type[Work], steps: int) -> None:
    """Let Ctrl-C arrive after so many steps of one kind of work."""
    plain = kind.steps

    def stepping(self):
        for count, done in enumerate(plain(self), start=1):
            if count == steps:
                signal.raise_signal(signal.SIGINT)
            yield done

    monkeypatch.setattr(kind, "steps", stepping)


@pytest.mark.parametrize(("stage", "steps"), [("scores", 1), ("scores", 7), ("evaluation", 1), ("evaluation", 9)])
def test_a_resumed_run_equals_a_straight_one_in_every_bit(table, capsys, monkeypatch, stage, steps):
    from attnlab.circuits.work import EvaluationWork

    more = ["--batch-size", "2", "--evaluate", "--steps", "3", "--top-n", "60"]
    assert main(arguments(table, "straight.json", *more)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, EdgeWork if stage == "scores" else EvaluationWork, steps)
        assert main(arguments(table, "c.json", *more)) == 130
    said = capsys.readouterr().err
    kept = table.with_name("c.json.checkpoint")
    assert f"interrupted; {kept} is kept, --resume goes on from it" in said
    assert kept.exists()
    assert not table.with_name("c.json").exists()
    assert main(arguments(table, "c.json", *more)) == 2  # neither --resume nor --force: nothing is thrown away
    assert "go on with --resume, or start over with --force" in capsys.readouterr().err
    assert main(arguments(table, "c.json", *more, "--resume")) == 0
    assert table.with_name("c.json").read_bytes() == table.with_name("straight.json").read_bytes()
    assert not kept.exists()


def test_a_checkpoint_of_another_run_is_refused(table, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, EdgeWork, 2)
        assert main(arguments(table, "c.json", "--steps", "3")) == 130
    capsys.readouterr()
    assert main(arguments(table, "c.json", "--steps", "4", "--resume")) == 2
    assert "is of another run (steps: 3 there, 4 here)" in capsys.readouterr().err
    assert main(arguments(table, "c.json", "--steps", "3", "--top-n", "70", "--resume")) == 0  # the scores are the same


def test_resume_without_a_checkpoint_starts(table, capsys):
    assert main(arguments(table, "c.json", "--method", "eap", "--resume")) == 0
    assert "there is no checkpoint; starting from the beginning" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(table, capsys):
    table.with_name("c.json.checkpoint").write_bytes(b"PK half a file")
    assert main(arguments(table, "c.json", "--method", "eap", "--resume")) == 2
    assert "is no checkpoint of this command" in capsys.readouterr().err


def test_a_checkpoint_holds_no_code(tmp_path):
    path = tmp_path / "x.checkpoint"
    checkpoint.save(path, {"scores": {"steps": 3}}, {"scores": {"effect": np.arange(3.0)}})
    found = checkpoint.load(path)
    assert found.settings == {"scores": {"steps": 3}}
    np.testing.assert_array_equal(found.states["scores"]["effect"], np.arange(3.0))
    np.savez(tmp_path / "bad.npz", head=np.array([object()], dtype=object))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.load(tmp_path / "bad.npz")


# ------------------------------------------------------------------------------------------------ as a process


def start(table: Path, out: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attnlab.circuits", *arguments(table, out, *more)]
    environment = os.environ | {"ATTNLAB_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_goes_on_to_the_same_bits(table, blow):
    more = ["--batch-size", "1", "--steps", "40", "--every", "0"]
    process = start(table, "c.json", *more)
    wait_for(table.with_name("c.json.checkpoint"), process)
    process.send_signal(blow)
    _, said = process.communicate(timeout=120)
    if blow != signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in said
        assert "--resume goes on from it" in said
    else:
        assert process.returncode == -signal.SIGKILL
    assert main(arguments(table, "c.json", *more, "--resume")) == 0
    assert main(arguments(table, "straight.json", *more)) == 0
    assert table.with_name("c.json").read_bytes() == table.with_name("straight.json").read_bytes()


@pytest.mark.timeout(200)
def test_a_process_tells_bad_input_by_its_exit_code(table):
    table.write_text("clean,corrupt,answer,foil\nt2 t3,t2,t6,t7\n")
    process = start(table, "c.json")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert said.count("row 1 (line 2)") == 1
    assert "Traceback" not in said
