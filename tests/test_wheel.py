"""The wheel alone is enough: it builds, installs into an environment of its own, and a notebook runs there from another folder.

That is what Colab does. The environment is kept under ``_build`` and made again only when the lock or the dependencies change.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tools.chapters import BUILD, ROOT
from tools.new_chapter import FIRST_CELL

PIP = ["-m", "pip", "--disable-pip-version-check", "-q"]


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=clean() | environment, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def clean() -> dict[str, str]:
    """This process's environment without what would let the checkout in."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "ATTNLAB_OUT")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """An environment that holds the wheel and what its metadata asks for, at the locked versions."""
    wanted = hashlib.sha256(
        (ROOT / "requirements.lock").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    ).hexdigest()
    home = BUILD / "wheel-environment"
    stamp, interpreter = home / "made-from", home / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(home, clear=True, with_pip=True)
        run(interpreter, *PIP, "install", "-c", ROOT / "requirements.lock", wheel)
        stamp.write_text(wanted)
    run(interpreter, *PIP, "install", "--no-deps", "--force-reinstall", wheel)
    return interpreter


def test_the_wheel_holds_data_claims_and_licences(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "papers.toml",
        "py.typed",
        "claims/circuit-reuse.toml",
        "data/fashion_mnist_subset.npz",
        "data/LICENSE.omniglot",
    ):
        assert f"attnlab/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "notebooks"))]


def test_a_notebook_runs_with_the_wheel_alone(python: Path, tmp_path: Path) -> None:
    cells = [FIRST_CELL.format(slug="circuit-reuse"), USE]
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {
        "cells": [code | {"id": f"c{i}", "source": cell} for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "one.ipynb").write_text(json.dumps(notebook))
    text = run(python, "-c", RUN, cwd=tmp_path, ATTNLAB_OUT=str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert "site-packages" in text
    assert str(ROOT / "src") not in text


#: what a chapter touches: the package, a model, patching, a chart, data, an exercise
USE = """
import attnlab
from attnlab import circuits, claims, data, exercises, figures
from attnlab.models import pretrained

print(attnlab.__file__)
model = circuits.HookedLM(pretrained.tiny())
assert model.spec.n_heads == 6
assert data.fashion_mnist().x_train.shape[1:] == (28, 28)
assert claims.load("circuit-reuse")
exercises.check("circuit-reuse/1", ...)
"""

#: the wheel does not bring a notebook server, so its cells run in the shell that every kernel wraps
RUN = """
import json
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in json.load(open("one.ipynb"))["cells"]:
    shell.run_cell("".join(cell["source"])).raise_error()
"""
