"""Execute the chapters that changed, each once, two at a time, under nbmake.

``python -m tools.execute [circuits/circuit-reuse ...] [--force]``: every chapter of ``_toc.yml`` if none is named. The executed
copies lie in ``_build/executed`` (the book renders them), claim rows and run reports in ``_build/out``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.chapters import BUILD, OUT, ROOT, Chapter, all_chapters

CELL_LIMIT_S = 240  # one cell, on a machine that runs two chapters at once
CHAPTER_LIMIT_S = 400


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.execute", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("chapters", nargs="*", help="<part>/<slug>; all chapters if left out")
    parser.add_argument("--force", action="store_true", help="execute also what has not changed")
    options = parser.parse_args(arguments)
    try:
        chosen = pick(options.chapters)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [chapter for chapter in chosen if options.force or not chapter.is_fresh()]
    print(
        f"chapters: {len(chosen)} in all, {len(chosen) - len(stale)} unchanged since they last ran, {len(stale)} to execute"
    )
    code = execute(stale) if stale else 0
    report(chosen)
    return code


def pick(names: list[str]) -> list[Chapter]:
    """The chapters of these names, or all.

    Raises:
        ValueError: for a name that ``_toc.yml`` does not list.
    """
    known = {chapter.name: chapter for chapter in all_chapters()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"chapter {unknown[0]!r} is not in _toc.yml; there are: {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def execute(chapters: list[Chapter]) -> int:
    """Run the chapters under nbmake in a scratch folder; only one that succeeds is kept and gets a key.

    nbmake skips everything below a folder named ``_build``, and a run that is killed must leave nothing half done.
    """
    keys = {chapter: chapter.key for chapter in chapters}  # of the state that runs, even if a file changes meanwhile
    for chapter in chapters:
        chapter.key_file.unlink(missing_ok=True)
        for old in [*OUT.glob(f"claims/{chapter.slug}--*.json"), OUT / f"{chapter.slug}.run.json"]:
            old.unlink(missing_ok=True)
    workers = min(2, len(chapters))
    with tempfile.TemporaryDirectory(prefix="attnlab-") as scratch:
        copies = {chapter: Path(scratch) / f"{chapter.name}.ipynb" for chapter in chapters}
        for chapter, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chapter.path, copy)
        command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", f"--nbmake-timeout={CELL_LIMIT_S}"]
        command += [f"--timeout={CHAPTER_LIMIT_S}", "-p", "tools.progress", "--rootdir", scratch, "-c", os.devnull]
        command += ["-q", "--no-header"] + (["-n", str(workers)] if workers > 1 else [])
        command += [str(copy) for copy in copies.values()]
        code = subprocess.run(command, cwd=scratch, env=os.environ | settings(workers)).returncode
        outcomes = Path(scratch) / "chapters.json"
        results = json.loads(outcomes.read_text()) if outcomes.exists() else {}
        for chapter, copy in copies.items():
            chapter.executed.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copy, chapter.executed)  # a failed one too: its traceback is the thing to read
            if results.get(str(copy)) != "passed":
                continue
            if complaint := noise(chapter):
                print(f"FAILED {chapter.name}: {complaint}")
                code = code or 1
            else:
                chapter.key_file.write_text(keys[chapter])
    return code


def settings(workers: int) -> dict[str, str]:
    """Environment of the kernels: static figures without progress bars, no network, an even share of the cores."""
    # on a machine that others use, ATTNLAB_THREADS=1 is far faster than threads that wait for each other
    threads = os.environ.get("ATTNLAB_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    return {
        "ATTNLAB_BOOK": "1",
        "ATTNLAB_OUT": str(OUT),
        "ATTNLAB_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),  # for the plugin tools.progress; kernels import the installed package
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def noise(chapter: Chapter) -> str:
    """The first warning or message on standard error in the executed notebook; chapters must have none."""
    for number, cell in enumerate(json.loads(chapter.executed.read_text(encoding="utf-8"))["cells"]):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                return f"cell {number} wrote to standard error: {''.join(output['text'])[:300]}"
    return ""


def report(chapters: list[Chapter]) -> None:
    """One line a chapter: seconds, CPU seconds, memory."""
    print(f"{'chapter':44} {'seconds':>8} {'CPU s':>8} {'MB':>7}")
    for chapter in chapters:
        path = OUT / f"{chapter.slug}.run.json"
        if path.exists() and chapter.is_fresh():
            run = json.loads(path.read_text())
            print(f"{chapter.name:44} {run['seconds']:8.1f} {run['cpu_seconds']:8.1f} {run['peak_memory_mb']:7.0f}")
        else:
            print(f"{chapter.name:44} {'did not finish':>25}")
    print(f"executed notebooks: {BUILD.relative_to(ROOT) / 'executed'}; claim rows: {OUT.relative_to(ROOT) / 'claims'}")


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
