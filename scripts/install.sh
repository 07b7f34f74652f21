#!/usr/bin/env bash
# Makes .venv with everything, or does nothing if it is there and neither pyproject.toml nor the lock has changed since.
# Versions are those of this Python's lock file, which is what was tested; INSTALL=latest takes the newest that
# pyproject.toml allows. The lock only limits: of torch's own packages come those that its build (CUDA, CPU) asks for.
set -euo pipefail
cd "$(dirname "$0")/.."
install=${INSTALL:-locked}
case $install in
locked) lock=$(python3 -c 'import sys; print("requirements-py%d%d.lock" % sys.version_info[:2])') ;;
latest) lock=/dev/null ;;
*) echo "error: INSTALL=$install: expected locked or latest" >&2 && exit 1 ;;
esac
[ -e "$lock" ] || { echo "error: there is no $lock for $(python3 --version): use a Python that README names" >&2; exit 1; }
stamp=.venv/.installed
wanted=$(cat pyproject.toml "$lock")
if [ -f "$stamp" ] && [ "$wanted" = "$(cat "$stamp")" ]; then
    exit 0
fi
python3 -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --upgrade --constraint "$lock" -e '.[dev]'
printf '%s\n' "$wanted" >"$stamp"
