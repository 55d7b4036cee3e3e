"""Commands on models that are used otherwise than the paper's: they ask queries otherwise than
documents, take the mean of states, and give fewer numbers.
"""

import json
import re
import sys

import jax
import numpy as np
import pytest

from lco_jax import LcoError, OmniEmbedder, convert, evaluate
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.small_vectors import Storage, ranges_of
from lco_jax.data.instructions import Instructions
from lco_jax.data.media import MediaConfig
from lco_jax.evaluation.left_out import LeftOut
from lco_jax.evaluation.vector_sizes import as_compared
from lco_jax.files_encoder import FilesEncoder

PROMPTS = {"query": "Find what this says: ", "document": "A document.\n"}
USAGE = Usage("mean", Instructions(PROMPTS, "before", "document"), 32)
TEXTS = [f"text {i} of {'dogs' if i % 2 else 'cats'}" for i in range(12)]


def written(path, usage):
    export_merged("builtin:tiny", path, dtype="float32", usage=usage)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of this usage."""
    return written(tmp_path_factory.mktemp("usage") / "model", USAGE)


@pytest.fixture(scope="module")
def model(folder):
    return OmniEmbedder.from_pretrained(folder)


@pytest.fixture
def loads_nothing(monkeypatch):
    """Whoever loads a model fails the test."""

    def never(*args, **options):
        raise AssertionError("a model is loaded before the flags are checked")

    monkeypatch.setattr(OmniEmbedder, "from_pretrained", never)


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"query": f"question {i}", "document": text} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_convert(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, flags)])
    return convert.main()


# ---- embed


def test_ranges_are_of_the_vectors_that_are_stored(folder, model, tmp_path, run_embed):
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    output = tmp_path / "out.npy"
    flags = f"--input={tmp_path / 'in.txt'}", f"--output={output}", f"--model={folder}"
    code, _, err = run_embed(*flags, "--prompt-name=query", "--precision=int8")
    assert code == 0, err
    ranges = np.load(f"{output}.ranges.npy")
    want = ranges_of(model.encode_query(TEXTS), "int8")
    np.testing.assert_allclose(ranges, want, atol=1e-6)
    assert np.abs(want - ranges_of(model.encode_document(TEXTS), "int8")).max() > 1e-3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros((5, 128), np.float32), "give floats of shape (N, 32)"),
        (np.zeros((5, 32), np.int8), "holds int8 of shape (5, 32)"),
        (np.zeros((1, 32), np.float32), "holds 1 vectors; ranges are of two or more"),
    ],
)
def test_a_calibration_is_read_before_the_model(
    folder, tmp_path, run_command, loads_nothing, content, says
):
    from lco_jax import embed

    (tmp_path / "in.txt").write_text("one\ntwo\n")
    np.save(tmp_path / "some.npy", content)
    code, _, err = run_command(
        embed,
        f"--input={tmp_path / 'in.txt'}",
        f"--output={tmp_path / 'out.npy'}",
        f"--model={folder}",
        "--precision=int8",
        f"--calibration={tmp_path / 'some.npy'}",
    )
    assert (code, says in err) == (2, True), err


# ---- evaluate


@pytest.mark.parametrize("flags", [["--kind=retrieval"], ["--kind=retrieval", "--small-vectors"]])
def test_evaluate_checks_the_name_of_a_prompt_first(
    folder, records, tmp_path, run_command, loads_nothing, flags
):
    given = f"--input={records}", f"--output={tmp_path / 'out'}", f"--model={folder}"
    code, _, err = run_command(evaluate, *given, *flags, "--prompt-name=web")
    assert code == 2
    assert "--prompt-name=web: the model has the prompts query, document" in err
    assert not (tmp_path / "out").exists()


def encoder_of(folder, monkeypatch, *flags):
    given = ["--input=in", "--output=.", f"--model={folder}", *flags]
    args = evaluate.make_parser().parse_args(given)
    return FilesEncoder(args, MediaConfig(), LeftOut())


def test_ranges_of_an_evaluation_are_of_the_documents(folder, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    contents = [{"text": text} for text in TEXTS]
    encoder = encoder_of(folder, monkeypatch, "--kind=retrieval", "--precision=int8")
    got = encoder.encode_sides(4, contents)
    queries, documents = model.encode_query(TEXTS[:4]), model.encode_document(TEXTS[4:])
    storage = Storage(32, "int8", ranges_of(documents, "int8"))
    want = [storage.restore(storage.store(one)) for one in (queries, documents)]
    step = np.ptp(storage.ranges, axis=0).max() / 255  # what rounding can cost at an edge
    np.testing.assert_allclose(got, np.concatenate(want), atol=1.01 * step)
    assert (np.abs(got - np.concatenate(want)) > 1e-5).mean() < 0.1
    for one, other in zip((queries, documents), want, strict=True):
        np.testing.assert_array_equal(as_compared(one, "int8", documents), other)
    every = encoder_of(folder, monkeypatch, "--kind=sts", "--precision=int8").encode(contents)
    whole = model.encode_document(TEXTS)
    np.testing.assert_allclose(every, as_compared(whole, "int8", whole), atol=1.01 * step)


def test_one_size_has_the_numbers_that_the_table_has(
    folder, records, tmp_path, run_command, monkeypatch, load
):
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    out = tmp_path / "out"
    flags = f"--input={records}", f"--output={out}", f"--model={folder}", "--kind=retrieval"
    for more in ("--precision=int8", "--small-vectors"):
        code, _, err = run_command(evaluate, *flags, more)
        assert code == 0, err
    one = json.loads((out / "results.json").read_text())
    rows = json.loads((out / "small_vectors.json").read_text())["rows"]
    form = {"dimension": 32, "precision": "int8", "reranked": ""}
    [row] = [row for row in rows if form.items() <= row.items()]
    numbers = row.keys() - form.keys() - {"bytes"}
    assert "ndcg_at_10" in numbers
    for name in numbers:
        assert one[name] == pytest.approx(row[name], abs=1e-4), name


# ---- soups


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of builtin:tiny of this usage."""
    out = tmp_path_factory.mktemp("adapters")
    config = lora.LoraConfig(rank=2, alpha=2)
    params = abstract_params(open_checkpoint("builtin:tiny").config)
    for i in range(2):
        rng = np.random.default_rng(i)
        tree = jax.tree.map(
            lambda x, rng=rng: (0.1 * rng.normal(size=x.shape)).astype(np.float32),
            jax.device_get(lora.init(jax.random.key(0), params, config)),
        )
        write_peft(out / str(i), tree, config, "builtin:tiny", usage=USAGE)
    return [out / str(i) for i in range(2)]


