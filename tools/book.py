"""Render the book from the executed chapters: ``python -m tools.book [--missing-ok]``.

The pages are laid out in ``_build/site`` as in the repository, the chapters with their outputs, and jupyter-book renders that
folder. Files that did not change keep their time stamp there, so that Sphinx renders again only what did.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.chapters import BUILD, OUT, ROOT, Chapter, all_chapters

SITE = BUILD / "site"
HTML = BUILD / "html"
DOCTREES = BUILD / ".doctrees"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.book", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--missing-ok", action="store_true", help="render chapters that were not executed without their outputs"
    )
    options = parser.parse_args(arguments)
    missing = [chapter.name for chapter in all_chapters() if not chapter.is_fresh()]
    if missing and not options.missing_ok:
        print(
            f"error: not executed since the last change: {', '.join(missing)}; run python -m tools.execute first",
            file=sys.stderr,
        )
        return 2
    lay_out()
    flags = [] if options.missing_ok else ["-W", "--keep-going", "-n"]
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        *flags,
        "--path-output",
        str(ROOT),
        str(SITE),
    ]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"ATTNLAB_OUT": str(OUT), "ATTNLAB_BOOK": "1"}).returncode
    if code != 0:
        shutil.rmtree(DOCTREES, ignore_errors=True)  # or pages with a warning would count as done the next time
    else:
        size = sum(path.stat().st_size for path in HTML.rglob("*") if path.is_file()) / 1e6
        print(f"book: {(HTML / 'index.html').relative_to(ROOT)} ({size:.1f} MB with assets); make serve shows it")
    return code


def lay_out() -> None:
    """Make ``_build/site`` equal to what the book needs, touching only what differs."""
    wanted = dict(_pages())
    for old in [path for path in SITE.rglob("*") if path.is_file() and path.relative_to(SITE).as_posix() not in wanted]:
        old.unlink()
    for name, content in wanted.items():
        target = SITE / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _pages() -> Iterator[tuple[str, bytes]]:
    for name in ("_config.yml", "_toc.yml"):
        yield name, (ROOT / name).read_bytes()
    for path in sorted((ROOT / "book").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    for chapter in all_chapters():
        yield f"notebooks/{chapter.name}.ipynb", json.dumps(with_outputs(chapter), indent=1).encode()


def with_outputs(chapter: Chapter) -> dict[str, Any]:
    """Today's text with the outputs of the last execution (whose code is the same, or the chapter would not be fresh)."""
    notebook = copy.deepcopy(chapter.notebook)
    if not chapter.is_fresh():
        return notebook
    executed = json.loads(chapter.executed.read_text(encoding="utf-8"))
    done = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    for cell, result in zip([c for c in notebook["cells"] if c["cell_type"] == "code"], done, strict=True):
        cell["outputs"], cell["execution_count"] = result["outputs"], result["execution_count"]
    return notebook


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
