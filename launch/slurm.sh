#!/usr/bin/env bash
# Run a job on the GPUs of a Slurm cluster, with one process per GPU or per node.
#
#   NODES=2 GPUS=8 launch/slurm.sh --follow train --config=FILE --output=DIR
#
# --follow   print the log until the job ends; the status is 0 if it succeeded
# --dry-run  print the commands, and run none of them
#
# NODES   the number of nodes
# GPUS    the number of GPUs of a node
# PER     `gpu` (default) or `node`: what one process runs on. A mesh with a tensor axis needs
#         `node`. embed starts a Ray cluster with one process per node and one actor per GPU
# NAME    the job's name (lco)
# LOGS    the folder of the log, NAME-JOBID.out (runs/slurm)
# PYTHON  the interpreter (.venv/bin/python)
# POLL    seconds between two looks at the job (30)
#
# sbatch reads its own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT,
# SBATCH_CPUS_PER_GPU and so on. The job runs from this checkout, which every node must see. The
# environment, with its tokens, is passed to the job.
#
# The processes receive SIGTERM GRACE seconds (120) before the time limit, and save.
# launch/slurm_job.sh requeues the job after status 75 or 76, a kill or a failure, at most RETRIES
# times (3). An attempt that lasted STEADY seconds (600) resets that count. Slurm itself requeues a
# job after a node failure or a preemption.
source "$(dirname "$0")/common.sh"
: "${PER:=gpu}" "${NAME:=lco}" "${LOGS:=runs/slurm}" "${POLL:=30}"

options "--follow" "$@"
needs NODES=2 GPUS=8
read_module "${rest[@]}"
[ -z "$on_ray" ] || PER=node
case $PER in
  gpu) tasks=$GPUS ;;
  node) tasks=1 ;;
  *) fail "PER=$PER: processes are one a gpu or one a node" ;;
esac
[ -n "$joins" ] || [ "$tasks" = 1 ] || fail "a process of $module takes all GPUs of a node: PER=node"
[ -n "$joins$on_ray" ] || [ "$NODES" = 1 ] || fail "$module runs in one process: NODES=1 PER=node"
export RETRIES STEADY GRACE LOGS NAME GPUS PER

run mkdir -p "$LOGS"
submit=(sbatch --parsable --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$tasks" --gpus-per-node="$GPUS"
  --requeue --open-mode=append --signal="B:TERM@$GRACE" --chdir="$PWD" --output="$LOGS/$NAME-%j.out"
  launch/slurm_job.sh "$module" "${arguments[@]}")
if [ -n "$dry_run" ]; then
  quote export RETRIES="$RETRIES" STEADY="$STEADY" GRACE="$GRACE" LOGS="$LOGS" NAME="$NAME" GPUS="$GPUS" PER="$PER"
  quote "${submit[@]}"
  exit
fi
id=$("${submit[@]}")
id=${id%%;*}
log=$LOGS/$NAME-$id.out
say "job $id; its log is $log"
[ -n "${follow:-}" ] || exit 0

tail -n +1 -F "$log" 2>/dev/null &
trap 'kill %1 2>/dev/null || true' EXIT
while true; do
  state=$(squeue --noheader --jobs="$id" --states=all --format=%T) || state=
  case $state in
    COMPLETED) exit 0 ;;
    BOOT_FAIL | CANCELLED | DEADLINE | FAILED | NODE_FAIL | OUT_OF_MEMORY | PREEMPTED | TIMEOUT | "")
      say "job $id: ${state:-squeue tells nothing of it any more}"
      exit 1
      ;;
  esac
  sleep "$POLL"
done
