"""Everything that has to hold, in order of cost: ``python -m tools.check``. Each step says what it is, how long it took and, if it
failed, the command to repeat it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.chapters import ROOT


@dataclass(frozen=True)
class Step:
    """One command of the check."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def steps() -> list[Step]:
    """Cheap ones first; the chapters are executed once and serve both the tests behind them and the book."""
    python, tool = sys.executable, Path(sys.executable).with_name
    pytest = [python, "-m", "pytest"]
    return [
        Step("lint", [str(tool("ruff")), "check", "."]),
        Step("format", [str(tool("ruff")), "format", "--check", "."]),
        Step("types", [str(tool("mypy"))]),
        Step("import directions", [str(tool("lint-imports"))]),
        Step(
            "unit tests",
            [*pytest, "tests", "--ignore=tests/book", "--ignore=tests/notebooks", "--ignore=tests/interpreter"],
        ),
        # a process of its own: the interpreter is chosen when triton is imported
        Step("Triton kernels in the interpreter", [*pytest, "tests/interpreter"], {"TRITON_INTERPRET": "1"}),
        Step("chapters", [python, "-m", "tools.execute"]),
        Step("chapters: form, budgets, claims", [*pytest, "tests/notebooks"]),
        Step("book", [python, "-m", "tools.book"]),
        Step("book in a browser", [*pytest, "tests/book"]),
    ]


def main() -> int:
    todo, started, rows = steps(), time.monotonic(), []
    for number, step in enumerate(todo, start=1):
        print(f"\n=== step {number} of {len(todo)}, {time.monotonic() - started:.0f} s so far: {step.name}", flush=True)
        begun = time.monotonic()
        code = subprocess.run(step.command, cwd=ROOT, env=os.environ | step.environment).returncode
        rows.append((step, code, time.monotonic() - begun))
    print(f"\n{'step':40} {'seconds':>8}  result")
    for step, code, seconds in rows:
        print(f"{step.name:40} {seconds:8.1f}  {'ok' if code == 0 else 'FAILED'}")
    failed = [step for step, code, _ in rows if code]
    for step in failed:
        settings = "".join(f"{key}={value} " for key, value in step.environment.items())
        print(f"to repeat {step.name!r}: {settings}{' '.join(step.command)}")
    print(f"in all {time.monotonic() - started:.0f} s; book: _build/html/index.html, screenshots: _build/screenshots")
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
