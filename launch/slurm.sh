#!/usr/bin/env bash
# Run a job on the GPUs of a Slurm cluster: one process a GPU, or one a node.
#
#   NODES=2 GPUS=8 launch/slurm.sh --follow train --config=FILE --output=DIR
#
# --follow  print the log as it is written, and end when the job ends: with 0 if it did well
# --dry-run print the commands, and run none
#
# NODES: how many; GPUS: how many a node has. PER: `gpu` (default) or `node`, which a mesh with a tensor axis
# needs; embed starts a Ray cluster of one process a node, with an actor for each GPU.
# NAME: the job's (lco). LOGS: the folder of its log, NAME-JOBID.out (runs/slurm). PYTHON: the interpreter
# (.venv/bin/python). The rest is sbatch's own: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT,
# SBATCH_CPUS_PER_GPU and so on. The checkout is run as it stands and must lie where every node sees it; the environment,
# with its tokens, goes along.
#
# GRACE seconds (120) before the time limit the processes get SIGTERM and save. launch/slurm_job.sh puts the job back into
# the queue after status 75, 76, a kill or a failure, RETRIES times (3); an attempt of STEADY seconds (600) forgives those
# before it. Slurm itself does so for nodes that fail and jobs that are preempted. POLL: seconds between looks (30).
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
