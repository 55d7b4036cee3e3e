"""Checkpoints on disks that fail: damaged ones are noticed and put aside, and a disk that is full
is told as such.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing

import jax
import numpy as np
import pytest
import tensorstore

from lco_jax import LcoError
from lco_jax.checkpoint.store import CHECKSUMS, RunStore, _explanation
from lco_jax.core.sharding import make_mesh, replicated


def state_of(step):
    return {
        "step": np.int32(step),
        "w": np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32),
    }


@pytest.fixture
def saved(tmp_path):
    """A store's folder, with checkpoints of steps 4, 8 and 12."""
    store = RunStore(tmp_path, 3)
    for step in (4, 8, 12):
        store.save(step, jax.tree.map(jax.numpy.asarray, state_of(step)), {"next": step})
    store.close()
    return tmp_path


def newest(folder):
    store, like = RunStore(folder, 3), state_of(0)
    try:
        return store.restore_newest(like, jax.tree.map(lambda _: replicated(make_mesh()), like))
    finally:
        store.close()


def files(folder, kind):
    found = {"any": "*", "data": "data/*", "sums": CHECKSUMS}[kind]
    return sorted(path for path in folder.rglob(found) if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def holds(found, step):
    got, state, position = found
    return (
        got == step
        and position == {"next": step}
        and np.array_equal(state["w"], state_of(step)["w"])
    )


def test_the_newest_is_used_and_its_sums_are_there(saved):
    assert holds(newest(saved), 12)
    sums = json.loads((saved / "12" / CHECKSUMS).read_text())
    assert {"data/metadata", "state/manifest.ocdbt"} < sums.keys()


@pytest.mark.parametrize(
    "harm", [flip, truncate, lambda path: path.unlink()], ids=["flipped", "truncated", "removed"]
)
def test_a_harm_to_any_file_is_noticed_said_and_put_aside(saved, caplog, harm):
    """Each file in turn, in whichever checkpoint is the newest; the last of all is used in the
    end.
    """
    harmed = max(
        (path for path in files(saved / "12", "any") if path.stat().st_size),
        key=lambda x: x.stat().st_size,
    )
    harm(harmed)
    assert holds(newest(saved), 8)
    assert "12 is damaged" in caplog.text
    assert "the one before is used" in caplog.text
    assert (saved / "12.damaged").is_dir()
    for path in files(saved / "8", "data"):
        if path.stat().st_size:
            harm(path)
    assert holds(newest(saved), 4)
    flip(files(saved / "4", "sums")[0])
    for _ in range(2):  # nor does the run silently begin anew
        with pytest.raises(
            LcoError, match="holds no checkpoint that can be read; give another --output"
        ):
            newest(saved)


def test_without_sums_what_cannot_be_read_is_put_aside(saved):
    for path in files(saved / "12", "any"):
        truncate(path) if path.name == "manifest.ocdbt" else None
    (saved / "12" / CHECKSUMS).unlink()
    assert holds(newest(saved), 8)


def test_a_whole_checkpoint_of_another_run_stays_where_it_is(saved):
    store, like = RunStore(saved, 3), {**state_of(0), "other": np.zeros(3, np.float32)}
    with pytest.raises(LcoError, match="12 cannot be read"):
        store.restore_newest(like, jax.tree.map(lambda _: replicated(make_mesh()), like))
    store.close()
    assert holds(newest(saved), 12)


def test_a_part_is_read_alone_and_onto_the_host(tmp_path):
    """The bytes read are those of the part, and no device holds them; a damaged checkpoint is
    told."""
    part = {"a": np.arange(6, dtype=np.float32)}
    large = np.random.default_rng(0).normal(size=2**20).astype(np.float32)
    state = {"tuned": part, "optimizer": {"mu": large}}
    store = RunStore(tmp_path, 1)
    store.save(4, jax.tree.map(jax.numpy.asarray, state), {})
    store.close()
    shape = {"tuned": {"a": jax.ShapeDtypeStruct((6,), np.float32)}}
    live, before = len(jax.live_arrays()), bytes_read()
    found = store.read(4, shape)
    assert len(jax.live_arrays()) == live
    assert bytes_read() - before < large.nbytes / 4
    assert list(found) == ["tuned"]
    assert type(found["tuned"]["a"]) is np.ndarray
    assert np.array_equal(found["tuned"]["a"], part["a"])
    with pytest.raises(LcoError, match="4 cannot be read"):
        store.read(4, {"tuned": {"b": shape["tuned"]["a"]}})
    flip(max(files(tmp_path / "4", "any"), key=lambda path: path.stat().st_size))
    with pytest.raises(LcoError, match="4 is damaged"):
        store.read(4, shape)


def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_a_put_aside_checkpoint_may_come_again(saved):
    for _ in range(2):
        flip(files(saved / "12", "data")[0])
        assert holds(newest(saved), 8)
        store = RunStore(saved, 3)
        store.save(12, jax.tree.map(jax.numpy.asarray, state_of(12)), {"next": 12})
        store.close()
        assert holds(newest(saved), 12)


def test_none_was_saved(tmp_path):
    assert newest(tmp_path) is None


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(saved):
    store = RunStore(saved, 3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2048, limit[1])
    )  # a write beyond fails, as on a full disk
    try:
        whole = "where those before it are whole"
        limited = r"File too large; raise the limit on the size of a file \(ulimit -f\), and the"
        told = pytest.raises(LcoError, match=rf"could not be written to .*, {whole}: {limited}")
        with told, closing(store):  # at once or in the end
            store.save(16, jax.tree.map(jax.numpy.asarray, state_of(16)), {"next": 16})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert holds(newest(saved), 12)
    end = time.monotonic() + 20
    while list(saved.glob("*tmp*")) and time.monotonic() < end:  # its threads may still write
        assert holds(newest(saved), 12)
    assert not list(saved.glob("*tmp*"))  # what it left is removed by those who come after


