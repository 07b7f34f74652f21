#!/usr/bin/env bash
# Start a program on this node of several; run the same command on every node (torchrun's rendezvous):
#   NODES=4 GPUS=4 NODE_RANK=0 MASTER=node0 bash scripts/launch_multinode.sh scripts/train.py experiment=glus_s hardware=nodes4
# or once, on the first node, with a DeepSpeed hostfile (lines "host slots=4", ssh without password, same paths on all):
#   HOSTFILE=hosts.txt bash scripts/launch_multinode.sh scripts/train.py experiment=glus_s hardware=nodes4
# Torchrun (2.13; older ones may not) passes SIGTERM and SIGUSR1 on, and gives its processes five minutes to save
# (DeepSpeed's launcher: SIGTERM, half a minute).
# DRY_RUN=1 prints the command instead. Other settings: PORT (29500), PYTHON (this checkout's .venv, else python3).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { sed -n 2,8p "$0"; exit 1; }

python=${PYTHON:-$here/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
PORT=${PORT:-29500}
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || { echo "error: HOSTFILE=$HOSTFILE: no such file; expected lines 'host slots=GPUs'" >&2; exit 1; }
  command=("$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$PORT")
  [ -z "${MASTER:-}" ] || command+=(--master_addr "$MASTER")
else
  for name in NODES GPUS NODE_RANK MASTER; do
    [ -n "${!name:-}" ] || { echo "error: set $name (or HOSTFILE): number of nodes NODES, processes per node GPUS, this" \
      "node's number NODE_RANK from 0, host name of node 0 MASTER" >&2; exit 1; }
  done
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
  command=("$python" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$GPUS" --node_rank "$NODE_RANK"
    --master_addr "$MASTER" --master_port "$PORT")
fi
command+=("$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  printf '\n'
else
  exec "${command[@]}"
fi
