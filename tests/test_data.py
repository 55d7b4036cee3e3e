"""Records, sources, the batches made of them and their packing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import reference
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint import builtin
from lco_jax.core.packing import bucket, fill_rows, place
from lco_jax.data import pipeline
from lco_jax.data.pipeline import Layout, local_batches, record_stream
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.data.records import Record, parse_record
from lco_jax.data.sources import Columns, JsonlSource, ListSource, nli_source, open_source, parquet_source

ROOT = Path(__file__).parents[1]
LAYOUT = Layout(batch_size=8, row_length=128, max_negatives=2)


@pytest.fixture(scope="module")
def tokenizer(cache):
    return ChatTokenizer(builtin.build())


def sentence(error):
    """The message of an LcoError, which must be one line and no fragment."""
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(":")
    return text


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
    assert record.texts == ("a", "p", *negatives)


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
    '{"anchor": {"text": "a", "image_path": "x.jpg"}, "positive": "p"}': "image_path",
    '{"anchor": "a", "positive": "p", "negative": [{"audio_path": "x.wav"}]}': "audio_path",
    '{"anchor": "a", "positive": "p", "negative": {"video_path": "x.mp4"}}': "video_path",
    '{"anchor": 3, "positive": "p"}': "anchor must be",
    '{"anchor": null, "positive": "p"}': "anchor must be",
    '{"anchor": "a", "positive": {"text": 3}}': "positive.text",
    '{"anchor": "a", "positive": "p", "negative": [["n"]]}': "negative must be",
    '{"anchor": "a", "positive": "p", "negative": [null]}': "negative must be",
}


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
    """A lone surrogate is valid JSON, and the tokenizer cannot take it: the scan must find it, not step 7000."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"anchor": "' + anchor + b'", "positive": "p"}\n')
    with pytest.raises(LcoError, match=r"data\.jsonl:1: "):
        tokenizer([as_messages(text, "") for text in JsonlSource(path)[0].texts])


