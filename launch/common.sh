# shellcheck shell=bash disable=SC2034
# What the launchers share. Each launcher sources this file first. The file changes to the root of
# the repository.
set -euo pipefail
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
me=launch/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${RETRIES:=3}" "${STEADY:=600}" "${GRACE:=120}"
restarts=0 failed_at_once=no dry_run=

say() { echo "$me: $*" >&2; }

fail() {
  say "$*"
  exit 2
}

# Prints the words as one line that a shell reads back as the same words.
quote() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Every command that changes anything goes through here.
run() {
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# options KNOWN ARGUMENT…: sets a variable for each of the launcher's flags (--dry-run:
# dry_run=yes), and `rest` to the arguments after them.
options() {
  local known="--dry-run $1" name
  shift
  while [[ ${1:-} == -* ]]; do
    if [[ $1 == -h || $1 == --help ]]; then
      sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$script"
      exit 0
    fi
    [[ " $known " == *" $1 "* ]] ||
      fail "$1 is no flag of this launcher (${known% }); a module's flags follow its name"
    name=${1#--}
    printf -v "${name//-/_}" yes
    shift
  done
  rest=("$@")
}

# needs NAME=EXAMPLE…: fails with one sentence that names every variable that is not set.
needs() {
  local pair name missing=() examples=()
  for pair; do
    name=${pair%%=*}
    [ -n "${!name:-}" ] || { missing+=("$name") && examples+=("$pair"); }
  done
  [ ${#missing[@]} -eq 0 ] || fail "set ${missing[*]}; for example: $(quote "${examples[@]}") $me …"
}

# read_module MODULE ARGUMENT…: sets module, arguments, joins (the processes form one job), on_ray
# (one process uses a Ray cluster) and, if it is not set, EXTRAS.
read_module() {
  module=${1:-}
  [[ $module =~ ^[a-z]+$ && -f lco_jax/$module.py ]] ||
    fail "name a module of lco_jax (train, pretrain, embed), not '$module'"
  arguments=("${@:2}")
  joins='' on_ray=''
  local extras=tpu
  case $module in train | pretrain) joins=yes ;; embed) on_ray=yes && extras+=,ray ;; esac
  [[ ${arguments[*]} != *gs://* ]] || extras+=,gcs
  : "${EXTRAS:=$extras}"
}

# job_command PYTHON: sets `command` to the words of the job that each machine runs.
job_command() {
  command=("$1" -m "lco_jax.$module")
  [ -z "$joins" ] || command+=(--distributed)
  [ -z "$on_ray" ] || command=(launch/ray.sh "${command[@]}" --ray=auto)
  command+=("${arguments[@]}")
}

# with_ray_token: sets ENV_FILE to a copy with RAY_AUTH_TOKEN, the secret that the machines share.
with_ray_token() {
  local file=${TMPDIR:-/tmp}/lco-jax-$NAME.env
  if [ -z "$dry_run" ]; then
    (
      umask 077
      [ -z "${ENV_FILE:-}" ] || cat "$ENV_FILE"
      echo "RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    ) >"$file"
  fi
  ENV_FILE=$file
}

# gpu_memory: sets the share of a GPU that jax allocates when it starts (jax's default is 0.75).
# remat and chunks are chosen for that share. The CUDA context, NCCL and the libraries use the rest.
gpu_memory() {
  run export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
}

# again STATUS SECONDS: whether to restart a job that ended with STATUS after SECONDS; says why.
# 75: saved after SIGTERM. 76: a process hung or died. 2: a user's mistake. An attempt that lasted
# STEADY seconds resets the count of restarts.
again() {
  local status=$1 why="failed"
  case $status in
    0 | 2) return 1 ;;
    75) why="was preempted and has saved" ;;
    76 | 255) why="lost a machine or a process" ;;
    129 | 1[3-9]?) why="was killed" ;;
  esac
  if [ "$why" != failed ] || [ "$2" -ge 60 ]; then
    failed_at_once=no
  elif [ $failed_at_once = yes ]; then
    say "status $status: failed at once twice in a row; not started again"
    return 1
  else
    failed_at_once=yes
  fi
  [ "$2" -lt "$STEADY" ] || restarts=0
  if [ "$restarts" -ge "$RETRIES" ]; then
    say "status $status: the job $why, after $restarts restarts (RETRIES=$RETRIES); given up"
    return 1
  fi
  restarts=$((restarts + 1))
  say "status $status: the job $why; restart $restarts of $RETRIES"
}

# Packs the last commit into `archive`. Refuses uncommitted changes, which it would leave behind.
pack() {
  local changed
  changed=$(git status --porcelain) || fail "the code is shipped from git; this is no clone"
  if [ -n "$changed" ]; then
    changed="commit first, for what is shipped is the last commit: $(head -n 1 <<<"$changed")"
    if [ -n "$dry_run" ]; then say "$changed"; else fail "$changed"; fi
  fi
  archive=${TMPDIR:-/tmp}/lco-jax-$(git rev-parse --short HEAD).tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
}
