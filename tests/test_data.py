"""Records and sources: what is read, and what is refused by name."""

import copy
import gzip
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict
from tfds_files import CORE, NUMBER, TEXT, class_label, image_feature, png, shape, write_tfds

from lco_jax import LcoError
from lco_jax.checkpoint import builtin
from lco_jax.core.files import ASSETS
from lco_jax.data.content import Reader, as_content
from lco_jax.data.inputs import Preparation, prepare_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.data.record_stream import open_sources
from lco_jax.data.records import Record, content_key, parse_record
from lco_jax.data.sources import Columns, JsonlSource, open_source, parquet_source
from lco_jax.data.tfds import nli_source
from lco_jax.evaluation.retrieval import retrieval

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(cache):
    return ChatTokenizer(builtin.build())


@pytest.fixture(scope="module")
def processor(cache):
    return Processor(builtin.build())


def sentence(error):
    """The message of an LcoError, which must be one line and no fragment."""
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(":")
    return text


def test_the_built_in_checkpoint_is_what_its_tool_makes(tmp_path):
    folder = tmp_path / builtin.FILES.name
    folder.mkdir()
    runpy.run_path(str(ROOT / "tools" / "make_tiny.py"))["write"](folder)
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in builtin.FILES.iterdir()
    }
    for file in [*folder.iterdir(), tmp_path / builtin.SHAPES.name]:
        assert file.read_bytes() == (ASSETS / file.relative_to(tmp_path)).read_bytes(), file.name


# ---- records


def reference_side(text):
    return {"image_path": "", "text": text}


@pytest.mark.parametrize(
    ("content", "negatives"),
    [
        ({"anchor": "a", "positive": "p", "negative": "n"}, ("n",)),
        ({k: reference_side(k[0]) for k in ("anchor", "positive", "negative")}, ("n",)),
        ({"anchor": reference_side("a"), "positive": "p", "negative": reference_side("")}, ()),
        ({"anchor": "a", "positive": {"text": "p", "image_path": None}}, ()),
        ({"anchor": "a", "positive": "p", "negative": None}, ()),
        ({"anchor": "a", "positive": "p", "negative": []}, ()),
        ({"anchor": "a", "positive": "p", "negative": ""}, ()),
        ({"anchor": "a", "positive": "p", "negative": ["n", {"text": "m"}, ""]}, ("n", "m")),
        ({"anchor": "a", "positive": "p", "negatives": ["n", "m"]}, ("n", "m")),
    ],
)
def test_records(content, negatives):
    record = parse_record(content, "here")
    assert record == Record("a", "p", negatives, "here")
    assert record.sides == ("a", "p", *negatives)


GOOD = '{"anchor": "a", "positive": "p", "negative": "n"}'
BAD_RECORDS = {  # line -> what the message says about it
    '{"anchor": "a", "positive"': "not valid JSON",
    '"a string"': "anchor and positive",
    "[1, 2]": "anchor and positive",
    '{"positive": "p"}': "'anchor'",
    '{"anchor": "a"}': "'positive'",
    '{"anchor": "a", "positive": ""}': "positive is empty",
    '{"anchor": {"text": "", "image_path": ""}, "positive": "p"}': "anchor is empty",
    '{"anchor": "a", "positive": {}}': "positive is empty",
    '{"anchor": "a", "positive": "p", "negativ": "n"}': "'negativ'",
    '{"anchor": {"txt": "a"}, "positive": "p"}': "'txt'",
    '{"anchor": {"text": "a", "image_path": "x.jpg"}, "positive": "p"}':
        "anchor.image_path: there is no file",
    '{"anchor": "a", "positive": "p", "negative": [{"audio_path": "x.wav"}]}':
        "negative.audio_path: there is no",
    '{"anchor": "a", "positive": "p", "negative": {"video_path": "x.mp4"}}':
        "negative.video_path: there is no file",
    '{"anchor": {"image_path": 3}, "positive": "p"}': "anchor.image_path must be a path",
    '{"anchor": {"image_path": ["data:,", ""]}, "positive": "p"}':
        "anchor.image_path[1] must be a path",
    '{"anchor": {"image_path": [["data:,"]]}, "positive": "p"}':
        "anchor.image_path[0] must be a path",
    '{"anchor": {"video_path": "1.png"}, "positive": "p"}':
        "anchor.video_path is an image, '1.png'",
    '{"anchor": {"video_path": ["data:,", ["1.png"], 3]}, "positive": "p"}': "there is no file",
    '{"anchor": {"image": "data:,", "image_path": "data:,"}, "positive": "p"}':
        "both image and image_path",
    '{"anchor": {"content": 3}, "positive": "p"}': "anchor.content is int 3; give",
    '{"anchor": {"content": ["a"]}, "positive": "p"}': "anchor.content is list ['a']; give",
    '{"anchor": {"content": "a", "text": "b"}, "positive": "p"}': "both content and text",
    '{"anchor": {"content": [{"type": "text", "text": ""}]}, "positive": "p"}': "anchor is empty",
    '{"anchor": [], "positive": "p"}': "anchor is empty",
    '{"anchor": ["a"], "positive": "p"}': "anchor is list ['a']; give a text, ",
    '{"anchor": "a", "positive": [{"type": "picture", "image": "data:,"}]}':
        "positive[0] has the unknown type 'picture'",
    '{"anchor": "a", "positive": [{"type": ["image"], "image": "data:,"}]}':
        "positive[0] has the unknown type ['image']",
    '{"anchor": "a", "positive": [{"type": "image", "audio": "data:,"}]}':
        "positive[0] has the unknown key 'audio'",
    '{"anchor": "a", "positive": [{"type": "image"}]}':
        "positive[0] is a part of type 'image'; it must hold its medium once, under image or ",
    '{"anchor": "a", "positive": [{"type": "image", "image": "data:,", "image_path": "data:,"}]}':
        "positive[0] is a part of type 'image'; it must hold its medium once",
    '{"anchor": "a", "positive": [{"type": "text", "text": 3}]}':
        "positive[0].text must be a string",
    '{"anchor": "a", "positive": [{"type": "text", "text": "t", "image": "data:,"}]}':
        "positive[0] has the unknown key 'image'",
    '{"anchor": "a", "positive": [{"type": "image", "image": ""}]}':
        "positive[0].image must be a path",
    '{"anchor": "a", "positive": [{"type": "video", "video": []}]}':
        "positive[0].video must be a path",
    '{"anchor": "a", "positive": [{"type": "video", "video": ["data:,", 1]}]}':
        "positive[0].video[1] must be a path",
    '{"anchor": "a", "positive": [{"type": "text", "text": "b"}, {"text": "c"}]}':
        "positive is list [",
    '{"anchor": "a", "positive": [{"role": "user", "content": "b"}]}': "positive is list [",
    '{"anchor": "a", "positive": "p", "negative": ["n", {"type": "image", "url": "x"}]}':
        "negative.url: there is no file",
    '{"anchor": 3, "positive": "p"}': "anchor is int 3; give",
    '{"anchor": null, "positive": "p"}': "anchor is NoneType None; give",
    '{"anchor": "a", "positive": {"text": 3}}': "positive.text",
    '{"anchor": "a", "positive": "p", "negative": [["n"]]}': "negative is list ['n']; give",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_RECORDS)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(LcoError) as error:
        JsonlSource(path)
    assert f"{path}:3: " in sentence(error)
    assert BAD_RECORDS[line] in str(error.value)


