"""Vectors of fewer numbers and fewer bits: made, stored, searched, evaluated and exported."""

import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow.parquet
import pytest

from configs import tiny as tiny_config
from lco_jax import LcoError, OmniEmbedder, convert, evaluate, quantize_embeddings, search
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.configs.base import get_config
from lco_jax.core.small_vectors import (
    LEVELS,
    PRECISIONS,
    SIGNS,
    Storage,
    distances,
    lowest,
    ranges_of,
    words,
)
from lco_jax.data.sources import open_source
from lco_jax.evaluation.local_tasks import evaluate as evaluate_files
from lco_jax.evaluation.retrieval import ranks, ranks_of_scores, retrieval
from lco_jax.evaluation.vector_sizes import Form, as_compared, compare_and_write, forms
from lco_jax.searching.nearest import Nearest, with_graph
from lco_jax.train import train
from lco_jax.training.instructions import usage_of_run
from lco_jax.training.run import check_dimensions
from lco_jax.vector_form import VectorForm

TEXTS = [f"text {i} of {'dogs' if i % 2 else 'cats'}" for i in range(24)]


def unit(n, d, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def storage(precision, vectors):
    ranges = ranges_of(vectors, precision) if precision in LEVELS else None
    return Storage(vectors.shape[1], precision, ranges)


# ---- as sentence-transformers has it


@pytest.mark.slow  # to import them takes long
@pytest.mark.parametrize("dimension", [64, 12])  # 12 signs do not fill their bytes
@pytest.mark.parametrize("precision", [one for one in PRECISIONS if one != "float16"])
def test_theirs_to_the_bit(precision, dimension):
    from sentence_transformers.util import quantize_embeddings as theirs

    vectors, calibration = unit(200, dimension), unit(150, dimension, seed=1)
    vectors[:, 3] = calibration[:, 3] = 0.5  # a dimension without a range
    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    for options in ({}, {"calibration_embeddings": calibration}, {"ranges": ranges}):
        got, want = (make(vectors, precision, **options) for make in (quantize_embeddings, theirs))
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    empty = quantize_embeddings(vectors[:0], precision)
    assert (empty.shape, empty.dtype) == ((0, want.shape[1]), want.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("precision", LEVELS)
def test_what_is_restored_ranks_as_theirs(precision):
    from sentence_transformers.util.quantization import _dequantize_embeddings

    vectors, queries = unit(300, 48), unit(20, 48, seed=1)
    form = storage(precision, vectors)
    stored = form.store(vectors)
    theirs = queries @ _dequantize_embeddings(stored, precision, form.ranges).T
    for query, want in zip(queries, theirs, strict=True):
        np.testing.assert_allclose(np.ptp(form.cosines(stored, query) - want), 0, atol=1e-5)


def test_float16_is_rounded_float32():
    vectors = unit(5, 16)
    got = quantize_embeddings(vectors, "float16")
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, vectors.astype(np.float16))
    assert np.isnan(quantize_embeddings(np.full((1, 4), np.nan), "float16")).all()


@pytest.mark.parametrize(
    ("vectors", "precision", "options", "says"),
    [
        (unit(2, 8), "int4", {}, "precision is 'int4'; it is one of: float32, float16, int8"),
        (np.ones((2, 8), np.int8), "binary", {}, "embeddings hold int8; only floats"),
        (unit(1, 8), "int8", {}, "precision is int8, and a single vector has no range"),
        (unit(1, 8)[0], "uint8", {}, "a single vector has no range"),
        (unit(2, 8), "int8", {"ranges": np.zeros((2, 7))}, "they must be numbers of shape (2, 8)"),
        (unit(2, 8), "int8", {"ranges": [[1.0] * 8, [0.0] * 8]}, "no more than its most"),
        (unit(2, 8), "int8", {"ranges": np.full((2, 8), np.nan)}, "must be finite"),
    ],
)
def test_what_cannot_be_quantized(vectors, precision, options, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        quantize_embeddings(vectors, precision, **options)


# ---- encode


@pytest.mark.parametrize("precision", LEVELS)
def test_with_ranges_a_vector_does_not_depend_on_its_batch(tiny, precision):
    vectors = tiny.encode(TEXTS)
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    together = tiny.encode(TEXTS, precision=precision, ranges=ranges)
    np.testing.assert_array_equal(together, quantize_embeddings(vectors, precision))
    form = VectorForm(precision=precision, ranges=ranges)
    for row, vector in enumerate(vectors):
        np.testing.assert_array_equal(form.of(vector[None], single=True), together[row])
    alone = tiny.encode(TEXTS[0], precision=precision, ranges=ranges)
    # a forward pass of another size rounds otherwise, and may cross an edge
    assert np.abs(alone.astype(int) - together[0].astype(int)).max() <= 1
    with pytest.raises(LcoError, match=r"must be numbers of shape \(2, 16\)"):
        tiny.encode(TEXTS, precision=precision, ranges=ranges, truncate_dim=16)
    with pytest.raises(LcoError, match="ranges go with int8 and uint8, and precision is binary"):
        tiny.encode(TEXTS, precision="binary", ranges=ranges)


def test_float16_takes_skipped_inputs(tiny):
    got = tiny.encode(["a", "missing.png"], precision="float16", on_error="skip")
    assert got.dtype == np.float16
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[0]).any()


def test_a_model_has_a_dimension_of_its_own(tiny):
    one = OmniEmbedder(tiny.model, tiny.params, tiny.processor, tiny.mesh)
    one.truncate_dim = 16
    np.testing.assert_array_equal(one.encode(TEXTS), tiny.encode(TEXTS, truncate_dim=16))
    assert one.get_embedding_dimension() == 16
    assert one.encode(TEXTS, truncate_dim=128).shape == (24, 128)
    assert "the first 16 of 128 numbers" in repr(one)


# ---- stored, and searched


@pytest.mark.parametrize("dimension", [64, 12])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_stored_comes_back(precision, dimension):
    vectors = unit(200, dimension)
    vectors[:, 3] = 0.25  # without a range
    form = storage(precision, vectors)
    stored = form.store(vectors)
    assert (stored.shape, stored.dtype) == ((200, form.width), form.dtype)
    assert stored[0].nbytes == form.bytes
    back = form.restore(stored)
    if precision in SIGNS:
        np.testing.assert_array_equal(back > 0, vectors > 0)
        np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(form.bits(stored), np.packbits(vectors > 0, axis=1))
    else:
        half = np.ptp(vectors, axis=0) / 510 if precision in LEVELS else 1e-3
        assert (np.abs(back - vectors) <= half + 1e-6).all()
    query = unit(1, dimension, seed=1)[0]
    np.testing.assert_allclose(form.cosines(stored, query), back @ query, atol=1e-6)


def test_distances_count_signs():
    a, b = (np.random.default_rng(seed).integers(0, 2, (30, 77)) for seed in (0, 1))
    packed, other = (words(np.packbits(one, axis=1)) for one in (a, b))
    for row in range(30):
        np.testing.assert_array_equal(distances(packed, other[row]), (a != b[row]).sum(axis=1))


def test_the_lowest_of_equal_values_are_the_first():
    assert sorted(lowest(np.array([3, 1, 2, 1, 2, 2]), 4)) == [1, 2, 3, 4]
    assert sorted(lowest(np.array([3, 1]), 5)) == [0, 1]


@pytest.mark.parametrize("k", [1, 7, 500])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_search_of_small_vectors(precision, k):
    vectors, query = unit(300, 48), unit(1, 48, seed=1)[0]
    form = storage(precision, vectors)
    stored = form.store(vectors)
    back = form.restore(stored).astype(np.float64)
    for by_signs in (False, True):
        nearest = Nearest(stored, None, form, by_signs)
        rows, cosines = nearest(query, k)
        proposed = np.arange(300)
        if by_signs or precision in SIGNS:
            bits = (back > 0) != (query > 0)
            proposed = np.lexsort((proposed, bits.sum(axis=1)))[: 4 * k]
        scores = np.round(back[proposed] @ query, 6)
        want = proposed[np.lexsort((proposed, -scores))][:k]
        np.testing.assert_allclose(cosines, np.sort(back[want] @ query)[::-1], atol=1e-6)
        assert len(set(rows) & set(want)) >= len(want) - 1  # rounding may part a tie
        np.testing.assert_allclose(nearest.vector(3), back[3] / np.linalg.norm(back[3]), atol=1e-6)


def test_float_vectors_rerank_what_signs_propose():
    vectors = unit(300, 64)
    by_signs = Nearest(vectors, by_signs=True)
    exact, signs = Nearest(vectors), Nearest(*binary(vectors))
    found = {"none": 0, "own": 0, "float32": 0}
    for query in unit(30, 64, seed=1):
        want = set(exact(query, 10)[0])
        found["float32"] += len(want & set(by_signs(query, 10)[0]))
        found["own"] += len(want & set(signs(query, 10)[0]))
        nearest = lowest((vectors > 0) @ -np.sign(query), 10)
        found["none"] += len(want & set(nearest))
    assert found["none"] < found["own"] < found["float32"]
    rows, cosines = by_signs(query, 75)  # all are proposed
    np.testing.assert_array_equal(rows, exact(query, 75)[0])
    np.testing.assert_array_equal(cosines, exact(query, 75)[1])


def binary(vectors):
    form = Storage(vectors.shape[1], "binary")
    return form.store(vectors), None, form


def test_a_graph_of_levels(tmp_path):
    vectors = unit(500, 24)
    form = storage("int8", vectors)
    keys = [f"{i:032x}" for i in range(500)]
    nearest = with_graph(form.store(vectors), keys, tmp_path, "text", form)
    rows, cosines = nearest(vectors[7], 3)
    assert rows[0] == 7
    assert abs(cosines[0] - 1) < 0.01
    again = with_graph(form.store(vectors), keys, tmp_path, "text", form)
    np.testing.assert_array_equal(again(vectors[7], 3)[0], rows)


# ---- embed


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embed_stores_what_encode_makes(tmp_path, tiny, texts, run_embed, precision):
    vectors = tiny.encode(TEXTS, truncate_dim=12)
    ranges = ranges_of(vectors[:10], precision)
    form = Storage(12, precision, ranges if precision in LEVELS else None)
    flags = [f"--input={texts}", f"--precision={precision}", "--truncate-dim=12"]
    flags += ["--calibration=10"] if precision in LEVELS else []
    outputs = [tmp_path / name for name in ("a.npy", "b.npy", "c.parquet", "d")]
    for output, size in zip(outputs, (24, 7, 5, 9), strict=True):
        status, out, err = run_embed(*flags, f"--output={output}", f"--part-size={size}")
        assert status == 0, err
        kind = "" if precision == "float32" else f" in {precision}"
        assert out == f"24 vectors of 12{kind}: {output}\n"
    first, second = np.load(outputs[0]), np.load(outputs[1])
    assert (first.dtype, first.shape) == (form.dtype, (24, form.width))
    if precision in LEVELS:
        found = [np.load(f"{output}.ranges.npy") for output in outputs[:3]]
        for one in (*found, np.load(outputs[3] / "_ranges.npy")):
            np.testing.assert_array_equal(one, found[0])  # whatever the unit is
        np.testing.assert_allclose(found[0], ranges, atol=1e-6)
        # vectors of other passes are rounded otherwise, which may cross an edge: most of all those
        # that the ranges are of
        want = quantize_embeddings(vectors, precision, ranges=found[0]).astype(int)
        for one in (first, second):
            assert np.abs(one - want).max() <= 1
            assert (one != want)[10:].mean() < 0.02
        record = json.loads(Path(f"{outputs[0]}.json").read_text())
        assert (record["dimension"], record["precision"]) == (12, precision)
    else:
        np.testing.assert_allclose(first, form.store(vectors), atol=1e-3)
        np.testing.assert_allclose(second, first, atol=1e-3)
    for output in outputs[2:]:
        table = pyarrow.parquet.read_table(output)
        atol = 1 if precision in LEVELS else 1e-3
        np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), first, atol=atol)


