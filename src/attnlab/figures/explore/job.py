"""Long work beside a live notebook: one thread, a bar, and a Cancel button that is heard between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Stepwise(Protocol):
    """What a job can run, such as :class:`attnlab.circuits.work.Work`."""

    name: str
    total: int
    done: int

    def steps(self) -> Iterator[int]:
        """Do what is left, yielding after each step."""

    def result(self) -> Any:
        """The result, once every step is done."""


class Once:
    """A plain function as work of one step; it cannot be cancelled in between."""

    total = 1
    done = 0

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        self.name, self._call = name, call

    def steps(self) -> Iterator[int]:
        self._result = self._call()
        self.done = 1
        yield 1

    def result(self) -> Any:
        return self._result


class Job:
    """Work in a thread of its own.

    ``on_step(done, total, seconds left or None)`` is called after each step, then one of ``on_result(result)``, ``on_cancel()`` or
    ``on_error(error)``, all in that thread. ``lock`` is held during a step, so that whoever shares the model can wait for it.
    """

    def __init__(
        self,
        work: Stepwise,
        *,
        on_step: Callable[[int, int, float | None], None],
        on_result: Callable[[Any], None],
        on_cancel: Callable[[], None],
        on_error: Callable[[BaseException], None],
        lock: threading.RLock,
    ) -> None:
        self.work, self.lock = work, lock
        self.on_step, self.on_result, self.on_cancel, self.on_error = on_step, on_result, on_cancel, on_error
        self._stop = threading.Event()
        self._threads = torch.get_num_threads()  # a new thread would start with the machine's default
        self.thread = threading.Thread(target=self._run, name=f"attnlab {work.name}", daemon=True)

    def start(self) -> Job:
        self.thread.start()
        return self

    def cancel(self) -> None:
        """Stop after the step that runs now."""
        self._stop.set()

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def wait(self) -> None:
        """Wait for the end. An interrupt of the kernel (KeyboardInterrupt) cancels the work, waits for its step, and ends here."""
        try:
            while self.thread.is_alive():
                self.thread.join(0.05)
        except KeyboardInterrupt:
            self.cancel()
            self.thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        started, before = time.monotonic(), self.work.done
        try:
            steps = self.work.steps()
            while not self._stop.is_set():
                with self.lock:
                    done = next(steps, None)
                if done is None:
                    break
                spent = time.monotonic() - started
                fresh = done - before
                self.on_step(done, self.work.total, spent / fresh * (self.work.total - done) if fresh else None)
            else:
                if self.work.done < self.work.total:
                    self.on_cancel()
                    return
            with self.lock:
                result = self.work.result()
            self.on_result(result)
        except BaseException as error:  # whatever it was, the panel has to hear of it
            self.on_error(error)
