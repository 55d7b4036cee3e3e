"""The folder of a run: one trainer at a time, ours alone, the same data, metrics that were lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import tiny
from lco_jax import LcoError, make_mesh
from lco_jax.core.files import write_json
from lco_jax.data.scan import fingerprint
from lco_jax.data.sources import JsonlSource, open_source
from lco_jax.train import train
from lco_jax.training import cli
from lco_jax.training.folder import held
from lco_jax.training.metrics import MetricsLog, read_metrics
from lco_jax.training.run import check_same_run, claim_workdir

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from lco_jax.training.folder import held
with held(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def never_loads(monkeypatch):
    """What is told here is told before a checkpoint is opened."""

    def opened(*_, **__):
        raise AssertionError("the checkpoint was opened first")

    monkeypatch.setattr("lco_jax.job.open_checkpoint", opened)
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))


def records(path, count=8, word="runs"):
    lines = [{"anchor": f"dog {i}", "positive": f"a dog {word} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(*flags):
    return cli.parse(["train", "--config=tiny", *(f"--config.{flag}" for flag in flags)], "").config


# ---- one trainer at a time


def test_the_second_trainer_of_a_folder_gets_one_sentence(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"holds\n"
    with pytest.raises(LcoError, match=f"another trainer works in {tmp_path}") as raised:
        train(config_of(), tmp_path)
    assert "\n" not in str(raised.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path):  # a process that is gone holds nothing
        pass


def test_the_folder_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(LcoError, match=r"nowhere\.jsonl cannot be read"):
            train(config_of("eval.path=nowhere.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing came of it


def test_the_others_of_a_job_ask_for_no_lock(tmp_path, monkeypatch):
    with held(tmp_path):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with held(tmp_path):
            pass


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(LcoError, match=f"--output={path} cannot be written"):
            train(config_of(), path)


def test_a_folder_that_vanishes_is_one_sentence(tmp_path):
    def work(file):
        with held(tmp_path / "a"):
            (tmp_path / "a" / ".lock").unlink()
            (tmp_path / "a").rmdir()
            file.read_text()

    with pytest.raises(LcoError, match=r"metrics\.jsonl failed: No such file"):
        work(tmp_path / "a" / "metrics.jsonl")
    with pytest.raises(FileNotFoundError):  # that is no matter of the folder
        work(tmp_path / "elsewhere")


# ---- told at the start


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_a_folder_of_somebody_else_is_told_at_the_start(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("")
    with pytest.raises(LcoError, match=f"{name} exists and was not written by lco_jax"):
        train(config_of(), tmp_path)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("data.sources.bundled.path=nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("eval.path=nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("export.dtype=float16", "config.export.dtype is 'float16'"),
        ("data.media.fps=-1.0", "config.data.media.fps is -1.0"),
        ("optimizer.learning_rate=nan", "config.optimizer.learning_rate is nan"),
    ],
)
def test_what_the_configuration_tells_is_told_at_the_start(tmp_path, flag, says):
    with pytest.raises(LcoError, match=says):
        train(config_of(flag), tmp_path)


def test_a_clashing_configuration_is_told_at_the_start(tmp_path):
    config = config_of("train.steps=100")
    claim_workdir(tmp_path, config, 100)
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    with pytest.raises(LcoError, match=r"config\.seed = 0, and this one has 1"):
        train(config_of("train.steps=100", "seed=1"), tmp_path)


def test_a_mesh_that_does_not_fit_tells_what_it_needs():
    with pytest.raises(LcoError, match=r"'data': 1, 'fsdp': 3.* needs 3 devices, and there are 1"):
        make_mesh(fsdp=3, devices=jax.devices()[:1])


# ---- the same data


def test_other_records_have_another_fingerprint(tmp_path):
    """Moved and touched files have the same."""
    first = fingerprint(JsonlSource(records(tmp_path / "a.jsonl")))
    assert first.startswith("8 records with digest ")
    assert fingerprint(JsonlSource(records(tmp_path / "b.jsonl"))) == first
    others = records(tmp_path / "c.jsonl", word="eats")
    assert fingerprint(JsonlSource(others)) != first
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(reversed(lines)))
    assert fingerprint(JsonlSource(tmp_path / "d.jsonl")) != first


def test_other_names_of_files_have_another_fingerprint(tmp_path):
    spec = {"kind": "files", "glob": f"{tmp_path}/*.png", "pattern": r"(?P<name>\w+)\.png"}
    spec["caption"] = "a {name}"
    (tmp_path / "dog.png").write_bytes(b"")
    first = fingerprint(open_source("a", spec))
    (tmp_path / "dog.png").rename(tmp_path / "cat.png")
    assert fingerprint(open_source("a", spec)) != first


def test_resuming_on_changed_data_is_refused(tmp_path):
    data = records(tmp_path / "a.jsonl")
    flags = [f"data.sources.bundled.path={data}", "train.steps=4", "optimizer.warmup_steps=1"]
    found = {"bundled": fingerprint(JsonlSource(data))}
    claim_workdir(tmp_path / "run", config_of(*flags), 4, found, "contrastive")
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    check_same_run(tmp_path / "run", config_of(*flags), 4, found)
    records(data, word="eats")  # as many lines
    with pytest.raises(LcoError, match=r"config\.data\.sources\.bundled has changed since"):
        train(config_of(*flags, "eval.path="), tmp_path / "run")


def test_a_run_of_an_earlier_version_knows_no_data(tmp_path):
    write_json(
        tmp_path / "config.json", json.loads(tiny.get_config().to_json()) | {"total_steps": 9}
    )
    check_same_run(tmp_path, tiny.get_config(), 9, {"bundled": "8 records with digest 12"})


# ---- metrics


def line(step, **more):
    return json.dumps({"step": step, "loss": 1.0, "learning_rate": 0.1, **more}).encode() + b"\n"


@pytest.mark.parametrize(
    "bad",
    [b"{torn\n", b"\xff\xfe\x00\n", b"\0" * 40 + b"\n", b"[1]\n", b"7\n", b'{"loss": 1}\n', b"\n",
     b'{"step": "one"}\n', b"[" * 100_000 + b"\n"],
)  # fmt: skip
def test_one_bad_line_of_metrics_stops_nothing(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(0) + bad + line(1, skipped_steps=3) + line(2) + b'{"step": 3, "lo')
    assert [one["step"] for one in read_metrics(path)] == [0, 1, 2]
    log = MetricsLog(tmp_path, 2, tiny.get_config())
    assert log.skipped == 3
    log.write(2, {"loss": 0.5})
    log.close()
    assert [one["step"] for one in read_metrics(path)] == [0, 1, 2]


@pytest.mark.parametrize("content", [None, b"", b"\x80\x00garbage"])
def test_metrics_that_are_gone_stop_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    log = MetricsLog(tmp_path, 5, tiny.get_config())
    assert log.skipped == 0
    log.write(5, {"loss": 0.5})
    log.close()
    assert [one["step"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [5]


# ---- a reader that is gone


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    code = """
import sys
from pathlib import Path
from lco_jax.core.errors import run_main

def main():
    for i in range(20_000):
        print("a line", i)
        print("another", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")

run_main(main)
"""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "end"], stdout=write, stderr=write
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").read_text() == "done"
