#!/usr/bin/env bash
# Run a job on this machine in several processes, as a pod would. Each process has its share of the
# data and of the devices.
#
#   launch/local.sh [--dry-run] PROCESSES [MODULE] [flags of the module]
#   launch/local.sh 4 --config=base --output=runs/four
#
# MODULE is train (default), pretrain or embed; any other module runs in one process. embed starts
# that many Ray actors itself. If one process fails, the others receive SIGTERM and are killed after
# GRACE seconds (120). All are then restarted after status 75 or 76, a kill or a failure, at most
# RETRIES times (3). An attempt that lasted STEADY seconds (600) resets that count. Status 2, a
# mistake in the command, ends the job. So do two failures in a row that come within a minute.
# SIGTERM and Ctrl-C are passed on to the processes, which save.
#
# PYTHON   the interpreter (.venv/bin/python)
# PORT     the coordinator's port (29500)
# DEVICES  CPU devices of each process, on a machine without accelerators (1)
source "$(dirname "$0")/common.sh"

options "" "$@"
set -- "${rest[@]}"
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES [MODULE] --config=FILE [flags of the module]" >&2
  exit 2
fi
count=$1
shift
[[ $1 != -* ]] || set -- train "$@"
read_module "$@"
if [ -n "$on_ray" ]; then
  arguments=(--ray --actors="$count" "${arguments[@]}")
  count=1
fi
[ -n "$joins" ] || [ "$count" = 1 ] || fail "$module runs in one process: launch/local.sh 1 $module …"
gpu_memory
run export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

command=("${PYTHON:-.venv/bin/python}" -m "lco_jax.$module")
start() {
  local join=()
  [ -z "$joins" ] || join=(--coordinator="127.0.0.1:${PORT:-29500}" --num-processes="$count" --process-id="$1")
  if [ -n "$dry_run" ]; then
    echo "$(quote "${command[@]}" "${join[@]}" "${arguments[@]}") &"
  else
    "${command[@]}" "${join[@]}" "${arguments[@]}" &
    pids+=($!)
  fi
}

# Starts all processes and waits for all. Sets `status` to 0, to 2 if a process ended with it, or to
# the status of the first that failed.
attempt() {
  local i pid code left ending=no deadline=0
  pids=() status=0
  for ((i = 0; i < count; i++)); do start "$i"; done
  while [ ${#pids[@]} -gt 0 ]; do
    sleep 0.2
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      [ "$status" != 0 ] && [ $code != 2 ] || status=$code
    done
    pids=("${left[@]}")
    [ ${#pids[@]} -gt 0 ] || break
    if [ $ending = no ] && { [ "$status" != 0 ] || [ $stopping = yes ]; }; then
      ending=yes deadline=$((SECONDS + GRACE))
      kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [ $ending = yes ] && [ $SECONDS -ge $deadline ]; then
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
  done
}

stopping=no
trap 'stopping=yes' INT TERM
while true; do
  since=$SECONDS
  attempt
  { [ $stopping = no ] && again "$status" $((SECONDS - since)); } || break
done
[ -z "$dry_run" ] || echo wait
exit "$status"
