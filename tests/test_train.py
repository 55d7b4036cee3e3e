"""The main job in real processes: killed, resumed, preempted, several of them; and its outputs."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import free_port, with_devices

from configs import tiny
from lco_jax import LcoError, contrastive, generative, make_mesh
from lco_jax.core.errors import PREEMPTED
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training import cli
from lco_jax.training.metrics import read_metrics
from lco_jax.training.run import check_config, check_same_run, claim_workdir

ROOT = Path(__file__).parent.parent
STEPS = 20
SMALL = [  # the real job, made short
    "--config=configs/tiny.py", f"--config.train.steps={STEPS}", "--config.train.batch_size=8",
    "--config.eval.path=", "--config.optimizer.warmup_steps=4", "--config.checkpoint.every=4",
    "--config.export.merged=False", "--config.lora.rank=4",
]  # fmt: skip


def start(workdir, *flags, devices=1):
    command = [sys.executable, "-m", "lco_jax.train", *SMALL, f"--output={workdir}", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=with_devices(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def losses(workdir):
    lines = read_metrics(Path(workdir) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def wait_for_lines(workdir, count, process):
    while process.poll() is None and len(read_metrics(Path(workdir) / "metrics.jsonl")) < count:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("quiet")
    finish(start(workdir))
    return workdir


def adapter_bytes(workdir):
    return (Path(workdir) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run after two SIGKILLs, the second while a checkpoint is being written."""
    workdir, rng = tmp_path_factory.mktemp("killed"), random.Random(0)
    for kill in range(2):
        if (
            len(read_metrics(workdir / "metrics.jsonl")) > STEPS - 6
        ):  # nearly through: from the beginning
            shutil.rmtree(workdir)
            workdir.mkdir()
        process = start(workdir)
        done = len(read_metrics(workdir / "metrics.jsonl"))
        if kill % 2:  # right after a step that saves, while orbax writes in the background
            wait_for_lines(
                workdir, max(done // 4 + 1, 2) * 4, process
            )  # one is complete in the end
            time.sleep(rng.uniform(0, 0.03))
        else:
            wait_for_lines(workdir, done + 1, process)
            time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.wait()
    return workdir


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_bit_for_bit(quiet, killed, tmp_path):
    """The same losses, the same adapter."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    finish(start(tmp_path))
    assert losses(tmp_path) == losses(quiet)
    assert adapter_bytes(tmp_path) == adapter_bytes(quiet)


@pytest.mark.slow
def test_resumed_on_another_mesh(quiet, killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    output = finish(
        start(
            tmp_path,
            "--config.mesh.data=2",
            "--config.mesh.fsdp=2",
            "--config.mesh.tensor=2",
            devices=8,
        )
    )
    assert "resuming" in output
    assert np.abs(np.array(losses(tmp_path)) - losses(quiet)).max() < 1e-4


@pytest.mark.slow
def test_sigterm_saves_and_says_so_by_its_status(quiet, tmp_path):
    process = start(tmp_path, "--config.checkpoint.every=1000")
    wait_for_lines(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes" in finish(process, PREEMPTED)
    assert 3 <= len(losses(tmp_path)) < STEPS
    assert "resuming" in finish(start(tmp_path))
    assert losses(tmp_path) == losses(quiet)
    assert adapter_bytes(tmp_path) == adapter_bytes(quiet)


@pytest.mark.slow
def test_a_folder_that_is_deleted_while_it_trains(tmp_path):
    """The run ends with one sentence, and makes no other folder in its place.

    Between two saves: in the midst of one, orbax may wait for minutes before it gives up.
    """
    workdir = tmp_path / "run"
    process = start(workdir, "--config.train.steps=3000", "--config.checkpoint.every=40")
    wait_for_lines(workdir, 6, process)
    assert process.poll() is None, process.communicate()[0]
    shutil.rmtree(workdir)
    output = finish(process, code=2)
    gone = f"error: {workdir / 'checkpoints'}, or a file in it, was removed while the run worked"
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith(f"{gone}; put it back to resume; without it")
    assert output.count("error: ") == 1, output
    assert not workdir.exists()


@pytest.mark.slow
def test_two_processes_equal_one(quiet, tmp_path):
    """Real processes on loopback, started by the launcher, with one set of outputs."""
    given = {"PYTHON": sys.executable, "PORT": str(free_port()), "DEVICES": "2"}
    flags = [*SMALL, f"--workdir={tmp_path}", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    flags += ["--config.log.tensorboard=True"]
    subprocess.run(
        [ROOT / "launch" / "local.sh", "2", *flags],
        env={**with_devices(1), **given},
        check=True,
        timeout=300,
    )
    assert np.abs(np.array(losses(tmp_path)) - losses(quiet)).max() < 1e-4
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # of the first process


@pytest.mark.slow
def test_a_finished_run_and_another_configuration(quiet, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))

    def run(*flags):
        return train(cli.parse(["train", *SMALL, *flags], "").config, quiet)

    before, adapter = losses(quiet), adapter_bytes(quiet)
    shutil.rmtree(quiet / "adapter")
    run()  # nothing left to do: exports again
    assert losses(quiet) == before
    assert adapter_bytes(quiet) == adapter
    with pytest.raises(LcoError, match=r"config\.optimizer\.learning_rate.*another --output"):
        run("--config.optimizer.learning_rate=5.0")
    assert losses(quiet) == before


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("train.batch_size=0", "config.train.batch_size is 0"),
        ("train.temperature=-0.1", "config.train.temperature is -0.1"),
        ("checkpoint.every=0", "config.checkpoint.every is 0"),
        ("optimizer.clip_norm=-1.0", "config.optimizer.clip_norm is -1.0"),
        ("data.batches=sorted", "config.data.batches is 'sorted'; it must be mixed or homogeneous"),
        ("seed=-1", "config.seed is -1"),
        ("model.remat=ful", "remat is 'ful'"),
        ("model.dtype=bf16", "config.model.dtype is 'bf16'"),
        ("mesh.tensor=3", "mesh .* needs"),
        ("optimizer.schedule=cubic", "optimizer.schedule is 'cubic'"),
        ("eval.path=nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("eval.path=assets:lab/text.jsonl,assets:lab/text.jsonl", "holds two files of one name"),
    ],
)
def test_a_value_that_cannot_be_is_refused_and_claims_no_folder(tmp_path, monkeypatch, flag, says):
    monkeypatch.chdir(ROOT)
    args = cli.parse(["train", *SMALL, f"--config.{flag}"], "")
    with pytest.raises(LcoError, match=says):
        train(args.config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_key_that_is_gone_is_refused_unless_it_has_its_default():
    config = tiny.get_config()
    config.train.candidates = "auto"
    check_config(config)
    config.train.candidates = "ring"
    with pytest.raises(LcoError, match=r"config\.train\.candidates does not exist any more"):
        check_config(config)


def test_an_earlier_versions_run_can_be_resumed(tmp_path):
    config = tiny.get_config()
    config.train.spike = 3.0
    claim_workdir(tmp_path, config, 10)
    check_same_run(tmp_path, tiny.get_config(), 10)
    with pytest.raises(LcoError, match=r"config\.total_steps = 10, and this one has 11"):
        check_same_run(tmp_path, tiny.get_config(), 11)


@pytest.mark.slow
@pytest.mark.parametrize("job", [train, pretrain])
def test_the_second_evaluation_compiles_nothing(tmp_path, monkeypatch, job):
    """Before and after, of the same held-out records, with the same programs."""
    lines = [{"anchor": f"dog {i}", "positive": f"a dog runs {i}"} for i in range(8)]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    module, compiled, evaluated = contrastive if job is train else generative, [], []
    evaluate = module._evaluate

    def counted(*args, **kwargs):
        before = len(compiled)
        if job is pretrain:
            kwargs["answered"] = 0
        evaluated.append((evaluate(*args, **kwargs), len(compiled) - before))
        return evaluated[-1][0]

    def listen(event, *_, **__):
        compiled.append(event) if event.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(module, "_evaluate", counted)
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.chdir(ROOT)
    flags = [
        *SMALL,
        "--config.train.steps=2",
        f"--config.eval.path={data}",
        f"--config.data.sources.bundled.path={data}",
    ]
    job(
        cli.parse(["train", *flags, "--config.optimizer.warmup_steps=1"], "").config,
        tmp_path / "run",
    )
    jax.monitoring.unregister_event_duration_listener(listen)
    (before, programs), (after, again) = evaluated
    assert programs > 0
    assert again == 0
    assert repr(before) != repr(after)


@pytest.mark.slow
def test_repeated_non_finite_steps_stop_the_run(tmp_path):
    flags = [
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.clip_norm=0.0",
        "--config.train.max_nonfinite=3",
    ]
    output = finish(start(tmp_path, *flags, "--config.lora.dropout=0.0"), code=2)
    assert "not finite in 3 steps in a row" in output
    assert "Traceback" not in output