SAVES_WHERE_IT_CANNOT = """
import logging, os, subprocess, sys
from contextlib import closing
from pathlib import Path
import jax, numpy as np
from lco_jax import LcoError
from lco_jax.checkpoint.store import RunStore

disk, how = sys.argv[1:]
logging.getLogger("absl").setLevel(logging.CRITICAL)  # as the commands do
if how != "forbidden":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
noise = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
folder = Path(disk) / "checkpoints"
store = RunStore(folder, 3)
store.save(1, {"w": jax.numpy.asarray(noise[:10])}, {"next": 1})
store.close()
store = RunStore(folder, 3)
if how == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
elif how == "forbidden":
    os.seteuid(65534)
rows = 1000 if how == "full" else 10
try:
    with closing(store):
        store.save(2, {"w": jax.numpy.asarray(noise[:rows])}, {"next": 2})
except LcoError as error:
    print(error)
if how != "forbidden":
    print(*RunStore(folder, 3, read_only=True).steps())
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("full", "No space left on device; make room"),
        ("read-only", "Read-only file system; mount the disk so that it can be written"),
        ("forbidden", "Permission denied; let this user write there"),
    ],
)
def test_a_failed_save_says_what_failed(tmp_path, how, says):
    """On a real disk that is full, one that was mounted anew, and without permission."""
    own = ["unshare", "--map-root-user", "--mount"] if how != "forbidden" else []
    may = not subprocess.run([*own, "true"], capture_output=True, check=False).returncode
    if not may or (how == "forbidden" and os.geteuid() != 0):
        pytest.skip("this machine does not let us")
    tmp_path.chmod(0o755)
    command = [*own, sys.executable, "-c", SAVES_WHERE_IT_CANNOT, str(tmp_path), how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    said, *steps = result.stdout.splitlines()
    place = f"{tmp_path}/checkpoints, where those before it are whole"
    beginning = f"a checkpoint could not be written to {place}: "
    assert said == f"{beginning}{says}, and the same command resumes"
    assert steps == ([] if how == "forbidden" else ["1"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; make room"),
        (ValueError("Failed: x [os_error_code='122']"), "Disk quota exceeded; make room"),
        (OSError(errno.EIO, "x"), "Input/output error; mend that"),
        (OSError(errno.EMFILE, "x"), "Too many open files; raise the limit on open files"),
        (ValueError("nobody knows"), "nobody knows; mend that"),
        (ValueError("ABORTED: x [os_error_code='13']"), "Permission denied; let this user"),
    ],
)
def test_only_a_lack_of_room_asks_for_room(error, says):
    assert _explanation(error).startswith(says)


def test_a_folder_that_was_removed_is_not_made_again(saved):
    """Nothing in another one would tell whose run it is."""
    store = RunStore(saved, 3)
    shutil.rmtree(saved)
    removed = rf"^{saved}, or a file in it, was removed while the run worked; put it back"
    with closing(store), pytest.raises(LcoError, match=removed):
        store.save(16, jax.tree.map(jax.numpy.asarray, state_of(16)), {"next": 16})
    assert not saved.exists()
