#!/usr/bin/env bash
# Run a job on a Cloud TPU slice, on each of its workers. The slice is created if it is missing,
# through a queued resource.
#
#   NAME=lco ZONE=us-east5-b TPU_TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e \
#     launch/tpu_vm.sh --spot train --config=FILE …
#   NAME=lco ZONE=us-east5-b launch/tpu_vm.sh delete
#
# --spot          ask for capacity that may be preempted
# --delete-after  delete the slice when the job ends, whatever its status; by default the slice
#                 stays, and costs money
# --dry-run       print the commands of a run without trouble, and run none of them
#
# The script waits until the slice is ACTIVE, copies the last commit to every worker, installs it,
# stops what an earlier launch left running there, runs the job and streams its logs. It deletes a
# preempted slice and requests it again. The job is restarted after a preemption, status 75 or 76,
# a kill or a failure, at most RETRIES times (3). An attempt that lasted STEADY seconds (600) resets
# that count. --output must outlive the slice: use gs://… or a mount.
#
# PROJECT   the Google Cloud project (default: gcloud's)
# SETUP     a command that each worker runs first, for example a mount
# EXTRAS    extras to install with the package (default: tpu; ray for embed; gcs if a flag names
#           gs://…)
# ENV_FILE  a file of NAME=VALUE lines (tokens); it is copied to the workers and read there
# POLL      seconds between two looks at the slice (30)
# GRACE     seconds that a job of an earlier launch has to save (120)
source "$(dirname "$0")/common.sh"
: "${POLL:=30}"

options "--spot --delete-after" "$@"
required=(NAME=lco ZONE=us-east5-b)
[ "${rest[*]}" = delete ] || required+=(TPU_TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e)
needs "${required[@]}"
here=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || here+=(--project="$PROJECT")
delete_slice() { run gcloud compute tpus queued-resources delete "$NAME" "${here[@]}" --force --quiet; }
if [ "${rest[*]}" = delete ]; then
  delete_slice
  exit
fi
read_module "${rest[@]}"
worker=0
[ -z "$joins$on_ray" ] || worker=all
[ -z "${ENV_FILE:-}" ] || [ -f "$ENV_FILE" ] || fail "ENV_FILE=$ENV_FILE: there is no such file"
[ -z "$on_ray" ] || with_ray_token
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# look EXPECTED: sets `state`, NONE if there is no such slice. A look that fails is repeated, as it
# tells nothing about the slice.
look() {
  local command=(gcloud compute tpus queued-resources describe "$NAME" "${here[@]}" "--format=value(state.state)") tries
  if [ -n "$dry_run" ]; then
    quote "${command[@]}"
    state=$1
    return
  fi
  for tries in 1 2 3 4 5; do
    ! state=$("${command[@]}" 2>"$scratch/error") || return 0
    state=NONE
    ! grep -q NOT_FOUND "$scratch/error" || return 0
    [ "$tries" = 5 ] || sleep "$POLL"
  done
  cat "$scratch/error" >&2
  say "the slice cannot be looked at; what runs there goes on, and the same command takes it up"
  exit 1
}

# Returns when the slice is ACTIVE; status 1 where it has failed.
provide() {
  local before=
  look NONE
  case $state in FAILED | SUSPENDING | SUSPENDED | DELETING)
    delete_slice || true
    look NONE
    ;;
  esac
  if [ "$state" = NONE ]; then
    run gcloud compute tpus queued-resources create "$NAME" "${here[@]}" --node-id="$NAME" \
      --accelerator-type="$TPU_TYPE" --runtime-version="$RUNTIME" ${spot:+--spot} || {
      [ "$restarts" = 0 ] || return 1
      fail "the slice was refused"
    }
    look ACTIVE
  fi
  while [ "$state" != ACTIVE ]; do
    [ "$state" = "$before" ] || say "$NAME is $state"
    before=$state
    case $state in FAILED | SUSPENDING | SUSPENDED | DELETING | NONE) return 1 ;; esac
    sleep "$POLL"
    look ACTIVE
  done
}

on() { run gcloud compute tpus tpu-vm ssh "$NAME" "${here[@]}" --worker="$1" --command="$2"; }
copy() { run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${here[@]}" --worker="$worker"; }

# uv installs Python 3.12, as the runtime images have an older one. Only the code of an earlier
# launch is removed: its runs stay.
install="umask 077 && mkdir -p lco-jax && cd lco-jax && rm -rf lco_jax configs && tar -xzf ../lco-jax.tar.gz"
install+=" && python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv"
install+=" && ~/.local/bin/uv pip install --quiet --python .venv -e '.[$EXTRAS]'"
[ -z "${ENV_FILE:-}" ] || install="chmod 600 lco-jax.env && $install"
[ -z "${SETUP:-}" ] || install="$SETUP && $install"
stop="pkill -f '[-]m lco_jax' || true; for i in \$(seq $GRACE); do pgrep -f '[-]m lco_jax' >/dev/null || break; sleep 1; done"
stop+="; pkill -KILL -f '[-]m lco_jax' || true"
[ -z "$on_ray" ] || stop="{ $stop; }; lco-jax/.venv/bin/ray stop --force || true"
job="cd lco-jax"
[ -z "${ENV_FILE:-}" ] || job+=" && set -a && . ../lco-jax.env && set +a"
job_command .venv/bin/python
job+=" && $(quote "${command[@]}"); status=\$?"
job+="; echo \"exit status of the job: \$status\"; exit \$status"

prepare() {
  copy "$archive" lco-jax.tar.gz && { [ -z "${ENV_FILE:-}" ] || copy "$ENV_FILE" lco-jax.env; } &&
    on "$worker" "$stop" && on "$worker" "$install"
}

# The job's status is read from its output: gcloud does not return a worker's status if there are
# several workers.
work() {
  [ -z "$dry_run" ] || { on "$worker" "$job" && return; }
  rm -f "$scratch/status"
  on "$worker" "$job" | while IFS= read -r line; do
    echo "$line"
    [[ ! $line =~ ^exit\ status\ of\ the\ job:\ ([1-9][0-9]*)$ ]] || echo "${BASH_REMATCH[1]}" >>"$scratch/status"
  done || status=$?
  [ ! -s "$scratch/status" ] || read -r status <"$scratch/status"
}

pack
while true; do
  status=0
  { provide && prepare; } || status=76
  since=$SECONDS
  [ "$status" != 0 ] || work
  if [ "$status" != 0 ] && look ACTIVE && [ "$state" != ACTIVE ]; then
    say "$NAME is $state"
    status=76
  fi
  again "$status" $((SECONDS - since)) || break
  sleep "$POLL"
done
if [ -n "${delete_after:-}" ]; then
  delete_slice
elif [ -z "$dry_run" ]; then
  say "$NAME still exists, and is paid for: NAME=$NAME ZONE=$ZONE $me delete"
fi
exit "$status"
