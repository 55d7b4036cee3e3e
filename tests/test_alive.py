"""Runs that survive or say why not: failed steps, hangs, SIGTERM, disks and data that vanish."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, run_two, with_devices

from configs import base
from lco_jax import LcoError, job, run_model, train
from lco_jax.core import errors
from lco_jax.core.errors import PEER_LOST, PREEMPTED, PeerLost, run_main
from lco_jax.core.sharding import make_mesh
from lco_jax.data import pipeline
from lco_jax.data.record_stream import record_stream
from lco_jax.data.sources import JsonlSource
from lco_jax.training import cli, reports, watch
from lco_jax.training.metrics import read_metrics
from lco_jax.training.reports import StepReports, report_incident

ROOT = Path(__file__).parent.parent
NAMES = tuple(f"a.jsonl:{i}" for i in range(8))


def incidents(folder):
    return read_metrics(folder / "incidents.jsonl")


def test_a_step_that_is_not_finite_is_blamed_on_its_own_records(tmp_path, caplog):
    inf, nan = np.inf, np.nan
    losses = np.array([inf, inf, nan, inf, -inf, nan, inf, inf], np.float32)
    report_incident(tmp_path / "incidents.jsonl", 3, nan, losses, NAMES)
    (line,) = incidents(tmp_path)
    blamed = [one["record"] for one in line["records"] if not one["finite"]]
    assert blamed == ["a.jsonl:2", "a.jsonl:5"]
    assert len(line["records"]) == 7  # the one that was left out is not among them
    assert (line["step"], line["loss"]) == (3, None)
    says = "not finite; the worst records and their losses: a.jsonl:2 (nan), a.jsonl:5 (nan), "
    assert says in caplog.text


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_names_its_own_records(tmp_path, monkeypatch, process):
    """Each of two has every second record; a resumed run drops the lines after its checkpoint."""
    monkeypatch.setattr(reports.jax, "process_count", lambda: 2)
    monkeypatch.setattr(reports.jax, "process_index", lambda: process)
    config = base.get_config()
    made = StepReports(config, tmp_path, 10, 0)
    metrics = {"loss": jnp.nan, "finite": False, "tokens": 1}
    losses = jnp.array([jnp.nan, 2.0, 1.0, jnp.nan])
    made.record(0, {**metrics, "record_losses": losses}, NAMES[process:4:2])
    made.flush()
    made.close()
    file = tmp_path / ("incidents-1.jsonl" if process else "incidents.jsonl")
    (line,) = read_metrics(file)
    assert [one["record"] for one in line["records"]] == [
        ["a.jsonl:0", "a.jsonl:2"],
        ["a.jsonl:3", "a.jsonl:1"],
    ][process]
    StepReports(config, tmp_path, 10, 1).close()
    assert read_metrics(file)
    StepReports(config, tmp_path, 10, 0).close()  # resumed before it
    assert not read_metrics(file)


@pytest.mark.slow
def test_a_record_that_makes_nan_is_found(tmp_path, monkeypatch):
    """One token's embedding is NaN, and one record of 16 has it; with GradCache and dropout.

    The records beside it in its stream may be NaN as well, since they share the prefix, but it
    alone is in both incidents.
    """
    lines = [
        {"anchor": f"dog {i}", "positive": f"a dog runs {i}", "negative": f"no {i}"}
        for i in range(16)
    ]
    lines[5]["positive"] = "a zebra runs"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = run_model.load_model

    def poisoned(checkpoint, *args, **kwargs):
        model, params = load(checkpoint, *args, **kwargs)
        tokenizer = job.Processor(checkpoint.folder, 512, job.MediaConfig()).tokenizer
        ids = [
            set(tokenizer.answers([text])[0].tolist())
            for text in (line["positive"] for line in lines)
        ]
        (token, *_) = ids[5] - set().union(*ids[:5], *ids[6:])
        table = params["decoder"]["embed_tokens"]
        table["weight"] = table["weight"].at[token].set(jnp.nan)
        return model, params

    monkeypatch.setattr(run_model, "load_model", poisoned)
    monkeypatch.setattr(job, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:2]))
    flags = [
        "--config=base",
        "--config.train.steps=4",
        "--config.train.batch_size=8",
        "--config.train.chunk_tokens=64",
        "--config.eval.path=",
        "--config.export.merged=False",
        "--config.optimizer.warmup_steps=1",
        f"--config.data.sources.bundled.path={tmp_path / 'a.jsonl'}",
    ]
    args = cli.parse(["train", *flags], "")
    train(args.config, tmp_path)
    found = incidents(tmp_path)
    assert len(found) == 2  # one batch of each epoch
    blamed = [{one["record"] for one in line["records"] if not one["finite"]} for line in found]
    assert set.intersection(*blamed) == {f"{tmp_path}/a.jsonl:6"}
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 2


def test_a_step_that_does_not_end_ends_the_process_with_a_sentence(monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(watch.os, "_exit", ends.append)
    with watch.Watchdog(0.5, 7) as dog:  # six times that for the first step
        time.sleep(1)
        assert not ends
        dog.ended(7)
        for _ in range(10):
            time.sleep(0.1)
            dog.ended(8)
        assert not ends
        late = time.monotonic() + 60
        while not ends and time.monotonic() < late:
            time.sleep(0.05)
    assert ends[0] == PEER_LOST
    said = capsys.readouterr().err
    assert "process 0 of 1: step 9 has not ended" in said
    assert "waits in test_alive.py" in said
    with watch.Watchdog(0.0, 7) as dog:
        assert not dog.is_alive()


def barrier_timeout():
    """As orbax raises it."""
    error = TimeoutError("Timeout waiting at barrier")
    error.__cause__ = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    return error


LOST = [
    jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    PeerLost("the connection to another process is gone"),
    barrier_timeout(),
]
NOT_LOST = [
    ConnectionError("connection refused by api.wandb.ai: heartbeat, barrier, UNAVAILABLE"),
    TimeoutError("the connection to the bucket timed out"),
    ValueError("ABORTED: a bug"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while a connection is open"),
]


@pytest.mark.parametrize("error", LOST + NOT_LOST, ids=repr)
def test_the_loss_of_a_peer_is_known_by_its_type(monkeypatch, capsys, error):
    """And any other error is a traceback with status 1, whatever its message says."""
    statuses = []

    def leave(status, seconds=5.0):
        statuses.append(status)
        sys.exit(status)

    def main():
        with watch.peers():
            raise error

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(watch, "leave", leave)
    monkeypatch.setattr(errors, "leave", leave)
    with pytest.raises(SystemExit):
        run_main(main)
    is_lost = error in LOST
    assert statuses == [PEER_LOST if is_lost else 1]
    err = capsys.readouterr().err
    assert ("another process is gone, or late" in err) == is_lost
    assert "Traceback" in err
    assert str(error) in err


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        ("LcoError('a.jsonl:7: bad')", 2, "error: a.jsonl:7: bad"),
        pytest.param(
            *("ConnectionError('api.wandb.ai: refused')", 1),
            "ConnectionError: api.wandb.ai: refused",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_in_one_process_does_not_leave_the_other_waiting(raised, status, says):
    """The one with the error reports it; the other, in a collective, ends with 76."""
    code = f"""
