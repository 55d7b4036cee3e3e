#!/usr/bin/env bash
# Run a job on TPUs of a GKE cluster through XPK, which makes a JobSet of it: a pod for each host of a slice.
#
#   NAME=lco CLUSTER=mine TPU_TYPE=v6e-16 launch/gke.sh --follow train --config=FILE --output=DIR
#   NAME=lco CLUSTER=mine launch/gke.sh delete
#
# --follow  stream the logs, and end when the job ends: with 0 if it did well; else it is submitted, and left alone
# --spot    ask an autoprovisioning cluster for nodes that may be preempted
# --dry-run print the commands, and run none
#
# The last commit is laid over BASE_IMAGE (python:3.12) and installed when a pod starts; an IMAGE that has the package
# installed is taken as it is. The JobSet starts all pods again, RETRIES times (3), after a preempted node, status 1, 75,
# 76, 42 or 127 and more; status 2, a mistake in the command, ends it. Pods have GRACE seconds to save (120). --output
# must outlive the pods (gs://…, or a mount). ZONE and PROJECT: gcloud's own by default. SLICES: how many (1). EXTRAS:
# what is installed with the package (tpu; ray for embed; gcs where a flag names gs://…). ENV_FILE: a file of NAME=VALUE
# lines (tokens); they stand in the JobSet. An IMAGE for embed needs launch/ in its working directory. POLL: seconds between looks for pods (30).
source "$(dirname "$0")/common.sh"
: "${POLL:=30}"

options "--follow --spot" "$@"
required=(NAME=lco CLUSTER=mine)
[ "${rest[*]}" = delete ] || required+=(TPU_TYPE=v6e-16)
needs "${required[@]}"
here=(--cluster="$CLUSTER")
[ -z "${ZONE:-}" ] || here+=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || here+=(--project="$PROJECT")
if [ "${rest[*]}" = delete ]; then
  run xpk workload delete --workload="$NAME" "${here[@]}" --force
  exit
fi
read_module "${rest[@]}"
[ -z "${ENV_FILE:-}" ] || [ -f "$ENV_FILE" ] || fail "ENV_FILE=$ENV_FILE: there is no such file"
[ -z "$on_ray" ] || [ "${SLICES:-1}" = 1 ] || fail "$module runs on one slice: SLICES=1"
[ -z "$on_ray" ] || with_ray_token

job_command python
job="exec $(quote "${command[@]}")" # exec: SIGTERM then reaches Python itself, or launch/ray.sh
if [ -n "${IMAGE:-}" ]; then
  code=(--docker-image="$IMAGE")
else
  pack
  tree=${archive%.tar.gz}
  run mkdir -p "$tree"
  run tar -xzf "$archive" -C "$tree"
  code=(--base-docker-image="${BASE_IMAGE:-python:3.12}" --script-dir="$tree")
  job="pip install --quiet '.[$EXTRAS]' && $job"
fi
run xpk workload create --workload="$NAME" "${here[@]}" --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" \
  "${code[@]}" ${ENV_FILE:+--env-file="$ENV_FILE"} ${spot:+--spot} --max-restarts="$RETRIES" \
  --restart-on-exit-codes=1,75,76 --termination-grace-period-seconds="$GRACE" --command="$job"
[ -n "${follow:-}" ] || exit 0

# Pods come and go with restarts, so their logs are asked for again and again, of the time since the last look.
logs=(kubectl logs --follow --prefix --ignore-errors --max-log-requests=1000 --tail=-1 --since="$((2 * POLL))s"
  --selector="jobset.sigs.k8s.io/jobset-name=$NAME")
wait_for=(xpk workload list "${here[@]}" --wait-for-job-completion="$NAME")
if [ -n "$dry_run" ]; then
  quote "${logs[@]}"
  quote "${wait_for[@]}"
  exit
fi
"${wait_for[@]}" >&2 &
waiter=$!
trap 'kill "$waiter" 2>/dev/null || true' EXIT
while kill -0 "$waiter" 2>/dev/null; do
  "${logs[@]}" 2>/dev/null || true
  sleep "$POLL"
done
wait "$waiter"
