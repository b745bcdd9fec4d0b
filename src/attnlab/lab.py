"""The frame of every chapter: one set-up call, the device, seeds, progress bars, source listings and the budget.

The first code cell of a chapter calls :func:`setup`. In a notebook it also starts a clock: after every cell the
seconds and the memory used so far are written to ``<out>/<slug>.run.json``, and one line is printed if the chapter
costs more than it promises. torch is imported by the functions that need it, so that ``import attnlab.lab`` is fast.
"""

import html
import importlib
import importlib.util
import inspect
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attnlab import __version__, papers

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

BUDGET_SECONDS = 90.0  # of one chapter alone on two cores, so twice as many CPU seconds
BUDGET_CPU_SECONDS = 2 * BUDGET_SECONDS
BUDGET_MB = 3000.0
MOST_THREADS = 8  # the chapters' matrices are small: more threads only wait for each other


@dataclass(frozen=True)
class Chapter:
    """What :func:`setup` found; the last line of a cell shows it as one line."""

    slug: str
    title: str
    versions: dict[str, str]
    device: str
    threads: int

    def facts(self) -> list[str]:
        """Versions, device, threads and budget, one string each."""
        budget = f"budget {BUDGET_SECONDS:.0f} s, {BUDGET_MB / 1000:.0f} GB"
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return [*(f"{name} {version}" for name, version in self.versions.items()), self.device, threads, budget]

    def __repr__(self) -> str:
        return f"{self.slug}: {self.title} · " + " · ".join(self.facts())

    def _repr_html_(self) -> str:
        facts = " · ".join(map(html.escape, self.facts()))
        return (
            f'<p class="attnlab-setup"><strong>{html.escape(self.title)}</strong> '
            f"<code>{html.escape(self.slug)}</code> · <small>{facts}</small></p>"
        )


def setup(slug: str, title: str | None = None) -> Chapter:
    """Prepare this process for one chapter: seeds, threads, device, charts, and the clock of the budget.

    Args:
        slug: the chapter's paper, such as ``circuit-reuse``.
        title: shown instead of the paper's title; with it the slug need not be a paper's (explorers).

    Returns:
        the chapter. A notebook shows it as the value of the cell; elsewhere it is printed.

    Raises:
        ValueError: an unknown slug (with close matches), or a number of threads that is none.
    """
    name = papers.get(slug).title if title is None else title
    clock = _Clock(slug)  # before torch is imported, which is part of what a chapter costs
    threads = _set_threads()
    seed(0)
    chapter = Chapter(slug, name, versions(), str(device()), threads)
    shell = _shell()
    if importlib.util.find_spec("altair") is not None:
        importlib.import_module("attnlab.figures").enable()  # by name: lab stands below figures
    if shell is None:
        print(chapter)
    else:
        _start_clock(shell, clock)
    return chapter


def device() -> "torch.device":
    """The CUDA device if there is one, else the CPU. (Apple's GPUs lack the float64 that the proofs run in.)"""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> "torch.dtype":
    """What models run in on :func:`device`: bfloat16 where the GPU computes in it, else float32. Proofs use float64."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float32


def seed(n: int) -> None:
    """Seed Python, NumPy and torch (every device) with ``n``; ``0 <= n < 2**32``, or a ``ValueError``."""
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**32:
        raise ValueError(f"n: a seed is an integer from 0 to 2**32 - 1, not {n!r}")
    import numpy as np
    import torch

    random.seed(n)
    np.random.seed(n)  # noqa: NPY002 - the global stream is what libraries draw from when nobody gives a generator
    torch.manual_seed(n)


def progress(iterable: Iterable[T], desc: str = "", total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar (a widget in a notebook, text elsewhere); the book's pages show none."""
    if in_book():
        return iterable
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(iterable, desc=desc or None, total=total)
    return bar


@dataclass(frozen=True)
class Source:
    """Source text that a notebook shows highlighted and everything else as it is written."""

    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from pygments import formatters, highlight, lexers  # type: ignore[import-untyped]

        # The book has a style sheet with a light and a dark half; a live notebook has none for our classes.
        book = in_book()
        code = highlight(
            self.text, lexers.PythonLexer(stripnl=False), formatters.HtmlFormatter(nowrap=True, noclasses=not book)
        )
        look = "" if book else ' style="background: #f8f8f8; color: #202020; padding: 0.6em 0.8em"'
        return f'<div class="attnlab-source highlight"><pre{look}>{code}</pre></div>'


