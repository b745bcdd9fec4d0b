"""A folder of converted models that survives interrupted writes, damage and several processes at once.

An entry is a folder of files plus `manifest.json`, which records where the entry came from and the size and SHA-256 of
every file. An entry is built in a temporary sibling and renamed into place, so what has the final name is complete.
Nothing here knows about models: the caller says how to make, write and read a value.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")
MANIFEST = "manifest.json"
SCHEMA = 1
LOCK_SECONDS = 300.0  # a cold build takes some ten seconds; a process that waits longer builds its own copy in memory


class ModelUnavailable(ValueError):
    """A model cannot be had here and now; the message says why and what to do."""


def say(message: str) -> None:
    """Tell the reader something, on standard output: an executed book treats standard error as a failure."""
    print(message, flush=True)


def cache_root() -> Path:
    """The folder of the cache: the environment variable `ATTNLAB_CACHE`, or the user's cache folder."""
    if given := os.environ.get("ATTNLAB_CACHE"):
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("attnlab"))


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def problem(folder: Path, source: Mapping[str, object], *, hashes: bool = True) -> str | None:
    """What is wrong with the entry in `folder`, or None if it is whole and was made from `source`.

    `hashes=False` compares sizes only, which is enough to list models but not to load one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA or manifest["source"] != dict(source):
            return "it was made from another source"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if hashes and sha256(path) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename or MANIFEST).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # unreadable, or not our JSON
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def cached(
    name: str,
    source: Mapping[str, object],
    *,
    make: Callable[[], T],
    write: Callable[[T, Path], None],
    read: Callable[[Path], T],
) -> T:
    """The value `name`, read from the cache if a whole entry made from `source` is there, made and stored otherwise.

    `make()` builds the value in memory (slow), `write(value, folder)` stores it, `read(folder)` gets it back; `source`
    is a JSON-able description of what the value is made from. A damaged entry is reported and rebuilt. If the cache
    folder cannot be written, a temporary folder serves until this process ends; if storing fails later (a full disk),
    nothing stays behind and the value is returned from memory. Errors of `make` pass through, and leave nothing either.
    """
    entry = cache_root() / "weights" / name
    if problem(entry, source) is None:
        return read(entry)
    try:
        with _locked(entry) as scratch:
            return _read_or_build(entry, scratch, source, make, write, read)
    except Timeout:
        say(f"{name}: another process has been writing {entry} for {LOCK_SECONDS:.0f} s; loading without the cache.")
        return make()
    except _NotWritable as refused:
        fallback = _temporary_root() / name
        if problem(fallback, source) is None:
            return read(fallback)
        say(
            f"{name}: the cache folder {entry.parent} cannot be written ({refused}). A temporary folder is used until "
            "this process ends; set ATTNLAB_CACHE to a folder that can be written to keep the converted weights."
        )
        with _locked(fallback) as scratch:
            return _read_or_build(fallback, scratch, source, make, write, read)


class _NotWritable(Exception):
    """The cache folder cannot be created or written."""


@cache
def _temporary_root() -> Path:
    """A private folder that is removed when the process ends."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="attnlab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _locked(entry: Path) -> Iterator[Path]:
    """Hold the entry's lock; gives an empty sibling folder to build in, which is gone afterwards.

    Raises `_NotWritable` if the folder refuses either, `filelock.Timeout` if another process keeps the lock.
    """
    prefix = f".{entry.name}-"
    lock = FileLock(entry.parent / f".{entry.name}.lock", timeout=LOCK_SECONDS)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        raise _NotWritable(error.strerror or str(error)) from error
    try:
        for leftover in entry.parent.glob(f"{prefix}*"):  # of a build that was killed: we hold the lock, nobody uses it
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
        except OSError as error:
            raise _NotWritable(error.strerror or str(error)) from error
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        lock.release()


def _read_or_build(
    entry: Path,
    scratch: Path,
    source: Mapping[str, object],
    make: Callable[[], T],
    write: Callable[[T, Path], None],
    read: Callable[[Path], T],
) -> T:
    """Under the lock: read what another process built meanwhile, or build it."""
    if (fault := problem(entry, source)) is None:
        return read(entry)
    if entry.exists():
        say(f"{entry.name}: the cached copy is rebuilt because {fault}.")
    value = make()
    try:
        _store(value, entry, scratch, source, write)
    except Exception as error:  # the value is whole; whatever the disk or a serialiser says must not lose it
        say(
            f"{entry.name}: the converted weights could not be stored in {entry.parent} ({error}). The model is used "
            "from memory, and the next load converts again; free some space or set ATTNLAB_CACHE to another folder."
        )
    return value


def _store(
    value: T, entry: Path, scratch: Path, source: Mapping[str, object], write: Callable[[T, Path], None]
) -> None:
    """Write the value and its manifest into the scratch folder, then give it the entry's name."""
    fresh, stale = scratch / "fresh", scratch / "stale"
    fresh.mkdir()
    write(value, fresh)
    files = {
        path.relative_to(fresh).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(fresh.rglob("*"))
        if path.is_file()
    }
    manifest = {"schema": SCHEMA, "source": dict(source), "files": files}
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if entry.is_dir():
        entry.rename(stale)  # a folder that is not empty cannot be renamed over; the scratch folder takes it away
    elif entry.exists():
        entry.unlink()
    fresh.rename(entry)