@pytest.mark.parametrize("anchor", [b"\xff", rb"a\ud800b"])
def test_a_text_that_is_no_unicode_is_a_bad_record(tmp_path, tokenizer, anchor):
    """A lone surrogate is valid JSON, and no tokenizer takes it: the scan must find it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"anchor": "' + anchor + b'", "positive": "p"}\n')
    with pytest.raises(LcoError, match=r"data\.jsonl:1: "):
        tokenizer([as_messages(text, "") for text in JsonlSource(path)[0].sides])


def image(path):
    return {"type": "image", "image": path}


def video(path):
    return {"type": "video", "video": path}


def audio(path):
    return {"type": "audio", "audio": path}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("side", "want"),
    [
        ({"text": "a", "image_path": "i.png"}, (image("/r/i.png"), text("a"))),
        (
            {"text": "", "image_path": "i.png", "audio_path": "", "video_path": None},
            (image("/r/i.png"),),
        ),
        (
            {"audio_path": "a.wav", "video_path": "v.mp4", "image_path": "i.png", "text": "t"},
            (image("/r/i.png"), video("/r/v.mp4"), audio("/r/a.wav"), text("t")),
        ),
        ({"image_path": ["/abs/i.png", "sub/j.png"]}, (image("/abs/i.png"), image("/r/sub/j.png"))),
        ({"image_path": []}, ""),
        (
            {"video_path": [["1.png", "2.png"], "v.mp4"]},
            (video(["/r/1.png", "/r/2.png"]), video("/r/v.mp4")),
        ),
        ({"video_path": ["1.png", "2.JPG"]}, (video(["/r/1.png", "/r/2.JPG"]),)),
        ({"video_path": ["1.mp4", "2.gif"]}, (video("/r/1.mp4"), video("/r/2.gif"))),
        (
            {"image": "i.png", "audio": ["a.wav"], "text": "t"},
            (image("/r/i.png"), audio("/r/a.wav"), text("t")),
        ),
        ({"image_path": "https://host/i.png"}, (image("https://host/i.png"),)),
        ({"audio_path": "data:audio/wav;base64,AAAA"}, (audio("data:audio/wav;base64,AAAA"),)),
        ({"image_path": "FILE:///abs/i.png"}, (image("FILE:///abs/i.png"),)),
        (
            {"content": [image("i.png"), text("t"), audio("a.wav")]},
            (image("/r/i.png"), text("t"), audio("/r/a.wav")),
        ),
        ({"content": "only text"}, "only text"),
        ([text("t"), {"type": "image", "image_path": "i.png"}], (text("t"), image("/r/i.png"))),
        ([text("t"), text(""), text(" u")], "t u"),
        ([image("i.png"), text("")], (image("/r/i.png"),)),
        (video(["1.png", "2.png"]), (video(["/r/1.png", "/r/2.png"]),)),
        ({"type": "image", "image": b"encoded"}, (image(b"encoded"),)),
        (
            {"type": "image", "text": None, "image": "i.png", "image_path": None},
            (image("/r/i.png"),),
        ),
    ],
)
def test_a_side_may_hold_media(side, want):
    """In every spelling, on every side; text alone stays a string."""
    if want:
        assert parse_record({"anchor": side, "positive": side}, "here", "/r") == Record(
            want, want, (), "here"
        )
    record = parse_record({"anchor": "a", "positive": "p", "negative": side}, "here", "/r")
    assert record.negatives == ((want,) if want else ())


SPELLINGS = [  # several ways to write the same content
    [
        (image("https://h/i.png"), text("t")),
        [image("https://h/i.png"), text("t")],
        {"text": "t", "image": "https://h/i.png"},
        {"text": "t", "image_path": ["https://h/i.png"], "audio": None, "video": ""},
        {"text": "t", "image": {"bytes": None, "path": "https://h/i.png"}},
        {"content": [{"type": "image", "url": "https://h/i.png"}, text("t")]},
        [{"type": "image", "path": "https://h/i.png", "image": None}, text("t"), text("")],
    ],
    [
        ({"type": "video", "video": b"film", "max_frames": 4},),
        {"type": "video", "video": {"bytes": b"film", "path": "film.mp4"}, "max_frames": 4},
        [{"type": "video", "video_path": b"film", "max_frames": 4, "fps": None}],
    ],
    ["a b", {"text": "a b"}, {"content": "a b"}, [text("a "), text("b")], text("a b")],
    [
        (video(["1.png", "2.png"]), video("v.gif")),
        {"video": [["1.png", "2.png"], "v.gif"]},
        [video(["1.png", "2.png"]), {"type": "video", "path": "v.gif"}],
    ],
]


@pytest.mark.parametrize("spellings", SPELLINGS)
def test_a_content_is_one_however_it_is_spelt_and_wherever(spellings):
    """In `encode`, which reads Python objects, and in files."""
    want = spellings[0]
    for given in spellings:
        assert as_content(given, "here") == Reader("here", "").read(given) == want
        assert as_messages(given, "here") == as_messages(want, "here")
        if not isinstance(given, str):
            chat = [{"role": "user", "content": given}]
            (message,) = Reader("here", "").read(chat)
            joined = Reader("here", "").read(message["content"])
            assert (message["role"], joined) == ("user", want)


def test_a_mistake_is_named_by_its_place():
    for given, says in (
        ([{"role": "user", "content": "a"}, "b"], "here[1].role is None"),
        ([{"role": "user", "content": [{"type": "image", "size": 3}]}], "here[0].content[0] has"),
        ([{"role": "user", "content": []}], "here[0].content is empty"),
        ({"image": []}, "here: its image is an empty list"),
        ({"image": b"", "text": "t"}, "here: its image is empty"),
        ({"image": None}, "here holds nothing to embed; it needs one of: text, image, "),
        ({"text": 3}, "here.text must be a string, and is int 3"),
        (Path("no-such.png"), "there is no such file"),
        ("x" * 300 + ".png", "there is no such file"),
        (np.zeros(3), "here is ndarray of shape (3,); give sound as"),
    ):
        with pytest.raises(LcoError) as error:
            as_content(given, "here")
        assert says in sentence(error)


class Unloadable:
    """A text that no other process can make again."""

    def __reduce__(self):
        return "".join, ([1],)


class Unsendable(str):
    """A text that cannot be sent to another process."""

    def __reduce__(self):
        raise OSError("not me")


@pytest.mark.slow
def test_what_cannot_be_sent_to_a_process_is_prepared_here(processor):
    preparation = Preparation(processor)
    good, bad = [("one", "a"), (Unsendable("two"), "b")], [("one", "a"), (Unloadable(), "b")]
    for items in (good, bad):
        want = preparation(items)
        got = list(prepare_ahead(preparation, items, workers=1))
        assert np.array_equal(got[0].input_ids, want[0].input_ids)
    assert "b is Unloadable" in str(got[1])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bug_is_no_bad_input(workers):
    """It ends in a traceback, also where bad inputs are skipped."""
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'tokenizer'"):
        list(prepare_ahead(Preparation(None), [("text", "input 0")], workers))


def test_a_teachers_scores_are_of_every_candidate():
    given = {"anchor": "a", "positive": "p", "negative": ["m", "n"]}
    scored = parse_record({**given, "teacher_scores": [0.9, 0.5, 1]}, "here")
    assert scored.teacher_scores == (0.9, 0.5, 1.0)
    assert not scored.ignored
    assert parse_record({**given, "teacher_scores": None}, "here").teacher_scores == ()
    with pytest.raises(LcoError, match="here: teacher_scores has 2 numbers, and there are 3 cand"):
        parse_record({**given, "teacher_scores": [0.9, 0.5]}, "here")
    for wrong in ("0.9", [0.9, "0.5", 1.0], [0.9, True, 1.0], 0.9, [0.9, float("nan"), 1.0]):
        with pytest.raises(LcoError, match=r"here: teacher_scores is .* must be a list of numbers"):
            parse_record({**given, "teacher_scores": wrong}, "here")


def test_negatives_are_one_side_or_several():
    parts = [image("i.png"), text("t")]
    for given, count in (
        (parts, 1),
        ([parts], 1),
        ([parts, [image("j.png")]], 2),
        ([parts, "n", {"image_path": "i.png"}, image("j.png")], 4),
        ([{"text": "n"}, {"image_path": "i.png"}, ""], 2),
    ):
        assert (
            len(parse_record({"anchor": "a", "positive": "p", "negative": given}, "here").negatives)
            == count
        )


def write_jsonl(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_paths_start_at_the_folder_of_the_file(tmp_path, monkeypatch):
    path = write_jsonl(
        tmp_path / "set" / "data.jsonl", {"anchor": {"image_path": "m/i.png"}, "positive": "p"}
    )
    for root in ("set", "elsewhere"):
        (tmp_path / root / "m").mkdir(parents=True)
        (tmp_path / root / "m" / "i.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    own, other = JsonlSource("set/data.jsonl"), JsonlSource(path, media_root="elsewhere")
    monkeypatch.chdir("/")  # what a source gives does not depend on where the process stands
    assert own.root == str(tmp_path / "set")
    assert other[0].anchor == (image(str(tmp_path / "elsewhere" / "m" / "i.png")),)


def test_a_missing_media_file_is_found_by_the_scan(tmp_path):
    records = [
        {"anchor": {"image_path": f"{i}.png", "text": "a"}, "positive": "p"} for i in range(3)
    ]
    path = write_jsonl(tmp_path / "data.jsonl", *records)
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(LcoError) as error:
        JsonlSource(path)
    missing = f"{path}:2: anchor.image_path: there is no file {tmp_path / '1.png'}; "
    assert missing in sentence(error)
    source = JsonlSource(path, on_bad="skip")
    assert source.skipped == 1
    assert [record.where for record in (source[0], source[1])] == [f"{path}:1", f"{path}:3"]
    assert len(open_source("x", {"kind": "jsonl", "path": str(path), "check_media": False})) == 3


def test_each_file_is_looked_for_once(tmp_path, monkeypatch):
    (tmp_path / "i.png").write_bytes(b"")
    asked = []
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or True)
    records = [
        {"anchor": {"image_path": "i.png"}, "positive": {"image_path": "https://host/i.png"}}
    ] * 5
    source = JsonlSource(write_jsonl(tmp_path / "data.jsonl", *records))
    assert [source[i].where for i in range(5)]
    assert asked == [str(tmp_path / "i.png")]


def test_sides_that_say_the_same_have_one_key():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    sides = [
        "a",
        (image("a"),),
        (image("a"), text("a")),
        (text("a"), image("a")),
        (audio("a"),),
        (image(b"a"),),
        (image(pixels),),
        (image(pixels.reshape(1, 4, 3)),),
        (image(pixels.astype(np.int8)),),
        (image(pixels[::-1]),),
        (video({"array": pixels[None], "fps": 2.0}),),
        (video({"array": pixels[None], "fps": 1.0}),),
        (video(["a", "b"]),),
        (video(["ab"]),),
    ]
    assert len({content_key(side) for side in sides}) == len(sides)
    assert {content_key(side) for side in copy.deepcopy(sides)} == {
        content_key(side) for side in sides
    }
    assert content_key((image(pixels[:, ::-1].copy()[:, ::-1]),)) == content_key(
        (image(pixels),)
    )  # memory order is no content


@pytest.mark.parametrize(
    "shared", ["words", (image("a.png"), text("t")), (image(np.ones((2, 2, 3), np.uint8)),)]
)
def test_retrieval_takes_equal_sides_for_one(shared):
    """x and y share what is right, z is as near to a wrong image as to its own positive."""
    wrong = (image("wrong.png"),)
    again = copy.deepcopy(shared)
    records = [
        Record("x", shared, (wrong,), ""),
        Record("y", again, (again,), ""),
        Record("z", "another", (), ""),
    ]
    vectors = {content_key(side): [1, 0] for side in ("x", "y", shared)} | {
        content_key(side): [0, 1] for side in ("z", "another", wrong)
    }
    result = retrieval(
        lambda sides: np.array([vectors[content_key(side)] for side in sides]), records
    )
    assert (result.candidates, result.similarity.shape) == (3, (3, 3))
    assert result.recall_at_1 == 2 / 3
    assert result.mrr == (1 + 1 + 1 / 2) / 3


def test_bad_records_can_be_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    good = [{"anchor": f"é{i}今", "positive": f"p{i}", "negative": ["n"] * i} for i in range(3)]
    lines = [json.dumps(content, ensure_ascii=False) for content in good]
    bad = list(BAD_RECORDS)
    path.write_text(
        "\n".join([bad[0], lines[0], "", bad[3], bad[5], lines[1], lines[2]]), encoding="utf-8"
    )
    source = JsonlSource(path, on_bad="skip")
    assert source.skipped == 3
    assert source.max_negatives == 2
    assert [record.anchor for record in (source[2], source[0], source[1])] == [
        "é2今",
        "é0今",
        "é1今",
    ]
    assert [source[i].where for i in range(len(source))] == [f"{path}:{line}" for line in (2, 6, 7)]
    path.write_text("\n".join(bad))
    with pytest.raises(LcoError, match="no usable record"):
        JsonlSource(path, on_bad="skip")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(LcoError) as error:
        JsonlSource(path)
    assert sentence(error) == f"{path} holds no usable record"


def test_a_missing_file_is_an_error(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(LcoError) as error:
            JsonlSource(path)
        assert str(path) in sentence(error)


# ---- TFDS

LABELS = ("entailment", "neutral", "contradiction")
SNLI = [  # premise, hypothesis, label
    ("A dog runs.", "The annotators did not agree.", -1),  # not the last label, contradiction
    ("A dog runs.", "An animal moves.", 0),
    ("A dog runs.", "A dog sleeps.", 2),
    ("A man eats.", "A man eats an apple.", 1),
    ("A man eats.", "A person eats.", 0),  # no contradiction: no triplet
    ("Kids play.", "Nobody is there.", 2),  # no entailment: none
    ("Ein Mädchen singt.", "Jemand singt.", 0),
    ("Ein Mädchen singt.", "Ein Kind singt.", 0),
    ("Ein Mädchen singt.", "Alle schweigen.", 2),
    ("Ein Mädchen singt.", "Es ist still.", 2),
    ("Ein Mädchen singt.", "Sie hat eine Stimme.", 0),
    ("A bus waits.", "A vehicle waits.", 0),
    ("A bus waits.", "Nor did they here.", -1),
]
TRIPLETS = [
    ("A dog runs.", "An animal moves.", ("A dog sleeps.",)),
    ("Ein Mädchen singt.", "Jemand singt.", ("Alle schweigen.",)),
    ("Ein Mädchen singt.", "Ein Kind singt.", ("Es ist still.",)),
    ("Ein Mädchen singt.", "Sie hat eine Stimme.", ("Alle schweigen.",)),
]


def write_nli(data_dir, rows, name="snli", features=None):
    features = features or {"premise": TEXT, "hypothesis": TEXT, "label": class_label(3)}
    rows = [
        {"premise": p.encode(), "hypothesis": h.encode(), "label": label} for p, h, label in rows
    ]
    return write_tfds(data_dir, name, features, rows, {"label": LABELS})


@pytest.mark.parametrize(
    "name", ["snli", "my_nli"]
)  # TFDS has code for the first; the second is only files
def test_tfds_rows_become_triplets(tmp_path, name):
    source = open_source(
        "nli", {"kind": "tfds", "name": name, "data_dir": write_nli(tmp_path, SNLI, name)}
    )
    assert [(r.anchor, r.positive, r.negatives) for r in source] == TRIPLETS
    assert source.max_negatives == 1
    assert name in source[0].where
    assert "A dog runs." in source[0].where


def test_tfds_without_a_triplet_is_an_error(tmp_path):
    premises = {triplet[0] for triplet in TRIPLETS}
    data_dir = write_nli(tmp_path, [row for row in SNLI if row[0] not in premises])
    with pytest.raises(LcoError, match="no premise with an entailment and a contradiction"):
        nli_source("snli", data_dir=data_dir)


def test_tfds_errors_are_one_sentence(tmp_path):
    data_dir = write_nli(tmp_path / "data", SNLI)
    missing = str(tmp_path / "missing")
    for arguments, named in (
        ({"name": "no_such_dataset", "data_dir": data_dir}, "no_such_dataset"),
        ({"name": "snli", "data_dir": missing}, missing),
        ({"name": "snli", "data_dir": data_dir, "split": "tset"}, "tset"),
    ):
        with pytest.raises(LcoError) as error:
            nli_source(**arguments)
        assert named in sentence(error)


@pytest.mark.parametrize("change", ["no label", "label without names"])
def test_a_tfds_dataset_of_another_kind_is_an_error(tmp_path, change):
    features = {"premise": TEXT, "hypothesis": TEXT}
    if change == "label without names":
        features["label"] = NUMBER
    with pytest.raises(LcoError) as error:
        nli_source("my_nli", data_dir=write_nli(tmp_path, SNLI, "my_nli", features))
    assert "label" in sentence(error)
    assert "my_nli" in str(error.value)


def test_tfds_is_read_without_tensorflow_and_torch(tmp_path):
    """A decoy of tensorflow lies on the path, so that an import of it is seen anywhere.

    torch is hidden: transformers imports it wherever it finds it.
    """
    (tmp_path / "decoy" / "tensorflow").mkdir(parents=True)
    (tmp_path / "decoy" / "tensorflow" / "__init__.py").write_text("")
    code = (
        "import sys; sys.modules['torch'] = None; from lco_jax.data.tfds import nli_source; "
        f"source = nli_source('snli', data_dir={write_nli(tmp_path, SNLI)!r}); "
        "print(len(source), 'tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'decoy'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{len(TRIPLETS)} False\n", done.stderr


# ---- TFDS with media

WORDS = ("sports_car", "dog")


IMAGE = image_feature(4, 5, 3)
AUDIO = {
    "pythonClassName": f"{CORE}.audio_feature.Audio",
    "audio": {
        "dtype": "int64",
        "shape": shape(-1),
        "fileFormat": "wav",
        "encoding": "none",
        "sampleRate": "8000",
    },
}
VIDEO = {
    "pythonClassName": f"{CORE}.video_feature.Video",
    "video": {"dtype": "uint8", "shape": shape(-1, 4, 5, 3), "encodingFormat": "png"},
}


def captioned(data_dir, features, rows, name="my_set", **spec):
    """The source of a set that is written for it, with a class label and a text in every row."""
    features = {**features, "label": class_label(2), "colour": TEXT, "count": NUMBER}
    rows = [
        {"label": i % 2, "colour": b"gr\xc3\xbcn", "count": 3 + i, **row}
        for i, row in enumerate(rows)
    ]
    folder = write_tfds(data_dir, name, features, rows, {"label": WORDS})
    return open_source(
        "mine", {"kind": "tfds", "name": name, "data_dir": folder, "caption": "a {label}", **spec}
    )


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)


def test_tfds_images_become_pairs(tmp_path):
    """The image as it is stored: nothing of it is decoded here."""
    stored = [png(pixels) for pixels in pictures(2)] + [b"no image at all"]
    source = captioned(
        tmp_path,
        {"image": IMAGE},
        [{"image": x} for x in stored],
        caption="{count} {colour} {label}s",
    )
    assert (len(source), source.max_negatives, source.skipped) == (3, 0, 0)
    captions = ["3 grün sports cars", "4 grün dogs", "5 grün sports cars"]
    where = [f"tfds:my_set/train, row {i}" for i in range(3)]
    wanted = [
        Record((image(x),), c, (), w) for x, c, w in zip(stored, captions, where, strict=True)
    ]
    assert [source[i] for i in (2, 0, 1)] == [wanted[i] for i in (2, 0, 1)]


def test_tfds_captions_can_be_the_anchor_and_words_be_replaced(tmp_path):
    rows = [{"image": png(pixels)} for pixels in pictures(2)]
    values = {
        "label": {"sports car": "Ferrari", "dog": "poodle"},
        "count": {3: "three", "4": "four"},
    }
    source = captioned(
        tmp_path, {"image": IMAGE}, rows, caption="{count} {label}", values=values, reverse=True
    )
    assert [source[i].anchor for i in range(2)] == ["three Ferrari", "four poodle"]
    assert source[1].positive == (image(rows[1]["image"]),)


@pytest.mark.parametrize(
    ("dtype", "stored", "want"),
    [
        ("int64", [0, 16384, -32768], [0, 0.5, -1]),
        ("int16", [0, 16384, -32768], [0, 0.5, -1]),
        ("int64", [0, 2**30, -(2**31)], [0, 0.5, -1]),
        ("float32", [0.0, 0.5, -1.0], [0, 0.5, -1]),
    ],
)
def test_tfds_audio_becomes_pairs(tmp_path, dtype, stored, want):
    """TFDS builds its Audio with TensorFlow, which is not here."""
    feature = {**AUDIO, "audio": {**AUDIO["audio"], "dtype": dtype}}
    source = captioned(tmp_path, {"speech": feature}, [{"speech": stored}, {"speech": stored[:2]}])
    for index, length in ((0, 3), (1, 2)):
        (part,) = source[index].anchor
        assert part["type"] == "audio"
        assert part["audio"]["sampling_rate"] == 8000
        assert part["audio"]["array"].dtype == np.float32
        assert part["audio"]["array"].tolist() == want[:length]
    assert source[1].positive == "a dog"


def test_tfds_audio_of_two_channels_and_another_rate(tmp_path):
    feature = {**AUDIO, "audio": {**AUDIO["audio"], "shape": shape(-1, 2)}}
    rows = [{"speech": [0, 16384, 32767, -32767, -8192, -8192]}]
    source = captioned(tmp_path, {"speech": feature}, rows, sampling_rate=16000)
    assert source[0].anchor[0]["audio"]["array"].tolist() == [0.25, 0, -0.25]
    assert source[0].anchor[0]["audio"]["sampling_rate"] == 16000


def test_tfds_audio_may_be_stored_as_its_file(tmp_path):
    feature = {**AUDIO, "audio": {**AUDIO["audio"], "lazyDecode": True}}
    source = captioned(tmp_path, {"speech": feature}, [{"speech": b"RIFF..."}])
    assert source[0].anchor == (audio(b"RIFF..."),)


@pytest.mark.parametrize("fps", [None, 2.5])
def test_tfds_video_becomes_pairs(tmp_path, fps):
    frames = pictures(5)
    rows = [
        {"clip": [png(pixels) for pixels in frames[:3]]},
        {"clip": [png(pixels) for pixels in frames[3:]]},
    ]
    source = captioned(tmp_path, {"clip": VIDEO}, rows, fps=fps)
    for index, want in ((0, frames[:3]), (1, frames[3:])):
        (part,) = source[index].anchor
        assert part["type"] == "video"
        assert part["video"].get("fps") == fps
        assert part["video"]["array"].dtype == np.uint8
        assert np.array_equal(part["video"]["array"], want)


def test_tfds_of_several_media_takes_the_one_that_is_named(tmp_path):
    rows = [{"image": png(pictures(1)[0]), "mask": b"not this", "speech": [0]}]
    features = {"image": IMAGE, "mask": IMAGE, "speech": AUDIO}
    source = captioned(tmp_path / "a", features, rows, feature="image")
    assert source[0].anchor == (image(rows[0]["image"]),)
    assert (
        captioned(tmp_path / "b", features, rows, feature="speech")[0].anchor[0]["type"] == "audio"
    )


DEPTH = {**IMAGE, "image": {"dtype": "float32", "shape": shape(4, 5, 1)}}
SILENT = {**AUDIO, "audio": {**AUDIO["audio"], "sampleRate": "0"}}
BAD_CAPTIONED = {  # case -> features, spec, what the message says
    "no field": ({"image": IMAGE}, {"caption": "a {lable}"}, ("'lable'", "colour, count, label")),
    "media as a field": (
        {"image": IMAGE},
        {"caption": "a {image}"},
        ("'image'", "colour, count, label"),
    ),
    "no template": ({"image": IMAGE}, {"caption": "a {label"}, ("'a {label'",)),
    "a number for a template": ({"image": IMAGE}, {"caption": 3}, ("caption 3",)),
    "a position for a field": (
        {"image": IMAGE},
        {"caption": "a {}"},
        ("''", "colour, count, label"),
    ),
    "a wrong format": ({"image": IMAGE}, {"caption": "{label:d}"}, ("row 0", "'{label:d}'")),
    "a wrong item": ({"image": IMAGE}, {"caption": "{colour[x]}"}, ("row 0", "'{colour[x]}'")),
    "an empty caption": ({"image": IMAGE}, {"caption": " "}, ("row 0", "caption is empty")),
    "values of no field": ({"image": IMAGE}, {"values": {"lable": {}}}, ("'lable'",)),
    "values that lack one": (
        {"image": IMAGE},
        {"values": {"label": {"dog": "cat"}}},
        ("row 0", "'sports car'"),
    ),
    "values of no mapping": (
        {"image": IMAGE},
        {"values": {"label": "cat"}},
        ("values.label", "'cat'"),
    ),
    "values that are no mapping": (
        {"image": IMAGE},
        {"values": "cat"},
        ("config.data.sources.mine.values", "'cat'"),
    ),
    "no media": ({}, {}, ("no feature of images, audio or video", "colour, count, label")),
    "several": ({"image": IMAGE, "mask": IMAGE}, {}, ("feature is None", "image, mask")),
    "no such feature": (
        {"image": IMAGE, "mask": IMAGE},
        {"feature": "imag"},
        ("'imag'", "image, mask"),
    ),
    "a feature of no media": ({"image": IMAGE}, {"feature": "label"}, ("'label'", "image")),
    "no sampling rate": ({"speech": SILENT}, {}, ("'speech'", "sampling_rate")),
    "a sampling rate of none": ({"speech": SILENT}, {"sampling_rate": -1}, ("sampling_rate", "-1")),
    "a sampling rate of images": (
        {"image": IMAGE},
        {"sampling_rate": 8000},
        ("sampling_rate", "'image'"),
    ),
    "frames of images": ({"image": IMAGE}, {"fps": 2}, ("fps", "'image'")),
    "images of floats": ({"image": DEPTH}, {}, ("float32", "'image'")),
    "an unknown argument": (
        {"image": IMAGE},
        {"captoin": "a"},
        ("config.data.sources.mine", "'captoin'"),
    ),
}


@pytest.mark.parametrize("case", BAD_CAPTIONED)
def test_a_wrong_source_of_captions_is_an_error(tmp_path, case):
    features, spec, named = BAD_CAPTIONED[case]
    rows = [{key: [0] if key == "speech" else b"" for key in features}]
    with pytest.raises(LcoError) as error:
        captioned(tmp_path, features, rows, **spec)
    assert all(part in sentence(error) for part in named)
    assert "my_set" in str(error.value) or "config.data.sources.mine" in str(error.value)


def test_tfds_rows_that_cannot_be_used_are_named(tmp_path):
    """Nothing but the first row is read when the source is opened."""
    images = [{"image": b"x"}] * 4
    rows = [{}, {"label": -1}, {"colour": b"\xff"}, {"count": 0, "colour": b"red"}]
    source = captioned(
        tmp_path,
        {"image": IMAGE},
        [x | y for x, y in zip(images, rows, strict=True)] + [{}],
        caption="{label} {colour}",
    )
    for index, named in ((1, "has no label"), (2, "cannot be read"), (4, "it has no image")):
        with pytest.raises(LcoError) as error:
            source[index]
        assert f"tfds:my_set/train, row {index}" in sentence(error)
        assert named in str(error.value)


def test_tfds_of_neither_kind_asks_for_a_caption(tmp_path):
    with pytest.raises(LcoError) as error:
        captioned(tmp_path, {"image": IMAGE}, [{"image": b""}], caption=None)
    assert "its features: colour, count, image, label" in sentence(error)
    assert "give a caption" in str(error.value)


# ---- files


def spoken(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_files_become_pairs_by_their_names(tmp_path):
    folder = spoken(tmp_path / "fsdd", "7_theo_0.wav", "0_ann_12.WAV", "notes.txt")
    spec = {
        "kind": "files",
        "glob": f"{folder}/*_*_*",
        "pattern": r"(?P<digit>\d)_(?P<speaker>\w+)_\d+\.(?i:wav)",
        "caption": "the spoken digit {digit}",
        "values": {"digit": {"7": "seven", "0": "zero"}},
    }
    wanted = [
        Record((audio(str(folder / name)),), f"the spoken digit {digit}", (), str(folder / name))
        for name, digit in (("0_ann_12.WAV", "zero"), ("7_theo_0.wav", "seven"))
    ]
    for given in (spec, ConfigDict({**spec, "weight": 2.0})):
        source = open_source("digits", given)
        assert [source[i] for i in range(len(source))] == wanted
        assert (source.skipped, source.max_negatives) == (0, 0)
    reverse = open_source("digits", {**spec, "reverse": True})
    assert (reverse[1].anchor, reverse[1].positive) == (wanted[1].positive, wanted[1].anchor)


def test_folders_can_be_part_of_the_pattern(tmp_path):
    spoken(tmp_path / "train" / "cat", "1.jpg", "2.png")
    spoken(tmp_path / "train" / "sea lion", "1.mp4")
    source = open_source(
        "x",
        {
            "kind": "files",
            "glob": f"{tmp_path}/**",
            "pattern": "(?P<name>[^/]+)/[^/]+",
            "caption": "a {name}",
        },
    )
    assert [record.positive for record in map(source.__getitem__, range(3))] == [
        "a cat",
        "a cat",
        "a sea lion",
    ]
    assert [record.anchor[0]["type"] for record in map(source.__getitem__, range(3))] == [
        "image",
        "image",
        "video",
    ]


def test_files_that_do_not_fit_are_named_or_skipped(tmp_path):
    names = ("1_a.wav", "10_a.wav", "2_a.txt", "3_a.wav", "x.wav")
    spec = {
        "kind": "files",
        "glob": f"{spoken(tmp_path / 'x', *names)}/*",
        "pattern": r"(?P<digit>\d)_\w+\.\w+",  # the tail of 10_a.wav must not pass for a 0
        "caption": "{digit}",
        "values": {"digit": {"1": "one", "2": "two"}},
    }
    bad = {
        "10_a.wav": "does not match",
        "2_a.txt": "no image, video or audio",
        "3_a.wav": "'3'",
        "x.wav": "does not",
    }
    for name, named in bad.items():
        with pytest.raises(LcoError) as error:
            open_source("x", {**spec, "glob": f"{tmp_path}/x/{name}"})
        assert str(tmp_path / "x" / name) in sentence(error)
        assert named in str(error.value)
    source = open_source("x", spec, "skip")
    assert (len(source), source.skipped) == (1, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"glob": "no/such/*.wav"}, "no/such/*.wav holds no usable record"),
        ({"pattern": "(?P<digit"}, "'(?P<digit'"),
        ({"pattern": r"\d\.wav"}, "no field 'digit' for its caption; those there are: none"),
        ({"caption": "{digt}"}, "no field 'digt' for its caption; those there are: digit"),
        ({"values": {"digt": {}}}, "'digt'"),
        ({"patern": "x"}, "'patern'"),
        ({"caption": None}, "'caption'"),
    ],
)
def test_a_wrong_source_of_files_is_named(tmp_path, change, named):
    spec = {
        "kind": "files",
        "glob": f"{spoken(tmp_path, '1.wav')}/*",
        "pattern": r"(?P<digit>\d)\.wav",
        "caption": "{digit}",
    }
    with pytest.raises(LcoError) as error:
        open_source("x", {**spec, **change})
    assert named in sentence(error)


# ---- parquet


def write_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_parquet_file(tmp_path):
    path = write_table(
        tmp_path / "x.parquet", anchor=["a", "b"], positive=["p", "q"], negative=["n", None]
    )
    source = open_source("x", {"kind": "parquet", "path": path})
    assert [record.sides for record in source] == [("a", "p", "n"), ("b", "q")]
    assert source.max_negatives == 1
    assert source[1].where == f"{path}, row 1"


def test_parquet_folder_is_read_in_order_of_name(tmp_path):
    for i in (2, 0, 1):
        write_table(
            tmp_path / f"sub{i}" / f"train-{i}.parquet",
            anchor=[f"a{i}"],
            positive=["p"],
            negative=["n"],
        )
    write_table(
        tmp_path / "sub0" / "test-0.parquet",
        anchor=["not this one"],
        positive=["p"],
        negative=["n"],
    )
    source = open_source(
        "x", {"kind": "parquet", "path": str(tmp_path), "files": "*/train-*.parquet"}
    )
    assert [record.anchor for record in source] == ["a0", "a1", "a2"]
    assert len(open_source("x", {"kind": "parquet", "path": str(tmp_path)})) == 4
    with pytest.raises(LcoError, match=r"holds no file that matches 'dev/\*'"):
        open_source("x", {"kind": "parquet", "path": str(tmp_path), "files": "dev/*"})


def test_parquet_columns_can_be_renamed_and_hold_lists(tmp_path):
    negatives = [["n1", "n2", "n3"], []]
    path = write_table(
        tmp_path / "x.parquet", query=["a", "b"], answer=["p", "q"], hard=negatives, easy=["e", "f"]
    )
    columns = {"anchor": "query", "positive": "answer", "negatives": ["hard", "easy"]}
    for spec in (
        {"kind": "parquet", "path": path, "columns": columns},
        ConfigDict({"kind": "parquet", "path": path, "columns": columns, "weight": 2.0}),
    ):
        source = open_source("x", spec)
        assert [record.sides for record in source] == [
            ("a", "p", "n1", "n2", "n3", "e"),
            ("b", "q", "f"),
        ]
        assert source.max_negatives == 4
    one = open_source(
        "x", {"kind": "parquet", "path": path, "columns": {**columns, "negatives": "hard"}}
    )
    assert one[0].negatives == ("n1", "n2", "n3")
    none = open_source(
        "x", {"kind": "parquet", "path": path, "columns": {**columns, "negatives": []}}
    )
    assert none.max_negatives == 0


def test_parquet_columns_may_hold_sides_of_media(tmp_path):
    """Structs and lists of structs, spelt as in jsonl; None stands where a row has nothing."""
    spoken(tmp_path / "media", "i.png", "j.png", "k.png")
    path = write_table(
        tmp_path / "x.parquet",
        anchor=[{"text": "a", "image_path": "i.png"}, {"text": "b", "image_path": None}],
        positive=[[image("j.png"), text("p")], [text("q")]],
        negative=[[{"image_path": ["k.png"]}], None],
    )
    source = open_source(
        "x", {"kind": "parquet", "path": path, "media_root": str(tmp_path / "media")}
    )
    i, j, k = (image(str(tmp_path / "media" / f"{name}.png")) for name in "ijk")
    assert [record.sides for record in source] == [
        ((i, text("a")), (j, text("p")), (k,)),
        ("b", "q"),
    ]
    with pytest.raises(LcoError) as error:
        open_source("x", {"kind": "parquet", "path": path})
    assert f"{path}, row 0: anchor.image_path: there is no file {tmp_path / 'i.png'}" in sentence(
        error
    )
    assert len(open_source("x", {"kind": "parquet", "path": path, "check_media": False})) == 2


def test_parquet_columns_may_hold_encoded_media(tmp_path):
    path = write_table(
        tmp_path / "x.parquet",
        picture=[{"bytes": b"encoded", "path": "i.png"}, {"bytes": None, "path": "i.png"}],
        caption=["p", "q"],
        sounds=[[b"one", b"two"], None],
    )
    spoken(tmp_path, "i.png")
    columns = {"anchor": "picture", "positive": "caption", "negatives": "sounds"}
    kinds = {"picture": "image", "sounds": "audio"}
    source = open_source(
        "x", {"kind": "parquet", "path": path, "columns": {**columns, "kinds": kinds}}
    )
    assert source[0].sides == ((image(b"encoded"),), "p", (audio(b"one"),), (audio(b"two"),))
    assert source[1].sides == ((image(str(tmp_path / "i.png")),), "q")
    for wrong, named in (({"pictur": "image"}, "'pictur'"), ({"picture": "jpeg"}, "'jpeg'")):
        with pytest.raises(LcoError, match=named):
            open_source(
                "x", {"kind": "parquet", "path": path, "columns": {**columns, "kinds": wrong}}
            )


def test_parquet_with_a_missing_column_is_an_error(tmp_path):
    path = write_table(tmp_path / "x.parquet", anchor=["a"], positve=["p"], negative=["n"])
    with pytest.raises(LcoError) as error:
        parquet_source(path, Columns())
    assert (
        sentence(error)
        == f"{path} has no column 'positive'; its columns: anchor, positve, negative"
    )


def test_parquet_may_have_a_teachers_scores(tmp_path):
    columns = {"anchor": ["a", "b"], "positive": ["p", "q"], "negatives": [["m", "n"], None]}
    scores = [[0.5, 0.25, 0.125], None]
    path = write_table(tmp_path / "x.parquet", **columns, teacher_scores=scores)
    for given in (Columns(), Columns(negatives="negatives")):
        source = parquet_source(path, given)
        assert source.has_teacher
        assert [record.teacher_scores for record in source] == [(0.5, 0.25, 0.125), ()]
    assert not parquet_source(path, Columns(teacher_scores="")).has_teacher
    path = write_table(tmp_path / "y.parquet", **columns, cosines=scores)
    assert not parquet_source(path, Columns()).has_teacher
    columns_of_y = {"teacher_scores": "cosines"}
    source = open_source("x", {"kind": "parquet", "path": path, "columns": columns_of_y})
    assert source[0].teacher_scores == (0.5, 0.25, 0.125)
    path = write_table(tmp_path / "z.parquet", **columns, teacher_score=scores)
    with pytest.raises(LcoError, match="has a column 'teacher_score'; write 'teacher_scores'"):
        parquet_source(path, Columns())
    path = write_table(tmp_path / "w.parquet", **columns, teacher_scores=[[0.5], [0.5]])
    with pytest.raises(LcoError, match=r"w\.parquet, row 0: teacher_scores has 1 numbers"):
        parquet_source(path, Columns())


def test_parquet_needs_no_negatives(tmp_path):
    path = write_table(tmp_path / "x.parquet", anchor=["a"], positive=["p"], other=["o"])
    assert parquet_source(path, Columns())[0].sides == ("a", "p")
    write_table(tmp_path / "y.parquet", anchor=["b"], positive=["q"], negatives=[["n", "m"]])
    both = parquet_source(f"{tmp_path}/*.parquet", Columns())
    assert [record.sides for record in both] == [("a", "p"), ("b", "q", "n", "m")]
    write_table(tmp_path / "z.parquet", anchor=["b"], positive=["q"], Negativ=["n"])
    with pytest.raises(LcoError, match=r"z\.parquet has a column 'Negativ'; write 'negative'"):
        parquet_source(f"{tmp_path}/z.parquet", Columns())
    with pytest.raises(LcoError, match="has no column 'negative'"):
        parquet_source(path, Columns(negatives="negative"))


def test_parquet_bad_rows_are_named_or_skipped(tmp_path):
    path = write_table(
        tmp_path / "x.parquet", anchor=["a", None, "c"], positive=["p", "q", ""], negative=["n"] * 3
    )
    with pytest.raises(LcoError) as error:
        parquet_source(path, Columns())
    assert f"{path}, row 1" in sentence(error)
    source = parquet_source(path, Columns(), on_bad="skip")
    assert len(source) == 1
    assert source.skipped == 2


@pytest.mark.parametrize("damage", ["empty", "footer", "page", "text"])
def test_a_torn_parquet_file_is_an_error(tmp_path, damage):
    words = [f"{i * 7919 % 1000} words {i}" for i in range(1000)]
    path = Path(write_table(tmp_path / "x.parquet", anchor=words, positive=words, negative=words))
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "footer": content[:-5],
            "page": content[:200]
            + b"\xff" * 200
            + content[400:],  # the footer is whole, the data is not
            "text": b'{"anchor": "a"}',
        }[damage]
    )
    with pytest.raises(LcoError) as error:
        parquet_source(str(path), Columns())
    assert str(path) in str(error.value)
    assert "torn" in str(error.value)


def test_parquet_that_is_nowhere_is_an_error(tmp_path):
    for path in (str(tmp_path / "none"), "owner/no-such-dataset"):
        with pytest.raises(LcoError) as error:
            parquet_source(path, Columns())
        assert path in sentence(error)


# ---- open_source


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"kind": "jsonnl", "path": "x"}, "'jsonnl'"),
        ({"path": "x"}, "kind"),
        ({"kind": "jsonl", "pth": "x"}, "'pth'"),
        ({"kind": "jsonl"}, "'path'"),
        ({"kind": "jsonl", "path": "x", "columns": {"anchor": "y"}}, "'columns'"),
        ({"kind": "jsonl", "path": "x", "media": "y"}, "'media'"),
        ({"kind": "tfds", "path": "x"}, "'path'"),
        ({"kind": "tfds", "name": "x", "feature": "image"}, "'feature'"),
        ({"kind": "parquet", "path": "x", "columns": {"anchr": "y"}}, "'anchr'"),
        ({"kind": "parquet", "path": "x", "columns": "anchor"}, "columns"),
        ("x.jsonl", "kind"),
    ],
)
def test_a_wrong_source_is_named(spec, named):
    with pytest.raises(LcoError) as error:
        open_source("mine", spec)
    assert "config.data.sources.mine" in sentence(error)
    assert named in str(error.value)


def test_on_bad_is_error_or_skip():
    with pytest.raises(LcoError, match="'ignore'; it is one of: error, skip"):
        open_source("x", {"kind": "jsonl", "path": "assets:triplets_train.jsonl"}, "ignore")


def test_there_must_be_a_source():
    with pytest.raises(LcoError, match=r"config\.data\.sources is empty"):
        open_sources({"sources": {}, "on_bad": "error"})


def test_other_keys_are_counted_and_null_is_no_negative(tmp_path, caplog):
    records = [
        {"anchor": f"a{i}", "positive": "p", "negative": [None, f"n{i}", None], "id": i, "url": ""}
        for i in range(3)
    ]
    del records[0]["url"]
    source = JsonlSource(write_jsonl(tmp_path / "data.jsonl", *records))
    assert [record.negatives for record in source] == [("n0",), ("n1",), ("n2",)]
    assert "keys of records that are ignored: 'id' 3, 'url' 2" in caplog.text
    for slip in ("negativ", "Positive", "anchors"):
        with pytest.raises(LcoError, match=f"the record has '{slip}'; write"):
            parse_record({"anchor": "a", "positive": "p", slip: "n"}, "here")
    assert parse_record({"anchor": "a", "positive": "p", "positive_id": 3}, "").ignored == (
        "positive_id",
    )


def test_jsonl_may_be_packed_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LCO_JAX_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"anchor": f"é{i}", "positive": f"p{i}"}) + "\n" for i in range(5)]
    (tmp_path / "b.jsonl").write_text("".join(lines[2:]), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write("".join(lines[:2]).encode())
    for path in ("*.jsonl*", "**/*.jsonl*"):
        source = open_source("s", {"kind": "jsonl", "path": str(tmp_path / path)})
        assert [source[i].anchor for i in (4, 0, 3, 1, 2)] == ["é4", "é0", "é3", "é1", "é2"]
        assert source[1].where == f"{tmp_path / 'a.jsonl.gz'}:2"
    with pytest.raises(LcoError, match="matches no file"):
        JsonlSource(tmp_path / "x*.jsonl")
    content = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-12])
    with pytest.raises(LcoError, match="is torn or not packed by gzip"):
        JsonlSource(tmp_path / "a.jsonl.gz")
