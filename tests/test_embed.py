"""`python -m lco_jax.embed`: what it reads, what a kill costs, and media through the command
line.
"""

import copy
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from processes import command_of, until, with_devices

from lco_jax import LcoError, MediaConfig
from lco_jax.core.extras import install_line
from lco_jax.core.small_vectors import Storage
from lco_jax.data.corpus import Corpus, scan
from lco_jax.data.parts import DESCRIPTION, PartsFolder, Unit, VectorParts, cut
from lco_jax.data.vectors import part_table

ROOT = Path(__file__).parents[1]
STRANGE = "path/to/cat.png"  # a text that looks like a file


def sentence(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def picture(path, i=0):
    """A small PNG of noise; no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_lines(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


# ---- what is read


def contents(path, **options):
    return [(item.id, item.content) for item in Corpus(path, **options).items()]


def image(path):
    return {"type": "image", "image": str(path)}


def test_lines_of_text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(f"\ufeffone\r\n\n{STRANGE}\n four \nlast".encode())
    assert contents(path) == [
        (i, {"text": x}) for i, x in enumerate(["one", "", STRANGE, " four ", "last"])
    ]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(LcoError, match=r"in\.txt:2: not valid UTF-8"):
        contents(path)


def test_every_kind_of_line(tmp_path):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}],
        }
    ]
    path = write_lines(
        tmp_path / "in.jsonl",
        STRANGE,
        {"text": STRANGE, "title": "metadata", "type": "news", "content": 3},
        {"text": "a", "image_path": "a.png", "video": ""},
        {"image": ["a.png", "/b.png"], "audio_path": "c.wav"},
        {"video": ["1.png", "2.png"]},
        {"text": ""},
        chat,
    )
    a = tmp_path / "a.png"
    text = {"type": "text", "text": "a"}
    clip = {"type": "video", "video": [str(tmp_path / "1.png"), str(tmp_path / "2.png")]}
    sound = {"type": "audio", "audio": str(tmp_path / "c.wav")}
    rendered = [{"role": "user", "content": [image(a), {"type": "text", "text": "?"}]}]
    want = [
        {"text": STRANGE},
        {"text": STRANGE},
        (image(a), text),
        (image(a), image("/b.png"), sound),
        (clip,),
    ]
    assert contents(path) == list(enumerate([*want, {"text": ""}, rendered]))
    assert contents(path, root=Path("/m"))[2] == (2, (image("/m/a.png"), text))


def test_the_cells_of_a_table(tmp_path):
    hf = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "image": pa.array(
            [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "a.png"}, None, None], hf
        ),
        "audio_path": pa.array([None, None, "c.wav", None]),
        "video": pa.array([None, None, None, b"film"], pa.binary()),
        "text": pa.array([None, "t", None, None]),
        "name": pa.array(["p", "q", "r", "s"]),
        "label": pa.array([1, 2, 3, 4]),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "in.parquet")
    sound = {"type": "audio", "audio": str(tmp_path / "c.wav")}
    want = [
        ({"type": "image", "image": b"x"},),
        (image(tmp_path / "a.png"), {"type": "text", "text": "t"}),
        (sound,),
    ]
    want.append(({"type": "video", "video": b"film"},))
    assert contents(tmp_path / "in.parquet", id_field="name") == list(
        zip("pqrs", want, strict=True)
    )
    assert [name for name, _ in contents(tmp_path / "in.parquet")] == [0, 1, 2, 3]
    with pytest.raises(LcoError, match="has no column 'nmae'; its columns: image, "):
        contents(tmp_path / "in.parquet", id_field="nmae")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    names = ["a/2.png", "a/10.JPG", "a.png", "b/c/d.wav", "b.mp4", "z.png"]
    for name in [*names, "note.txt", "a/x.json", ".hidden/a.png", "._z.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = contents(tmp_path)
    assert [name for name, _ in found] == sorted(names)
    assert dict(found)["b/c/d.wav"] == ({"type": "audio", "audio": str(tmp_path / "b/c/d.wav")},)
    corpus = Corpus(tmp_path)
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    os.utime(tmp_path / "b.mp4", (1, 1))
    assert corpus.fingerprint() != before
    (tmp_path / "none").mkdir()
    with pytest.raises(LcoError, match="holds no image, video or audio file"):
        contents(tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 5}', "input.text must be a string"),
        ('{"image": 5}', "input.image must be a path"),
        ('{"image": "a.png", "image_path": "b.png"}', "both image and image_path"),
        ('{"image": {"bytes": "x"}}', "input.image must be a path"),
        ('{"video": "a.png"}', "give a video file, or a list of frames"),
        ('{"id": 1}', "holds nothing to embed"),
        ('{"image": "", "text": null}', "holds nothing to embed"),
        ("null", "NoneType"),
        ("[]", "holds nothing to embed"),
        ('"\\ud800"', "surrogate"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "must hold its medium once"),
        ('[{"role": "user", "content": [{"type": "image", "image": 3}]}]', "must be a path"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, words):
    (tmp_path / "in.jsonl").write_text(f'"fine"\n\n{line}\n')
    with pytest.raises(LcoError) as error:
        contents(tmp_path / "in.jsonl")
    assert sentence(error).startswith(f"{tmp_path / 'in.jsonl'}:3")
    assert words in sentence(error)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "bool True"),
        (1.5, "float 1.5"),
        (2**63, "64-bit"),
        (None, "NoneType"),
        ("\ud800", "surrogate"),
    ],
)
def test_ids_that_are_refused(tmp_path, value, words):
    path = write_lines(tmp_path / "in.jsonl", {"text": "a", "key": value})
    with pytest.raises(LcoError) as error:
        contents(path, id_field="key")
    assert sentence(error).startswith(f"{path}:1: 'key' ")
    assert words in sentence(error)


def test_tables_that_are_refused(tmp_path):
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(LcoError, match="is torn or not a parquet file"):
        contents(path)
    pyarrow.parquet.write_table(pa.table({"txt": ["a"]}), path)
    with pytest.raises(LcoError, match=r"has none of the columns text, .*; it has txt"):
        contents(path)
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(LcoError, match=r"in\.parquet, row 1 holds nothing to embed"):
        contents(path)
    for name, field in (("in.txt", "key"), (".", "key"), ("in.csv", None), ("no.txt", None)):
        if name not in (".", "no.txt"):
            (tmp_path / name).touch()
        with pytest.raises(LcoError, match="--input="):
            Corpus(tmp_path / name, field)


def test_the_scan_says_what_there_is_and_finds_what_is_missing(tmp_path):
    path = write_lines(
        tmp_path / "in.jsonl", "a", {"image": "a.png", "text": "b"}, {"audio": "https://x/b.wav"}
    )
    remote = MediaConfig(allow_remote=True)
    found = scan(Corpus(path).items(), MediaConfig(), False)
    kinds = {"text": 1, "image": 2, "audio": 3}
    assert found == (3, {kind: f"{path}:{line}" for kind, line in kinds.items()}, int)
    with pytest.raises(LcoError, match=r"in\.jsonl:2: input\.image: there is no file"):
        scan(Corpus(path).items(True), remote, True)
    picture(tmp_path / "a.png")
    with pytest.raises(
        LcoError, match=r"in\.jsonl:3: its audio is at an http address; give --allow-remote"
    ):
        scan(Corpus(path).items(True), MediaConfig(), True)
    assert scan(Corpus(path).items(True), remote, True) == found


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.parquet", "."])
def test_a_reader_gives_any_range(tmp_path, name):
    total = 300
    if name == ".":
        for i in range(total):
            (tmp_path / f"{i}.png").touch()
    elif name == "in.parquet":
        table = pa.table(
            {"text": [f"{i}" for i in range(total)], "name": [f"n{i}" for i in range(total)]}
        )
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=70)
    else:
        lines = [f'"{i}"' + "\n" * (1 + (i % 7 == 0 and name == "in.jsonl")) for i in range(total)]
        (tmp_path / name).write_text("".join(lines))
    corpus = Corpus(tmp_path / name)
    items, read = list(corpus.items()), corpus.reader()
    assert len(items) == total
    for first, end in (
        (0, 3),
        (3, 5),
        (69, 71),
        (140, 210),
        (290, 310),
        (10, 11),
        (10, 11),
        (299, 300),
        (0, 300),
    ):
        assert list(read(first, end)) == items[first:end]


# ---- parts


@contextmanager
def begin(output, work, rows=4):
    """`VectorParts`, entered and described."""
    with VectorParts(output, work) as parts:
        if parts.description() is None:
            parts.describe(part_rows=rows)
        yield parts


def table(unit):
    """Rows of a value that is their index; row 3 is skipped."""
    rows = np.arange(unit.first, unit.end, dtype=np.float32)
    vectors = np.repeat(rows[:, None], 4, axis=1)
    vectors[rows == 3] = np.nan
    reasons = {int(row) - unit.first: "why" for row in rows if row == 3}
    return part_table([f"k{row:.0f}" for row in rows], vectors, reasons)


def fill(parts, units):
    for unit in parts.left(units):
        parts.folder.write(unit, table(unit))


def check(output, total, recorded=True):
    want = np.repeat(np.arange(total, dtype=np.float32)[:, None], 4, axis=1)
    want[3] = np.nan
    if output.suffix == ".npy":
        np.testing.assert_array_equal(np.load(output), want)
    else:  # also a folder of parts
        found = pyarrow.parquet.read_table(output, columns=["id", "embedding"]).to_pydict()
        assert found["id"] == [f"k{i}" for i in range(total)]
        assert found["embedding"] == [None if i == 3 else [float(i)] * 4 for i in range(total)]
    skipped = output.with_name(output.name + ".skipped.jsonl")
    assert json.loads(skipped.read_text()) == {"index": 3, "id": "k3", "reason": "why"}
    assert not recorded or VectorParts(output, {"a": 1}).finished()["vectors"] == total


OUTPUTS = pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out"])


@OUTPUTS
def test_parts_become_the_output(tmp_path, name):
    output, units = tmp_path / "new" / name, cut(0, 6, 4)
    with begin(output, {"a": 1}) as parts:
        assert parts.description()["part_rows"] == 4
        fill(parts, units)
        names = sorted(x.name for x in parts.folder.path.iterdir() if x.name[0] != "_")
        assert names == ["000000000000-000000000004.parquet", "000000000004-000000000006.parquet"]
        (parts.folder.path / "_output.tmp").write_text("of a process that was killed")
        (parts.folder.path / "000000000001-000000000003.parquet").write_text("of no unit")
        assert parts.join(units, Storage(4), str)["skipped"] == 1
    check(output, 6)
    beside = {f"{name}.skipped.jsonl", *([] if name == "out" else [f"{name}.json"])}
    assert {x.name for x in output.parent.iterdir()} == {name, *beside}
    if name == "out":
        assert sorted(os.listdir(output)) == [*names, "_index.json"]
        assert json.loads((output / "_index.json").read_text())["parts"] == names
        with pytest.raises(LcoError, match="out holds other work: a was 1 and is 2"):
            VectorParts(output, {"a": 2}).finished()
        return
    assert VectorParts(output, {"a": 2}).finished() is None
    with begin(output, {"a": 2}) as parts:  # and again, with nothing skipped
        parts.folder.write(Unit(0, 1), part_table([1], np.ones((1, 4), np.float32), {}))
        assert parts.join([Unit(0, 1)], Storage(4), int)["skipped"] == 0
    assert {x.name for x in output.parent.iterdir()} == {name, f"{name}.json"}


def harms(folder, unit):
    """A part as kills, disks and other runs may leave it."""
    whole = (folder.path / unit.part).read_bytes()
    yield whole[:-9]
    yield b""
    yield b"torn"
    other = PartsFolder(folder.path, "of another model")
    other.write(unit, table(unit))
    yield (folder.path / unit.part).read_bytes()
    folder.write(unit, table(Unit(unit.first, unit.end - 1)))
    yield (folder.path / unit.part).read_bytes()
    yield None


def test_a_part_that_is_torn_or_lost_or_of_other_work_is_made_again(tmp_path, caplog):
    output, units = tmp_path / "out.npy", cut(0, 8, 2)
    with begin(output, {"a": 1}, 2) as parts:
        fill(parts, units)
        for i, harm in enumerate(list(harms(parts.folder, units[1]))):
            part = parts.folder.path / units[1].part
            part.unlink(missing_ok=True) if harm is None else part.write_bytes(harm)
            assert parts.left(units) == [units[1]], i
            assert not part.exists()
            fill(parts, units)
        assert caplog.text.count(f"{units[1].part} is torn, or of other work") == 5
        part = parts.folder.path / units[2].part
        content = bytearray(part.read_bytes())
        content[40] ^= 255  # in the body, which is looked at when all is joined
        part.write_bytes(content)
        assert parts.left(units) == []
        with pytest.raises(LcoError) as error:
            parts.join(units, Storage(4), str)
        assert sentence(error).startswith(f"{part} is damaged: ") or "damaged" in sentence(error)
        part.unlink()
        fill(parts, units)
        parts.join(units, Storage(4), str)
    check(output, 8)


def test_other_work_is_refused(tmp_path):
    output, work = tmp_path / "out.npy", {"--dtype": "float32", "--on-error": "raise"}
    with begin(output, work) as parts:
        parts.folder.write(Unit(0, 2), part_table(["a", "b"], np.ones((2, 4), np.float32), {}))
        other = VectorParts(output, work)
        with pytest.raises(LcoError, match=r"another process writes --output=.*out\.npy"), other:
            pass
    with (
        VectorParts(output, {**work, "--dtype": "bfloat16"}) as parts,
        pytest.raises(LcoError) as error,
    ):
        parts.description()
    differs = "--dtype was 'float32' and is 'bfloat16'; give another --output, or remove the folder"
    assert differs in sentence(error)
    skips = {**work, "--on-error": "skip"}
    for _ in range(2):  # what was made while every input was good, a run that skips can use
        with begin(output, skips) as parts:
            assert parts.left([Unit(0, 2), Unit(2, 4)]) == [Unit(2, 4)]
            parts.describe()
    with VectorParts(output, work) as parts, pytest.raises(LcoError, match="--on-error was 'skip'"):
        parts.description()
    (tmp_path / "out.parquet.partial").mkdir()
    (tmp_path / "out.parquet.partial" / "mine").touch()
    with (
        pytest.raises(LcoError, match="holds mine and nothing that says what it is"),
        begin(tmp_path / "out.parquet", work),
    ):
        pass


def test_a_folder_without_a_part_vanishes_and_a_failure_keeps_the_rest(tmp_path):
    def fail(rows):
        with begin(tmp_path / "out.npy", {}) as parts:
            for unit in cut(0, rows, 2):
                parts.folder.write(unit, table(unit))
            raise KeyboardInterrupt

    for rows in (0, 4):
        with pytest.raises(KeyboardInterrupt):
            fail(rows)
        assert (tmp_path / "out.npy.partial").exists() == bool(rows)
    with begin(tmp_path / "out.npy", {}) as parts:
        assert parts.rows_done() == 4


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_embed import Storage, VectorParts, begin, check, cut, fill

output, steps = Path(sys.argv[1]), 0

def deadly(call, fatal):  # dies just before or just after one of its calls
    def made(*args, **options):
        global steps
        steps += 1
        if (steps, "before") == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **options)
        finally:
            if (steps, "after") == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    return made

def write():
    units = cut(0, 5, 2)
    with VectorParts(output, {"a": 1}) as parts:
        if not parts.finished():
            parts.description()
            parts.describe()
            fill(parts, units)
            parts.join(units, Storage(4), str)

def old():
    for ending in ("", ".json", ".skipped.jsonl"):
        path = output.with_name(output.name + ending)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if output.suffix:
        output.write_bytes(b"old")  # a folder would be refused

def is_old():
    return output.read_bytes() == b"old" if output.suffix else not output.exists()

def run(fatal=None):  # in a process of its own -> its status
    if os.fork() == 0:
        for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir", "open", "close"):
            setattr(os, name, deadly(getattr(os, name), fatal))
        write()
        os._exit(0)
    return os.wait()[1]

write()  # here, so that what pyarrow imports late is not imported by every process
kills = 0
while True:
    old()
    if status := run((kills // 2 + 1, ("before", "after")[kills % 2])):
        assert status == signal.SIGKILL, status
        kills += 1
        if not is_old():
            check(output, 5, recorded=False)
        assert run() == 0
    check(output, 5)
    assert not output.with_name(output.name + ".partial").exists()
    if not status:
        break
print(kills)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.npy", "out"])
def test_sigkill_at_every_step(tmp_path, name):
    """Before and after each of its calls a process dies; whatever is there is complete, and the
    next one ends well.
    """
    output = tmp_path / name
    here = str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(output), here]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40
    check(output, 5)


# ---- end to end


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures, of which 6 is torn, and lines that name them between texts."""
    lines = []
    for i in range(10):
        path = picture(tmp_path / "media" / f"{i}.png", i)
        lines += [
            {"key": f"p{i}", "image_path": f"media/{i}.png", "source": "noise"},
            {"key": f"t{i}", "text": f"{i}"},
        ]
    path = tmp_path / "media" / "6.png"
    path.write_bytes(path.read_bytes()[:1500])
    return write_lines(tmp_path / "in.jsonl", *lines)


def wanted(embedder, folder):
    """Of the lines of `pictures`."""
    good = [i for i in range(10) if i != 6]
    vectors = np.full((20, embedder.dimension), np.nan, np.float32)
    vectors[[2 * i for i in good]] = embedder.encode([folder / "media" / f"{i}.png" for i in good])
    vectors[1::2] = embedder.encode([{"text": f"{i}"} for i in range(10)])
    return vectors


def test_torn_media_among_good_ones(tmp_path, tiny, run_embed, pictures):
    """Raised by file and line, what was done is kept, and a run that skips goes on from there."""
    output = tmp_path / "out.parquet"
    command = [
        f"--input={pictures}",
        f"--output={output}",
        "--id-field=key",
        "--part-size=5",
        "--workers=0",
    ]
    status, out, err = run_embed(*command)
    assert (status, out) == (2, "")
    *_, kept, error = err.rstrip("\n").split("\n")
    assert error.startswith(
        f"error: {pictures}:13: image {tmp_path / 'media' / '6.png'} cannot be decoded: "
    )
    assert (
        kept
        == f"10 of 20 vectors are kept in {output}.partial; the same command goes on from there"
    )
    assert not output.exists()
    status, out, err = run_embed(*command, "--dtype=bfloat16")
    assert status == 2
    assert "--dtype was 'float32' and is 'bfloat16'" in err
    status, out, err = run_embed(*command, "--on-error=skip", "--batch-size=3")
    assert status == 0, err
    assert "embedding:  50%" in err.split("\r")[1], "the bar starts where the run before ended"
    assert f"1 of them are empty: {output}.skipped.jsonl" in out
    table = pyarrow.parquet.read_table(output).to_pydict()
    assert table["id"] == [f"{kind}{i}" for i in range(10) for kind in "pt"]
    assert [i for i, vector in enumerate(table["embedding"]) if vector is None] == [12]
    vectors = np.array(
        [[np.nan] * tiny.dimension if x is None else x for x in table["embedding"]], np.float32
    )
    np.testing.assert_allclose(vectors, wanted(tiny, tmp_path), atol=1e-5)
    (line,) = Path(f"{output}.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 12
    assert json.loads(line)["id"] == "p6"
    assert json.loads(line)["reason"].startswith(f"{pictures}:13: image ")
    assert not Path(f"{output}.partial").exists()


def test_a_folder_in_processes(tmp_path, tiny, run_embed, pictures):
    """And sound, which the checkpoint does not take, is skipped or raised before any work."""
    output = tmp_path / "out.npy"
    command = [f"--input={tmp_path / 'media'}", f"--output={output}"]
    (tmp_path / "media" / "a.wav").write_bytes(b"RIFF")
    status, _, err = run_embed(*command)
    assert status == 2
    assert "error: a.wav has audio, and tiny-1-" in err
    status, out, err = run_embed(*command, "--on-error=skip", "--workers=1")
    assert status == 0, err
    assert f"2 of them are empty: {output}.skipped.jsonl" in out
    want = np.concatenate([wanted(tiny, tmp_path)[::2], np.full((1, tiny.dimension), np.nan)])
    np.testing.assert_allclose(np.load(output), want, atol=1e-5)
    reasons = [
        json.loads(line) for line in Path(f"{output}.skipped.jsonl").read_text().splitlines()
    ]
    assert [(x["index"], x["id"]) for x in reasons] == [(6, "6.png"), (10, "a.wav")]
    assert "a.wav has audio" in reasons[1]["reason"]


def test_a_folder_of_parts_and_a_work_that_is_whole(tmp_path, run_embed, load):
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("".join(f"text {i}\n" for i in range(12)))
    command = [f"--input={source}", f"--output={output}"]
    assert (
        run_embed(*command, "--part-size=5")[1]
        == f"12 vectors of {load('builtin:tiny').dimension}: {output}\n"
    )
    table = pyarrow.parquet.read_table(output)
    assert table["id"].to_pylist() == list(range(12))
    want = load("builtin:tiny", None, "float32").encode([f"text {i}" for i in range(12)])
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), want, atol=1e-5)
    status, out, _ = run_embed(*command)
    assert (status, out) == (
        0,
        f"{output} is complete: this very command has made its 12 vectors\n",
    )
    assert not Path(f"{output}.partial").exists()
    status, _, err = run_embed(*command, "--max-length=3")
    assert status == 2
    assert (
        f"{output} holds other work: --max-length was None and is 3; give another --output, or"
        in err
    )
    for kind in ("npy", "parquet"):
        (tmp_path / f"a.{kind}").mkdir()
        assert (
            f"a.{kind} is a folder; give"
            in run_embed(f"--input={source}", f"--output={tmp_path / f'a.{kind}'}")[2]
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    assert (
        "is a folder of something else"
        in run_embed(f"--input={source}", f"--output={tmp_path / 'mine'}")[2]
    )
    source.write_text("other\n")
    assert "what --input holds was" in run_embed(*command)[2]


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, run_embed, monkeypatch):
    source = tmp_path / "in.txt"
    source.write_text("a\nb\nc\nd\n")
    write = PartsFolder.write

    def changing(folder, unit, rows):
        write(folder, unit, rows)
        source.write_text("a\nb\nc\ne\n")

    monkeypatch.setattr(PartsFolder, "write", changing)
    status, _, err = run_embed(f"--input={source}", f"--output={tmp_path / 'out.npy'}")
    assert status == 2
    assert "in.txt changed meanwhile; remove " in err
    assert not (tmp_path / "out.npy").exists()


