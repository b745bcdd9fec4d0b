"""Resolve ``pyproject.toml`` into ``requirements.lock`` and write ``environment.yml`` from it: ``python -m tools.lock``.

GPU libraries are left out of the lock: torch brings those that its build needs, and a CPU build needs none.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from tools.chapters import ROOT

LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"
LEFT_OUT = re.compile(r"(nvidia|cuda)-")


def resolve() -> str:
    """The lock's text, one pinned package a line, valid for every supported Python and platform."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal", "--quiet"]
    command += ["--python-version", "3.11", "--no-header", "--no-annotate", "--upgrade"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept = [line for line in text.splitlines() if not LEFT_OUT.match(line)]
    return "# Made by `make lock` from pyproject.toml; do not edit.\n" + "\n".join(kept) + "\n"


def environment() -> str:
    """``environment.yml`` for conda and Binder: the lock itself is its pip section, so the two cannot drift apart."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line]
    name = pyproject["project"]["name"]
    lines = [
        "# Made by `make lock`; do not edit. The weights come with postBuild (Binder) or as README.md says (conda).",
        f"name: {name}",
    ]
    lines += ["channels: [conda-forge]", "dependencies:", "  - python=3.12", "  - pip", "  - pip:"]
    lines += [f'      - "{pin}"' for pin in pins] + ["      - -e ."]
    return "\n".join(lines) + "\n"


def main() -> int:
    LOCK.write_text(resolve(), encoding="utf-8")
    ENVIRONMENT.write_text(environment(), encoding="utf-8")
    print(
        f"{LOCK.name}: {sum('==' in line for line in LOCK.read_text().splitlines())} packages; {ENVIRONMENT.name} written"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
