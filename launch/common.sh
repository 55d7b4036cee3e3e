# shellcheck shell=bash disable=SC2034
# What the launchers share; each sources it first. It goes to the repository's root.
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

# The words as one line that a shell reads back as the same words.
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

# options KNOWN ARGUMENT…: the launcher's flags become variables (--dry-run: dry_run=yes); what follows them is `rest`.
options() {
  local known="--dry-run $1" name
  shift
  while [[ ${1:-} == -* ]]; do
    if [[ $1 == -h || $1 == --help ]]; then
      sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$script"
      exit 0
    fi
    [[ " $known " == *" $1 "* ]] || fail "$1 is no flag of this launcher (${known% }); a module's flags follow its name"
    name=${1#--}
    printf -v "${name//-/_}" yes
    shift
  done
  rest=("$@")
}

# needs NAME=EXAMPLE…: ends with one sentence that names every variable that is not set.
needs() {
  local pair name missing=() examples=()
  for pair; do
    name=${pair%%=*}
    [ -n "${!name:-}" ] || { missing+=("$name") && examples+=("$pair"); }
  done
  [ ${#missing[@]} -eq 0 ] || fail "set ${missing[*]}; for example: $(quote "${examples[@]}") $me …"
}

# read_module MODULE ARGUMENT…: sets module, arguments, and whether its processes join into one job (joins), or a Ray
# cluster works for one of them (on_ray); and what is installed with the package, where it was not said.
read_module() {
  module=${1:-}
  [[ $module =~ ^[a-z]+$ && -f lco_jax/$module.py ]] || fail "name a module of lco_jax (train, pretrain, embed), not '$module'"
  arguments=("${@:2}")
  joins='' on_ray=''
  local extras=tpu
  case $module in train | pretrain) joins=yes ;; embed) on_ray=yes && extras+=,ray ;; esac
  [[ ${arguments[*]} != *gs://* ]] || extras+=,gcs
  : "${EXTRAS:=$extras}"
}

# job_command PYTHON: the words of the job, as each machine runs them, in `command`.
job_command() {
  command=("$1" -m "lco_jax.$module")
  [ -z "$joins" ] || command+=(--distributed)
  [ -z "$on_ray" ] || command=(launch/ray.sh "${command[@]}" --ray=auto)
  command+=("${arguments[@]}")
}

# with_ray_token: makes ENV_FILE a file that has RAY_AUTH_TOKEN, too, by which the machines of a job know each other.
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

# gpu_memory: the share of a GPU that jax allocates at its start, which is 0.75 where nothing says otherwise; remat and
# chunks are chosen for it. What is left is for the CUDA context, NCCL and the libraries.
gpu_memory() {
  run export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
}

# again STATUS SECONDS: whether a job that ended so after so long is to be started again; says why, or why not.
# 75: saved after SIGTERM. 76: a process hung or died. 2: a user's mistake. An attempt of STEADY seconds forgives those before.
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

# Packs the code, as it is committed, into `archive`. What is not committed would be left behind, and so is refused.
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
