#!/usr/bin/env bash
# Installs if needed, then runs the tests: the fast ones; with --all also the long ones (kills, long videos, the quickstart, a browser);
# with --full those of the full size alone, on a CPU: an hour, 24 GB of memory, 60 GB of disk below TMPDIR.
#   bash scripts/test.sh [--all | --full] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
marker="not slow and not gpu and not full"
processes="${GLUS_TEST_PROCESSES:-2}"
if [ "${1:-}" = "--all" ]; then
    shift
    marker="not gpu and not full"
    command -v chromium chromedriver >/dev/null || { apt-get -qq update && apt-get -qq install -y chromium chromium-driver; }
    if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        marker="not full"
    fi
elif [ "${1:-}" = "--full" ]; then
    shift
    marker="full"
    processes=0
fi
exec .venv/bin/python -m pytest -n "$processes" --dist loadfile -m "$marker" "$@"
