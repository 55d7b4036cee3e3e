"""Runs, models and data on a bucket, as the stand-in of it in bucket.py has them."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from bucket import Bucket
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from processes import free_port

from lco_jax import LcoError
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.store import RunStore
from lco_jax.core.extras import install_line
from lco_jax.core.files import ASSETS, as_path, local_copy, local_path, upload, written_aside
from lco_jax.core.sharding import make_mesh
from lco_jax.data.given import sources_of
from lco_jax.data.sources import open_source
from lco_jax.train import train
from lco_jax.training import cli
from lco_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bucket(cache):
    """One for all: clients remember where it was."""
    with Bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, bucket.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setenv(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # which would look for Google's machines
        yield bucket


def held(bucket, at):
    """{name below `at`: content}."""
    there = dict(bucket.objects)
    return {name.removeprefix(f"{at}/"): there[name] for name in there if name.startswith(f"{at}/")}


def files_of(folder):
    return {
        x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*") if x.is_file()
    }


def test_a_folder_copied_up_is_the_same_there_and_its_mark_comes_last(bucket, tmp_path):
    """Output folders lose what they no longer hold; what else is there, and what has not changed,
    is left as it is.
    """
    rng, there = np.random.default_rng(0), as_path("gs://bucket/up")
    bucket.put("up/checkpoints/1/x", b"another's")
    names = [f"{folder}{i}" for folder in ("", "sub/") for i in range(6)]
    for turn in range(4):
        with written_aside(tmp_path / "adapter") as aside:
            (aside / "sub").mkdir()
            for name in rng.choice(names, size=6, replace=False):
                (aside / name).write_bytes(rng.bytes(rng.integers(0, 9)) + b"\r\n" * turn)
        (tmp_path / "metrics.jsonl").write_text(f"{turn // 2}\n")
        before = bucket.generations.get("up/metrics.jsonl")
        upload(tmp_path, there)
        assert held(bucket, "up") == {**files_of(tmp_path), "checkpoints/1/x": b"another's"}
        assert (
            max(bucket.generations, key=bucket.generations.get) == "up/adapter/.written-by-lco-jax"
        )
        assert (bucket.generations["up/metrics.jsonl"] == before) == (turn % 2 == 1)


def test_what_is_fetched_is_what_is_there_and_fetched_once(bucket, monkeypatch):
    bucket.put("some/a.json", b"{}")
    bucket.put("some/sub/b.json", b"[]")
    bucket.put("some/c.bin", b"c")
    folder = local_copy("gs://bucket/some", ["*.json"])
    assert {x.relative_to(folder).as_posix() for x in folder.rglob("*.*") if x.name[0] != "."} == {
        "a.json",
        "sub/b.json",
    }
    assert local_copy("gs://bucket/some/c.bin").read_bytes() == b"c"
    with monkeypatch.context() as patch:
        patch.delattr("lco_jax.core.files._download")
        assert local_copy("gs://bucket/some", ["*.json"]) == folder
    bucket.put("some/a.json", b"{1}")
    assert (local_copy("gs://bucket/some", ["*.json"]) / "a.json").read_bytes() == b"{1}"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gs://bucket/none", "gs://bucket/none holds nothing that matches"),
        ("gs://other/x", "gs://other/x cannot be read or written: there is no such bucket"),
        ("gs://closed/x", "gs://closed/x cannot be read or written: Forbidden"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(bucket, path, says):
    with pytest.raises(LcoError, match=says):
        local_copy(path)


def test_without_the_package_and_with_other_addresses(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "fs" in name else find(name, *a)
    )
    for path, extra in (("gs://b/x", "gcs"), ("s3://b/x", "s3")):
        says = re.escape(f"{path} needs a package more: {install_line(extra)}")
        with pytest.raises(LcoError, match=says):
            as_path(path)
    with pytest.raises(
        LcoError, match="az://b/x: give a path of a disk, perhaps a mounted one, or gs"
    ):
        as_path("az://b/x")
    with pytest.raises(LcoError, match="gs://b/x is not a path of a disk"):
        local_path("gs://b/x")

    def absent(*_, **__):
        raise ImportError("gcsfs")

    monkeypatch.setattr("lco_jax.core.files.fsspec.filesystem", absent)
    says = re.escape(f"gs://b/x cannot be read or written: {install_line('gcs')}")
    with pytest.raises(LcoError, match=says):
        local_copy("gs://b/x")


def test_an_output_folder_on_a_bucket(bucket, tmp_path):
    """It is there when it is complete, replaces what was written so, and nothing else."""
    target = as_path("gs://bucket/outputs/one")
    for content in (b"1", b"2"):
        with written_aside(target) as aside:
            (aside / content.decode()).write_bytes(content)
        assert held(bucket, "outputs/one") == {
            content.decode(): content,
            ".written-by-lco-jax": b"",
        }
    with pytest.raises(KeyboardInterrupt), written_aside(target) as aside:
        raise KeyboardInterrupt
    assert held(bucket, "outputs/one").keys() == {"2", ".written-by-lco-jax"}
    bucket.put("outputs/theirs/x", b"")
    with (
        pytest.raises(LcoError, match="was not written by lco_jax"),
        written_aside(as_path("gs://bucket/outputs/theirs")),
    ):
        pass


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.parquet", "vectors"])
def test_embed_reads_and_writes_buckets(bucket, tmp_path, run_embed, name):
    """A file and a folder of media; as on a disk, also when it goes on, and when all is done."""
    (tmp_path / "media").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "media" / f"{i}.png")
        bucket.put(f"{name}-in/media/{i}.png", (tmp_path / "media" / f"{i}.png").read_bytes())
    bucket.put(f"{name}-in/media/note.txt", b"no medium")
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    bucket.put(f"{name}-in/in.txt", b"a\nb\nc\n")
    for source in ("in.txt", "media"):
        there = f"{source.partition('.')[0]}-{name}"
        here = tmp_path / there
        assert run_embed(f"--input={tmp_path / source}", f"--output={here}", "--workers=0")[0] == 0
        flags = [f"--input=gs://bucket/{name}-in/{source}", f"--output=gs://bucket/{there}"]
        flags += ["--part-size=2", "--workers=0"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lco_jax.data.parts.VectorParts.join", interrupted)
            assert run_embed(*flags)[0] == 130
        assert there not in bucket.objects
        made = [x for x in bucket.objects if x.startswith(there) and x.endswith("2.parquet")]
        assert len(made) == 1
        generation = bucket.generations[made[0]]
        status, _, err = run_embed(*flags)
        assert status == 0, err
        assert "is complete: this very command" in run_embed(*flags)[1]
        assert not [x for x in bucket.objects if x.startswith(f"{there}.partial")]
        vectors = vectors_of(lambda x: bucket.objects[x], there)
        np.testing.assert_allclose(
            vectors, vectors_of(lambda x: Path(x).read_bytes(), str(here)), atol=1e-5
        )
        if name == "vectors":  # where the parts are the output
            assert bucket.generations[made[0]] == generation


def interrupted(*_, **__):
    raise KeyboardInterrupt


def vectors_of(read, name):
    """float32 [N, D] of an output of any kind."""
    if name.endswith(".npy"):
        return np.load(io.BytesIO(read(name)))
    if name.endswith(".parquet"):
        parts = [name]
    else:
        parts = [f"{name}/{part}" for part in json.loads(read(f"{name}/_index.json"))["parts"]]
    tables = [pyarrow.parquet.read_table(io.BytesIO(read(part))) for part in parts]
    return np.array([row for table in tables for row in table["embedding"].to_pylist()])


def test_sources_on_a_bucket(bucket, tmp_path):
    bucket.put("data/t.jsonl", (ASSETS / "triplets_train.jsonl").read_bytes())
    with_bucket = open_source("x", {"kind": "jsonl", "path": "gs://bucket/data/t.jsonl"})
    local = open_source("x", {"kind": "jsonl", "path": "assets:triplets_train.jsonl"})
    assert [(one.anchor, one.positive) for one in with_bucket] == [
        (one.anchor, one.positive) for one in local
    ]
    spec = {"kind": "jsonl", "path": "gs://bucket/data/t.jsonl"}
    bucket.put("data/mine.json", json.dumps(spec).encode())
    assert sources_of("gs://bucket/data/mine.json", "--data") == {"mine": spec}
    with pytest.raises(LcoError, match=r"^--data=gs://bucket/data/no\.json: gs://bucket/data/no"):
        sources_of("gs://bucket/data/no.json", "--data")


TWO = """
import itertools, sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from lco_jax.checkpoint.store import RunStore
from lco_jax.core.files import as_path
from lco_jax.core.sharding import make_mesh
rows = NamedSharding(make_mesh(), PartitionSpec("data"))
store = RunStore(as_path("gs://bucket/two"), 3)
for step in itertools.count(1):
    state = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    w = jax.make_array_from_callback(state.shape, rows, lambda i: state[i])
    store.save(step, {"w": w}, {"next": step})