import sys, jax, numpy as np
from jax.experimental import multihost_utils
from lco_jax.core.errors import LcoError, run_main
from lco_jax.training.watch import peers

def main():
    jax.distributed.initialize(f"127.0.0.1:{{sys.argv[2]}}", 2, int(sys.argv[1]))
    with peers():
        for step in range(10):
            if jax.process_index() == 1 and step == 3:
                raise {raised}
            multihost_utils.process_allgather(np.ones(1))

run_main(main)
"""
    both = run_two(code)
    said = [err for _, _, err in both]
    assert [ended for ended, _, _ in both] == [PEER_LOST, status], said
    assert "process 0 of 2: another process is gone, or late" in said[0]
    assert "JaxRuntimeError" in said[0]
    assert says in said[1]
    assert "another process" not in said[1]


@pytest.mark.parametrize("how", ["flag", "variable", "neither"])
def test_debug_shows_the_traceback_of_a_mistake(monkeypatch, capsys, how):
    def main():
        assert sys.argv == ["train", "--config=base"]
        raise LcoError("a.jsonl:7: bad")

    flag = ["--debug"] if how == "flag" else []
    monkeypatch.setattr(sys, "argv", ["train", *flag, "--config=base"])
    monkeypatch.setenv("LCO_JAX_DEBUG", "1" if how == "variable" else "")
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("error: a.jsonl:7: bad\n")
    assert ("Traceback" in err) == (how != "neither")


def test_sigterm_before_there_is_anything_to_save():
    code = """
from lco_jax.training import watch
watch.leave_on_sigterm()
print(1, flush=True)
input()
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "nothing to save" in process.communicate(timeout=20)[1]
    assert process.returncode == PREEMPTED


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_lets_both_save_the_same_step(tmp_path):
    """jax's preemption service informs the other."""
    command = [
        sys.executable, "-m", "lco_jax.train", "--config=tiny", f"--output={tmp_path}",
        "--config.train.batch_size=8", "--config.train.steps=2000",
        "--config.checkpoint.every=100000", "--config.eval.path=", "--config.lora.rank=4",
        f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2",
    ]  # fmt: skip
    options = {
        "cwd": ROOT,
        "env": with_devices(1),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    both = [subprocess.Popen([*command, f"--process-id={i}"], **options) for i in range(2)]
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
    stream = record_stream({"a": JsonlSource(path)}, {"a": 1.0}, 0)
    iterator = pipeline.ahead(pipeline.local_batches(stream, layout, tiny.processor, None), 1)
    assert all(name.startswith(f"{path}:") for name in next(iterator).where)
    path.unlink()
    with pytest.raises(LcoError, match=r"a\.jsonl can no longer be read: No such file"):
        list(itertools.islice(iterator, 20))  # some are read ahead


@pytest.mark.slow
def test_several_processes_survive_kills():
    """The benchmark of that name in short: one kill, and the losses of an uninterrupted run."""
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