@pytest.mark.parametrize("flags", [[], ["--truncate-dim=8"]])
def test_a_greedy_soup_is_scored_as_it_is_used(
    adapters, records, tmp_path, monkeypatch, run_command, flags
):
    soup = tmp_path / "soup"
    given = ["--model=builtin:tiny", "--adapters", *adapters, "--greedy", "--kind=retrieval"]
    given += [f"--validate={records}", f"--output={soup}", "--dtype=float32"]
    assert run_convert(monkeypatch, "soup", *given, *flags) == 0
    steps = json.loads((soup / "soup.json").read_text())["greedy"]
    score = [step["together"] for step in steps if step["kept"]][-1]
    given = f"--adapter={soup}", f"--input={records}", f"--output={tmp_path / 'out'}"
    code, _, err = run_command(evaluate, *given, "--kind=retrieval")
    assert code == 0, err
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert numbers["ndcg_at_10"] == pytest.approx(score, abs=1e-6)
    code, _, err = run_command(evaluate, *given, "--kind=retrieval", "--truncate-dim=128")
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert abs(whole["ndcg_at_10"] - score) > 1e-3  # the two can be told apart


def test_a_greedy_soup_of_more_numbers_than_there_are(
    adapters, records, tmp_path, monkeypatch, loads_nothing
):
    given = ["--model=builtin:tiny", "--adapters", *adapters, "--greedy", "--kind=retrieval"]
    given += [f"--validate={records}", f"--output={tmp_path / 'soup'}", "--truncate-dim=129"]
    with pytest.raises(LcoError, match="truncate_dim is 129; the model's vectors have 128"):
        run_convert(monkeypatch, "soup", *given)


@pytest.mark.parametrize(
    "usage",
    [
        Usage("last", USAGE.instructions, 32),
        Usage("mean", Instructions({**PROMPTS, "query": ""}, "before", "document"), 32),
        Usage("mean", USAGE.instructions, 16),
    ],
)
def test_models_that_are_used_differently_are_not_averaged(folder, tmp_path, monkeypatch, usage):
    other = written(tmp_path / "other", usage)
    says = f"{folder} and {other} differ in pooling, prompts or truncate_dim"
    output = tmp_path / "soup"
    with pytest.raises(LcoError, match=re.escape(says)):
        run_convert(monkeypatch, "soup", "--models", folder, other, f"--output={output}")
    assert not output.exists()


def test_models_that_are_used_alike_keep_their_usage(folder, model, tmp_path, monkeypatch):
    output = tmp_path / "soup"
    flags = ["soup", "--models", folder, folder, f"--output={output}", "--dtype=float32"]
    assert run_convert(monkeypatch, *flags) == 0
    got = OmniEmbedder.from_pretrained(output).encode_query(TEXTS)
    np.testing.assert_allclose(got, model.encode_query(TEXTS), atol=1e-5)
