"""Keep the scripts that the book's pages load as local files.

A page of the book asks no other host for anything, so what a theme would take from a content network lies under
``book/_static/vendor``. ``manifest.toml`` there names each package, its version and licence, and the hash of each file.

    python tools/vendor.py            fetch every package in the version the manifest names, rewrite files and hashes
    python tools/vendor.py --check    compare the files with their hashes; needs no network

Fetching goes through ``npm pack``, which checks a package against the integrity value of its registry.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).resolve().parent.parent / "book" / "_static" / "vendor"
MANIFEST = VENDOR / "manifest.toml"
HEADER = (
    "# Written by tools/vendor.py. For another version of a package change its `version` here,\n"
    "# then run `python tools/vendor.py`.\n"
)


def read_manifest(path: Path = MANIFEST) -> list[dict[str, Any]]:
    """Return the packages of a manifest; each has name, version, licence, purpose and files."""
    packages: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["package"]
    return packages


def write_manifest(packages: list[dict[str, Any]], path: Path = MANIFEST) -> None:
    """Write the manifest. The strings hold no character that JSON and TOML quote differently."""
    blocks = [HEADER]
    for package in packages:
        lines = ["[[package]]"]
        lines += [f"{key} = {json.dumps(package[key])}" for key in ("name", "version", "licence", "purpose")]
        lines.append("files = [")
        for entry in package["files"]:
            fields = ", ".join(f"{key} = {json.dumps(entry[key])}" for key in ("path", "source", "sha256"))
            lines.append(f"    {{ {fields} }},")
        lines.append("]\n")
        blocks.append("\n".join(lines))
    path.write_text("\n".join(blocks), encoding="utf-8")


def digest(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def fetch(package: dict[str, Any], vendor: Path = VENDOR) -> None:
    """Fetch one package, write its files below ``vendor`` and put their hashes into ``package``.

    Raises ``ValueError`` if the package's own licence field differs from the manifest's, or a file is missing in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package['name']}@{package['version']}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(folder) / name) as archive:
            licence = json.loads(_member(archive, "package.json"))["license"]
            if licence != package["licence"]:
                raise ValueError(f"{package['name']}: licence is {licence!r}, the manifest says {package['licence']!r}")
            for entry in package["files"]:
                data = _member(archive, entry["source"])
                target = vendor / entry["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                entry["sha256"] = digest(data)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the bytes of ``name`` in an npm archive, whose files lie in a folder ``package``."""
    try:
        stream = archive.extractfile(f"package/{name}")
    except KeyError:
        stream = None
    if stream is None:
        raise ValueError(f"the package has no file {name!r}; look for the new name and change the manifest")
    return stream.read()


def problems(packages: list[dict[str, Any]], vendor: Path = VENDOR) -> list[str]:
    """Return one line for each file that is missing, changed, or present without being in the manifest."""
    found = []
    known = {"manifest.toml"}
    for package in packages:
        for entry in package["files"]:
            known.add(entry["path"])
            path = vendor / entry["path"]
            if not path.is_file():
                found.append(f"{entry['path']}: missing")
            elif digest(path.read_bytes()) != entry["sha256"]:
                found.append(f"{entry['path']}: differs from its hash in the manifest")
    present = {path.relative_to(vendor).as_posix() for path in vendor.rglob("*") if path.is_file()}
    return found + [f"{name}: not in the manifest" for name in sorted(present - known)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Fetch or check the scripts that the book's pages load.")
    parser.add_argument("--check", action="store_true", help="compare the files with their hashes, without a network")
    options = parser.parse_args(arguments)
    packages = read_manifest()
    if not options.check:
        for package in packages:
            fetch(package)
        write_manifest(packages)
    found = problems(packages)
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        count = sum(len(package["files"]) for package in packages)
        print(f"{count} vendored files of {len(packages)} packages match their hashes")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
