#!/usr/bin/env bash
# From benchmarks and starting weights to scores and the servers' zips: check data, train, export, predict, score, zip.
#   bash scripts/reproduce.sh glus_s
# A stage that is finished is not run again, one that was killed is continued (REPRODUCE_OUT/stages holds the list;
# delete a line's file to run it again). Settings:
#   REPRODUCE_OUT        outputs/reproduce_<experiment>
#   REPRODUCE_PROCESSES  processes (GPUs) for training and prediction; 1
#   REPRODUCE_CHECK      splits whose files are checked
#   REPRODUCE_SCORE      splits that are scored here
#   REPRODUCE_SUBMIT     splits that a server scores: a zip for each
#   REPRODUCE_KEY_FRAMES empty: sentences start at the first frame; self: where the trained model chooses; a folder:
#                        where its <split>.json says, in the published format (scripts/README.md, Key frames)
#   REPRODUCE_PATHS      overrides for every program: paths.data=... paths.weights=...
#   REPRODUCE_TRAIN      more overrides for training: hardware=gpu8 trainer.wandb.enabled=true
#   REPRODUCE_SPLIT      more overrides for programs that read a split: dataset.root=...
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,16p "$0"; exit 1; }
experiment=$1
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
OUT=${REPRODUCE_OUT:-outputs/reproduce_$experiment}
PROCESSES=${REPRODUCE_PROCESSES:-1}
CHECK=${REPRODUCE_CHECK-mevis_train ref_youtube_vos_train mevis_valid_u mevis_valid ref_youtube_vos_valid}
SCORE=${REPRODUCE_SCORE-mevis_valid_u}
SUBMIT=${REPRODUCE_SUBMIT-mevis_valid ref_youtube_vos_valid}
KEY_FRAMES=${REPRODUCE_KEY_FRAMES:-}
read -ra paths <<<"${REPRODUCE_PATHS:-}"
read -ra train <<<"${REPRODUCE_TRAIN:-}"
read -ra split <<<"${REPRODUCE_SPLIT:-}"
for name in $SCORE $SUBMIT; do # now, not after the training
  used=$OUT/key_frames/$name.used
  [ ! -f "$used" ] || [ "$(cat "$used")" = "$KEY_FRAMES" ] || { echo "error: REPRODUCE_KEY_FRAMES=$KEY_FRAMES: $OUT" \
    "holds predictions of $name with '$(cat "$used")'; choose another REPRODUCE_OUT" >&2; exit 1; }
  case $KEY_FRAMES in "" | self) continue ;; esac
  [ -f "$KEY_FRAMES/$name.json" ] || { echo "error: REPRODUCE_KEY_FRAMES=$KEY_FRAMES: $name.json is not there;" \
    "expected one file per split ($SCORE $SUBMIT); 'self' lets the trained model choose" >&2; exit 1; }
done
mkdir -p "$OUT/stages" "$OUT/key_frames"

stage() { # name, command
  local name=$1
  shift
  if [ -f "$OUT/stages/$name" ]; then
    printf '== %s: done before\n' "$name"
    return
  fi
  printf '== %s (%s)\n' "$name" "$(date +%T)"
  "$@"
  date >"$OUT/stages/$name"
}
many() {
  # A signal that ends the launcher (SIGUSR1 too) goes on to its processes, which get time to save.
  PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 \
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES" "$@"
}
export_model() { # a killed export leaves nothing behind that counts; a finished one must not be there twice
  rm -rf "$OUT/model"
  "$python" "$here/tools/export.py" --weights "$OUT/run" --output "$OUT/model"
}
choose_key_frames() {
  many "$here/scripts/score_frames.py" dataset="$1" weights="$OUT/model" output="$OUT/key_frames/$1" \
    "${paths[@]}" "${split[@]}"
}
predict() {
  local start=null
  case $KEY_FRAMES in
    "") ;;
    self) start=$OUT/key_frames/$1/key_frames.json ;;
    *) start=$KEY_FRAMES/$1.json ;;
  esac
  printf '%s\n' "$KEY_FRAMES" >"$OUT/key_frames/$1.used"
  many "$here/scripts/predict.py" dataset="$1" weights="$OUT/model" output="$OUT/predictions/$1" \
    inference.key_frames="$start" "${paths[@]}" "${split[@]}"
}
score() {
  "$python" "$here/scripts/score.py" dataset="$1" predictions="$OUT/predictions/$1" "${paths[@]}" "${split[@]}"
}
submit() {
  "$python" "$here/scripts/submit.py" dataset="$1" predictions="$OUT/predictions/$1" output="$OUT/$1.zip" \
    "${paths[@]}" "${split[@]}"
}

for name in $CHECK; do
  stage "check_$name" "$python" "$here/tools/check_data.py" dataset="$name" output="$OUT/check/$name.json" \
    "${paths[@]}" "${split[@]}"
done
stage train many "$here/scripts/train.py" experiment="$experiment" output="$OUT/run" "${paths[@]}" "${train[@]}"
stage export export_model
for name in $SCORE $SUBMIT; do
  [ "$KEY_FRAMES" != self ] || stage "key_frames_$name" choose_key_frames "$name"
  stage "predict_$name" predict "$name"
done
for name in $SCORE; do stage "score_$name" score "$name"; done
for name in $SUBMIT; do stage "submit_$name" submit "$name"; done
printf '== everything is in %s\n' "$OUT"
