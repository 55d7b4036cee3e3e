"""Runs that stay alive or say why not: steps traced to their records, hangs, SIGTERM, disks and data that go away."""

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_two

from lco_jax import LcoError, job, train
from lco_jax.core.errors import PEER_LOST, PREEMPTED, run_main
from lco_jax.core.sharding import make_mesh
from lco_jax.data import pipeline
from lco_jax.data.sources import JsonlSource
from lco_jax.training import cli, progress, watch
from lco_jax.training.metrics import read_metrics
from lco_jax.training.progress import LEAST, Incidents

ROOT = Path(__file__).parent.parent
NAMES = tuple(f"a.jsonl:{i}" for i in range(8))


def told(folder):
    return read_metrics(folder / "incidents.jsonl")


def test_a_leap_is_told_with_the_highest_rows_and_noise_is_not(tmp_path, caplog):
    rng, watched = np.random.default_rng(0), Incidents(tmp_path, 0, 20.0)
    for step in range(200):  # a loss that falls to a tenth, with a third of noise
        loss = (0.1 + 0.9 * 0.98**step) * (1 + 0.1 * rng.normal())
        watched.look(step, loss, True, jnp.full(8, loss), NAMES)
    assert not told(tmp_path)
    rows = jnp.array([0.1, 9.0, 0.2, -jnp.inf, 70.0, 0.3, 0.1, 0.1])
    watched.look(200, 10.0, True, rows, NAMES)
    (line,) = told(tmp_path)
    assert [one["record"] for one in line["records"]][:2] == ["a.jsonl:4", "a.jsonl:1"]
    assert len(line["records"]) == 7  # the one that was left out is not among them
    assert (line["step"], line["loss"], line["skipped"]) == (200, 10.0, False)
    assert "step 200: the loss leaps from 0.1" in caplog.text
    assert "a.jsonl:4 (70), a.jsonl:1 (9)" in caplog.text


def test_few_losses_and_a_spike_of_nought_tell_of_no_leap(tmp_path):
    for spike, steps in ((20.0, LEAST - 1), (0.0, 40)):
        watched = Incidents(tmp_path, 0, spike)
        for step in range(steps):
            watched.look(step, 1.0, True, jnp.ones(8), NAMES)
        watched.look(steps, 1e6, True, jnp.ones(8), NAMES)
    assert not told(tmp_path)


def test_what_is_not_finite_is_blamed_on_its_own_records(tmp_path, caplog):
    rows = jnp.array([jnp.inf, jnp.inf, jnp.nan, jnp.inf, jnp.inf, jnp.nan, jnp.inf, jnp.inf])
    Incidents(tmp_path, 0, 20.0).look(3, float("nan"), False, rows, NAMES)
    (line,) = told(tmp_path)
    assert [one["record"] for one in line["records"] if not one["finite"]] == [
        "a.jsonl:2",
        "a.jsonl:5",
    ]
    assert line["loss"] is None
    assert (
        "not finite; the worst records and their losses: a.jsonl:2 (nan), a.jsonl:5 (nan), a.jsonl:0"
        in caplog.text
    )
    Incidents(tmp_path, 4, 20.0)
    assert told(tmp_path)
    Incidents(tmp_path, 3, 20.0)  # resumed before it
    assert not told(tmp_path)


def test_processes_tell_each_other_their_names(monkeypatch):
    """Each of three has every third; a name that is too long keeps its end."""
    names = ["x" * 600 + ":7", "b:2", "c:3", "ü:4", "e:5", "f:6"]
    shares = {}
    monkeypatch.setattr(progress.jax, "process_count", lambda: 3)
    for me in range(3):
        monkeypatch.setattr(progress.jax, "process_index", lambda me=me: me)
        gather = lambda x, tiled, me=me: shares.setdefault(me, x)
        monkeypatch.setattr(progress.multihost_utils, "process_allgather", gather)
        progress._names([5, 0, 3], names[me::3])
    monkeypatch.setattr(
        progress.multihost_utils,
        "process_allgather",
        lambda x, tiled: np.concatenate(list(shares.values())),
    )
    assert progress._names([5, 0, 3], names[2::3]) == ["f:6", names[0][-progress.NAME :], "ü:4"]


@pytest.mark.slow
def test_a_record_that_makes_nan_is_found(tmp_path, monkeypatch):
    """One token's embedding is NaN, and one record of 16 has it; GradCache chunks, dropout and all. Those beside it in
    its stream may share its fate (they share the head), but it alone is in both incidents."""
    lines = [
        {"anchor": f"dog {i}", "positive": f"a dog runs {i}", "negative": f"no {i}"}
        for i in range(16)
    ]
    lines[5]["positive"] = "a zebra runs"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = job.load_model

    def poisoned(checkpoint, *args, **kwargs):
        model, params = load(checkpoint, *args, **kwargs)
        tokenizer = train.jobs.Processor(checkpoint.folder, 512, job.MediaConfig()).tokenizer
        ids = [
            set(tokenizer.answers([text])[0].tolist())
            for text in (line["positive"] for line in lines)
        ]
        (token, *_) = ids[5] - set().union(*ids[:5], *ids[6:])
        table = params["decoder"]["embed_tokens"]
        table["weight"] = table["weight"].at[token].set(jnp.nan)
        return model, params

    monkeypatch.setattr(job, "load_model", poisoned)
    monkeypatch.setattr(job, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:2]))
    monkeypatch.chdir(ROOT)
    args = cli.parse(
        ["train", "--config=configs/base.py", "--config.train.steps=4", "--config.train.batch_size=8",
         "--config.eval.path=", "--config.export.merged=False", "--config.train.chunk_tokens=64",
         "--config.optimizer.warmup_steps=1",
         f"--config.data.sources.bundled.path={tmp_path / 'a.jsonl'}"], "",
    )  # fmt: skip
    train.train(args.config, tmp_path)
    found = told(tmp_path)
    assert len(found) == 2  # one batch of each epoch
    for line in found:
        assert line["skipped"]
    blamed = [{one["record"] for one in line["records"] if not one["finite"]} for line in found]
    assert set.intersection(*blamed) == {f"{tmp_path}/a.jsonl:6"}
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 2


