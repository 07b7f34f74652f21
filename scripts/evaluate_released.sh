#!/usr/bin/env bash
# Evaluate a published GLUS checkpoint both ways: with the memory encoder's scales that the released evaluator ran with
# (fuser_gamma=identity) and with those that were trained (checkpoint).
#   bash scripts/evaluate_released.sh weights/GLUS-A mevis_valid_u [overrides of the dataset]
# The checkpoint is a folder or owner/name on Hugging Face. RELEASED_PROCESSES processes share the videos (default 1);
# RELEASED_OUT gets the converted model and both predictions; RELEASED_CONVERT holds more options of convert_weights.py.
# A killed run is continued by the same command.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,7p "$0"; exit 1; }
weights=$1 dataset=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
OUT=${RELEASED_OUT:-outputs/released/$(basename "$weights")}

if [ ! -d "$OUT/model" ]; then
  mkdir -p "$OUT"
  # shellcheck disable=SC2086  # options, separated by spaces
  "$python" "$here/tools/convert_weights.py" --weights "$weights" --output "$OUT/model" ${RELEASED_CONVERT:-}
fi
for gamma in identity checkpoint; do
  "$python" -m torch.distributed.run --standalone --nproc_per_node="${RELEASED_PROCESSES:-1}" \
    "$here/scripts/predict.py" dataset="$dataset" weights="$OUT/model" inference.fuser_gamma="$gamma" \
    output="$OUT/$dataset/$gamma" "$@"
done
for gamma in identity checkpoint; do
  printf '\nfuser_gamma=%s (%s)\n' "$gamma" "$([ "$gamma" = identity ] && echo 'as released' || echo 'as trained')"
  "$python" "$here/scripts/score.py" dataset="$dataset" predictions="$OUT/$dataset/$gamma" "$@"
done
