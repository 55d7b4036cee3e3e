"""Mining: every rule against all cosines, the search against a plain sort, files and kills."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from lco_jax import OmniEmbedder, mine
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.sentence_transformers import Usage, write_usage
from lco_jax.core.errors import LcoError
from lco_jax.core.files import ASSETS
from lco_jax.data.instructions import Instructions
from lco_jax.data.sources import open_file
from lco_jax.mining import nearest
from lco_jax.mining.contents import Lines, number_contents
from lco_jax.mining.miner import LineForm, Miner
from lco_jax.mining.nearest import Candidates, Excluded
from lco_jax.mining.output import MinedLines
from lco_jax.mining.report import Report
from lco_jax.mining.rules import MARGIN, RATIO, SKIPPED, Rules, choose, highest

PLAIN = Rules(2, 100, 0, 0.95, None, False, 0)


@pytest.fixture
def run_mine(monkeypatch, run_command, load):
    """`mine`, which loads a checkpoint once a session."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    return functools.partial(run_command, mine)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def pairs(count, seed=0):
    """Records of random words; some share anchors, positives and negatives."""
    random = np.random.default_rng(seed)
    words = [
        "red",
        "green",
        "blue",
        "one",
        "two",
        "many",
        "cats",
        "dogs",
        "birds",
        "run",
        "sleep",
        "sing",
        "here",
        "there",
    ]

    def text():
        return " ".join(random.choice(words, 3))

    records = []
    for number in range(count):
        record = {"anchor": text(), "positive": text()}
        if number % 3 == 0:
            record["negative"] = text()
        records.append(record)
    records[-1] = {**records[0], "positive": text()}  # a second positive of one anchor
    return records


def negatives_of(record):
    return [record["negative"]] if "negative" in record else []


def brute_force(records, vector, rules, keeps=False):
    """The negatives of each record, by all cosines and nested loops."""
    candidates = []
    for record in records:
        for text in (record["positive"], *negatives_of(record)):
            if text not in candidates:
                candidates.append(text)
    found = []
    for record in records:
        anchor = record["anchor"]
        own = {anchor}
        own |= {one["positive"] for one in records if one["anchor"] == anchor}
        own |= {one["anchor"] for one in records if one["positive"] == anchor}

        def score(text, anchor=anchor):
            return np.float32(vector[anchor].astype(np.float64) @ vector[text].astype(np.float64))

        others = [text for text in candidates if text not in own]
        ranked = sorted(others, key=lambda text: -score(text))[: rules.range]
        given = negatives_of(record) if keeps else []
        ranked = [text for text in ranked if text not in given][rules.skip_top :]
        positive = float(score(record["positive"]))
        left = [text for text in ranked if float(score(text)) < highest(positive, rules.max_ratio)]
        if rules.margin is not None:
            left = [text for text in left if float(score(text)) <= positive - rules.margin]
        found.append(given + left[: rules.negatives])
    return found


def not_nearest(records, vector):
    """How many positives some other candidate, also a record's own negative, scores as high as."""
    count = 0
    for record in records:
        anchor = vector[record["anchor"]].astype(np.float64)
        own = {record["anchor"]}
        own |= {one["positive"] for one in records if one["anchor"] == record["anchor"]}
        own |= {one["anchor"] for one in records if one["positive"] == record["anchor"]}
        texts = {text for one in records for text in (one["positive"], *negatives_of(one))}
        best = max(np.float32(anchor @ vector[text].astype(np.float64)) for text in texts - own)
        count += best >= np.float32(anchor @ vector[record["positive"]].astype(np.float64))
    return count


# ---- the rules


def test_each_rule_drops_what_it_names():
    scores = np.array([0.9, 0.8, 0.76, 0.5, 0.2, -np.inf], np.float32)
    found = choose(scores, 0.8, Rules(5, 6, 1, 0.95, 0.2, False, 0), 0)
    assert np.flatnonzero(found.dropped[SKIPPED]).tolist() == [0]
    assert np.flatnonzero(found.dropped[RATIO]).tolist() == [1]  # 0.76 is 95 % in float64: less
    assert np.flatnonzero(found.dropped[MARGIN]).tolist() == [2]
    assert found.chosen.tolist() == [3, 4]


