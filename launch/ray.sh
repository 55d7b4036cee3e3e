#!/usr/bin/env bash
# Start a Ray cluster on the machines of a job, run a command on the first machine, and stop the
# cluster when the command ends.
#
#   launch/ray.sh .venv/bin/python -m lco_jax.embed --ray=auto --input=… --output=…
#
# The launchers run this script on every machine at once. It finds the machines through the
# variables of Slurm or of a TPU slice on GKE; on TPU VMs it asks the metadata server. The first
# machine is the head. It waits until all machines have joined, at most PATIENCE seconds (300), and
# then runs the command. SIGTERM is passed on to the command. The command's status is the job's.
#
# RAY_PORT        the head's port (6379)
# RAY_AUTH_TOKEN  the secret that the machines share
set -euo pipefail
: "${RAY_PORT:=6379}" "${PATIENCE:=300}"
export RAY_USAGE_STATS_ENABLED=0
python=$1
ray=${python%python*}ray

metadata() {
  curl --silent --fail --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [ -n "${SLURM_PROCID:-}" ]; then
  rank=$SLURM_PROCID machines=$SLURM_NNODES
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  head=${hosts%%$'\n'*}
else
  if [ -n "${TPU_WORKER_HOSTNAMES:-}" ]; then
    rank=${TPU_WORKER_ID:-0} hosts=$TPU_WORKER_HOSTNAMES
  else
    rank=$(metadata agent-worker-number)
    # of each machine it says three things, the last of them its address: a:b:10.0.0.2,…
    hosts=$(metadata worker-network-endpoints | tr , '\n' | cut -d : -f 3 | paste -sd ,)
  fi
  head=${hosts%%,*}
  machines=$(tr , '\n' <<<"$hosts" | wc -l)
fi

if [ "$rank" != 0 ]; then
  until (exec 3<>"/dev/tcp/$head/$RAY_PORT") 2>/dev/null; do
    [ "$SECONDS" -lt "$PATIENCE" ] || exit 76
    sleep 1
  done
  "$ray" start --address="$head:$RAY_PORT" --block || true # until the head ends
  exit 0
fi

trap '"$ray" stop --grace-period=5 >&2 || true' EXIT
"$ray" start --head --port="$RAY_PORT" --include-dashboard=false >&2
"$python" - "$machines" "$PATIENCE" <<'CODE'
import sys, time, ray

ray.init("auto", logging_level="ERROR")
machines, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while sum(node["Alive"] for node in ray.nodes()) < machines and time.monotonic() < end:
    time.sleep(1)
CODE
"$@" &
job=$! status=0
trap 'kill -TERM "$job"' TERM
wait "$job" || status=$?
while kill -0 "$job" 2>/dev/null; do # a signal has ended the wait, not the command
  status=0
  wait "$job" || status=$?
done
exit "$status"
