#!/usr/bin/env bash
# From a clean clone to a page of results: installs, segments a sample video with the shipped model, generates Shapes,
# trains GLUS from the shipped small towers (as the real one starts from CLIP, SAM2 and LISA), predicts held-out videos,
# scores them, and puts the run beside the shipped model on one page.
set -euo pipefail
cd "$(dirname "$0")/.."

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
train_data=(data.mixture.shapes.dataset.root="$DATA" valid.root="$DATA")
valid=(dataset=shapes_valid dataset.root="$DATA")

say "segment a video with the shipped model"
"$python" scripts/segment_video.py --video assets/example.mp4 --text "the star that turns yellow" \
  --text "the star that turns red" --text "the purple object" --weights glus_shapes --output "$OUT/example"

say "generate Shapes"
"$python" tools/make_shapes.py "$DATA" --train-videos 400 --valid-videos 24

say "train GLUS"
"$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" scripts/train.py experiment=shapes \
  paths.outputs="$OUT" "${train_data[@]}" trainer.steps=500 trainer.micro_batch_size=$((4 / ranks))

evaluate() { # weights, folder of the predictions
  "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" scripts/predict.py "${valid[@]}" \
    weights="$1" output="$2"
  "$python" scripts/score.py "${valid[@]}" predictions="$2"
}
say "predict held-out videos and score them: the model that was just trained, and the shipped one"
evaluate "$OUT/shapes" "$OUT/predictions"
evaluate glus_shapes "$OUT/shipped_predictions"

say "compare both with answers that ignore the sentence, and put them on a page"
"$python" scripts/compare.py "${valid[@]}" output="$OUT/comparison.json" \
  predictions="{quickstart: $OUT/predictions, shipped: $OUT/shipped_predictions}"
"$python" scripts/report.py "${valid[@]}" runs="[$OUT/predictions, $OUT/shipped_predictions]" output="$OUT/report.html"
say "done: $OUT/report.html"