def test_a_disk_that_loses_parts_is_not_written_for_ever(tmp_path, run_embed, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n")
    calls = []
    monkeypatch.setattr(PartsFolder, "write", lambda *_: calls.append(1))
    status, _, err = run_embed(f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.npy'}")
    assert (status, len(calls)) == (2, 3)
    assert "loses the parts that are written to it" in err


def test_a_table_of_pictures_and_the_caps_on_media(tmp_path, run_embed, pictures, load):
    content = [(tmp_path / "media" / f"{i}.png").read_bytes() for i in range(3)]
    pyarrow.parquet.write_table(
        pa.table({"image": [{"bytes": x, "path": None} for x in content]}), tmp_path / "t.parquet"
    )
    command = [
        f"--input={tmp_path / 't.parquet'}",
        f"--output={tmp_path / 'out.npy'}",
        "--workers=0",
    ]
    assert run_embed(*command)[0] == 0
    want = load("builtin:tiny", None, "float32").encode(
        [tmp_path / "media" / f"{i}.png" for i in range(3)]
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, atol=1e-5)
    status, _, err = run_embed(*command, "--max-image-pixels=100")
    assert status == 2
    assert "t.parquet, row 0: image " in err
    assert "max_image_pixels is 100" in err
    for flag, words in (
        ("--max-frames=1", "--max-frames is 1; it must be"),
        ("--fps=-1", "--fps is -1.0"),
    ):
        assert words in run_embed(*command, flag)[2]
    assert run_embed(*command, "--workers=-1")[2] == "error: --workers=-1: it must be at least 0\n"


def test_texts_load_no_tower(tmp_path, run_embed, monkeypatch):
    from lco_jax import OmniEmbedder

    (tmp_path / "in.txt").write_text("a\n")
    seen, before = [], OmniEmbedder.from_pretrained

    def spied(*args, **options):
        seen.append(options["modalities"])
        return before(*args, **options)

    monkeypatch.setattr(OmniEmbedder, "from_pretrained", spied)
    assert run_embed(f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.npy'}")[0] == 0
    assert seen == [("text",)]


# ---- real processes


def children(process):
    """The processes that descend from one."""
    return psutil.Process(process).children(recursive=True)


def begin_embed(source, output, *flags, path=()):
    environment = with_devices(1)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    command = [sys.executable, "-m", "lco_jax.embed", "--model=builtin:tiny"]
    return subprocess.Popen(
        [*command, f"--input={source}", f"--output={output}", *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def mixture(tmp_path):
    """1,500 lines, each third a picture; the last picture is torn."""
    lines = [{"key": i, "text": f"{'word ' * (i % 40)}{i}"} for i in range(1500)]
    for i in range(0, 1500, 3):
        picture(tmp_path / f"{i}.png", i)
        lines[i] = {"key": i, "image_path": f"{i}.png"}
    (tmp_path / "1497.png").write_bytes(b"torn")
    return write_lines(tmp_path / "in.jsonl", *lines)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, mixture):
    """Equal bits to a quiet run, and no worker outlives its parent. Many more kills: `benchmarks
    survival --embed`.
    """
    flags = ["--part-size=50", "--workers=1", "--on-error=skip"]
    quiet, output = tmp_path / "quiet.npy", tmp_path / "out.npy"
    assert begin_embed(mixture, quiet, *flags).wait() == 0
    parts = Path(f"{output}.partial")
    draw, workers = random.Random(0), []
    for _ in range(2):
        job, kept = begin_embed(mixture, output, *flags), len(done(parts))
        until(lambda job=job, kept=kept: job.poll() is not None or len(done(parts)) >= kept + 2)
        time.sleep(draw.uniform(0, 0.02))
        workers += children(job.pid)
        job.kill()
        assert job.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert len(workers) >= 2
    until(lambda: not any(worker.is_running() for worker in workers))
    assert not output.exists()
    kept = {part: part.stat().st_ino for part in done(parts)}
    last = begin_embed(mixture, output, *flags)
    until(lambda: last.poll() is not None or len(done(parts)) > len(kept))
    assert kept.items() <= {part: part.stat().st_ino for part in done(parts)}.items(), (
        "a part is made twice"
    )
    assert last.wait() == 0
    assert output.read_bytes() == quiet.read_bytes()
    assert not parts.exists()


# ---- Ray


def actors(driver):
    """The processes of a driver's actors."""
    return [one for one in children(driver.pid) if command_of(one).startswith("ray::Worker")]


@pytest.mark.slow
def test_actors_and_their_driver_die_and_the_work_goes_on(tmp_path, mixture, run_embed):
    """An actor is killed, the driver gets SIGTERM, then SIGKILL; another driver is refused; equal
    bits at the end.
    """
    flags = ["--part-size=50", "--workers=0", "--on-error=skip"]
    quiet, output = tmp_path / "quiet.npy", tmp_path / "out.npy"
    assert begin_embed(mixture, quiet, *flags).wait() == 0
    parts = Path(f"{output}.partial")
    ray = [*flags, "--ray", "--actors=2"]
    for kill in (signal.SIGTERM, signal.SIGKILL):
        driver, kept = begin_embed(mixture, output, *ray), len(done(parts))
        until(lambda driver=driver, kept=kept: driver.poll() is not None or len(done(parts)) > kept)
        assert driver.poll() is None, driver.stderr.read()
        if kill == signal.SIGTERM:
            status, _, err = run_embed(f"--input={mixture}", f"--output={output}", *ray)
            assert status == 2
            assert "another process writes --output=" in err
            actors(driver)[0].kill()
        left = actors(driver)
        driver.send_signal(kill)
        status, err = wait(driver)
        assert status == (75 if kill == signal.SIGTERM else -kill), err
        until(lambda left=left: not any(process.is_running() for process in left))
        assert not output.exists()
    last = begin_embed(mixture, output, *ray)
    assert last.wait() == 0, last.stderr.read()
    assert output.read_bytes() == quiet.read_bytes()
    skipped = Path(f"{output}.skipped.jsonl").read_text()
    assert skipped == Path(f"{quiet}.skipped.jsonl").read_text()
    assert json.loads(skipped)["index"] == 1497
    assert not parts.exists()


@pytest.mark.slow
def test_what_an_actor_meets_reaches_the_user(tmp_path):
    """A bad input is one sentence; actors that die at their start again and again end the work."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    (tmp_path / "torn.png").write_bytes(b"torn")
    write_lines(source, "fine", {"image": "torn.png"})
    status, err = wait(begin_embed(source, output, "--ray", "--actors=1"))
    assert status == 2
    assert err.rstrip().split("\n")[-1].startswith(f"error: {source}:2: image ")
    assert "Traceback" not in err
    (tmp_path / "deadly").mkdir()
    (tmp_path / "deadly" / "sitecustomize.py").write_text(DEADLY)
    path = [tmp_path / "deadly"]
    status, err = wait(begin_embed(source, output, "--ray", "--actors=1", path=path))
    assert status == 2
    assert "error: actors die again and again at " in err
    assert not Path(f"{output}.partial").exists()


DEADLY = """
import os, sys

class Deadly:
    def find_spec(self, name, *_):
        if name == "lco_jax.unit_embedder" and sys.argv[0].endswith("default_worker.py"):
            os._exit(1)

sys.meta_path.insert(0, Deadly())
"""


def wait(process):
    _, err = process.communicate(timeout=400)
    return process.returncode, err


def test_ray_needs_its_package_and_flags_that_fit(tmp_path, run_embed, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n")
    command = [f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.npy'}"]
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lco_jax.data.ray_actors", raising=False)
    assert install_line("ray") in run_embed(*command, "--ray")[2]
    for flags, words in (
        (["--actors=2"], "--actors and --actor-resources go with --ray"),
        (["--ray", "--actors=0"], "--actors=0: it must be at least 1"),
        (["--ray", "--actor-resources=TPU"], "--actor-resources=TPU: give NAME=N"),
        (["--ray", "--actor-resources=TPU=0"], "with N above 0"),
    ):
        status, _, err = run_embed(*command, *flags)
        assert status == 2
        assert words in err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in.txt"]


def done(parts):
    return sorted(parts.glob("*-*.parquet"))


@pytest.mark.slow
def test_memory_stays_flat():
    """The full job, 20,000 images, is `python tools/memory.py`."""
    command = [sys.executable, "tools/memory.py", "--images=1500", "--limit-mb=200"]
    environment = {**with_devices(1), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ---- odd folders


def odd_folder(folder):
    """Three pictures that can be read, among all that can be odd."""
    good = picture(folder / "a.png")
    picture(folder / "line\nbreak.png", 1)
    os.rename(good, os.fsencode(folder) + b"/\xff.png")
    picture(folder / "b" / "good.PNG", 2)
    (folder / "IMG_1.PSD").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for name in ("note.txt", "more.TXT", "README", ".DS_Store", "table.csv"):
        (folder / name).write_text("x")
    (folder / ".git").mkdir()
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "self.png").symlink_to("self.png")
    (folder / "self").symlink_to("self")
    (folder / "b" / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    return folder


ODD_IDS = ["\\xff.png", "b/good.PNG", "broken.png", "line\nbreak.png", "pipe.png", "self.png"]
ODD_REST = {
    ".txt": 2,
    "hidden": 2,
    "no ending": 3,
    ".csv": 1,
    ".psd": 1,
    "links to folders": 1,
}


def test_odd_entries_of_a_folder_are_skipped_or_counted(tmp_path, tiny, run_embed):
    """Names that are not UTF-8 or not on a line, broken links, links in a circle, pipes."""
    folder = odd_folder(tmp_path / "media")
    command = [f"--input={folder}", f"--output={tmp_path / 'out.parquet'}", "--workers=0"]
    status, _, err = run_embed(*command)
    assert status == 2
    assert f"error: {folder}: broken.png is a broken link; remove it" in err
    status, out, err = run_embed(*command, "--on-error=skip")
    assert status == 0, err
    rest = ".txt 2, hidden 2, .csv 1, .psd 1, links to folders 1"
    assert out.endswith(f"\nleft out: no ending 3, {rest}\n")
    record = json.loads((tmp_path / "out.parquet.json").read_text())
    assert record["left out"] == ODD_REST
    assert (record["vectors"], record["skipped"]) == (6, 3)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    found = dict(zip(table["id"], table["embedding"], strict=True))
    assert sorted(found) == sorted(ODD_IDS)
    want = tiny.encode([Image.open(folder / "b" / "good.PNG")])
    np.testing.assert_allclose(found["b/good.PNG"], want[0], atol=1e-5)
    assert {id for id, vector in found.items() if vector is None} == {
        "broken.png",
        "pipe.png",
        "self.png",
    }
    lines = (tmp_path / "out.parquet.skipped.jsonl").read_text().splitlines()
    reasons = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    assert "does not exist" in reasons["broken.png"]
    assert "is a pipe or a device" in reasons["pipe.png"]
    assert "symbolic links" in reasons["self.png"]


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A folder with a picture below 1,200 folders, which Python could not remove by itself."""
    levels = 1200
    folder = tmp_path / "deep"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for _ in range(levels):
        os.mkdir("d")
        os.chdir("d")
    Path("deep.png").touch()
    yield folder
    os.unlink("deep.png")
    for _ in range(levels):
        os.chdir("..")
        os.rmdir("d")


def test_a_folder_may_be_deep_or_closed(tmp_path, monkeypatch, deep):
    assert [name for name, _ in contents(deep)] == ["d/" * 1200 + "deep.png"]
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("secret/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    other = tmp_path / "other"
    picture(other / "secret" / "b.png")
    picture(other / "a.png")
    monkeypatch.setattr(os, "scandir", closed)
    corpus = Corpus(other)
    assert [item.id for item in corpus.items()] == ["a.png"]
    assert corpus.listing.left_out == {"folders that cannot be read": 1}
    with pytest.raises(LcoError, match="the folder secret/ cannot be read: Permission denied"):
        list(corpus.items(check_media=True))


@pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out"])
def test_what_comes_and_goes_while_a_folder_is_embedded(tmp_path, run_embed, monkeypatch, name):
    """The list of the start is kept, also by a command that goes on; what changed is said."""
    folder, output = tmp_path / "media", tmp_path / name
    for i in range(6):
        picture(folder / f"{i}.png", i)
    command = [f"--input={folder}", "--part-size=2", "--workers=0", "--on-error=skip"]
    assert run_embed(*command, f"--output={tmp_path / 'want.npy'}")[0] == 0
    want = np.load(tmp_path / "want.npy")
    write = PartsFolder.write

    def changing(parts, unit, rows):
        write(parts, unit, rows)
        picture(folder / "00.png", 9)
        (folder / "5.png").unlink()
        picture(folder / "0.png", 8)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartsFolder, "write", changing)
        status, _, err = run_embed(*command, f"--output={output}")
    assert status == 130
    assert "2 of 6 vectors are kept" in err
    status, out, err = run_embed(*command, f"--output={output}")
    assert status == 0, err
    said = "1 (00.png) new and not in it; 1 (5.png) gone; 1 (0.png) changed"
    assert f"since the folder was listed: {said}\n" in out
    record = json.loads(
        (output / "_index.json" if name == "out" else Path(f"{output}.json")).read_text()
    )
    assert record["since listed"] == {"new": ["00.png"], "gone": ["5.png"], "changed": ["0.png"]}
    if name == "out.npy":
        np.testing.assert_allclose(np.load(output)[:5], want[:5], atol=1e-5)
        assert np.isnan(np.load(output)[5]).all()
    assert not Path(f"{output}.partial").exists()
    assert not (output / "_files.json").exists()


# ---- whose fault it is


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_model_that_makes_nan_is_to_blame(tmp_path, tiny, run_embed, monkeypatch, on_error):
    model = copy.copy(tiny)
    model.params = {**tiny.params, "decoder": dict(tiny.params["decoder"])}
    model.params["decoder"]["norm"] = jax.tree.map(
        lambda x: x.at[0].set(jnp.nan), tiny.params["decoder"]["norm"]
    )
    monkeypatch.setattr(type(tiny), "from_pretrained", lambda *_, **__: model)
    (tmp_path / "in.txt").write_text("a\nb\n")
    output = tmp_path / "out.npy"
    status, out, err = run_embed(
        f"--input={tmp_path / 'in.txt'}", f"--output={output}", f"--on-error={on_error}"
    )
    assert (status, out) == (2, "")
    assert "2 of 2 results are not finite" in err
    assert "the model's decoder/norm/" in err
    assert "holds NaN or infinity" in err
    assert not output.exists()
    model.params["decoder"]["norm"] = jax.tree.map(
        lambda x: jnp.full_like(x, 3.4e38), tiny.params["decoder"]["norm"]
    )
    with pytest.raises(LcoError, match="the model overflows in float32"):
        model.encode(["a"], on_error=on_error)


def test_malformed_lines_are_skipped_like_torn_media(tmp_path, tiny, run_embed):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"id": "a", "text": "one"}\n{"id": "b", "text": null}\n{"id": \n\xff\n'
        b'{"id": "e", "text": "five"}\n'
    )
    output = tmp_path / "out.parquet"
    command = [f"--input={path}", f"--output={output}", "--id-field=id"]
    assert run_embed(*command)[0] == 2
    assert run_embed(*command, "--on-error=skip")[0] == 0
    table = pyarrow.parquet.read_table(output).to_pydict()
    assert table["id"] == ["a", "b", None, None, "e"]
    want = tiny.encode([{"text": "one"}, {"text": "five"}])
    vectors = table["embedding"]
    assert vectors[1:4] == [None, None, None]
    np.testing.assert_allclose(np.array([vectors[0], vectors[4]]), want, atol=1e-5)
    lines = Path(f"{output}.skipped.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    for reason, words in zip(reasons, ["nothing to embed", "JSON", "UTF-8"], strict=True):
        assert words in reason


def test_packed_and_several_files_of_lines(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('"one"\n\n"two"\n')
    write_lines(tmp_path / "b.jsonl", "three")
    both = contents(tmp_path / "*.jsonl*")
    assert both == [(0, {"text": "one"}), (2, {"text": "two"}), (3, {"text": "three"})]
    assert list(Corpus(tmp_path / "*.jsonl*").reader()(1, 3))[1].content == {"text": "three"}
    for name, texts in (("a", ["one", "two"]), ("b", ["three"])):
        pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    found = contents(tmp_path / "*.parquet")
    assert found == [(i, {"text": x}) for i, x in enumerate(["one", "two", "three"])]
    assert [item.id for item in Corpus(tmp_path / "*.parquet").reader()(2, 3)] == [2]
    with pytest.raises(LcoError, match="name one kind"):
        contents(tmp_path / "*")


@pytest.mark.parametrize("content", [b"", b'{"work": ', b"[]", b"\xff"])
@pytest.mark.parametrize("ending", [".parquet", ""])
def test_a_damaged_record_says_what_to_remove(tmp_path, ending, content):
    """Of what is done, and of what is in work."""
    output = tmp_path / f"out{ending}"
    partial = tmp_path / f"out{ending}.partial"
    partial.mkdir()
    (partial / DESCRIPTION).write_bytes(content)
    begins_anew = "and the same command begins anew"
    with pytest.raises(LcoError) as error, VectorParts(output, {}) as parts:
        parts.description()
    assert str(error.value).startswith(f"{partial / DESCRIPTION} ")
    assert str(error.value).endswith(f"; remove {partial}, {begins_anew}")
    done = VectorParts(output, {})
    output.mkdir() if not ending else output.touch()
    done.record.write_bytes(content)
    with pytest.raises(LcoError) as error:
        done.finished()
    assert str(error.value).startswith(f"{done.record} ")
    assert str(error.value).endswith(f"; remove {done.record if ending else output}, {begins_anew}")
