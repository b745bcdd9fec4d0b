"""Promises of the repository as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tools import lock
from tools.chapters import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name]


def texts() -> dict[str, str]:
    found = {}
    for name in tracked():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".css", ".bib", ".sh", ""}
            and "vendor/" not in name
            and path.is_file()
        ):
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import attnlab, sys; print([m for m in ('torch', 'numpy', 'altair', 'pandas', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    bare = address.removeprefix("https://")
    assert [name for name, text in texts().items() if bare in text] == ["_config.yml"]


def test_no_file_names_a_path_of_a_machine() -> None:
    pattern = re.compile("|".join(f"/{folder}/" for folder in ("root", "work", "Users")) + r"|/home/[a-z]")
    assert [name for name, text in texts().items() if pattern.search(text)] == []


def test_modules_can_be_held_in_the_head() -> None:
    long = {
        name: text.count("\n") for name, text in texts().items() if name.startswith("src/") and name.endswith(".py")
    }
    assert {name: lines for name, lines in long.items() if lines > 500} == {}


def test_environment_yml_is_what_the_lock_says() -> None:
    assert lock.ENVIRONMENT.read_text(encoding="utf-8") == lock.environment(), "run make lock"


def test_dependencies_have_lower_bounds_and_no_needless_caps() -> None:
    for requirement in PYPROJECT["project"]["dependencies"]:
        assert ">=" in requirement, requirement
    capped = [requirement for requirement in PYPROJECT["project"]["dependencies"] if "<" in requirement]
    assert [re.split(r"[>;]", requirement)[0] for requirement in capped] == ["transformer-lens"]


def test_everything_the_package_imports_is_declared() -> None:
    import grimp

    graph = grimp.build_graph("attnlab", include_external_packages=True, cache_dir=None)
    external = {name for name in graph.modules if not name.startswith("attnlab")} - set(sys.stdlib_module_names)
    declared = {re.split(r"[><=;\s]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]}
    modules = {"scikit-learn": "sklearn", "transformer-lens": "transformer_lens"}
    known = {modules.get(name, name) for name in declared}
    comes_along = {"IPython", "huggingface_hub", "tokenizers"}  # with ipywidgets and transformers
    optional = {"vl_convert"}  # extra lab
    assert external - known - comes_along - optional == set()
