"""Which chapters there are, and what the result of each depends on.

A chapter's key is a hash of its code cells, of every module of the package that it imports (directly or not), of its claims,
exercises and records, and of the lock. Prose is not part of it: rewording a paragraph executes nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import grimp
import yaml

from attnlab import papers

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "attnlab"
BUILD = ROOT / "_build"
EXECUTED = BUILD / "executed"
OUT = BUILD / "out"


@dataclass(frozen=True)
class Chapter:
    """One notebook of the table of contents, named ``<part>/<slug>``."""

    name: str

    @property
    def slug(self) -> str:
        return self.name.rsplit("/", 1)[-1]

    @property
    def paper(self) -> papers.Paper | None:
        """What the chapter is about. None for an explorer, and for an introduction, which teaches but claims nothing."""
        return papers.all().get(self.slug)

    @property
    def is_explorer(self) -> bool:
        """A workspace of the folder ``explore``: it has no paper, so no claims, no exercises and no module of its own."""
        return self.name.startswith("explore/")

    @property
    def path(self) -> Path:
        return ROOT / "notebooks" / f"{self.name}.ipynb"

    @property
    def executed(self) -> Path:
        return EXECUTED / f"{self.name}.ipynb"

    @property
    def key_file(self) -> Path:
        return self.executed.with_suffix(".key")

    @cached_property
    def notebook(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def code(self) -> list[str]:
        """Sources of the code cells."""
        return ["".join(cell["source"]) for cell in self.notebook["cells"] if cell["cell_type"] == "code"]

    @cached_property
    def key(self) -> str:
        """What the executed result depends on, as a hash."""
        digest = hashlib.sha256(repr((sys.version_info[:2], self.code)).encode())
        for path in [ROOT / "requirements.lock", *self.sources()]:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()

    def is_fresh(self) -> bool:
        """Whether the executed copy was made from exactly this state."""
        return self.executed.exists() and self.key_file.exists() and self.key_file.read_text() == self.key

    def sources(self) -> list[Path]:
        """Files of the package and records that the chapter reads, sorted."""
        module = f"attnlab.exercises.{self.slug.replace('-', '_')}"
        graph = import_graph()
        # lab loads figures by name, exercises load the chapter's module by name: static analysis sees neither
        start = imported_modules(self.code, graph.modules) | ({module, "attnlab.figures"} & graph.modules)
        modules = {ancestor for name in start for ancestor in _ancestors(name)}
        modules |= {
            ancestor for name in start for up in graph.find_upstream_modules(name) for ancestor in _ancestors(up)
        }
        files = {_module_file(name) for name in modules}
        files |= set((SOURCE / "claims").glob(f"{self.slug}.toml"))
        texts = [*self.code, *(path.read_text(encoding="utf-8") for path in files if path.suffix == ".py")]
        files |= {record for record in (ROOT / "records").rglob("*.*") if self._reads(record, texts)}
        if "attnlab.data" in modules:
            files |= {path for path in (SOURCE / "data").iterdir() if path.suffix in (".npz", ".json")}
        return sorted(files)

    def _reads(self, record: Path, texts: list[str]) -> bool:
        """Whether a record is the chapter's by name, or its stem stands in the code: some are shared."""
        return record.stem.startswith(self.slug) or any(f'"{record.stem}' in text for text in texts)


@cache
def import_graph() -> grimp.ImportGraph:
    """The package's import graph (modules without ``__init__`` or a file of their own do not occur)."""
    return grimp.build_graph("attnlab", cache_dir=None)


def imported_modules(cells: list[str], known: set[str]) -> set[str]:
    """Modules of the package that code cells import; IPython magics are skipped."""
    found: set[str] = set()
    for cell in cells:
        plain = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            found |= set(names) & known
    return found


def all_chapters() -> list[Chapter]:
    """The notebooks that ``_toc.yml`` lists, in its order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [Chapter(name.removeprefix("notebooks/")) for name in _files(toc) if name.startswith("notebooks/")]


def toc_pages() -> list[str]:
    """Every page of ``_toc.yml``, in its order, without suffix."""
    return list(_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))


def _files(entry: Any) -> list[str]:
    if isinstance(entry, list):
        return [name for item in entry for name in _files(item)]
    if not isinstance(entry, dict):
        return []
    own = [entry[key] for key in ("root", "file") if key in entry]
    return own + [name for key in ("parts", "chapters", "sections") for name in _files(entry.get(key))]


def _ancestors(name: str) -> list[str]:
    """A module and the packages that Python imports on the way to it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _module_file(name: str) -> Path:
    path = SOURCE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
