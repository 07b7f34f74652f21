#!/usr/bin/env bash
# Train, predict and score the small GLUS with one thing changed at a time, all from the same pre-trained parts:
#   bash scripts/ablations.sh [name ...]
# After bash scripts/quickstart.sh, whose data and parts it uses. ABLATION_STEPS and the folders below can be set from
# outside. Prints J&F per kind of sentence for every variant; finished variants are not run again.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=${ABLATION_STEPS:-300}
VIDEOS=${ABLATION_VIDEOS:-20}
DATA=${ABLATION_DATA:-data/shapes}
WEIGHTS=${ABLATION_WEIGHTS:-outputs/quickstart/weights}
OUT=${ABLATION_OUT:-outputs/ablations}
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

declare -A variants=(
  [paper]="experiment=shapes"
  [no_context]="experiment=ablation/local_only"
  [global_only]="experiment=ablation/global_only"
  [no_memory]="experiment=ablation/no_memory"
  [no_contrastive]="experiment=ablation/no_contrastive"
  [K1]="experiment=shapes frames.num_context=1"
  [K2]="experiment=shapes frames.num_context=2"
  [K8]="experiment=shapes frames.num_context=8"
  [Q1]="experiment=shapes frames.num_query=1"
  [Q2]="experiment=shapes frames.num_query=2"
  [Q8]="experiment=shapes frames.num_query=8"
)
order=(paper no_context global_only no_memory no_contrastive K1 K2 K8 Q1 Q2 Q8)
[ $# -gt 0 ] && order=("$@")

predictions=()
for name in "${order[@]}"; do
  [ -n "${variants[$name]+known}" ] || { echo "error: no variant $name; known are ${!variants[*]}" >&2; exit 1; }
  if [ ! -f "$OUT/$name/done" ]; then
    rm -rf "${OUT:?}/$name"
    # shellcheck disable=SC2086  # a variant is a list of overrides
    "$python" scripts/train.py ${variants[$name]} valid=null output="$OUT/$name" \
      data.mixture.shapes.dataset.root="$DATA" paths.weights="$WEIGHTS" trainer.steps="$STEPS"
    "$python" scripts/predict.py dataset=shapes_valid dataset.root="$DATA" max_videos="$VIDEOS" \
      weights="$OUT/$name" output="$OUT/$name/predictions"
    touch "$OUT/$name/done"
  fi
  predictions+=("$name: $OUT/$name/predictions")
done
list=$(printf ', %s' "${predictions[@]}")
"$python" scripts/compare.py dataset=shapes_valid dataset.root="$DATA" max_videos="$VIDEOS" \
  predictions="{${list:2}}" output="$OUT/summary.json"
