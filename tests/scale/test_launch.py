"""Ranks that are processes: they agree with one process, and none of them can keep the others waiting."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

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

def starved(wire, *args):
    import torch
    if wire.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 GiB. Including non-PyTorch memory, 1 GiB")
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
        ("killed", 60, scale.RankError, "^rank 1 was killed by SIGKILL"),
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


REMEDY = "; try a smaller --length, --heads or --batch\n"


def test_memory_that_runs_out_in_a_process_of_the_command_is_one_line(jobs, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(demo, "every_form", jobs.starved)
    assert main(["--length", "32", "--heads", "2", "--width", "4"]) == 1
    wanted = "error: rank 1 ran out of memory: CUDA out of memory. Tried to allocate 256.00 GiB" + REMEDY
    assert capsys.readouterr().err == wanted


@pytest.fixture
def under_torchrun(monkeypatch):
    """Rank 0 of 1 without torchrun; call it with the error that the job is to raise."""

    @contextmanager
    def joined(time_limit_s):
        yield ThreadWire(0, 1, [], time_limit_s)

    def ends_with(error):
        def every_form(wire, problem):
            raise error

        monkeypatch.setattr(demo, "every_form", every_form)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(scale.launch, "joined", joined)
    return ends_with


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "CUDA out of memory. Tried to"),
        (RuntimeError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), "Cuda failure 2 'out of memory'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (MemoryError(), "no more is known"),
    ],
)
def test_memory_that_runs_out_under_torchrun_is_one_line(under_torchrun, capsys, error, said):
    under_torchrun(error)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: rank 0 ran out of memory: {said}")
    assert told.endswith(REMEDY)
    assert told.count("\n") == 1


def test_the_loss_of_another_rank_is_one_line_and_other_errors_keep_their_traceback(under_torchrun, capsys):
    under_torchrun(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1456."))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "error: rank 0 lost the connection to a rank that has ended\n"
    under_torchrun(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main([])


def test_other_errors_are_no_shortage_of_memory():
    assert scale.launch.shortage(RuntimeError("shapes do not fit")) is None
    assert scale.launch.shortage(ValueError("out of memory")) is None


def test_memory_that_runs_out_in_a_thread_is_told_alone():
    def job(wire):
        if wire.rank == 0:
            raise MemoryError
        wire.barrier()

    with pytest.raises(scale.RankError, match=r"^rank 0 ran out of memory: no more is known$"):
        scale.threads(job, 2, time_limit_s=0.2)


@pytest.mark.parametrize("gpus", [0, 2])
def test_each_rank_of_torchrun_names_its_own_gpu(monkeypatch, gpus):
    started = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: started.update(set=device))
    monkeypatch.setattr(
        scale.launch.dist, "init_process_group", lambda backend, **rest: started.update(rest, on=backend)
    )
    monkeypatch.setattr(scale.launch.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        scale.launch, "ProcessWire", lambda: SimpleNamespace(barrier=lambda: started.update(waited=True))
    )
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with scale.joined():
        assert "waited" not in started
    assert started.pop("waited")  # nobody leaves alone
    one = torch.device("cuda", 1)
    wanted = {"on": "nccl", "device_id": one, "set": one} if gpus else {"on": "gloo", "device_id": None}
    assert {name: value for name, value in started.items() if name != "timeout"} == wanted


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


def test_a_thread_that_hangs_does_not_hold_up_the_caller():
    released = threading.Event()

    def job(wire: scale.Wire, waited_for: bool) -> None:
        if wire.rank == 1:
            released.wait(60)
        elif waited_for:
            wire.barrier()

    for waited_for, error, message in (
        (True, scale.RankError, "rank 0 raised TimeoutError: rank 0 waited 0.2 s for rank 1"),
        (False, TimeoutError, "rank 1 of 2 not done within 0.2 s; threads cannot be ended and go on"),
    ):
        start = time.monotonic()
        with pytest.raises(error, match=message):
            scale.threads(job, 2, waited_for, time_limit_s=0.2)
        assert time.monotonic() - start < 0.2 + 2 * scale.launch.GRACE_S
    released.set()


def test_the_lost_rank_of_the_page():
    with pytest.raises(scale.RankError, match=r"^rank 1 ended with exit code 1 before it had a result$"):
        scale.processes(demo.losing_one, 2, "dies", time_limit_s=60)


def test_what_takes_too_long_is_ended_with_its_message():
    code = "import time; from attnlab.scale import launch\nwith launch.ended_after(0.2, 'too late'): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "too late\n")
    with scale.launch.ended_after(0.2, "not shown"):
        pass
    time.sleep(0.3)  # this process is still here


def test_a_rank_that_did_not_come_is_one_line(under_torchrun, capsys):
    under_torchrun(RuntimeError("[unbound_buffer.cc:133] Timed out waiting 8000ms for recv operation to complete"))
    with pytest.raises(SystemExit):
        main([])
    told = capsys.readouterr().err
    assert told == "error: rank 0 waited for another rank until the time limit; did all start, and does one hang?\n"
