"""A pytest plugin that tells how far the chapters are and leaves their outcomes in ``chapters.json`` of the working folder."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

BEAT_S = 15
#: our own copy of standard output: pytest captures descriptor 1 while a chapter runs, and lines printed then would be lost
SCREEN = os.fdopen(os.dup(1), "w", buffering=1)


class Progress:
    """Counts chapters as they finish; a line every few seconds while they run."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.running: list[str] = []
        self.total = 0
        self.results: dict[str, str] = {}
        self.over = threading.Event()
        self.parent = os.getppid()
        self.beat = threading.Thread(target=self._beat, daemon=True)

    @pytest.hookimpl
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.total = len(session.config.args)
        self.beat.start()

    @pytest.hookimpl
    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.running.append(nodeid)
        self._say(f"{_name(nodeid)} starts")

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        path = str((Path.cwd() / report.nodeid.split("::")[0]).resolve())
        self.results[path] = report.outcome
        if report.nodeid in self.running:
            self.running.remove(report.nodeid)
        self._say(f"{_name(report.nodeid)} {report.outcome} in {report.duration:.0f} s")

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.over.set()
        (Path.cwd() / "chapters.json").write_text(json.dumps(self.results, indent=1))

    def _beat(self) -> None:
        due = time.monotonic() + BEAT_S
        while not self.over.wait(1):
            # tools.execute was killed: an orphan would slow the next run and write beside it; kernels follow by themselves
            if os.getppid() != self.parent:
                os._exit(1)
            if self.running and time.monotonic() >= due:
                due += BEAT_S
                self._say("running " + ", ".join(_name(nodeid) for nodeid in self.running))

    def _say(self, text: str) -> None:
        done = len(self.results)
        spent = time.monotonic() - self.started
        left = f", about {spent / done * (self.total - done):.0f} s left" if 0 < done < self.total else ""
        print(
            f"\n[chapter {min(done + 1, self.total)} of {self.total}, {spent:.0f} s so far{left}] {text}", file=SCREEN
        )


def _name(nodeid: str) -> str:
    path = Path(nodeid.split("::")[0])
    return f"{path.parent.name}/{path.stem}"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist only the controller counts
        config.pluginmanager.register(Progress())
