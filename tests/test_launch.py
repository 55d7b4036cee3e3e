"""The launchers against stand-ins of gcloud, xpk, kubectl, Slurm and python that record their calls
and play a part.

Nothing here reaches a cloud or a cluster: a real launch of launch/local.sh is in test_train.py.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
STUBS = ("gcloud", "xpk", "kubectl", "sbatch", "srun", "scontrol", "squeue", "python", "ray")
STUB = """#!/usr/bin/env bash
# in one piece: others call, too
line=$(printf '%s\\x1f' "${0##*/}" "$@") && echo "$line" >>"$CALLS"
times() { grep -c -- "$1" "$CALLS" || true; }  # how many calls so far, this one with them, say so
source "$PART"
"""
TPU = {"NAME": "lco", "ZONE": "us-east5-b", "TPU_TYPE": "v6e-16", "RUNTIME": "v2-alpha-tpuv6e"}
GKE = {"NAME": "lco", "CLUSTER": "mine", "TPU_TYPE": "v6e-16"}
SLURM = {"NODES": "2", "GPUS": "8"}
JOB = {"SLURM_JOB_ID": "7", "LOGS": ".", "NAME": "lco", "PER": "gpu", "GPUS": "2"}
FLAGS = ["--config=configs/a.py:x", "--output=/mnt/my runs/it's"]
# {looks}: what describe says, look by look (the last for ever); {job}: what the job's ssh does
SLICE = """
case "$*" in
  *describe*) looks=({looks}); n=$(times describe)
    state=${{looks[n > ${{#looks[@]}} ? -1 : n - 1]}}
    [ $state != NONE ] || {{ echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }}
    echo $state ;;
  *lco_jax.train*) {job} ;;
esac
"""


class Launcher:
    """A committed copy of launch/ in a repository of its own, with stand-ins before everything else
    on the PATH.
    """

    def __init__(self, folder):
        self.repository, self.calls_file, self.part = (
            folder / "repository",
            folder / "calls",
            folder / "part",
        )
        shutil.copytree(LAUNCH, self.repository / "launch")
        (self.repository / "lco_jax").mkdir()
        for module in ("train", "pretrain", "embed"):
            (self.repository / "lco_jax" / f"{module}.py").touch()
        (self.repository / ".gitignore").write_text("runs/\n*.restarts\ntokens.env\n")
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
            subprocess.run(["git", *name, *command], cwd=self.repository, check=True)
        stubs = folder / "stubs"
        stubs.mkdir()
        for name in STUBS:
            (stubs / name).write_text(STUB)
            (stubs / name).chmod(0o755)
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.environment = kept | {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PART": str(self.part),
            "TMPDIR": str(folder),
            "POLL": "0",
            "PYTHON": "python",
        }

    def start(self, script, *arguments, part="", **environment):
        self.part.write_text(part)
        self.calls_file.write_text("")
        return subprocess.Popen(
            [self.repository / "launch" / script, *arguments],
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.repository,
        )

    def run(self, script, *arguments, part="", **environment):
        """(status, stdout, stderr)."""
        process = self.start(script, *arguments, part=part, **environment)
        out, error = process.communicate(timeout=60)
        return process.returncode, out, error

    @property
    def calls(self):
        return [line.split("\x1f")[:-1] for line in self.calls_file.read_text().splitlines()]

    def count(self, text):
        return sum(text in " ".join(call) for call in self.calls)


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "part"),
    [
        (
            "tpu_vm.sh",
            ["--spot", "--delete-after", "train"],
            TPU,
            SLICE.format(looks="NONE ACTIVE", job=":"),
        ),
        (
            "tpu_vm.sh",
            ["embed"],
            {**TPU, "PROJECT": "p"},
            SLICE.format(looks="NONE ACTIVE", job=":"),
        ),
        ("tpu_vm.sh", ["delete"], TPU, ""),
        (
            "gke.sh",
            ["--follow", "--spot", "train"],
            {**GKE, "ZONE": "z"},
            '[ "$1 $2" != "workload list" ] || sleep 0.2',
        ),
        ("gke.sh", ["embed"], {**GKE, "IMAGE": "mine:1"}, ""),
        ("gke.sh", ["delete"], GKE, ""),
        ("slurm.sh", ["train"], SLURM, "echo 7"),
        ("local.sh", ["3", "train"], {}, ""),
        ("local.sh", ["3", "embed"], {}, ""),
        ("slurm.sh", ["embed"], {**SLURM, "PER": "node"}, "echo 7"),
    ],
)
def test_a_dry_run_prints_what_a_run_calls(launcher, script, arguments, environment, part):
    flags = [] if arguments == ["delete"] else FLAGS
    status, printed, error = launcher.run(script, "--dry-run", *arguments, *flags, **environment)
    assert (status, error, launcher.calls) == (0, "", [])
    words = [shlex.split(line.removesuffix(" &")) for line in printed.splitlines()]
    planned = [line for line in words if line[0] in STUBS]
    assert len(planned) >= 1
    status, _, error = launcher.run(script, *arguments, *flags, part=part, **environment)
    assert status == 0, error
    called = [
        call
        for i, call in enumerate(launcher.calls)
        if call[0] != "kubectl" or call not in launcher.calls[:i]
    ]
    concurrent = script == "local.sh" or "--follow" in arguments
    assert (sorted(called) if concurrent else called) == (
        sorted(planned) if concurrent else planned
    )


def test_the_documented_dry_runs_are_what_is_printed(launcher):
    (launcher.repository / "tokens.env").touch()
    environment = {**launcher.environment, "TMPDIR": "/tmp"}
    del environment["PYTHON"], environment["POLL"]
    changing = re.compile(r"(lco-jax-|--chdir=)[\w/-]+")  # a commit and a folder
    text = (LAUNCH.parent / "docs" / "launching.md").read_text()
    blocks = re.findall(r"```console\n\$ (.*)\n([^`]*)```", text)
    assert len(blocks) == 6
    for command, printed in blocks:
        done = subprocess.run(
            command,
            shell=True,
            cwd=launcher.repository,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert changing.sub(r"\1", done.stdout) == changing.sub(r"\1", printed)


@pytest.mark.parametrize(
    ("script", "needed"), [("tpu_vm.sh", TPU), ("gke.sh", GKE), ("slurm.sh", SLURM)]
)
def test_what_is_missing_or_unknown_is_named_and_nothing_called(launcher, script, needed):
    status, _, error = launcher.run(script, "train", *FLAGS)
    assert (status, error.count("\n")) == (2, 1)
    assert f"set {' '.join(needed)};" in error
    last = list(needed)[-1]
    assert f"set {last};" in launcher.run(script, "train", *FLAGS, **{**needed, last: ""})[2]
    status, _, error = launcher.run(script, "--spto", "train", *FLAGS, **needed)
    assert status == 2
    assert "--spto is no flag of this launcher" in error
    status, _, error = launcher.run(script, "trian", *FLAGS, **needed)
    assert status == 2
    assert "'trian'" in error
    assert not launcher.calls
    status, help_text, _ = launcher.run(script, "--help")
    assert status == 0
    assert all(name in help_text for name in needed)


@pytest.mark.parametrize(("script", "needed"), [("tpu_vm.sh", TPU), ("gke.sh", GKE)])
def test_code_that_is_not_committed_is_not_left_behind_unsaid(launcher, script, needed):
    (launcher.repository / "lco_jax" / "new.py").touch()
    status, _, error = launcher.run(script, "train", *FLAGS, **needed)
    assert (status, launcher.calls) == (2, [])
    assert "lco_jax/new.py" in error


@pytest.mark.parametrize("module", ["train", "embed"])
@pytest.mark.parametrize(("script", "needed"), [("tpu_vm.sh", TPU), ("gke.sh", GKE)])
def test_secrets_stay_in_their_file(launcher, tmp_path, script, needed, module):
    """So does the token by which the machines of a Ray cluster know each other."""
    (tmp_path / "env").write_text("HF_TOKEN=secret-7\n")
    part = SLICE.format(looks="ACTIVE", job=":")
    status, out, error = launcher.run(
        script, module, *FLAGS, part=part, ENV_FILE=str(tmp_path / "env"), **needed
    )
    assert status == 0, error
    file = tmp_path / ("env" if module == "train" else "lco-jax-lco.env")
    assert launcher.count(str(file)) == 1
    secrets = [line.partition("=")[2] for line in file.read_text().splitlines()]
    assert file.read_text().startswith("HF_TOKEN=secret-7\n")
    assert len(secrets) == (1 if module == "train" else 2)
    said = launcher.calls_file.read_text() + out + error
    assert not any(secret in said for secret in secrets)


def test_a_slice_is_waited_for(launcher):
    part = SLICE.format(
        looks="NONE WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
        job="echo step 1",
    )
    status, out, error = launcher.run("tpu_vm.sh", "train", *FLAGS, part=part, **TPU)
    assert (status, launcher.count("describe"), launcher.count("create")) == (0, 5, 1)
    assert out == "step 1\n"
    assert error.count("WAITING_FOR_RESOURCES") == 1
    assert "still exists" in error


def test_a_preempted_slice_is_made_anew(launcher):
    looks = "NONE ACTIVE SUSPENDED SUSPENDED NONE ACTIVE"
    part = SLICE.format(looks=looks, job="[ $(times lco_jax.train) = 2 ] || exit 255")
    status, _, error = launcher.run("tpu_vm.sh", "--spot", "train", *FLAGS, part=part, **TPU)
    assert status == 0, error
    said = [
        next(
            word for word in call if word in ("create", "delete", "scp") or "lco_jax.train" in word
        )
        for call in launcher.calls
        if "describe" not in call and "pkill" not in str(call) and "uv pip" not in str(call)
    ]
    run = said[-1]
    assert said == ["create", "scp", run, "delete", "create", "scp", run]
    assert "restart 1 of 3" in error


@pytest.mark.parametrize(("says", "runs"), [("139", 3), ("75", 3), ("1", 2), ("2", 1)])
def test_a_job_on_a_slice_is_restarted_for_what_it_says_of_itself(launcher, says, runs):
    """gcloud's own status is 1 whatever the workers' are."""
    part = SLICE.format(looks="ACTIVE", job=f"echo 'exit status of the job: {says}'; exit 1")
    status, _, error = launcher.run("tpu_vm.sh", "train", *FLAGS, part=part, RETRIES="2", **TPU)
    assert (status, launcher.count("lco_jax.train"), launcher.count("create")) == (
        int(says),
        runs,
        0,
    )
    assert ("after 2 restarts (RETRIES=2); given up" in error) == (runs == 3)
    assert ("failed at once twice" in error) == (says == "1")


def test_a_slice_that_cannot_be_looked_at_is_left_alone(launcher):
    status, _, error = launcher.run(
        "tpu_vm.sh", "train", *FLAGS, part="echo no network >&2; exit 1", **TPU
    )
    assert (status, len(launcher.calls)) == (1, 5)
    assert "no network" in error
    assert "cannot be looked at" in error


@pytest.mark.parametrize(
    ("status", "requeues"),
    [("0", [0]), ("2", [0]), ("75", [1, 1, 0]), ("137", [1, 1, 0]), ("1", [1, 0])],
)
def test_a_slurm_job_requeues_itself_as_long_as_is_due(launcher, status, requeues):
    for attempt in requeues:
        part = f"[ ${{0##*/}} != srun ] || exit {status}"
        ended, _, _ = launcher.run("slurm_job.sh", "train", *FLAGS, part=part, RETRIES="2", **JOB)
        assert (ended, launcher.count("scontrol requeue 7")) == (int(status), attempt)
        (srun, *_) = launcher.calls
        assert srun[0] == "srun"
        assert srun[-3:] == ["--distributed", *FLAGS]


def test_a_slurm_job_hands_its_signal_on(launcher):
    waits = "trap 'exit 75' TERM; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done"
    part = f"[ ${{0##*/}} != srun ] || {{ {waits}; }}"
    status, _, _ = launcher.run("slurm_job.sh", "train", *FLAGS, part=part, **JOB)
    assert (status, launcher.count("scontrol requeue 7")) == (75, 1)


@pytest.mark.parametrize(
    ("given", "share"), [({}, "0.92"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "0.5")]
)
@pytest.mark.parametrize(("script", "arguments"), [("slurm_job.sh", []), ("local.sh", ["1"])])
def test_jobs_on_gpus_may_fill_them(launcher, script, arguments, given, share):
    """jax alone would take three quarters; what its user says stands."""
    part = "case ${0##*/} in srun | python) echo share $XLA_PYTHON_CLIENT_MEM_FRACTION ;; esac"
    status, out, error = launcher.run(
        script, *arguments, "train", *FLAGS, part=part, **JOB, **given
    )
    assert (status, out) == (0, f"share {share}\n"), error


@pytest.mark.parametrize(("end", "expected"), [("COMPLETED", 0), ("FAILED", 1)])
def test_a_slurm_job_is_followed_to_its_end(launcher, end, expected):
    part = f"""case ${{0##*/}} in
      sbatch) echo step 1 >runs/slurm/lco-7.out; echo 7 ;;
      squeue) sleep 0.2; [ $(times squeue) -gt 2 ] && echo {end} || echo RUNNING ;;
    esac"""
    status, out, error = launcher.run("slurm.sh", "--follow", "train", *FLAGS, part=part, **SLURM)
    assert (status, out) == (expected, "step 1\n"), error
    assert launcher.count("squeue") == 3


@pytest.mark.parametrize(
    ("first", "later", "ended", "runs"),
    [
        ("75", "0", 0, 2),
        ("76", "0", 0, 2),
        ("137", "0", 0, 2),
        ("2", "0", 2, 1),
        ("1", "1", 1, 2),
        ("75", "75", 75, 3),
    ],
)
def test_processes_start_again_together_where_that_helps(launcher, first, later, ended, runs):
    """Process 0 exits so the first time and so later; process 1 runs till it is told to end."""
    part = f"""case "$*" in
      *process-id=0*) [ $(times process-id=0) -gt 1 ] && exit {later} || exit {first} ;;
      *) [ {later} = 0 ] && [ $(times process-id=1) -gt 1 ] && exit 0
        trap 'exit 0' TERM; for i in {{1..300}}; do sleep 0.1; done; exit 9 ;;
    esac"""
    status, _, error = launcher.run("local.sh", "2", *FLAGS, part=part, RETRIES="2")
    assert status == ended, error
    assert launcher.count("process-id=0") == launcher.count("process-id=1") == runs
    assert error.count("restart ") == runs - 1


def test_actors_on_this_machine_are_those_of_one_command(launcher):
    status, _, error = launcher.run("local.sh", "3", "embed", *FLAGS)
    assert status == 0, error
    command = ["python", "-m", "lco_jax.embed", "--ray", "--actors=3", *FLAGS]
    assert launcher.calls == [command]


RANK = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,b", "RAY_PORT": "0"}
EMBED = ["python", "-m", "lco_jax.embed", "--ray=auto", *FLAGS]
HOSTS = 'case "${0##*/} $1" in "scontrol show") printf "localhost\\nb\\n" ;;'


@pytest.mark.parametrize("ended", [0, 2, 75])
def test_the_first_machine_of_a_cluster_runs_the_command_and_ends_the_cluster(launcher, ended):
    part = f'{HOSTS} "python -m") exit {ended} ;; esac'
    status, _, error = launcher.run("ray.sh", *EMBED, part=part, SLURM_PROCID="0", **RANK)
    assert status == ended, error
    calls = [call[:3] for call in launcher.calls]
    start, stop = ["ray", "start", "--head"], ["ray", "stop", "--grace-period=5"]
    assert calls == [
        ["scontrol", "show", "hostnames"],
        start,
        ["python", "-", "2"],
        EMBED[:3],
        stop,
    ]
    assert launcher.calls[3] == EMBED


def test_the_first_machine_hands_its_signal_on(launcher):
    waits = "trap 'exit 75' TERM; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done"
    part = f'{HOSTS} "python -m") {waits} ;; esac'
    status, _, error = launcher.run("ray.sh", *EMBED, part=part, SLURM_PROCID="0", **RANK)
    assert status == 75, error
    assert launcher.count("ray stop") == 1


def test_the_other_machines_join_the_first_and_end_with_it(launcher):
    """Whatever Ray's status is then: the first machine's is the job's."""
    slice_ = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "localhost,b"}
    with socket.create_server(("localhost", 0)) as head:
        port = str(head.getsockname()[1])
        status, _, error = launcher.run("ray.sh", *EMBED, part="exit 1", RAY_PORT=port, **slice_)
    assert status == 0, error
    assert launcher.calls == [["ray", "start", f"--address=localhost:{port}", "--block"]]
    lost = launcher.run("ray.sh", *EMBED, RAY_PORT=port, PATIENCE="0", **slice_)
    assert (lost[0], launcher.calls) == (76, [])


def test_a_slurm_job_starts_a_cluster_for_embed(launcher):
    part = "[ ${0##*/} != srun ] || echo token ${#RAY_AUTH_TOKEN} ${JAX_LOCAL_DEVICE_IDS:-none}"
    job = {**JOB, "PER": "node"}
    status, out, error = launcher.run("slurm_job.sh", "embed", *FLAGS, part=part, **job)
    assert (status, out) == (0, "token 64 none\n"), error
    (srun,) = launcher.calls
    assert srun[-len(EMBED) - 1 :] == ["launch/ray.sh", *EMBED]


def test_a_process_that_does_not_end_is_killed(launcher):
    waits = "for i in {1..300}; do sleep 0.1; done"
    part = f'[[ "$*" != *process-id=0* ]] || exit 2; trap "" TERM; {waits}'
    since = time.monotonic()
    assert launcher.run("local.sh", "2", *FLAGS, part=part, GRACE="0")[0] == 2
    assert time.monotonic() - since < 25  # of 30


def test_a_launcher_that_is_stopped_lets_its_processes_save(launcher):
    part = "trap 'exit 75' TERM; echo up; for i in {1..300}; do sleep 0.1; done"
    process = launcher.start("local.sh", "2", *FLAGS, part=part)
    assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (process.returncode, len(launcher.calls)) == (75, 2)