def test_a_step_that_does_not_end_ends_the_process_with_a_sentence(monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(watch.os, "_exit", ends.append)
    with watch.Watchdog(0.1, 7) as dog:  # six times that for the first step
        time.sleep(0.3)
        assert not ends
        dog.ended(7)
        for _ in range(5):
            time.sleep(0.05)
            dog.ended(8)
        assert not ends
        time.sleep(0.5)
    assert ends[0] == PEER_LOST
    said = capsys.readouterr().err
    assert "process 0 of 1: step 9 has not ended" in said
    assert "waits in test_alive.py" in said
    with watch.Watchdog(0.0, 7) as dog:
        assert not dog.is_alive()


@pytest.mark.parametrize(
    "says", ["UNKNOWN: Gloo AllGather failed: Connection closed by peer", "a bug"]
)
def test_a_collective_that_fails_names_the_loss_of_a_peer(monkeypatch, capsys, says):
    monkeypatch.setattr(watch.jax.distributed, "is_initialized", lambda: True)
    ends = []
    monkeypatch.setattr(watch, "leave", lambda status, seconds: ends.append(status))
    failing = pytest.raises(ValueError, match=says) if says == "a bug" else watch.peers()
    with failing, watch.peers():
        raise ValueError(says)
    assert ends == ([] if says == "a bug" else [PEER_LOST])
    assert ("another process is gone, or late" in capsys.readouterr().err) == bool(ends)


def test_an_error_in_one_process_does_not_leave_the_other_waiting():
    """The one with a user's mistake says it and ends with 2; the other, in a collective, with 76 and a sentence."""
    code = """
import sys, jax, numpy as np
from jax.experimental import multihost_utils
from lco_jax.core.errors import LcoError, run_main
from lco_jax.training.watch import peers

def main():
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
    with peers():
        for step in range(10):
            if jax.process_index() == 1 and step == 3:
                raise LcoError("a.jsonl:7: bad")
            multihost_utils.process_allgather(np.ones(1))

run_main(main)
"""
    both = run_two(code)
    said = [err for _, _, err in both]
    assert [status for status, _, _ in both] == [PEER_LOST, 2], said
    assert "process 0 of 2: another process is gone, or late" in said[0]
    assert "error: a.jsonl:7: bad" in said[1]


def test_sigterm_before_there_is_anything_to_save():
    code = "from lco_jax.training import watch; watch.leave_on_sigterm(); print(1, flush=True); input()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "nothing to save" in process.communicate(timeout=20)[1]
    assert process.returncode == PREEMPTED


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_lets_both_save_the_same_step(tmp_path):
    """Which jax's preemption service tells; then the same command resumes from there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "lco_jax.train", "--config=configs/tiny.py", f"--workdir={tmp_path}",
        "--config.train.batch_size=8", "--config.train.steps=2000", "--config.checkpoint.every=100000",
        "--config.eval.path=", "--config.lora.rank=4", f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    options = {
        "cwd": ROOT,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    both = [subprocess.Popen([*command, f"--process_id={i}"], **options) for i in range(2)]
    while both[1].poll() is None and len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=250)[0] for one in both]
    assert [one.returncode for one in both] == [PREEMPTED, PREEMPTED], said
    steps = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert 3 <= steps < 2000
    assert f"saved at step {steps}: the same command resumes" in said[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == [
        str(steps)
    ]


def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: runs/a/metrics.jsonl: No space left on device; make room, then try again\n"
    )


def test_data_that_vanishes_in_mid_run_is_named(tmp_path, tiny):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"anchor": f"a {i}", "positive": f"b {i}"}) + "\n" for i in range(8))
    )
    layout = pipeline.Layout(2, 0, tiny.processor.tokenizer.prefix)
    stream = pipeline.record_stream({"a": JsonlSource(path)}, {"a": 1.0}, 0)
    iterator = pipeline.ahead(pipeline.local_batches(stream, layout, tiny.processor, None), 1)
    assert all(name.startswith(f"{path}:") for name in next(iterator).where)
    path.unlink()
    with pytest.raises(LcoError, match=r"a\.jsonl can no longer be read: No such file"):
        list(itertools.islice(iterator, 20))  # some are read ahead


@pytest.mark.slow
def test_several_processes_survive_kills():
    """The benchmark of that name in short, one process killed: losses and batches of one that ran uninterrupted."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "survival",
        "--kills=1",
        "--processes=2",
        "--devices=1",
    ]
    done = subprocess.run(
        [*command, "--steps=17", "--then", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["others"]) <= {
        str(PEER_LOST),
        "-6",
    }  # -6: jax's own abort, which may come first
    assert result["ends"]["2x1"]["loss"] < 1e-5
    assert result["ends"]["2x1"]["same_batches"]
