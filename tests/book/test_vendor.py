"""The scripts that the pages load are the ones the manifest names, each with its licence beside it."""

import importlib.util
import json
import subprocess
import tarfile
import urllib.parse
from pathlib import Path

import altair as alt
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def vendor():
    """tools/vendor.py as a module."""
    spec = importlib.util.spec_from_file_location("vendor", ROOT / "tools" / "vendor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_match_their_hashes(vendor):
    assert vendor.problems(vendor.read_manifest()) == []


def test_each_package_brings_its_licence(vendor):
    for package in vendor.read_manifest():
        assert package["licence"] in {"BSD-3-Clause", "Apache-2.0", "MIT"}
        texts = [entry["path"] for entry in package["files"] if "LICENSE" in entry["path"]]
        assert texts, f"{package['name']} has no licence text"
        assert "copyright" in (vendor.VENDOR / texts[0]).read_text(encoding="utf-8").lower()


def test_versions_draw_what_altair_writes(vendor):
    versions = {package["name"]: package["version"].split(".") for package in vendor.read_manifest()}
    written = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    assert versions["vega-lite"][0] == written[0]
    assert [int(n) for n in versions["vega-lite"]] >= [int(n) for n in written]
    assert versions["vega"][0] == alt.VEGA_VERSION
    assert versions["vega-embed"][0] == alt.VEGAEMBED_VERSION


def test_a_changed_a_missing_and_an_unknown_file_are_named(vendor, tmp_path):
    (tmp_path / "a.js").write_text("changed")
    (tmp_path / "stray.js").write_text("who put me here?")
    files = [{"path": "a.js", "sha256": vendor.digest(b"original")}, {"path": "b.js", "sha256": ""}]
    assert vendor.problems([{"files": files}], tmp_path) == [
        "a.js: differs from its hash in the manifest",
        "b.js: missing",
        "stray.js: not in the manifest",
    ]


def test_manifest_survives_writing(vendor, tmp_path):
    packages = vendor.read_manifest()
    vendor.write_manifest(packages, tmp_path / "manifest.toml")
    assert vendor.read_manifest(tmp_path / "manifest.toml") == packages
    assert (tmp_path / "manifest.toml").read_text() == vendor.MANIFEST.read_text()


@pytest.mark.parametrize(("licence", "source", "message"), [("MIT", "a.js", "licence"), ("ISC", "b.js", "no file")])
def test_fetching_refuses_another_licence_and_a_missing_file(vendor, monkeypatch, tmp_path, licence, source, message):
    def pack(command, cwd, **_):
        folder = Path(cwd) / "package"
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"license": "ISC"}))
        with tarfile.open(Path(cwd) / "p-1.tgz", "w:gz") as archive:
            archive.add(folder, "package")
        return subprocess.CompletedProcess(command, 0, stdout="p-1.tgz\n")

    monkeypatch.setattr(vendor.subprocess, "run", pack)
    package = {"name": "p", "version": "1", "licence": licence, "files": [{"path": "p/x.js", "source": source}]}
    with pytest.raises(ValueError, match=message):
        vendor.fetch(package, tmp_path)


def test_no_file_of_ours_names_another_host_to_load_from():
    for name in ("charts.js", "ledger.js", "attnlab.css", "logo.svg", "favicon.svg"):
        text = (ROOT / "book" / "_static" / name).read_text(encoding="utf-8")
        hosts = {urllib.parse.urlsplit(word).netloc for word in text.replace('"', " ").split() if "://" in word}
        assert hosts <= {"www.w3.org"}, f"{name} names {hosts}"
