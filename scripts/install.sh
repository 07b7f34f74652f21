#!/usr/bin/env bash
# Makes .venv with everything, or does nothing if it is there and pyproject.toml has not changed since.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed
if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    exit 0
fi
python3 -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -e '.[dev]'
cp pyproject.toml "$stamp"
