#!/usr/bin/env bash
# GLUS-S of the paper, from data and starting weights to scores and zips: see scripts/reproduce.sh for its settings.
#   REPRODUCE_PROCESSES=4 bash scripts/reproduce_glus_s.sh
set -euo pipefail
exec bash "$(dirname "$0")/reproduce.sh" glus_s
