#!/usr/bin/env bash
# The batch script of launch/slurm.sh: runs the job's processes with srun, and requeues the job
# after a failure that a restart may mend.
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh # sbatch runs a copy of this file, in the repository's root
me=launch/slurm_job.sh
read_module "$@"
job_command "${PYTHON:-.venv/bin/python}"
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
[ -z "$on_ray" ] || export RAY_AUTH_TOKEN
if [ "$PER" = node ] && [ -z "$on_ray" ]; then
  # by default jax gives each process of a Slurm job one GPU
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((GPUS - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
gpu_memory

record=$LOGS/$NAME-$SLURM_JOB_ID.restarts # of this job's earlier attempts
[ ! -f "$record" ] || read -r restarts failed_at_once <"$record"
wait_for=$GRACE
[ -n "$joins$on_ray" ] || wait_for=0
# When one process of a joined job ends, the others have GRACE seconds. The status is the highest.
srun --label --kill-on-bad-exit=0 --wait="$wait_for" "${command[@]}" &
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