def test_the_ratio_drops_what_scores_as_much():
    """A score of exactly the bound is dropped, one of exactly the margin is not."""
    scores = np.array([0.5, 0.25, 0.125], np.float32)
    assert choose(scores, 0.5, Rules(9, 3, 0, 0.5, None, False, 0), 0).chosen.tolist() == [2]
    assert choose(scores, 0.5, Rules(9, 3, 0, None, 0.25, False, 0), 0).chosen.tolist() == [1, 2]
    assert choose(scores, 0.5, Rules(9, 3, 0, None, None, False, 0), 0).chosen.tolist() == [0, 1, 2]


@pytest.mark.parametrize("positive", [0.5, 0.0, -0.4])
def test_a_ratio_never_keeps_what_scores_above_the_positive(positive):
    bound = highest(positive, 0.95)
    assert bound <= positive
    assert bound == pytest.approx(positive - 0.05 * abs(positive))


def test_drawn_negatives_are_of_those_left_and_depend_on_the_record_alone():
    scores = np.linspace(0.9, 0.1, 50).astype(np.float32)
    rules = Rules(4, 50, 10, 0.95, None, True, 3)
    drawn = [choose(scores, 0.8, rules, record).chosen.tolist() for record in range(20)]
    assert drawn == [choose(scores, 0.8, rules, record).chosen.tolist() for record in range(20)]
    assert len(set(map(tuple, drawn))) > 10
    assert all(len(set(one)) == 4 and min(one) >= 10 and one == sorted(one) for one in drawn)
    other = choose(scores, 0.8, replace(rules, seed=4), 0)
    assert other.chosen.tolist() != drawn[0]


# ---- the search


@pytest.mark.parametrize("block", [256, 512, nearest.CANDIDATES])
def test_the_search_is_a_sort_of_all_cosines(monkeypatch, block):
    """Any blocks give the same; equal vectors come in the order of the corpus."""
    monkeypatch.setattr(nearest, "CANDIDATES", block)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1300, 24)).astype(np.float32)
    vectors[600:900] = vectors[:300]  # ties
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = np.nan
    numbers = np.flatnonzero(random.random(1300) < 0.9).astype(np.int32)
    candidates = Candidates(vectors, numbers)
    anchors = vectors[1000:1130]
    places = np.array([[3, 700], [9, 2], [9, 1000]], np.int32)
    left_out = Excluded(places[:, 0], places[:, 1])
    found = candidates.nearest(anchors, left_out, 50)
    scores = nearest.exact(anchors[:, None], vectors[numbers][None])
    scores[places[:, 0], places[:, 1]] = -np.inf
    scores[:, numbers == 7] = -np.inf
    want = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    np.testing.assert_array_equal(found.places, want)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, want, axis=1))


