#!/usr/bin/env bash
# GLUS-A of the paper, from data and starting weights to scores and zips: see scripts/reproduce.sh for its settings.
#   REPRODUCE_PROCESSES=4 bash scripts/reproduce_glus_a.sh
# No key frames, as in the paper's row.
set -euo pipefail
export REPRODUCE_CHECK=${REPRODUCE_CHECK-mevis_train ref_youtube_vos_train ref_davis17_train revos_train lvvis_train \
mevis_valid_u mevis_valid ref_youtube_vos_valid ref_davis17_valid revos_valid reason_vos}
export REPRODUCE_SCORE=${REPRODUCE_SCORE-mevis_valid_u ref_davis17_valid revos_valid reason_vos}
exec bash "$(dirname "$0")/reproduce.sh" glus_a
