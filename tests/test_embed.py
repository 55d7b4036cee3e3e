"""`python -m lco_jax.embed`: what it reads, what a kill costs, and media through the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from lco_jax import LcoError, MediaConfig, embed
from lco_jax.data import parts as parts_module
from lco_jax.data.corpus import Corpus, scan
from lco_jax.data.parts import VectorParts

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


def fill(parts, total, step=2):
    """Rows of a value that is their index, `step` at a time; row 3 is skipped."""
    parts.divide(total)
    while unit := parts.claim():
        add(unit, unit.first, unit.end, step)


def add(unit, first, end, step=2):
    for row in range(first, end, step):
        rows = np.arange(row, min(row + step, end), dtype=np.float32)
        vectors = np.repeat(rows[:, None], 4, axis=1)
        vectors[rows == 3] = np.nan
        unit.add(
            [f"k{i:.0f}" for i in rows], vectors, {int(i) - row: "why" for i in rows if i == 3}
        )


def check(output, total, recorded=True):
    want = np.repeat(np.arange(total, dtype=np.float32)[:, None], 4, axis=1)
    want[3] = np.nan
    if output.suffix == ".npy":
        np.testing.assert_array_equal(np.load(output), want)
    else:
        table = pyarrow.parquet.read_table(
            output, columns=["id", "embedding"]
        ).to_pydict()  # also a folder of them
        assert table["id"] == [f"k{i}" for i in range(total)]
        assert table["embedding"] == [None if i == 3 else [float(i)] * 4 for i in range(total)]
    skipped = output.with_name(output.name + ".skipped.jsonl")
    assert json.loads(skipped.read_text()) == {"index": 3, "id": "k3", "reason": "why"}
    assert not recorded or VectorParts(output, {"a": 1}).whole()["vectors"] == total


OUTPUTS = pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out"])


@OUTPUTS
def test_parts_become_the_output(tmp_path, name):
    output = tmp_path / "new" / name
    with VectorParts(output, {"a": 1}, 4) as parts:
        assert parts.settled(lambda: {"total": 6}) == {"total": 6}
        assert parts.settled(lambda: {"total": 7}) == {"total": 6}
        fill(parts, 6)
        names = sorted(x.name for x in parts.folder.iterdir() if x.name[0] != "_")
        assert names == ["000000000000-000000000004.parquet", "000000000004-000000000006.parquet"]
        assert parts.finish(6, 4, str)["skipped"] == 1
    check(output, 6)
    beside = {f"{name}.skipped.jsonl", *([] if name == "out" else [f"{name}.json"])}
    assert {x.name for x in output.parent.iterdir()} == {name, *beside}
    if name == "out":
        assert sorted(os.listdir(output)) == [*names, "_index.json"]
        assert json.loads((output / "_index.json").read_text())["parts"] == names
        with pytest.raises(LcoError, match="out holds other work: a was 1 and is 2"):
            VectorParts(output, {"a": 2}).whole()
        return
    assert VectorParts(output, {"a": 2}).whole() is None
    with VectorParts(output, {"a": 2}, 4) as parts, parts.alone():
        parts_module.Unit(parts, 0, 1).add(
            [1], np.ones((1, 4), np.float32), {}
        )  # and again, with nothing skipped
        assert parts.join(1, 4, int)["skipped"] == 0
    assert {x.name for x in output.parent.iterdir()} == {name, f"{name}.json"}


def test_processes_share_the_units_and_what_one_leaves_another_makes(tmp_path):
    output = tmp_path / "out.npy"
    with VectorParts(output, {"a": 1}, 4) as one, VectorParts(output, {"a": 1}, 4) as other:
        one.settled(dict)
        one.divide(10), other.divide(10)
        mine, theirs = one.claim(), other.claim()
        assert [(mine.first, mine.end), (theirs.first, theirs.end)] == [(0, 4), (4, 8)]
        add(mine, 0, 2)
        mine.close()  # as a process that is killed, but for what waits
        add(theirs, 4, 8)
        left = [other.claim(), other.claim(), other.claim()]
        assert [(unit.first, unit.end) for unit in left[:2]] == [(2, 4), (8, 10)]
        assert left[2] is None
        assert one.claim() is None, "all that one has in view is made, or in the hands of the other"
        assert set(one.left) == {8}
        add(left[0], 2, 4)
        add(left[1], 8, 10)
        assert one.claim() is None
        assert not one.left
        assert one.news() == 8
        assert one.news() == 0
        assert other.finish(10, 4, str)["vectors"] == one.finish(10, 4, str)["vectors"] == 10
    check(output, 10)
    assert not one.folder.exists()


@OUTPUTS
def test_a_process_that_hangs_is_overtaken_and_no_row_is_there_twice(tmp_path, name, monkeypatch):
    with (
        VectorParts(tmp_path / name, {"a": 1}, 6) as one,
        VectorParts(tmp_path / name, {"a": 1}, 6) as other,
    ):
        one.settled(dict)
        one.divide(6), other.divide(6)
        hung = one.claim()
        monkeypatch.setattr(parts_module, "PART_SECONDS", 0)
        add(hung, 0, 2)
        assert other.claim() is None
        monkeypatch.setattr(parts_module, "STALE", 0)
        unit = other.claim()
        assert (unit.first, unit.end) == (2, 6)
        add(hung, 2, 5, 3)  # it goes on, after all
        add(unit, 2, 6, 2)
        assert other.done == 6
        assert other.finish(6, 4, str)["vectors"] == 6
        hung.add(["k5"], np.full((1, 4), 5, np.float32), {})
    check(tmp_path / name, 6)


def test_who_wakes_when_all_is_done_does_no_harm(tmp_path, monkeypatch):
    """To the output, or to other work that has begun in its place; and makes nothing again."""
    output = tmp_path / "out.npy"
    hung, loading, one = (VectorParts(output, {"a": 1}, 4) for _ in range(3))
    with hung, one:
        for parts in (hung, loading, one):
            parts.settled(dict)
            parts.divide(8)
        unit = hung.claim()
        monkeypatch.setattr(parts_module, "STALE", 0)
        one.claim().close(), fill(one, 8)
        assert one.finish(8, 4, str)
        with loading:
            assert loading.done == 0, "the folder is gone"
            assert loading.claim() is None
            assert loading.finish(8, 4, str)["vectors"] == 8
        with VectorParts(output, {"a": 2}, 4) as other:
            assert other.finish(8, 4, str) is None
            unit.add(list("abcd"), np.ones((4, 4)), {})
            assert hung.claim() is None
            assert not list(other.folder.glob("0*"))
            with pytest.raises(LcoError, match="holds other work: a was 2 and is 1"):
                hung.finish(8, 4, str)
            assert len(other.claim()) == 4
    check(output, 8, recorded=False)


def test_a_part_in_the_making_is_nobody_elses(tmp_path, monkeypatch):
    """In containers, processes have equal numbers; one is stopped in the midst of writing, and overtaken."""
    monkeypatch.setattr(parts_module, "STALE", 0)
    monkeypatch.setattr(parts_module, "PART_SECONDS", 0)
    write = pyarrow.parquet.write_table
    with (
        VectorParts(tmp_path / "out", {"a": 1}, 6) as one,
        VectorParts(tmp_path / "out", {"a": 1}, 6) as other,
    ):
        one.settled(dict)
        one.divide(6), other.divide(6)
        unit = one.claim()

        def stopped(table, path, **options):
            monkeypatch.setattr(pyarrow.parquet, "write_table", write)
            with open(path, "wb") as file:
                assert other.claim() is None
                add(other.claim(), 0, 6, 6)
                write(table, file, **options)

        monkeypatch.setattr(pyarrow.parquet, "write_table", stopped)
        add(unit, 0, 2)
        other.finish(6, 4, str)
    check(tmp_path / "out", 6)


def test_a_unit_that_changes_hands_is_not_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "STALE", 0)
    with (
        VectorParts(tmp_path / "a.npy", {}, 4) as one,
        VectorParts(tmp_path / "a.npy", {}, 4) as other,
    ):
        one.settled(dict)
        one.divide(4), other.divide(4)
        unit = one.claim()
        assert other.claim() is None
        unit.close()
        one.divide(4)
        assert len(one.claim()) == 4
        assert other.claim() is None
        one.alive()
        assert other.claim() is None
        assert len(other.claim()) == 4


def test_nobody_comes_in_while_the_folder_is_removed(tmp_path, monkeypatch):
    unlink, seen = Path.unlink, []
    with VectorParts(tmp_path / "out.npy", {"a": 1}, 4) as parts:
        parts.settled(dict)
        fill(parts, 6)

        def watched(path, **options):
            unlink(path, **options)
            seen.append(path.name)
            if path.name != parts_module.LOCK:
                with (
                    pytest.raises(LcoError, match="another process writes"),
                    parts.alone(wait=False),
                ):
                    pass

        monkeypatch.setattr(Path, "unlink", watched)
        parts.finish(6, 4, str)
    assert parts_module.INDEX in seen
    assert not parts.folder.exists()


def test_a_folder_that_is_removed_while_one_comes_in_is_made(tmp_path, monkeypatch):
    mkdir, calls = os.mkdir, []

    def there_and_gone(path, *args):
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", there_and_gone)
    with VectorParts(tmp_path / "out.npy", {}) as parts, parts.alone():
        assert parts.ours()


def test_a_gap_is_made_again_and_a_torn_part_named(tmp_path):
    output = tmp_path / "out.npy"

    def begin():
        with VectorParts(output, {"a": 1}, 2) as parts:
            with parts.alone():
                done = parts.done
            fill(parts, 8)
            return done, parts

    assert begin()[0] == 0
    (tmp_path / "out.npy.partial" / "000000000002-000000000004.parquet").unlink()
    with VectorParts(output, {"a": 1}, 2) as parts:
        assert parts.finish(8, 4, str) is None
        assert parts.left == {2: 4}
    done, parts = begin()
    assert done == 6
    torn = parts.folder / "000000000004-000000000006.parquet"
    torn.write_bytes(b"torn")
    with VectorParts(output, {"a": 1}, 2) as parts, pytest.raises(LcoError) as error:
        parts.finish(8, 4, str)
    assert sentence(error).startswith(f"{torn} is torn; remove it")
    torn.unlink()
    with VectorParts(output, {"a": 1}, 2) as parts:
        assert parts.finish(8, 4, str) is None
        fill(parts, 8)
        assert parts.made == 2
        parts.finish(8, 4, str)
    check(output, 8)


def test_other_work_is_refused(tmp_path):
    output, work = tmp_path / "out.npy", {"--dtype": "float32", "--on-error": "raise"}

    def enter(output, work):
        with VectorParts(output, work, 2) as parts, parts.alone(wait=False):
            return parts.done

    with VectorParts(output, work, 2) as parts, parts.alone():
        parts_module.Unit(parts, 0, 2).add(["a", "b"], np.ones((2, 4), np.float32), {})
        with pytest.raises(LcoError, match="another process writes"):
            enter(output, work)
    with pytest.raises(LcoError) as error:
        enter(output, {**work, "--dtype": "bfloat16"})
    assert (
        "--dtype was 'float32' and is 'bfloat16'; give another --output, or remove the folder"
        in sentence(error)
    )
    for _ in range(2):  # what was made while every input was good, a run that skips can use
        assert enter(output, {**work, "--on-error": "skip"}) == 2
    with pytest.raises(LcoError, match="--on-error was 'skip' and is 'raise'"):
        enter(output, work)
    (tmp_path / "out.parquet.partial").mkdir()
    (tmp_path / "out.parquet.partial" / "mine").touch()
    with pytest.raises(LcoError, match="holds mine and no index of ours"):
        enter(tmp_path / "out.parquet", work)


def test_a_folder_without_a_whole_part_vanishes_and_a_failure_keeps_the_rest(tmp_path):
    def fail(rows):
        with VectorParts(tmp_path / "out.npy", {}, 100) as parts:
            parts.settled(dict)
            parts.divide(10)
            add(parts.claim(), 0, rows)
            raise KeyboardInterrupt

    for rows in (0, 4):
        with pytest.raises(KeyboardInterrupt):
            fail(rows)
        assert (tmp_path / "out.npy.partial").exists() == bool(rows)
    with VectorParts(tmp_path / "out.npy", {}, 100) as parts:
        assert parts.done == 4


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_embed import VectorParts, check, fill

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
    with VectorParts(output, {"a": 1}, 2) as parts:
        if not parts.whole():
            parts.settled(dict)
            fill(parts, 5)
            parts.finish(5, 4, str)

def old():
    for path in (output, output.with_name(output.name + ".json"), output.with_name(output.name + ".skipped.jsonl")):
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

write()  # here, so that what pyarrow imports late (pandas, where it is) is not imported by every process
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
    """Before and after each of its calls a process dies; whatever is there is whole, and the next one ends well."""
    output = tmp_path / name
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        KILLED,
        str(output),
        str(Path(__file__).parent),
    ]
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
    assert (status, out) == (0, f"{output} is whole: this very command has made its 12 vectors\n")
    assert not Path(f"{output}.partial").exists()
    status, _, err = run_embed(*command, "--max-length=3")
    assert status == 2
    assert (
        f"{output} holds other work: --max-length was None and is 3; give another --output, or remove"
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


@pytest.mark.parametrize("at", ["before the first look", "while the model loads"])
def test_who_comes_late_makes_nothing_again(tmp_path, run_embed, monkeypatch, at):
    """Another process does all meanwhile; each of its forward passes is a sign of life."""
    (tmp_path / "in.txt").write_text("a\nb\nc\nd\n")
    owner, name = (VectorParts, "settled") if at == "before the first look" else (embed, "load")
    step, embed_items, alive, made, signs = (
        getattr(owner, name),
        embed.embed_items,
        VectorParts.alive,
        [],
        [],
    )

    def late(*args):
        monkeypatch.setattr(owner, name, step)
        embed.main()
        return step(*args)

    monkeypatch.setattr(owner, name, late)
    monkeypatch.setattr(embed, "embed_items", lambda *args: (made.append(1), embed_items(*args)))
    monkeypatch.setattr(
        VectorParts, "alive", lambda parts: (signs.append(len(parts.open)), alive(parts))
    )
    status, out, err = run_embed(
        f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.npy'}", "--batch-size=1"
    )
    assert status == 0, err
    assert out.count("4 vectors of ") == 2
    assert len(made) == 1
    assert signs.count(1) >= 4
    assert {x.name for x in tmp_path.iterdir()} == {"in.txt", "out.npy", "out.npy.json"}


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
    """Ids of the processes that descend from one."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(child)]
    return found


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Two processes share a work, and both are killed; equal bits to a quiet run, and no worker outlives its parent.

    Many more of them: `python -m benchmarks sharing`.
    """
    lines = [{"key": i, "text": f"{'word ' * (i % 40)}{i}"} for i in range(1500)]
    for i in range(0, 1500, 3):
        picture(tmp_path / f"{i}.png", i)
        lines[i] = {"key": i, "image_path": f"{i}.png"}
    source = write_lines(tmp_path / "in.jsonl", *lines)
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}

    def start(output):
        command = [
            sys.executable,
            "-m",
            "lco_jax.embed",
            "--model=builtin:tiny",
            f"--input={source}",
        ]
        command += [f"--output={output}", "--part-size=50", "--workers=1"]
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    quiet, output = tmp_path / "quiet.npy", tmp_path / "out.npy"
    assert start(quiet).wait() == 0
    parts = Path(f"{output}.partial")
    draw, workers = random.Random(0), []
    for job in [
        start(output),
        start(output),
    ]:  # the second is killed while it makes what the first has left
        kept = len(done(parts))
        while job.poll() is None and len(done(parts)) < kept + 2:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        workers += children(job.pid)
        job.kill()
        assert job.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert len(workers) >= 2
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.1)
    assert not output.exists()
    kept = {part: part.stat().st_ino for part in done(parts)}
    last = start(output)
    while last.poll() is None and len(done(parts)) <= len(kept):
        time.sleep(0.01)
    assert kept.items() <= {part: part.stat().st_ino for part in done(parts)}.items(), (
        "a part is made twice"
    )
    assert last.wait() == 0
    assert output.read_bytes() == quiet.read_bytes()
    assert not parts.exists()


def done(parts):
    return sorted(parts.glob("*-*.parquet"))


@pytest.mark.slow
def test_memory_stays_flat():
    """The full job, 20,000 images, is `python tools/memory.py`."""
    command = [sys.executable, "tools/memory.py", "--images=1500", "--limit-mb=200"]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
