#!/usr/bin/env bash
# Submit a program to SLURM, one task per GPU:
#   NODES=4 GPUS=4 bash scripts/launch_slurm.sh scripts/train.py experiment=glus_s hardware=nodes4
# DRY_RUN=1 prints the job script instead. Other settings: TIME (48:00:00), CPUS per task (8), NAME (glus), PARTITION,
# ACCOUNT, PYTHON (this checkout's .venv). SLURM sends SIGUSR1 five minutes before the end of TIME.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { sed -n 2,5p "$0"; exit 1; }
for name in NODES GPUS; do
  [ -n "${!name:-}" ] || { echo "error: set $name: NODES, and GPUS on each of them" >&2; exit 1; }
done

python=${PYTHON:-$here/.venv/bin/python}
job() {
  cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=${NAME:-glus}
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --cpus-per-task=${CPUS:-8}
#SBATCH --time=${TIME:-48:00:00}
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=${NAME:-glus}-%j.log
JOB
  [ -z "${PARTITION:-}" ] || echo "#SBATCH --partition=$PARTITION"
  [ -z "${ACCOUNT:-}" ] || echo "#SBATCH --account=$ACCOUNT"
  cat <<'JOB'
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=1
JOB
  echo "export SRUN_CPUS_PER_TASK=${CPUS:-8} # since SLURM 22.05 srun has one CPU a task otherwise"
  printf 'exec srun --kill-on-bad-exit=1'
  printf ' %q' "$python" "$@"
  printf '\n'
}
if [ -n "${DRY_RUN:-}" ]; then job "$@"; else job "$@" | sbatch; fi
