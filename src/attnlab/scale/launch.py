"""Start a function on several ranks, and end all of them when one fails, is killed, or hangs."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from attnlab.scale.wire import ProcessWire, ThreadWire, Wire

GRACE_S = 1.0  # after the first failure, for the reports of the others
RAN_OUT = "ran out of memory"
DIED = ("was killed by", "ended with exit code")
SHORT_OF_MEMORY = ("out of memory", "can't allocate memory")  # in a RuntimeError of NCCL or of the allocator for CPUs


class RankError(RuntimeError):
    """A rank failed or was killed; the message says what each of them met, or only where memory ran out or a rank died."""


def processes(
    job: Callable[..., Any], ranks: int, *args: Any, time_limit_s: float = 60.0, threads: int = 1
) -> list[Any]:
    """Run ``job(wire, *args)`` in ``ranks`` new processes of this machine (gloo); results in the order of the ranks.

    ``job`` must be importable: a function of a module, not of a notebook. No port is opened to other machines.

    Args:
        time_limit_s: for everything, starting included (a few seconds).
        threads: of each process.

    Raises:
        RankError: a rank raised or was killed; the others are ended.
        TimeoutError: a rank was not done in time; all are ended.
        ValueError: fewer than one rank, a limit that is no time, or a job that a new process could not import.
    """
    _check(ranks, time_limit_s)
    _check_importable(job)
    deadline = time.monotonic() + time_limit_s
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="attnlab-ranks-") as folder:
        running, pipes = [], []
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                where = (os.path.join(folder, "store"), rank, ranks, time_limit_s, threads)
                process = context.Process(target=_child, args=(theirs, where, job, args), daemon=True)
                process.start()
                theirs.close()
                running.append(process)
                pipes.append(ours)
            results, failures = _collect(running, pipes, deadline)
        finally:
            for process in running:
                process.kill()
                process.join()
    return _in_order(results, failures, ranks, time_limit_s, "all ranks were ended")


def threads(job: Callable[..., Any], ranks: int, *args: Any, time_limit_s: float = 60.0) -> list[Any]:
    """Run ``job(wire, *args)`` on ranks that are threads of this process, for CPU tensors: nothing to start, nothing to gain.

    Args:
        time_limit_s: for everything, and a moment more for the reports. A thread cannot be ended: one that hangs goes on in the
            background, and does not keep the interpreter from leaving. Where that matters, use :func:`processes`.

    Raises:
        RankError: a rank raised, or waited longer than ``time_limit_s`` for another.
        TimeoutError: a rank was not done in time.
        ValueError: fewer than one rank, or a limit that is no time.
    """
    _check(ranks, time_limit_s)
    post: list[list[queue.Queue[Any]]] = [[queue.Queue() for _ in range(ranks)] for _ in range(ranks)]
    reports: queue.Queue[tuple[int, bool, Any]] = queue.Queue()

    def run(rank: int) -> None:
        try:
            reports.put((rank, True, job(ThreadWire(rank, ranks, post, time_limit_s), *args)))
        except Exception as error:
            reports.put((rank, False, shortage(error) or f"raised {type(error).__name__}: {error}"))

    deadline = time.monotonic() + time_limit_s + GRACE_S  # who waits in vain says so before all is called late
    for rank in range(ranks):
        threading.Thread(target=run, args=(rank,), daemon=True).start()
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < ranks:
        try:
            rank, good, what = reports.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        (results if good else failures)[rank] = what
        if not good:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return _in_order(results, failures, ranks, time_limit_s, "threads cannot be ended and go on")


@contextmanager
def joined(time_limit_s: float = 60.0) -> Iterator[Wire]:
    """The wire of a process that ``torchrun`` started: NCCL where each local rank has a GPU, otherwise gloo.

    An operation that waits longer than ``time_limit_s`` for another rank raises, and torchrun ends the job; all ranks wait for each
    other before they leave. With NCCL such a wait aborts the process instead: :func:`ended_after` ends it with a message before.

    Raises:
        RuntimeError: outside torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError("RANK and WORLD_SIZE are not set; start this with torchrun, or use attnlab.scale.processes")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if on_gpu else None
    if device:
        torch.cuda.set_device(device)
    backend = "nccl" if device else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=time_limit_s), device_id=device)
    try:
        wire = ProcessWire()
        yield wire
        wire.barrier()  # a rank that hangs now would leave torchrun waiting for it
    finally:
        dist.destroy_process_group()


