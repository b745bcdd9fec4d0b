"""Ranks that are processes: they agree with one process, and none of them can keep the others waiting."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from attnlab import scale
from attnlab.scale import demo
from attnlab.scale.__main__ import main
from attnlab.scale.wire import ThreadWire

JOBS = """
import os, signal, time

def killed(wire):
    if wire.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wire.barrier()

def hanging(wire):
    if wire.rank == 1:
        time.sleep(600)
    wire.barrier()

def raising(wire):
    if wire.rank == 1:
        raise ValueError("the third shard is missing")
    wire.barrier()

def leaving(wire):
    os._exit(3)

def told(wire, *args):
    return wire.rank, wire.ranks, args
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "rank_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import rank_jobs

    yield rank_jobs
    sys.modules.pop("rank_jobs", None)


def test_two_processes_compute_what_one_does():
    problem = demo.Problem(length=64, heads=4, kv_heads=2, width=8)
    for rows in scale.processes(demo.every_form, 2, problem, 1, time_limit_s=90):
        assert len(rows) == 9
        for row in rows:
            assert max(row["error"], row["gradient error"]) < 1e-10
            assert row["forward bytes"] == row["forward bytes, formula"]
            assert row["backward bytes"] == row["backward bytes, formula"]


@pytest.mark.parametrize(
    ("name", "limit", "error", "message"),
    [
        ("killed", 60, scale.RankError, "rank 1 was killed by SIGKILL"),
        ("raising", 60, scale.RankError, "rank 1 raised ValueError: the third shard is missing"),
        ("leaving", 60, scale.RankError, "rank 0 ended with exit code 3 before it had a result"),
        ("hanging", 8, (TimeoutError, scale.RankError), "within 8 s|Timed out|timed out"),
    ],
)
def test_a_rank_that_fails_ends_the_job_in_time(jobs, name, limit, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        scale.processes(getattr(jobs, name), 2, time_limit_s=limit)
    assert time.monotonic() - start < limit + 5


def test_results_come_in_the_order_of_the_ranks(jobs):
    assert scale.processes(jobs.told, 2, "x", 3, time_limit_s=60) == [(0, 2, ("x", 3)), (1, 2, ("x", 3))]


@pytest.mark.parametrize("start", [scale.processes, scale.threads])
def test_numbers_that_start_nothing_are_refused(start):
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        start(print, 0)
    with pytest.raises(ValueError, match="time_limit_s=0 must be positive"):
        start(print, 2, time_limit_s=0)


def test_a_job_that_no_process_could_import_is_refused():
    with pytest.raises(ValueError, match=r"job=.*lambda.* cannot be imported by a new process; .* scale.threads"):
        scale.processes(lambda wire: wire.rank, 2)


def test_the_command_starts_its_own_processes():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "attnlab.scale",
            "--length",
            "32",
            "--heads",
            "2",
            "--width",
            "4",
            "--dtype",
            "bfloat16",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zigzag") == 3


def test_outside_torchrun_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="start this with torchrun"), scale.joined():
        pass


def test_torchrun_runs_the_same_check():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "attnlab.scale",
    ]
    done = subprocess.run(
        [*command, "--length", "32", "--heads", "2", "--width", "4"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zigzag") == 3  # printed once, by rank 0


def test_the_command_names_what_does_not_divide(capsys):
    for arguments, message in (
        (["--length", "30", "--ranks", "2"], "length=30 is not a positive multiple of 4"),
        (["--heads", "4", "--kv-heads", "3"], "--kv-heads 3 does not divide --heads 4"),
        (["--heads", "3"], "--kv-heads 3 is no multiple of 2 ranks"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_one_rank_needs_no_wire():
    wire = ThreadWire(0, 1, [], 1.0)
    x = torch.arange(6.0)
    assert torch.equal(wire.shift(x)()[0], x)
    assert torch.equal(wire.swap(x[None])[0], x)
    assert torch.equal(wire.gather(x)[0], x)
    assert wire.sent == 0
    with pytest.raises(ValueError, match="one entry of axis 0 for each of 1 ranks"):
        wire.swap(x)


def test_a_thread_that_waits_in_vain_says_for_whom():
    def job(wire: scale.Wire) -> None:
        if wire.rank == 0:
            wire.barrier()

    with pytest.raises(scale.RankError, match=r"rank 0 raised TimeoutError: rank 0 waited 0.2 s for rank 1"):
        scale.threads(job, 2, time_limit_s=0.2)