def source(*things: Callable[..., Any] | type) -> Source:
    """The source of functions and classes as the package has it, complete, in the order given.

    Raises:
        ValueError: nothing given, or something whose source cannot be found (a built-in, an instance).
    """
    if not things:
        raise ValueError("source: give at least one function or class")
    return Source("\n\n".join(_source_text(thing).rstrip("\n") + "\n" for thing in things))


def in_book() -> bool:
    """Whether this run makes the static pages of the book (``ATTNLAB_BOOK=1``)."""
    return os.environ.get("ATTNLAB_BOOK") == "1"


def out_dir() -> Path:
    """The folder for what a run measures: ``ATTNLAB_OUT``, else ``attnlab-out`` in the user's cache. It exists."""
    given = os.environ.get("ATTNLAB_OUT")
    if given:
        folder = Path(given)
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("attnlab")) / "attnlab-out"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Versions that every measurement carries: python, torch and attnlab. torch is asked without loading it."""
    return {"python": platform.python_version(), "torch": metadata.version("torch"), "attnlab": __version__}


def machine() -> dict[str, Any]:
    """Where a measurement ran: platform, number of CPUs, and the GPU's name or None."""
    # Asking torch costs seconds where it is not loaded yet, and who has not loaded it has not used its GPU.
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {"platform": platform.platform(terse=True), "cpus": os.cpu_count(), "gpu": gpu}


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    half.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    half.replace(path)


def now() -> str:
    """The present as an ISO date and time, UTC, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Clock:
    """Seconds and memory of one chapter, from its set-up on. Pauses between cells do not count."""

    def __init__(self, slug: str) -> None:
        self.slug = slug
        self.seconds = 0.0
        self.cell_began: float | None = time.perf_counter()
        self.cpu_began = time.process_time()
        self.warned = False

    def before_cell(self) -> None:
        self.cell_began = time.perf_counter()

    def after_cell(self) -> None:
        if self.cell_began is not None:
            self.seconds += time.perf_counter() - self.cell_began
            self.cell_began = None
        report = self.report()
        write_json(out_dir() / f"{self.slug}.run.json", report)
        if not self.warned and (excess := _excess(report)):
            self.warned = True
            print(f"{self.slug} is over its budget: {excess}.")

    def report(self) -> dict[str, Any]:
        """The run report as it is written."""
        memory = peak_memory_mb()
        return {
            "slug": self.slug,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(time.process_time() - self.cpu_began, 2),
            "peak_memory_mb": None if memory is None else round(memory, 1),
        }


def peak_memory_mb() -> float | None:
    """The most memory this process has held so far, in MB of 10^6 bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def _excess(report: dict[str, Any]) -> str:
    """What of a run report exceeds the budget, in words; empty if nothing does."""
    parts = []
    if report["cpu_seconds"] > BUDGET_CPU_SECONDS:
        parts.append(f"{report['cpu_seconds']:.0f} CPU seconds of {BUDGET_CPU_SECONDS:.0f}")
    if (report["peak_memory_mb"] or 0.0) > BUDGET_MB:
        parts.append(f"{report['peak_memory_mb'] / 1000:.1f} GB of {BUDGET_MB / 1000:.0f}")
    return " and ".join(parts)


_clock: _Clock | None = None


def _start_clock(shell: Any, clock: _Clock) -> None:
    """Let ``clock`` run from now on. IPython keeps a callback once, however often it is registered."""
    global _clock
    _clock = clock
    shell.events.register("pre_run_cell", _before_cell)
    shell.events.register("post_run_cell", _after_cell)


def _before_cell(_info: Any) -> None:
    if _clock is not None:
        _clock.before_cell()


def _after_cell(_result: Any) -> None:
    if _clock is not None:
        _clock.after_cell()


def _shell() -> Any:
    """The running IPython shell, or None. A process that has not loaded IPython is in none."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside: two that wait for a core which somebody else uses cost more than they bring."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _set_threads() -> int:
    """Set torch's number of threads from ``ATTNLAB_THREADS``, else to the CPUs, and return it."""
    import torch

    given = os.environ.get("ATTNLAB_THREADS")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"ATTNLAB_THREADS: a positive integer is wanted, not {given!r}")
    threads = int(given) if given else min(os.cpu_count() or 1, MOST_THREADS)
    torch.set_num_threads(threads)
    return threads


def _source_text(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError) as error:
        name = getattr(thing, "__qualname__", repr(thing))
        raise ValueError(f"source: a function or class written in Python is wanted; {name} has no source") from error