def test_an_anchor_finds_the_same_alone():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(700, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    candidates = Candidates(vectors, np.arange(700, dtype=np.int32))
    none = Excluded(np.zeros(0, np.int32), np.zeros(0, np.int32))
    together = candidates.nearest(vectors[:300], none, 20)
    alone = candidates.nearest(vectors[299:300], none, 20)
    np.testing.assert_array_equal(together.places[299:], alone.places)
    np.testing.assert_array_equal(together.scores[299:], alone.scores)


def test_fewer_candidates_than_asked_for():
    vectors = np.eye(4, dtype=np.float32)
    left_out = Excluded(np.array([0], np.int32), np.array([0], np.int32))
    found = Candidates(vectors, np.arange(4, dtype=np.int32)).nearest(vectors[:1], left_out, 100)
    assert found.places.tolist() == [[1, 2, 3, -1]]
    assert found.scores.tolist() == [[0, 0, 0, -np.inf]]


# ---- the command


@pytest.mark.parametrize(
    ("flags", "rules", "keeps"),
    [
        (["--negatives=2"], PLAIN, False),
        (["--negatives=3", "--margin=0.02"], Rules(3, 100, 0, None, 0.02, False, 0), False),
        (
            ["--negatives=2", "--range=9", "--skip-top=4", "--max-ratio=off", "--keep-given"],
            Rules(2, 9, 4, None, None, False, 0),
            True,
        ),
    ],
)
def test_mined_records_are_those_of_a_plain_search(tmp_path, run_mine, tiny, flags, rules, keeps):
    records = pairs(60)
    output = tmp_path / "mined.jsonl"
    flags = [*flags, "--scores"]
    status, out, _ = run_mine(
        f"--input={write(tmp_path / 'pairs.jsonl', records)}", f"--output={output}", *flags
    )
    assert status == 0
    texts = sorted({text for record in records for text in record.values()})
    contents = [
        json.loads(line) for line in (tmp_path / "mined.jsonl.vectors" / mine.CONTENTS).open()
    ]
    assert sorted(contents) == texts
    vectors = np.load(tmp_path / "mined.jsonl.vectors" / mine.VECTORS)
    np.testing.assert_allclose(vectors, tiny.encode([{"text": one} for one in contents]), atol=1e-5)
    vector = dict(zip(contents, vectors, strict=True))
    found = lines_of(output)
    assert [one.get("negatives", []) for one in found] == brute_force(records, vector, rules, keeps)
    source = open_file(output)  # as training reads it
    for given, line, record in zip(records, found, source, strict=True):
        assert (record.anchor, record.positive) == (given["anchor"], given["positive"])
        want = [float(vector[record.anchor] @ vector[one]) for one in record.sides[1:]]
        np.testing.assert_allclose(line["teacher_scores"], want, atol=1e-5)
    report = json.loads((tmp_path / "mined.report.json").read_text())
    assert report["records"] == 60
    assert report["candidates"] == len(
        {one["positive"] for one in records}
        | {one["negative"] for one in records if "negative" in one}
    )
    assert report["with fewer"] == sum(
        len(one.get("negatives", [])) - (keeps and "negative" in given) < rules.negatives
        for one, given in zip(found, records, strict=True)
    )
    assert report["positive is not nearest"] == not_nearest(records, vector)
    assert (tmp_path / "mined.report.png").stat().st_size
    assert "negatives written" in out


def test_resumed_is_as_uninterrupted(tmp_path, run_mine, monkeypatch):
    monkeypatch.setattr(mine, "ANCHORS", 16)
    source = write(tmp_path / "pairs.jsonl", pairs(60))
    flags = [f"--input={source}", "--negatives=3", "--sample", f"--vectors={tmp_path / 'v'}"]
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert run_mine(*flags, f"--output={whole}")[0] == 0
    add, calls = MinedLines.add, []

    def ended(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MinedLines, "add", ended)
        status, _, err = run_mine(*flags, f"--output={resumed}")
    assert status == 130
    assert "32 of 60 records are kept" in err
    assert not resumed.exists()
    folder = tmp_path / "resumed.jsonl.partial"
    with (folder / "lines.jsonl").open("a") as file:
        file.write('{"anchor": "torn')  # what a kill may leave
    status, _, err = run_mine(*flags[:1], "--negatives=2", *flags[3:], f"--output={resumed}")
    assert status == 2
    assert "--negatives was 3 and is 2" in err
    assert run_mine(*flags, f"--output={resumed}")[0] == 0
    assert resumed.read_bytes() == whole.read_bytes()
    assert not folder.exists()
    reports = [json.loads(one.with_suffix(".report.json").read_text()) for one in (whole, resumed)]
    assert reports[0].pop("output")
    assert reports[1].pop("output")
    assert reports[0] == reports[1]
    status, out, _ = run_mine(*flags, f"--output={resumed}")
    assert status == 0
    assert "is complete" in out


def test_other_rules_embed_nothing_again(tmp_path, run_mine):
    source = write(tmp_path / "pairs.jsonl", pairs(20))
    flags = [f"--input={source}", f"--output={tmp_path / 'm.jsonl'}"]
    assert run_mine(*flags)[0] == 0
    made = (tmp_path / "m.jsonl.vectors" / mine.VECTORS).stat().st_mtime_ns
    status, out, _ = run_mine(*flags, "--max-ratio=0.8")
    assert status == 0
    assert "is complete: this very command has made its" in out
    assert (tmp_path / "m.jsonl.vectors" / mine.VECTORS).stat().st_mtime_ns == made


def test_media_resolve_from_the_new_file_and_equal_files_are_one(tmp_path, run_mine):
    """Pictures in a folder below the output get relative names, others absolute ones."""
    random = np.random.default_rng(0)
    for name in ("in/a.png", "in/b.png", "out/c.png", "elsewhere/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (28, 28, 3), np.uint8)).save(path)
    shutil.copy(tmp_path / "in/a.png", tmp_path / "in/copy.png")
    records = [
        {"anchor": "one", "positive": {"image_path": "a.png"}},
        {"anchor": "one", "positive": {"image_path": "copy.png", "text": "with words"}},
        {"anchor": "two", "positive": {"image": "../out/c.png"}},
        {"anchor": {"image": "b.png", "text": "three"}, "positive": "words"},
        {"anchor": "four", "positive": {"image": "copy.png"}},
        {
            "anchor": "five",
            "positive": [{"type": "text", "text": "x"}, {"type": "image", "image": "b.png"}],
        },
    ]
    source, output = write(tmp_path / "in/pairs.jsonl", records), tmp_path / "out/mined.jsonl"
    flags = [f"--input={source}", f"--output={output}", "--negatives=9", "--max-ratio=off"]
    assert run_mine(*flags)[0] == 0
    found = lines_of(output)
    assert found[2]["positive"] == {"image": "c.png"}
    assert found[0]["positive"] == {"image": str(tmp_path / "in/a.png")}
    assert found[4]["positive"] == found[0]["positive"]  # its copy is the same content
    assert found[3]["anchor"] == {"image": str(tmp_path / "in/b.png"), "text": "three"}
    assert [part["type"] for part in found[5]["positive"]] == ["text", "image"]
    own = [found[0]["positive"], found[1]["positive"]]
    assert all(one not in own for one in found[0]["negatives"])
    assert {"image": "c.png"} in found[0]["negatives"]
    assert "words" in found[0]["negatives"]
    mined = open_file(output)
    assert len(mined) == 6
    assert len(mined[0].negatives) == 3


def test_a_corpus_gives_the_candidates(tmp_path, run_mine):
    source = write(tmp_path / "pairs.jsonl", pairs(10))
    (tmp_path / "corpus.txt").write_text("blue birds sing\nmany cats sleep\nblue birds sing\n")
    output = tmp_path / "m.jsonl"
    flags = [f"--input={source}", f"--output={output}", "--max-ratio=off", "--negatives=5"]
    status, _, _ = run_mine(*flags, f"--corpus={tmp_path / 'corpus.txt'}")
    assert status == 0
    assert {text for one in lines_of(output) for text in one["negatives"]} == {
        "blue birds sing",
        "many cats sleep",
    }
    chat = write(tmp_path / "chat.jsonl", [[{"role": "user", "content": "x"}]])
    status, _, err = run_mine(*flags, f"--corpus={chat}", f"--vectors={tmp_path / 'other'}")
    assert status == 2
    assert "chat.jsonl:1 is a chat" in err


def test_what_cannot_be_read_is_left_out_or_named(tmp_path, run_mine):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    records = [*pairs(8), {"anchor": "x", "positive": {"image_path": "bad.png"}}]
    source, output = write(tmp_path / "pairs.jsonl", records), tmp_path / "m.jsonl"
    flags = [f"--input={source}", f"--output={output}"]
    status, _, err = run_mine(*flags)
    assert status == 2
    assert "pairs.jsonl:9" in err
    assert not output.exists()
    status, _out, _ = run_mine(*flags, "--on-error=skip", f"--vectors={tmp_path / 'v'}")
    assert status == 0
    assert len(lines_of(output)) == 8
    assert json.loads((tmp_path / "m.report.json").read_text())["left out"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--negatives=0"], "--negatives=0: it must be at least 1"),
        (["--max-ratio=2"], "--max-ratio=2.0: it must be above 0 and at most 1, or off"),
        (["--max-ratio=much"], "--max-ratio=much: give a number, or off"),
        (["--margin=3"], "--margin=3.0: it must be from -2 to 2"),
        (
            ["--range=5", "--skip-top=5"],
            "--range=5: it must be at least --skip-top and --negatives",
        ),
        (["--output=x.parquet"], "give a file that ends in .jsonl"),
        (["--actors=2"], "--actors and --actor-resources go with --ray"),
        (["--input=none.jsonl"], "none.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, run_mine, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", pairs(4))
    status, _, err = run_mine("--input=pairs.jsonl", "--output=m.jsonl", *flags)
    assert status == 2
    assert words in err.splitlines()[-1]
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt-name=none"], "--prompt-name=none: the model has the prompts"),
        (["--actors=2"], "--actors and --actor-resources go with --ray"),
        (["--batch-size=0"], "--batch-size=0: it must be at least 1"),
    ],
)
def test_flags_are_checked_before_records_are_read(tmp_path, run_mine, flags, words):
    source = tmp_path / "pairs.jsonl"
    source.write_text("no record", encoding="utf-8")
    status, _, err = run_mine(f"--input={source}", f"--output={tmp_path / 'm.jsonl'}", *flags)
    assert status == 2
    assert words in err.splitlines()[-1]
    assert not (tmp_path / "m.jsonl.vectors").exists()


def test_media_without_files_are_refused(tmp_path, run_mine):
    picture = pa.array([{"bytes": b"x", "path": None}])
    table = pa.table({"anchor": ["a"], "positive": picture})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    spec = {"kind": "parquet", "path": str(tmp_path / "p.parquet")}
    source = tmp_path / "source.json"
    source.write_text(json.dumps({**spec, "columns": {"kinds": {"positive": "image"}}}))
    status, _, err = run_mine(f"--input={source}", f"--output={tmp_path / 'm.jsonl'}")
    assert status == 2
    assert "row 0: its image has no file of its own" in err


def test_contents_are_numbered_as_they_come(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        [
            {"anchor": "a", "positive": "b", "negative": ["c", "a"]},
            {"anchor": "b", "positive": "a"},
        ],
    )
    numbers = number_contents(open_file(source), None, tmp_path / "contents.jsonl")
    assert numbers.anchors.tolist() == [0, 1]
    assert numbers.positives.tolist() == [1, 0]
    assert numbers.negatives_of(0).tolist() == [2, 0]
    assert numbers.negatives_of(1).tolist() == []
    assert numbers.candidates.tolist() == [0, 1, 2]
    assert [Lines(tmp_path / "contents.jsonl")[number] for number in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize("keeps_given", [False, True])
def test_a_given_negative_may_be_nearer_than_the_positive(tmp_path, keeps_given):
    record = {"anchor": "a", "positive": "b", "negative": "c"}
    source, contents = write(tmp_path / "p.jsonl", [record]), tmp_path / "contents.jsonl"
    numbers = number_contents(open_file(source), None, contents)
    vectors = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    form, report = LineForm(str(tmp_path), keeps_given, False), Report()
    (line,) = Miner(numbers, vectors, Lines(contents), PLAIN, form).lines(0, 1, report)
    assert line.get("negatives") == (["c"] if keeps_given else None)
    assert report.counts["positive is not nearest"] == 1


def test_changed_negatives_are_other_work(tmp_path):
    """Also where the contents and the candidates stay the same."""
    digests = set()
    for negative in ("c", "d"):
        records = [
            {"anchor": "c", "positive": "d"},
            {"anchor": "d", "positive": "c"},
            {"anchor": "a", "positive": "b", "negative": negative},
        ]
        source = open_file(write(tmp_path / "p.jsonl", records))
        digests.add(number_contents(source, None, tmp_path / "contents.jsonl").digest)
    assert len(digests) == 2


@pytest.mark.parametrize("lines", ["", '[""]\n'])
def test_a_corpus_of_nothing_is_named_before_anything_is_embedded(tmp_path, run_mine, lines):
    source = write(tmp_path / "pairs.jsonl", pairs(4))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(lines)
    flags = [f"--input={source}", f"--output={tmp_path / 'm.jsonl'}", "--on-error=skip"]
    status, _, err = run_mine(*flags, f"--corpus={corpus}")
    assert status == 2
    assert f"--corpus={corpus} holds nothing that may become a negative" in err.splitlines()[-1]
    assert not (tmp_path / "m.jsonl.vectors" / mine.CONTENTS).exists()


def test_a_relative_folder_of_media_is_a_corpus(tmp_path, run_mine, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save("pictures/a.png")
    write(Path("pairs.jsonl"), pairs(4))
    flags = ["--input=pairs.jsonl", "--output=out/m.jsonl", "--max-ratio=off"]
    assert run_mine(*flags, "--corpus=pictures")[0] == 0
    picture = {"image": str(tmp_path / "pictures/a.png")}
    assert [one["negatives"] for one in lines_of(Path("out/m.jsonl"))] == [[picture]] * 4


@pytest.mark.parametrize(
    ("output", "flags", "words"),
    [
        ("pairs.jsonl", [], "--output=pairs.jsonl is a file of --input=pairs.jsonl"),
        ("link.jsonl", [], "--output=link.jsonl is a file of --input=pairs.jsonl"),
        ("folder/x.jsonl", ["--input=folder"], "is a file of --input=folder"),
        ("folder/x.jsonl", ["--corpus=folder/*.jsonl"], "is a file of --corpus=folder/*.jsonl"),
        ("folder/x.jsonl", [], "no report beside it says that lco mine wrote it as it is"),
        ("m.jsonl", [], "m.report.json exists and lco mine did not write it"),
    ],
)
def test_what_is_not_ours_is_not_replaced(tmp_path, run_mine, monkeypatch, output, flags, words):
    monkeypatch.chdir(tmp_path)
    source = write(Path("pairs.jsonl"), pairs(4))
    Path("link.jsonl").symlink_to(source)
    Path("folder").mkdir()
    shutil.copy(source, "folder/x.jsonl")
    Path("m.report.json").write_text("{}")
    before = source.read_bytes()
    status, _, err = run_mine("--input=pairs.jsonl", f"--output={output}", *flags)
    assert status == 2
    assert words in err.splitlines()[-1]
    assert source.read_bytes() == Path("folder/x.jsonl").read_bytes() == before


def test_an_output_that_was_changed_is_not_replaced(tmp_path, run_mine):
    source, output = write(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "m.jsonl"
    flags = [f"--input={source}", f"--output={output}"]
    assert run_mine(*flags)[0] == 0
    output.write_text(output.read_text() + "\n")
    status, _, err = run_mine(*flags)
    assert status == 2
    assert "give another --output, or remove it" in err


def test_a_model_of_two_prompts_is_mined_with_one_that_is_named(tmp_path, run_mine, cache):
    checkpoint = open_checkpoint("builtin:tiny")
    folder = shutil.copytree(checkpoint.folder, tmp_path / "model")
    prompts = {"query": "Find: ", "document": "Read: "}
    usage = Usage("last", Instructions(prompts, "before", "document"))
    write_usage(folder, usage, checkpoint.config.hidden_size)
    source, output = write(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "m.jsonl"
    flags = [f"--input={source}", f"--output={output}", f"--model={folder}"]
    status, _, err = run_mine(*flags)
    assert status == 2
    assert "the prompt 'Find: ' for queries and 'Read: ' for documents" in err.splitlines()[-1]
    assert "give --prompt-name=NAME to use one prompt for all" in err
    assert not output.with_name("m.jsonl.vectors").exists()
    assert run_mine(*flags, "--prompt-name=document")[0] == 0
    assert len(lines_of(output)) == 4


def test_a_folder_of_vectors_is_of_one_process(tmp_path, run_mine):
    source, folder = write(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "v"
    folder.mkdir()
    flags = [f"--input={source}", f"--output={tmp_path / 'm.jsonl'}", f"--vectors={folder}"]
    with filelock.FileLock(folder / "_lock"):
        status, _, err = run_mine(*flags)
    assert status == 2
    assert f"another process works in --vectors={folder}" in err.splitlines()[-1]
    assert not (folder / mine.CONTENTS).exists()
    assert run_mine(*flags)[0] == 0


def test_errors_of_embedding_name_the_folder_of_vectors(tmp_path, run_mine):
    source, partial = write(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "v/vectors.npy.partial"
    partial.mkdir(parents=True)
    flags = [f"--input={source}", f"--output={tmp_path / 'm.jsonl'}", f"--vectors={tmp_path / 'v'}"]
    with filelock.FileLock(partial / "_lock"):
        status, _, err = run_mine(*flags)
    assert status == 2
    assert f"another process writes --vectors={tmp_path / 'v' / mine.VECTORS}" in err
    (partial / "strange").touch()
    status, _, err = run_mine(*flags)
    assert status == 2
    assert "strange and nothing that says what it is; give another --vectors" in err


def test_a_second_process_is_refused(tmp_path):
    with (
        MinedLines(tmp_path / "m.jsonl", {}),
        pytest.raises(LcoError, match="another process writes"),
        MinedLines(tmp_path / "m.jsonl", {}),
    ):
        pass
    assert not Path(f"{tmp_path / 'm.jsonl'}.partial").exists()


def test_a_report_goes_on_where_it_was():
    def filled(report, records):
        for record in records:
            scores = np.random.default_rng(record).uniform(-1, 1, 9).astype(np.float32)
            choice = choose(-np.sort(-scores), 0.3, PLAIN, record)
            report.add(-np.sort(-scores), 0.3, False, choice, PLAIN)
        return report

    whole = filled(Report(), range(20))
    half = json.loads(json.dumps(filled(Report(), range(10)).state))
    assert filled(Report(half), range(10, 20)).state == whole.state
    bins = whole.state["scores"]["negatives"]["bins"]
    assert sum(bins) == whole.counts["negatives"]


@pytest.mark.slow
def test_the_documented_loop_runs(tmp_path):
    """docs/mining.md, word for word, on the first records and for two steps."""
    page = (Path(__file__).parent.parent / "docs" / "mining.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for name in ("train", "text", "image", "audio"):
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = (ASSETS / "lab" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines[:64]))
    (tmp_path / "data" / "media").symlink_to(ASSETS / "lab" / "media")
    _, commands = block.split("\n", 1)  # the first line says where the data are
    few = (
        "train --config.train.steps=2 --config.train.batch_size=8 --config.optimizer.warmup_steps=1"
    )
    commands = commands.replace("lco train", f"lco {few}").replace("$data", "data")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    shell = ["bash", "-euc", commands]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(open_file(tmp_path / "mined.jsonl")) == 64
    results = json.loads((tmp_path / "runs/second/results.json").read_text())
    assert set(results["after"]) == {"text", "image", "audio"}
