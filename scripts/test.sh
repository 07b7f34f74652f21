#!/usr/bin/env bash
# Installs if needed, then runs the tests: the fast ones, or with --all also the long ones (kills, long videos, the quickstart).
#   bash scripts/test.sh [--all] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
marker="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then
    shift
    marker="not gpu"
    if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        marker=""
    fi
fi
exec .venv/bin/python -m pytest -n "${GLUS_TEST_PROCESSES:-2}" --dist loadfile -m "$marker" "$@"
