"""The command under torchrun: right numbers and a record, or one line a rank and exit code 1, in time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from attnlab import records, scale
from attnlab.scale.__main__ import main

SIZES = ["--length", "32", "--heads", "2", "--width", "4"]

# The command, with a job in which rank 1 does not do its part
SCRIPT = """
import os, signal, sys, time

from attnlab.scale import __main__ as command
from attnlab.scale import demo


def killed(wire, problem):
    if wire.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wire.barrier()


def hanging(wire, problem):
    if wire.rank == 1:
        time.sleep(600)
    wire.barrier()


def hanging_at_the_end(wire, problem):
    if wire.rank == 1:
        time.sleep(600)
    return []


demo.every_form = globals()[sys.argv[1]]
sys.exit(command.main(sys.argv[2:]))
"""


def torchrun(*arguments, timeout=120):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("job", "limit", "said"),
    [
        ("killed", 60, "error: rank 0 lost the connection to a rank that has ended"),
        ("hanging", 6, "was not done within 6 s; the job is ended"),
        ("hanging_at_the_end", 6, "was not done within 6 s; the job is ended"),
    ],
)
def test_a_rank_that_is_lost_ends_the_job_in_time_with_one_line(tmp_path, job, limit, said):
    (tmp_path / "job.py").write_text(SCRIPT)
    start = time.monotonic()
    done = torchrun(str(tmp_path / "job.py"), job, *SIZES, "--time-limit", str(limit))
    took = time.monotonic() - start
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(told) <= 2, done.stderr  # each rank speaks for itself; one may see the other leave first
    assert any(line.endswith(said) for line in told), told
    assert done.stderr.count("Traceback") == 1  # torchrun's own, whatever happened
    assert took < limit + 30  # torchrun and torch have to start


def test_torchrun_runs_the_same_check_and_keeps_it_once(tmp_path):
    done = torchrun("-m", "attnlab.scale", *SIZES, "--record", str(tmp_path / "scale.json"), "--commit", "abc")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zigzag") == 3  # printed once, by rank 0
    record = records.load("scale", tmp_path)
    assert record.command.startswith("torchrun --nproc-per-node 2 -m attnlab.scale --length 32")
    assert record.commit == "abc"
    assert not record.changed()


def test_a_record_has_what_the_table_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "scale.json"
    assert main([*SIZES, "--record", str(path)]) == 0
    record = records.load("scale", tmp_path)
    assert record.command == f"python -m attnlab.scale {' '.join(SIZES)} --record {path}"
    assert "" not in record.sources.values()
    frame = record.frame()
    assert len(frame) == 9
    assert set(frame.method) == {"ring", "ulysses", "gathered"}
    assert set(frame.layout) == set(scale.LAYOUTS)
    assert frame[["error", "gradient error"]].max().max() < 1e-10
    assert (frame[["forward ms", "backward ms"]] > 0).all().all()
    sent = scale.bytes_sent("ring", 2, 16, heads=2, kv_heads=2, width=4, element=8, backward=True)
    assert set(frame.loc[frame.method == "ring", "backward bytes"]) == {sent}
    assert frame.loc[0, ["device", "dtype", "ranks", "T", "H", "G", "K"]].tolist() == ["cpu", "float64", 2, 32, 2, 2, 4]
    table = capsys.readouterr().out
    assert all(f"{took:.1f} ms" in table for took in frame["forward ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time-limit", "0"], "--time-limit 0 must be positive"),
        (["--record", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_what_would_be_noticed_too_late_is_refused_first(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
