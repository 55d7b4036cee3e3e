#!/usr/bin/env bash
# What launch/slurm.sh submits: runs the job's processes under srun, and puts the job back into the queue where it is due.
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh # sbatch runs a copy of this file, in the repository's root
me=launch/slurm_job.sh
read_module "$@"
[ -z "$joins" ] || arguments=(--distributed "${arguments[@]}")
# jax gives each process of a Slurm job one GPU unless told otherwise
[ "$PER" = gpu ] || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((GPUS - 1)))
[ "$PER" = gpu ] || export JAX_LOCAL_DEVICE_IDS
gpu_memory

record=$LOGS/$NAME-$SLURM_JOB_ID.restarts # of this job's earlier attempts
[ ! -f "$record" ] || read -r restarts failed_at_once <"$record"
wait_for=$GRACE
[ -n "$joins" ] || wait_for=0
# A process that ends leaves the others GRACE seconds, where they are lost without it; the status is the highest of any.
srun --label --kill-on-bad-exit=0 --wait="$wait_for" "${PYTHON:-.venv/bin/python}" -m "lco_jax.$module" "${arguments[@]}" &
steps=$! status=0
trap 'kill -TERM "$steps"' TERM
wait "$steps" || status=$?
while kill -0 "$steps" 2>/dev/null; do # a signal has ended the wait, not the processes
  status=0
  wait "$steps" || status=$?
done
if again "$status" "$SECONDS"; then
  echo "$restarts $failed_at_once" >"$record"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
