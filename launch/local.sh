#!/usr/bin/env bash
# Train on this machine with several processes, as a pod would: each gets its share of the data and of the devices.
#
#   launch/local.sh 4 --config=configs/base.py --workdir=runs/four
#
# PYTHON names the interpreter (default .venv/bin/python), PORT the coordinator's port (default 29500), and on a machine
# without accelerators DEVICES the CPU devices of each process (default 1).
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES --config=FILE [flags of lco_jax.train]" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
count=$1
shift
python=${PYTHON:-.venv/bin/python}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
  "$python" -m lco_jax.train --coordinator="127.0.0.1:${PORT:-29500}" --num_processes="$count" --process_id="$i" "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