def test_bad_records_can_be_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    good = [{"anchor": f"é{i}今", "positive": f"p{i}", "negative": ["n"] * i} for i in range(3)]
    lines = [json.dumps(content, ensure_ascii=False) for content in good]
    bad = list(BAD_RECORDS)
    path.write_text("\n".join([bad[0], lines[0], "", bad[3], bad[5], lines[1], lines[2]]), encoding="utf-8")
    source = JsonlSource(path, on_bad="skip")
    assert source.skipped == 3
    assert source.max_negatives == 2
    assert [record.anchor for record in (source[2], source[0], source[1])] == ["é2今", "é0今", "é1今"]
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
    """What TFDS's own `builder.download_and_prepare(file_format="array_record")` leaves, without TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / name / "1.1.0"
    folder.mkdir(parents=True)
    core = "tensorflow_datasets.core.features"
    text = {"pythonClassName": f"{core}.text_feature.Text", "text": {}}
    label = {"pythonClassName": f"{core}.class_label_feature.ClassLabel", "classLabel": {"numClasses": "3"}}
    features = features or {"premise": text, "hypothesis": text, "label": label}
    content = {"pythonClassName": f"{core}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(content))
    (folder / "label.labels.txt").write_text("\n".join(LABELS) + "\n")
    serialized = []
    for premise, hypothesis, label_index in rows:
        example = tf_example_pb2.Example()
        example.features.feature["premise"].bytes_list.value.append(premise.encode())
        example.features.feature["hypothesis"].bytes_list.value.append(hypothesis.encode())
        example.features.feature["label"].int64_list.value.append(label_index)
        serialized.append(example.SerializeToString())
    writer = ArrayRecordWriter(str(folder / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for record in serialized:
        writer.write(record)
    writer.close()
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "shardLengths": [str(len(rows))],
        "numBytes": str(sum(map(len, serialized))),
    }
    info = {
        "name": name,
        "version": "1.1.0",
        "fileFormat": "array_record",
        "splits": [split],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(data_dir)


@pytest.mark.parametrize("name", ["snli", "my_nli"])  # TFDS has code for the first; the second is only files
def test_tfds_rows_become_triplets(tmp_path, name):
    source = open_source("nli", {"kind": "tfds", "name": name, "data_dir": write_nli(tmp_path, SNLI, name)})
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
    core = "tensorflow_datasets.core.features"
    features = {
        name: {"pythonClassName": f"{core}.text_feature.Text", "text": {}} for name in ("premise", "hypothesis")
    }
    if change == "label without names":
        shape = {"shape": {}, "dtype": "int64", "encoding": "none"}
        features["label"] = {"pythonClassName": f"{core}.scalar.Scalar", "tensor": shape}
    with pytest.raises(LcoError) as error:
        nli_source("my_nli", data_dir=write_nli(tmp_path, SNLI, "my_nli", features))
    assert "label" in sentence(error)
    assert "my_nli" in str(error.value)


def test_tfds_is_read_without_tensorflow_and_torch(tmp_path):
    """A decoy of tensorflow lies on the path, so that an import of it is seen even where it is not installed.

    torch is hidden: transformers imports it wherever it finds it.
    """
    (tmp_path / "decoy" / "tensorflow").mkdir(parents=True)
    (tmp_path / "decoy" / "tensorflow" / "__init__.py").write_text("")
    code = (
        "import sys; sys.modules['torch'] = None; from lco_jax.data.sources import nli_source; "
        f"print(len(nli_source('snli', data_dir={write_nli(tmp_path, SNLI)!r})), 'tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'decoy'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(TRIPLETS)} False\n", done.stderr


# ---- parquet


def write_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_parquet_file(tmp_path):
    path = write_table(tmp_path / "x.parquet", anchor=["a", "b"], positive=["p", "q"], negative=["n", None])
    source = open_source("x", {"kind": "parquet", "path": path})
    assert [record.texts for record in source] == [("a", "p", "n"), ("b", "q")]
    assert source.max_negatives == 1
    assert source[1].where == f"{path}, row 1"


def test_parquet_folder_is_read_in_order_of_name(tmp_path):
    for i in (2, 0, 1):
        write_table(tmp_path / f"sub{i}" / f"train-{i}.parquet", anchor=[f"a{i}"], positive=["p"], negative=["n"])
    write_table(tmp_path / "sub0" / "test-0.parquet", anchor=["not this one"], positive=["p"], negative=["n"])
    source = open_source("x", {"kind": "parquet", "path": str(tmp_path), "files": "*/train-*.parquet"})
    assert [record.anchor for record in source] == ["a0", "a1", "a2"]
    assert len(open_source("x", {"kind": "parquet", "path": str(tmp_path)})) == 4
    with pytest.raises(LcoError, match=r"holds no file that matches 'dev/\*'"):
        open_source("x", {"kind": "parquet", "path": str(tmp_path), "files": "dev/*"})


def test_parquet_columns_can_be_renamed_and_hold_lists(tmp_path):
    negatives = [["n1", "n2", "n3"], []]
    path = write_table(tmp_path / "x.parquet", query=["a", "b"], answer=["p", "q"], hard=negatives, easy=["e", "f"])
    columns = {"anchor": "query", "positive": "answer", "negatives": ["hard", "easy"]}
    for spec in (
        {"kind": "parquet", "path": path, "columns": columns},
        ConfigDict({"kind": "parquet", "path": path, "columns": columns, "weight": 2.0}),
    ):
        source = open_source("x", spec)
        assert [record.texts for record in source] == [("a", "p", "n1", "n2", "n3", "e"), ("b", "q", "f")]
        assert source.max_negatives == 4
    one = open_source("x", {"kind": "parquet", "path": path, "columns": {**columns, "negatives": "hard"}})
    assert one[0].negatives == ("n1", "n2", "n3")
    none = open_source("x", {"kind": "parquet", "path": path, "columns": {**columns, "negatives": []}})
    assert none.max_negatives == 0


def test_parquet_with_a_missing_column_is_an_error(tmp_path):
    path = write_table(tmp_path / "x.parquet", anchor=["a"], positve=["p"], negative=["n"])
    with pytest.raises(LcoError) as error:
        parquet_source(path, Columns())
    assert sentence(error) == f"{path} has no column 'positive'; its columns: anchor, positve, negative"


def test_parquet_bad_rows_are_named_or_skipped(tmp_path):
    path = write_table(tmp_path / "x.parquet", anchor=["a", None, "c"], positive=["p", "q", ""], negative=["n"] * 3)
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
            "page": content[:200] + b"\xff" * 200 + content[400:],  # the footer is whole, the data is not
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
        ({"kind": "tfds", "path": "x"}, "'path'"),
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
        pipeline.open_sources({"sources": {}, "on_bad": "error"})


# ---- the stream


def numbered(n, name="r", negatives=1):
    """n records of distinct texts; every third has no negative."""
    return ListSource(
        [
            Record(
                f"{name} {i} anchor",
                f"{name} {i} positive",
                tuple(f"{name} {i} negative {j}" for j in range(negatives if i % 3 else 0)),
                f"{name}:{i}",
            )
            for i in range(n)
        ]
    )


def order(sources, weights, seed, count):
    stream = record_stream(sources, weights, seed)
    return [stream[i].where for i in range(count)]


def test_stream_is_a_function_of_the_seed():
    sources, weights = {"a": numbered(200, "a"), "b": numbered(300, "b")}, {"a": 1.0, "b": 2.0}
    first = order(sources, weights, 0, 200)
    assert order(sources, weights, 0, 200) == first
    for seed in (1, 2, 2**31):
        assert order(sources, weights, seed, 200) != first


def test_every_epoch_is_another_permutation():
    n, epochs = 50, 4
    seen = np.array(order({"a": numbered(n)}, {"a": 1.0}, 0, n * epochs)).reshape(epochs, n)
    for epoch in seen:
        assert sorted(epoch) == sorted(f"r:{i}" for i in range(n))
    assert len({tuple(epoch) for epoch in seen}) == epochs
    assert (seen[0] != [f"r:{i}" for i in range(n)]).any()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (0.05, 0.15, 0.8)])
def test_mixture_weights_are_respected(weights):
    sources = {"a": numbered(250, "a"), "b": numbered(900, "b"), "c": numbered(500, "c")}
    names = [where[0] for where in order(sources, dict(zip("abc", weights, strict=True)), 0, 2000)]
    share = np.array([names.count(name) for name in "abc"]) / len(names)
    assert np.abs(share - np.array(weights) / sum(weights)).max() < 0.02


def test_sources_of_a_mixture_keep_their_epochs():
    seen = order({"a": numbered(7, "a"), "b": numbered(500, "b")}, {"a": 1.0, "b": 3.0}, 0, 400)
    of_a = np.array([where for where in seen if where[0] == "a"][:98]).reshape(14, 7)
    assert (np.sort(of_a) == [f"a:{i}" for i in range(7)]).all()
    assert len({tuple(epoch) for epoch in of_a}) > 7


@pytest.mark.parametrize("weight", [0.0, -1.0, "much"])
def test_a_weight_must_be_positive(weight):
    with pytest.raises(LcoError, match="weight"):
        record_stream({"a": numbered(7, "a"), "b": numbered(9, "b")}, {"a": weight, "b": 1.0}, 0)[0]


# ---- the batches of a process


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def by_sequence(local):
    """{(record, side): token ids}; each pair must occur once."""
    sequences = {
        (int(record), int(side)): ids.tolist()
        for record, side, ids in zip(local.record, local.side, local.tokens, strict=True)
    }
    assert len(sequences) == len(local.tokens)
    return sequences


def dropout_keys(local):
    """{(record, side): the dropout key of every token}, as `global_batch` sets them."""
    place_ = local.placement
    identity = local.record * pipeline.MAX_SIDES + local.side
    rows = fill_rows(local.tokens, identity, place_, place_.num_rows, LAYOUT.row_length, place_.num_slots)
    keys = {}
    for record, side, ids, row, start in zip(
        local.record, local.side, local.tokens, place_.row, place_.start, strict=True
    ):
        keys[int(record), int(side)] = rows.token_keys[row, start : start + len(ids)].tolist()
    return keys


def process_batches(monkeypatch, tokenizer, processes, me, seed=0):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: me)
    return local_batches(record_stream({"a": numbered(21, negatives=2)}, {"a": 1.0}, seed), LAYOUT, tokenizer, None)


def test_a_batch_holds_every_text_of_its_records(monkeypatch, tokenizer):
    stream = record_stream({"a": numbered(21, negatives=2)}, {"a": 1.0}, 0)
    for k, local in enumerate(take(process_batches(monkeypatch, tokenizer, 1, 0), 4)):
        records = [stream[i] for i in range(8 * k, 8 * k + 8)]
        want = {
            (i, j): tokenizer([as_messages(text, "")])[0].tolist()
            for i, record in enumerate(records)
            for j, text in enumerate(record.texts)
        }
        assert by_sequence(local) == want


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_that_one_would_read(monkeypatch, tokenizer, processes):
    whole = take(process_batches(monkeypatch, tokenizer, 1, 0), 6)
    shares = [take(process_batches(monkeypatch, tokenizer, processes, me), 6) for me in range(processes)]
    for k, local in enumerate(whole):
        for view in (by_sequence, dropout_keys):
            parts = [view(share[k]) for share in shares]
            assert sum(len(part) for part in parts) == len(view(local))
            assert {key: value for part in parts for key, value in part.items()} == view(local)
        assert len({tuple(keys) for keys in dropout_keys(local).values()}) == len(local.tokens)


def test_the_batch_must_divide_by_the_processes(monkeypatch, tokenizer):
    with pytest.raises(LcoError, match="8 does not divide by the 3 processes"):
        process_batches(monkeypatch, tokenizer, 3, 0)


def test_the_stream_resumes_where_it_stood(monkeypatch, tokenizer):
    """Also in another number of processes, and through the JSON that the checkpoint stores."""
    want = [by_sequence(local) for local in take(process_batches(monkeypatch, tokenizer, 1, 0), 9)]
    for stop in (0, 1, 4):
        iterator = process_batches(monkeypatch, tokenizer, 1, 0)
        take(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
        again = process_batches(monkeypatch, tokenizer, 1, 0)
        take(again, 2)  # whatever was read before does not matter
        again.set_state(state)
        assert [by_sequence(local) for local in take(again, 9 - stop)] == want[stop:]
        halves = [process_batches(monkeypatch, tokenizer, 2, me) for me in range(2)]
        for half in halves:
            half.set_state(state)
        assert [by_sequence(x) | by_sequence(y) for x, y in zip(*(take(h, 3) for h in halves), strict=True)] == want[
            stop : stop + 3
        ]


def test_max_negatives_limits_what_is_read(tokenizer):
    source = numbered(9, negatives=3)
    for most in (0, 1, 3):
        layout = Layout(batch_size=9, row_length=128, max_negatives=most)
        local = next(local_batches(record_stream({"a": source}, {"a": 1.0}, 0), layout, tokenizer, None))
        assert np.bincount(local.side).tolist() == [9, 9] + [6] * most


def test_texts_are_cut_before_the_template(tokenizer):
    record = Record("a long anchor with many more words than five in it", "short", (), "mem:0")
    layout = Layout(batch_size=1, row_length=128, max_negatives=0)
    local = next(local_batches(record_stream({"a": ListSource([record])}, {"a": 1.0}, 0), layout, tokenizer, 5))
    first_five = tokenizer.tokenizer.decode(tokenizer.tokenizer(record.anchor).input_ids[:5])
    want = tokenizer([as_messages(first_five, ""), as_messages("short", "")])
    assert [ids.tolist() for ids in local.tokens] == [ids.tolist() for ids in want]


@pytest.mark.parametrize("words", [200, 40_000])  # beyond the row; beyond the model's context as well
def test_a_text_that_fits_no_row_is_named(tokenizer, words):
    records = list(numbered(8))
    records[5] = Record("a", "b", ("word " * words,), "corpus.jsonl:17")
    iterator = local_batches(record_stream({"a": ListSource(records)}, {"a": 1.0}, 0), LAYOUT, tokenizer, None)
    with pytest.raises(LcoError) as error:
        next(iterator)
    assert "corpus.jsonl:17" in sentence(error)


@pytest.mark.parametrize(("mesh", "chunk_rows"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((4, 2, 1), 1), ((1, 1, 1), 2)])
def test_a_global_batch_holds_every_sequence_where_it_says(tokenizer, mesh, chunk_rows):
    layout = Layout(batch_size=12, row_length=128, max_negatives=2, chunk_rows=chunk_rows)
    local = next(local_batches(record_stream({"a": numbered(40, negatives=2)}, {"a": 1.0}, 0), layout, tokenizer, None))
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    batch = pipeline.global_batch(local, layout, mesh)
    rows, want = batch.rows.map(np.asarray), by_sequence(local)
    slots = rows.last_tokens.shape[-1]
    if chunk_rows:
        assert rows.input_ids.shape[1] == chunk_rows * mesh.shape["data"] * mesh.shape["fsdp"]
    for (record, side), index in np.ndenumerate(np.asarray(batch.sequences)):
        assert (index >= 0) == ((record, side) in want)
        if index >= 0:
            row, slot = divmod(int(index), slots)
            chunk, row = divmod(row, rows.input_ids.shape[1])
            mine = rows.segment_ids[chunk, row] == slot + 1
            assert rows.input_ids[chunk, row][mine].tolist() == want[record, side]
            assert rows.last_tokens[chunk, row, slot] == np.flatnonzero(mine)[-1]
            assert rows.position_ids[chunk, row][mine].T.tolist() == [list(range(mine.sum()))] * 3
    assert (rows.segment_ids > 0).sum() == sum(map(len, local.tokens))


# ---- the cut


@pytest.mark.parametrize("max_length", [1, 4, 16, 64, None])
@pytest.mark.parametrize("text", [*reference.TEXTS, "🙂🙃 emoji 👩‍👩‍👧", "word " * 100, ""])
def test_cut_is_the_references(tokenizer, text, max_length):
    """Tokenise, keep n, decode; a text that is short enough stays as it is, byte for byte."""
    ids = tokenizer.tokenizer(text).input_ids
    short = max_length is None or len(ids) <= max_length
    want = text if short else tokenizer.tokenizer.decode(ids[:max_length])
    assert tokenizer.cut(text, max_length) == want
    as_reference = tokenizer.tokenizer.decode(ids[:max_length])  # it decodes short texts too: same tokens
    assert np.array_equal(tokenizer([as_messages(want, "")])[0], tokenizer([as_messages(as_reference, "")])[0])


@pytest.mark.parametrize("max_length", [0, -1])
def test_cut_to_nothing_is_an_error(tokenizer, max_length):
    """-1 must not drop the last token in silence."""
    with pytest.raises(LcoError, match="max_length"):
        tokenizer.cut("a few words", max_length)


# ---- packing


@pytest.mark.parametrize("seed", range(20))
def test_place_is_a_packing(seed):
    """Every sequence once, none beyond its row, no two on one token, slots numbered along the row."""
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(1, 300))
    lengths = rng.integers(1, row_length + 1, int(rng.integers(1, 200)))
    placement = place(lengths, row_length)
    assert all(len(part) == len(lengths) for part in placement)
    taken = np.zeros((placement.num_rows, row_length), int)
    for row, start, length in zip(placement.row, placement.start, lengths, strict=True):
        assert start >= 0
        assert start + length <= row_length
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    assert taken.sum() == lengths.sum()
    assert taken.any(axis=1).all()
    for row in range(placement.num_rows):
        mine = placement.row == row
        assert sorted(placement.slot[mine]) == list(range(mine.sum()))
        assert (np.diff(placement.start[mine][np.argsort(placement.slot[mine])]) > 0).all()
    assert all(np.array_equal(x, y) for x, y in zip(place(lengths, row_length), placement, strict=True))


def test_place_of_nothing_and_of_too_much():
    assert place([], 16).num_rows == 0
    assert place([], 16).num_slots == 0
    assert place([16, 16], 16).num_rows == 2
    with pytest.raises(ValueError, match="17 tokens does not fit a row of 16"):
        place([3, 17], 16)


@pytest.mark.parametrize(("count", "row_length"), [(144, 256), (2304, 256), (2304, 1024)])
def test_rows_are_nine_tenths_full(count, row_length):
    """Lengths as NLI has them: about 33 tokens of template, and sentences of 4 to 50."""
    for seed in range(5):
        lengths = 33 + np.random.default_rng(seed).lognormal(2.5, 0.5, count).clip(4, 50).astype(int)
        assert lengths.sum() / (place(lengths, row_length).num_rows * row_length) > 0.9


@pytest.mark.parametrize("granularity", [2, 8])
def test_bucket_bounds(granularity):
    sizes = range(1, 5000)
    buckets = [bucket(n, granularity) for n in sizes]
    assert all(n <= m for n, m in zip(sizes, buckets, strict=True))
    assert all((m - n) * granularity < n for n, m in zip(sizes, buckets, strict=True))
    assert buckets == sorted(buckets)
    assert all(bucket(m, granularity) == m for m in buckets)
    assert buckets[: 2 * granularity] == list(range(1, 2 * granularity + 1))
    doublings = int(np.ceil(np.log2(5000 / (2 * granularity))))
    assert len(set(buckets)) <= granularity * (2 + doublings)