@contextmanager
def ended_after(time_limit_s: float, message: str) -> Iterator[None]:
    """End this process with ``message`` on standard error and exit code 1 if what is inside takes longer.

    The last resort, for what no exception can leave: an endless loop, or a kernel that waits for another rank.
    """

    def end() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(time_limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shortage(error: BaseException) -> str | None:
    """``ran out of memory: ...`` on one line if that is what ``error`` means, on a GPU or a CPU; None for another error."""
    told = [line for line in str(error).splitlines() if any(mark in line.lower() for mark in SHORT_OF_MEMORY)]
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not (isinstance(error, RuntimeError) and told):
        return None
    what = (told or str(error).splitlines() or ["no more is known"])[0]
    return f"{RAN_OUT}: {what.split(' Including non-PyTorch memory')[0].rstrip('.')}"


def _in_order(
    results: dict[int, Any], failures: dict[int, str], ranks: int, time_limit_s: float, what_then: str
) -> list[Any]:
    """The results of all ranks, or the error that tells why there are fewer."""
    if failures:
        raise RankError(_summary(failures))
    if late := [str(rank) for rank in range(ranks) if rank not in results]:
        raise TimeoutError(f"rank {', '.join(late)} of {ranks} not done within {time_limit_s:g} s; {what_then}")
    return [results[rank] for rank in range(ranks)]


def _summary(failures: dict[int, str]) -> str:
    """A line for each rank that failed; where some ran out of memory or died the others only lost them, and are left out."""
    for cause in ((RAN_OUT,), DIED):
        if told := {rank: what for rank, what in failures.items() if what.startswith(cause)}:
            failures = told
            break
    return "; ".join(f"rank {rank} {what}" for rank, what in sorted(failures.items()))


def _child(pipe: Connection, where: tuple[str, int, int, float, int], job: Callable[..., Any], args: tuple) -> None:
    store, rank, ranks, limit, threads_each = where
    torch.set_num_threads(threads_each)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: nothing listens to other machines
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=limit)
        )
        result = job(ProcessWire(), *args)
        dist.barrier()  # nobody leaves while another still reads from it
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.destroy_process_group()
    except Exception as error:
        what = shortage(error) or f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps((False, what)))


def _collect(running: list[Any], pipes: list[Connection], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and failures of the ranks until all have reported, one has failed (and a moment more), or time is up."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(running) and (left := deadline - time.monotonic()) > 0:
        waiting = {pipes[rank]: rank for rank in range(len(running)) if rank not in results and rank not in failures}
        for pipe in wait(list(waiting), timeout=left):
            rank = waiting[pipe]  # type: ignore[index]
            try:
                good, what = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:  # it ended without a word
                running[rank].join(timeout=10 * GRACE_S)  # the interpreter is on its way out
                good, what = False, _ending(running[rank].exitcode)
            (results if good else failures)[rank] = what
            if not good:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return results, failures


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"{DIED[0]} {signal.Signals(-code).name} (out of memory, if nobody sent it)"
    return f"{DIED[1]} {code} before it had a result"


def _check_importable(job: Callable[..., Any]) -> None:
    module, name = getattr(job, "__module__", None), getattr(job, "__qualname__", "<object>")
    in_notebook = module == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    if module is None or "<" in name or in_notebook:
        raise ValueError(
            f"job={module}.{name} cannot be imported by a new process; define it at the top of a module, "
            "or run it on threads with scale.threads"
        )


def _check(ranks: int, time_limit_s: float) -> None:
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s={time_limit_s} must be positive")
