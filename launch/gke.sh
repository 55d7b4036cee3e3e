#!/usr/bin/env bash
# Run a job on TPUs of a GKE cluster with XPK. XPK turns it into a JobSet with one pod for each host
# of a slice.
#
#   NAME=lco CLUSTER=mine TPU_TYPE=v6e-16 \
#     launch/gke.sh --follow train --config=FILE --output=DIR
#   NAME=lco CLUSTER=mine launch/gke.sh delete
#
# --follow   stream the logs until the job ends; the status is 0 if it succeeded. By default the
#            script submits the job and returns
# --spot     ask an autoprovisioning cluster for nodes that may be preempted
# --dry-run  print the commands, and run none of them
#
# Each pod adds the last commit to BASE_IMAGE (python:3.12) and installs it when it starts. An IMAGE
# that has the package installed is used as it is; for embed it needs launch/ in its working
# directory. The JobSet restarts all pods, at most RETRIES times (3), after a preempted node or
# status 1, 42, 75, 76, or 127 and more. Status 2, a mistake in the command, ends the job. Pods have
# GRACE seconds (120) to save. --output must outlive the pods: use gs://… or a mount.
#
# ZONE, PROJECT  where the cluster is (default: gcloud's)
# SLICES         the number of slices (1)
# EXTRAS         extras to install with the package (default: tpu; ray for embed; gcs if a flag
#                names gs://…)
# ENV_FILE       a file of NAME=VALUE lines (tokens); the JobSet contains them
# POLL           seconds between two looks for pods (30)
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

# Restarts replace pods, so each look asks for the logs since the one before.
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
