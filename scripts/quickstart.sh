#!/usr/bin/env bash
# From a clean clone to scored videos: installs, generates Shapes, trains a small GLUS from scratch, predicts held-out
# videos, scores them, and prints a table per kind of sentence and the paths of the pictures.
#
# About 15 minutes on two CPU cores after installation. The sizes below can be set from outside, e.g.
#   QUICKSTART_STEPS=2000 bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

TRAIN_VIDEOS=${QUICKSTART_TRAIN_VIDEOS:-600}
VALID_VIDEOS=${QUICKSTART_VALID_VIDEOS:-28}
SCENES=${QUICKSTART_SCENES:-600}
CLIP_STEPS=${QUICKSTART_CLIP_STEPS:-800}
LLM_STEPS=${QUICKSTART_LLM_STEPS:-700}
SAM2_STEPS=${QUICKSTART_SAM2_STEPS:-1400}
STEPS=${QUICKSTART_STEPS:-800}
DATA=${QUICKSTART_DATA:-data/shapes}
OUT=${QUICKSTART_OUT:-outputs/quickstart}

bash scripts/install.sh
python=.venv/bin/python
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
ranks=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1)) # processes that share the 4 videos of a step
# One thread each: more threads than cores make a step several times slower, and a tiny model feeds few.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
say() { printf '\n== %s (%s)\n' "$1" "$(date +%T)"; }
# A run is made anew; the data and the installation stay.
rm -rf "$OUT"
mkdir -p "$OUT"
root=(paths.outputs="$OUT" paths.weights="$OUT/weights")
scenes=(num_scenes="$SCENES")
train_data=(data.mixture.shapes.dataset.root="$DATA" valid.root="$DATA")
valid=(dataset=shapes_valid dataset.root="$DATA")

say "generate Shapes"
"$python" tools/make_shapes.py "$DATA" --train-videos "$TRAIN_VIDEOS" --valid-videos "$VALID_VIDEOS"

say "pre-train a small CLIP and LLM, and a small SAM2, side by side on other generated scenes"
"$python" tools/pretrain_towers.py "${root[@]}" "${scenes[@]}" 'parts=[tokenizer,clip,llm]' \
  clip_steps="$CLIP_STEPS" llm_steps="$LLM_STEPS" &
language=$!
"$python" tools/pretrain_towers.py "${root[@]}" "${scenes[@]}" 'parts=[sam2]' sam2_steps="$SAM2_STEPS"
wait "$language"

say "train GLUS"
"$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" scripts/train.py experiment=shapes \
  "${root[@]}" "${train_data[@]}" trainer.steps="$STEPS" trainer.micro_batch_size=$((4 / ranks))

evaluate() { # weights, folder of the predictions
  "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" scripts/predict.py "${valid[@]}" \
    weights="$1" output="$2"
  "$python" scripts/score.py "${valid[@]}" predictions="$2"
}
say "predict held-out videos and score them: the model that was just trained"
evaluate "$OUT/shapes" "$OUT/predictions"
say "the same for the shipped model, which longer runs of these commands made (assets/glus_shapes)"
evaluate assets/glus_shapes "$OUT/shipped_predictions"

say "compare both with answers that ignore the sentence, and draw"
"$python" scripts/compare.py "${valid[@]}" output="$OUT/summary.json" \
  predictions="{quickstart: $OUT/predictions, shipped: $OUT/shipped_predictions}"
"$python" scripts/show.py "${valid[@]}" predictions="$OUT/predictions" output="$OUT/pictures"
"$python" scripts/show.py "${valid[@]}" predictions="$OUT/shipped_predictions" output="$OUT/shipped_pictures"
say "done: $OUT/summary.json"