def test_skipped_rows_of_levels_are_null(tmp_path, run_embed):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('"one"\n{"image": "gone.png"}\n"two"\n"three"\n')
    flags = [f"--input={source}", "--on-error=skip", "--precision=int8"]
    status, _, err = run_embed(*flags, f"--output={output}")
    assert status == 0, err
    rows = pyarrow.parquet.read_table(output)["embedding"].to_pylist()
    assert [row is None for row in rows] == [False, True, False, False]
    status, _, err = run_embed(*flags, f"--output={tmp_path / 'out.npy'}")
    assert status == 2
    assert "an .npy has no place for what was skipped; give a .parquet" in err


def test_an_output_goes_on_with_its_ranges(tmp_path, texts, run_embed):
    """After a kill in which a part was lost; and a second output with the ranges of the first."""
    output = tmp_path / "out"
    flags = [f"--input={texts}", "--precision=uint8", "--part-size=8"]
    run_embed(*flags, f"--output={output}")
    want = np.array(pyarrow.parquet.read_table(output)["embedding"].to_pylist())
    other = tmp_path / "other.npy"
    ranges = output / "_ranges.npy"
    given = f"--calibration={ranges}"
    status, _, err = run_embed(*flags, f"--output={other}", given, "--part-size=3")
    assert status == 0, err
    np.testing.assert_array_equal(np.load(other), want)
    np.testing.assert_array_equal(np.load(f"{other}.ranges.npy"), np.load(ranges))
    status, _, err = run_embed(*flags, f"--output={output}", "--precision=int8")
    assert status == 2
    assert "--precision was 'uint8' and is 'int8'" in err
    plain = [flag for flag in flags if flag != "--precision=uint8"]
    status, _, err = run_embed(*plain, f"--output={other}")
    assert status == 0, err
    assert np.load(other).dtype == np.float32
    assert not Path(f"{other}.ranges.npy").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--truncate-dim=129"], "--truncate-dim=129: the model's vectors have 128 numbers"),
        (["--truncate-dim=0"], "--truncate-dim=0: it must be at least 1"),
        (["--calibration=5"], "--calibration goes with --precision=int8 or uint8"),
        (["--precision=int8", "--calibration=1"], "ranges are of two or more vectors"),
        (["--precision=int8", "--calibration=no.npy"], "no.npy is no file"),
        (["--precision=int8", "--calibration=in.txt"], "give a number of inputs, or a .npy or"),
        (["--precision=int8", "--calibration=wide.npy"], "give floats of shape (N, 128)"),
        (["--precision=int8", "--calibration=torn.npy"], "torn.npy cannot be read"),
        (["--precision=int8", "--input=one.txt"], "--input holds 1, and ranges are of two or more"),
    ],
)
def test_what_embed_refuses(tmp_path, texts, run_embed, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", unit(5, 130))
    Path("torn.npy").write_bytes(b"torn")
    Path("one.txt").write_text("one\n")
    status, _, err = run_embed(f"--input={texts}", "--output=out.npy", *flags)
    assert status == 2
    assert says in err
    assert not os.path.exists("out.npy")


# ---- search


@pytest.fixture
def start(monkeypatch, load, tmp_path, texts):
    """`search.prepare` of the texts."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)

    def start(*flags):
        paths = [f"--input={texts}", f"--output={tmp_path / 'index'}"]
        monkeypatch.setattr(sys, "argv", ["search", "--model=builtin:tiny", *paths, *flags])
        return search.prepare(search.make_parser().parse_args())

    return start


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_an_index_of_small_vectors(start, tmp_path, texts, tiny, precision):
    flags = [f"--precision={precision}", "--truncate-dim=64", "--calibration=20"]
    flags = flags if precision == "int8" else flags[:2]
    library, _, form, _ = start(*flags)
    assert (form.dimension, form.precision) == (64, precision)
    vectors = tiny.encode(TEXTS, truncate_dim=64)
    stored = form.store(vectors)
    query = vectors[5]
    found = library.nearest(query, ["text"], 3)
    want = Nearest(stored, None, form)(query, 3)
    assert [entry.text for entry, _ in found] == [TEXTS[row] for row in want[0]]
    np.testing.assert_allclose([cosine for _, cosine in found], want[1], atol=0.02)
    with texts.open("a") as file:
        file.write("a new one\n")
    again, _, kept, _ = start(*flags)
    assert again.counts == {"text": 25}
    np.testing.assert_array_equal(kept.ranges, form.ranges)  # they stay what they were
    with pytest.raises(LcoError, match=r"holds other work: --(precision|calibration) was"):
        start("--truncate-dim=64", "--precision=uint8")
    if precision == "int8":
        (tmp_path / "index" / "vectors.parquet.ranges.npy").unlink()
        with pytest.raises(LcoError, match="is gone, without which no vector"):
            start(*flags)


# ---- evaluate


def records(path):
    lines = [
        {"query": f"question {i}", "document": TEXTS[i], "negative": TEXTS[i + 12]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(dimension):
    """Texts -> vectors that are drawn for them."""

    def encode(contents):
        seeds = [crc32(repr(one).encode()) for one in contents]
        drawn = np.concatenate([unit(1, dimension, seed) for seed in seeds])
        drawn += unit(1, dimension)  # so that no sign is as likely as the other
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    return encode


def test_ranks_of_rows_are_those_of_products():
    queries, documents = unit(20, 16), np.repeat(unit(60, 16, seed=1), 2, axis=0)  # ties
    rng = np.random.default_rng(2)
    relevance = [
        {int(d): float(rng.integers(1, 4)) for d in rng.permutation(120)[:5]} for _ in queries
    ]
    rows = (
        (documents.astype(np.float64) @ query).astype(np.float32)
        for query in queries.astype(np.float64)
    )
    for got, want in zip(
        ranks_of_scores(rows, relevance), ranks(queries, documents, relevance), strict=True
    ):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_every_size_is_in_one_table(tmp_path):
    path = records(tmp_path / "in.jsonl")
    encode = drawn(64)
    rows = compare_and_write(encode, "retrieval", path, tmp_path / "out", model="drawn")
    found = {row.form: row.numbers for row in rows}
    assert [form.dimension for form in found][::8] == [64, 32, 16, 8, 4]
    whole = evaluate_files(encode, "retrieval", path).numbers
    for name, value in found[Form(64, "float32")].items():
        assert value == whole[name]
    bytes_of = {form: form.bytes for form in found}
    assert bytes_of[Form(64, "float32")] == 256
    assert bytes_of[Form(64, "float16")] == 128
    assert bytes_of[Form(64, "int8", "query")] == 64
    assert bytes_of[Form(64, "binary", "query")] == 8
    assert bytes_of[Form(4, "binary")] == 1
    assert bytes_of[Form(64, "binary", "int8")] == 72
    assert bytes_of[Form(64, "binary", "float32")] == 264
    # 24 documents are all proposed, so signs change nothing of what ranks in the end
    for dimension in (64, 8):
        assert found[Form(dimension, "binary", "float32")] == found[Form(dimension, "float32")]
        assert found[Form(dimension, "binary", "int8")] == found[Form(dimension, "int8", "query")]
    written = json.loads((tmp_path / "out" / "small_vectors.json").read_text())
    assert len(written["rows"]) == 40
    assert written["rows"][0]["bytes"] == 256
    page = (tmp_path / "out" / "small_vectors.md").read_text()
    assert "| 64 | binary, then int8 | 72 |" in page
    assert (tmp_path / "out" / "small_vectors.png").stat().st_size > 1000


def test_signs_propose_before_others_rank(tmp_path, monkeypatch):
    """With few proposed, what is left out comes after all that are."""
    monkeypatch.setattr("lco_jax.evaluation.vector_sizes.PROPOSED", 3)
    path = records(tmp_path / "in.jsonl")
    rows = compare_and_write(drawn(64), "retrieval", path, tmp_path / "out")
    found = {row.form: row.numbers for row in rows}
    reranked, signs = found[Form(64, "binary", "float32")], found[Form(64, "binary")]
    assert reranked["recall_at_10"] <= found[Form(64, "float32")]["recall_at_10"] + 1e-9
    assert reranked != found[Form(64, "float32")] or reranked == signs


def test_sts_at_every_size(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"a": TEXTS[i], "b": TEXTS[-1 - i], "score": i % 5} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare_and_write(drawn(32), "sts", path, tmp_path / "out")
    assert len(rows) == len(list(forms(32, [("", "")] * 4))) == 20
    found = {row.form: row.numbers for row in rows}
    whole = evaluate_files(drawn(32), "sts", path).numbers
    assert found[Form(32, "float32")]["spearman"] == pytest.approx(whole["spearman"])
    for precision in ("float16", "int8"):
        got = found[Form(32, precision)]["pearson"]
        assert got == pytest.approx(whole["pearson"], abs=0.02)

    def rounded(contents):
        vectors = drawn(32)(contents)
        return as_compared(vectors, "int8", vectors)

    # what `--precision=int8` measures
    assert found[Form(32, "int8")] == {
        name: pytest.approx(evaluate_files(rounded, "sts", path).numbers[name])
        for name in ("spearman", "pearson")
    }
    with pytest.raises(LcoError, match="--small-vectors goes with --kind=retrieval or sts"):
        compare_and_write(drawn(32), "zeroshot", path, tmp_path / "out")


def test_evaluate_of_one_size(tmp_path, monkeypatch, run_command, load):
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    path, output = records(tmp_path / "in.jsonl"), tmp_path / "out"
    flags = ["--kind=retrieval", f"--input={path}", f"--output={output}"]
    status, _, err = run_command(evaluate, *flags, "--precision=binary", "--truncate-dim=16")
    assert status == 0, err
    one = json.loads((output / "results.json").read_text())
    assert (one["precision"], one["truncate_dim"]) == ("binary", 16)
    status, _, err = run_command(evaluate, *flags, "--small-vectors")
    assert status == 0, err
    rows = json.loads((output / "small_vectors.json").read_text())["rows"]
    [row] = [
        x for x in rows if (x["dimension"], x["precision"], x["reranked"]) == (16, "binary", "")
    ]
    assert row["ndcg_at_10"] == pytest.approx(one["ndcg_at_10"])
    status, _, err = run_command(evaluate, *flags, "--small-vectors", "--precision=int8")
    assert status == 2
    assert "--small-vectors has every size" in err


# ---- exports


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """An export of the tiny model with 32 of its numbers."""
    output = tmp_path_factory.mktemp("shorter") / "out"
    flags = ["--model=builtin:tiny", f"--output={output}", "--dtype=float32", "--truncate-dim=32"]
    before = sys.argv
    sys.argv = ["convert", *flags]
    try:
        assert convert.main() == 0
    finally:
        sys.argv = before
    return output


def test_an_export_says_how_many_numbers(shorter, tiny, tmp_path, monkeypatch):
    general = json.loads((shorter / "config_sentence_transformers.json").read_text())
    assert (general["truncate_dim"], general["similarity_fn_name"]) == (32, "cosine")
    card = (shorter / "README.md").read_text()
    assert "the first 32 of 128 numbers" in card
    assert "model.encode(inputs, normalize_embeddings=True)" in card
    assert "states = [state[:, :32] for state in states]" in card
    model = OmniEmbedder.from_pretrained(shorter)
    assert model.truncate_dim == 32
    np.testing.assert_allclose(model.encode(TEXTS), tiny.encode(TEXTS, truncate_dim=32), atol=1e-5)
    again, whole = tmp_path / "again", tmp_path / "whole"
    for output, flags in ((again, []), (whole, ["--truncate-dim=128"])):
        flags = [f"--model={shorter}", f"--output={output}", *flags]
        monkeypatch.setattr(sys, "argv", ["convert", *flags])
        assert convert.main() == 0
    assert OmniEmbedder.from_pretrained(again).truncate_dim == 32
    assert OmniEmbedder.from_pretrained(whole).truncate_dim is None


@pytest.mark.parametrize("width", [0, 129, "32", 1.5, True])
def test_a_file_with_another_truncate_dim(shorter, tmp_path, width):
    folder = tmp_path / "model"
    shutil.copytree(shorter, folder)
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({"truncate_dim": width}))
    with pytest.raises(LcoError, match=r"truncate_dim is .*; give a whole number from 1 to 128"):
        OmniEmbedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--truncate-dim=129"], "truncate_dim is 129; the model's vectors have 128"),
        (["--truncate-dim=0"], "truncate_dim is 0; it must be a whole number of at least 1"),
    ],
)
def test_exports_that_cannot_be(tmp_path, monkeypatch, flags, says):
    paths = ["--model=builtin:tiny", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["convert", *paths, *flags])
    with pytest.raises(LcoError, match=re.escape(says)):
        convert.main()


@pytest.mark.parametrize("width", [129, 64])
def test_a_run_that_exports_fewer_numbers(width):
    config = get_config()
    config.export.truncate_dim = width
    checkpoint = open_checkpoint("builtin:tiny")
    if width == 64:
        check_dimensions(config, checkpoint)
        return
    with pytest.raises(LcoError, match=r"config\.export\.truncate_dim is 129; the model's vectors"):
        check_dimensions(config, checkpoint)


@pytest.mark.slow
def test_sentence_transformers_gives_our_shorter_vectors(shorter, tiny):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(shorter), device="cpu")
    assert model.get_embedding_dimension() == 32
    ours = tiny.encode(TEXTS, truncate_dim=32)
    theirs = model.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    plain = model.encode(TEXTS)  # they truncate after Normalize, and do not normalize again
    np.testing.assert_allclose(plain, tiny.encode(TEXTS)[:, :32], atol=1e-5)
    np.testing.assert_allclose(
        model.similarity(plain, plain), tiny.similarity(ours, ours), atol=1e-5
    )


@pytest.mark.parametrize(
    ("of_run", "flag", "width"), [(None, None, 32), (128, None, None), (16, None, 16), (16, 64, 64)]
)
def test_a_runs_vectors_are_as_long_as_it_says_or_its_base(shorter, of_run, flag, width):
    """The base has 32 of 128; 128 are all."""
    config = {"model": {}, "data": {"sources": {}}, "export": {"truncate_dim": of_run}}
    assert usage_of_run(config, open_checkpoint(shorter), flag).truncate_dim == width


@pytest.mark.slow
def test_a_run_is_measured_as_its_export_is(tmp_path):
    """Scores are of vectors of the length that is written, and a card of others has none."""
    records = [{"anchor": f"a dog {i}", "positive": f"a hound {i}"} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = tiny_config.get_config()
    config.data.sources = {"data": {"kind": "jsonl", "path": str(data)}}
    config.eval.path = str(data)
    config.train.steps, config.optimizer.warmup_steps, config.train.batch_size = 2, 1, 8
    config.export.truncate_dim = 8
    results = train(config, tmp_path / "run")
    model = OmniEmbedder.from_pretrained(tmp_path / "run" / "merged")
    assert model.truncate_dim == 8
    encode = partial(model.encode, max_length=config.data.max_length)
    found = retrieval(encode, list(open_source("data", config.data.sources.data.to_dict())))
    assert results["after"]["data"]["mrr"] == pytest.approx(found.mrr)
    flags = [f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    for more, said in (([], True), (["--truncate-dim=16"], False)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out-adapter", ignore_errors=True)
        sys_argv = sys.argv
        sys.argv = ["convert", *flags, *more]
        try:
            convert.main()
        finally:
            sys.argv = sys_argv
        card = (tmp_path / "out" / "README.md").read_text()
        assert (f"{found.mrr:.3f}" in card) == said