"""


def harm_newest(bucket, at, part):
    """Shorten an object of the newest checkpoint below `at`, in whose name `part` stands; the
    checkpoint's step.
    """
    saved = [name.split("/") for name in held(bucket, at)]
    newest = max(int(step) for step, *rest in saved if rest == ["commit_success.txt"])
    name = min(
        name for name in bucket.objects if name.startswith(f"{at}/{newest}/state/") and part in name
    )
    bucket.put(name, bucket.objects[name][:-1])
    return newest


@pytest.mark.slow
def test_two_processes_save_one_checkpoint_and_are_killed(bucket, caplog):
    """At any moment, perhaps in the midst of a save. Damage to the second's part is noticed; the
    one before is read.
    """
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, address, str(i)], cwd=ROOT, env=environment)
        for i in (0, 1)
    ]
    while "two/3/commit_success.txt" not in bucket.objects:
        assert [process.poll() for process in both] == [None, None]
        time.sleep(0.01)
    for process in both:
        process.kill()
        process.wait()
    newest = harm_newest(bucket, "two", "ocdbt.process_1/d/")
    shape, store = (
        {"w": jax.ShapeDtypeStruct((64, 32), np.float32)},
        RunStore(as_path("gs://bucket/two"), 3),
    )
    step, state, position = store.restore_newest(
        shape, {"w": NamedSharding(make_mesh(), PartitionSpec("data"))}
    )
    store.close()
    assert (step, position) == (newest - 1, {"next": step})
    np.testing.assert_array_equal(
        state["w"], np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    )
    assert f"gs://bucket/two/{newest} is damaged" in caplog.text
    assert held(bucket, f"two/{newest}.damaged")


@pytest.mark.slow
def test_a_run_on_a_bucket_is_a_local_run(bucket, tmp_path, monkeypatch, capsys):
    """With its model and its data, too; also when it resumes before what is damaged, and in what it
    leaves behind.
    """
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.chdir(ROOT)
    for file in builtin.build().iterdir():
        bucket.put(f"model/{file.name}", file.read_bytes())
    bucket.put("data/t.jsonl", (ASSETS / "triplets_train.jsonl").read_bytes())
    flags = [
        "--config=configs/tiny.py",
        "--config.train.steps=4",
        "--config.train.batch_size=8",
        "--config.eval.path=",
        "--config.optimizer.warmup_steps=2",
        "--config.checkpoint.every=1",
        "--config.lora.rank=4",
    ]
    there = [
        "--config.model.path=gs://bucket/model",
        "--config.data.sources.bundled.path=gs://bucket/data/t.jsonl",
    ]
    train(cli.parse(["train", *flags], "").config, tmp_path)
    for resumed in (False, True):
        train(cli.parse(["train", *flags, *there], "").config, as_path("gs://bucket/run"))
        said = capsys.readouterr().out
        assert ("resuming gs://bucket/run at step 3" in said) == resumed
        assert "merged model  gs://bucket/run/merged" in said
        (tmp_path / "there.jsonl").write_bytes(bucket.objects["run/metrics.jsonl"])
        lines, here = (read_metrics(tmp_path / name) for name in ("there.jsonl", "metrics.jsonl"))
        assert [line["loss"] for line in lines] == [line["loss"] for line in here]
        left = {name for name in held(bucket, "run") if not name.startswith("checkpoints/")}
        assert left == {
            name for name in files_of(tmp_path) if not name.startswith("checkpoints/")
        } - {"there.jsonl"}
        one, two = (
            open_checkpoint(folder).tensors
            for folder in ("gs://bucket/run/merged", tmp_path / "merged")
        )
        assert all(np.array_equal(one.read(key), two.read(key)) for key in one)
        assert resumed or harm_newest(bucket, "run/checkpoints", "/d/") == 4
