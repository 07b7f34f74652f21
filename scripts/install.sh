#!/usr/bin/env bash
# Makes .venv with everything, or does nothing if it is there and neither pyproject.toml nor the lock has changed since.
# Versions are those of the lock file of its Python (an existing .venv keeps its own), which is what was tested;
# INSTALL=latest takes the newest that pyproject.toml allows. The lock only limits: of torch's own packages come those
# that its build (CUDA, CPU) asks for, and a build for another CUDA of the same version stays.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
install=${INSTALL:-locked}
case $install in
locked) lock=$("$python" -c 'import sys; print("requirements-py%d%d.lock" % sys.version_info[:2])') ;;
latest) lock=/dev/null ;;
*) echo "error: INSTALL=$install: expected locked or latest" >&2 && exit 1 ;;
esac
[ -e "$lock" ] || {
    echo "error: no $lock for $("$python" --version) ($python): use Python 3.11, 3.12 or 3.13, or INSTALL=latest" >&2
    exit 1
}
stamp=.venv/.installed
wanted=$(cat pyproject.toml "$lock")
if [ -f "$stamp" ] && [ "$wanted" = "$(cat "$stamp")" ]; then
    exit 0
fi
[ "$python" = .venv/bin/python ] || python3 -m venv --clear .venv
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip # uv makes environments without pip
# Also what packages are built with: older pips read the first variable for it, newer ones the second.
export PIP_CONSTRAINT=$lock PIP_BUILD_CONSTRAINT=$lock
.venv/bin/python -m pip install --quiet --upgrade -e '.[dev]'
printf '%s\n' "$wanted" >"$stamp"
