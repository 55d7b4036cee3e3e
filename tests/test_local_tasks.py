"""Retrieval, STS and zero-shot on local files: numbers equal pytrec_eval's, scipy's, sklearn's."""

import json
import zlib

import numpy as np
import pytest
import pytrec_eval
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from lco_jax import LcoError, evaluate
from lco_jax.evaluation import local_files, local_tasks, retrieval
from lco_jax.evaluation.left_out import LeftOut
from lco_jax.evaluation.vector_sizes import compare_and_write


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def encode(inputs):
    """Another vector for every other input."""
    assert not any(isinstance(x, str) for x in inputs)  # a bare "cat.png" would be taken for a file
    draws = [np.random.default_rng(zlib.crc32(repr(x).encode())).normal(size=8) for x in inputs]
    return unit(np.array(draws)).astype(np.float32)


def write_lines(path, *items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)


# ---- retrieval


def test_retrieval_metrics_are_trec_evals(monkeypatch):
    monkeypatch.setattr(retrieval, "QUERIES", 8)
    monkeypatch.setattr(retrieval, "DOCUMENTS", 64)
    rng = np.random.default_rng(0)
    queries, documents = (unit(rng.normal(size=(n, 6))).astype(np.float32) for n in (37, 300))
    relevance = [
        {
            int(d): float(rng.integers(1, 4))
            for d in rng.choice(300, rng.integers(1, 30), replace=False)
        }
        for _ in queries
    ]
    ranked = retrieval.ranks(queries, documents, relevance)
    names = {f"d{i}": i for i in range(300)}
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    assert min(len(set(row.astype(np.float32))) for row in scores) == 300  # no ties
    qrels = {
        f"q{i}": {f"d{d}": int(grade) for d, grade in row.items()}
        for i, row in enumerate(relevance)
    }
    run = {
        f"q{i}": {name: float(row[d]) for name, d in names.items()} for i, row in enumerate(scores)
    }
    measures = {"ndcg_cut.10", "recall.1,5,10", "success.1,5,10", "recip_rank"}
    each = list(pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run).values())
    want = {"ndcg_at_10": np.mean([one["ndcg_cut_10"] for one in each])}
    want["mrr_at_10"] = np.mean(
        [one["recip_rank"] if one["recip_rank"] >= 0.1 else 0 for one in each]
    )
    want |= {f"recall_at_{k}": np.mean([one[f"recall_{k}"] for one in each]) for k in (1, 5, 10)}
    want |= {f"hit_at_{k}": np.mean([one[f"success_{k}"] for one in each]) for k in (1, 5, 10)}
    got = retrieval.retrieval_metrics(ranked)
    assert got.keys() == want.keys()
    for name in want:
        assert abs(got[name] - want[name]) < 1e-9, name


@pytest.mark.parametrize("block", [3, 4096])
def test_ties_count_against_the_query_in_whatever_order_documents_stand(monkeypatch, block):
    monkeypatch.setattr(retrieval, "DOCUMENTS", block)
    rng = np.random.default_rng(1)
    query = unit(rng.normal(size=(1, 300))).astype(np.float32)
    twin, far = (unit(query + 0.1 * rng.normal(size=(1, 300))).astype(np.float32) for _ in range(2))
    far = -far
    vectors, grades = np.concatenate([twin] * 4 + [far] * 3), {0: 1.0, 2: 3.0, 5: 1.0}
    for order in (np.arange(7), rng.permutation(7), rng.permutation(7)):
        relevance = {int(np.flatnonzero(order == d)[0]): grade for d, grade in grades.items()}
        ((ranks, found),) = retrieval.ranks(query, vectors[order], [relevance])
        # twins 1 and 3 are wrong and come first, then the grade of 1, then that of 3;
        # of the far ones the right one is last
        assert sorted(zip(ranks.tolist(), found.tolist(), strict=True)) == [
            (3, 1.0),
            (4, 3.0),
            (7, 1.0),
        ]


def test_records_by_either_name_and_what_says_the_same_is_there_once(tmp_path):
    picture(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "r.jsonl",
        {"query": "x", "document": ["one", "two"], "negative": "three"},
        {
            "anchor": "x",
            "positive": {"image_path": "a.png"},
            "negatives": ["one", {"text": "three"}],
        },
        {"query": {"text": "y"}, "document": "three"},
    )
    queries, documents, relevance = local_files.read_records(path, None, LeftOut())
    image = ({"type": "image", "image": str(tmp_path / "a.png")},)
    assert queries == [{"text": "x"}, {"text": "y"}]
    assert documents == [{"text": "one"}, {"text": "three"}, {"text": "two"}, image]
    assert relevance == [{0: 1.0, 2: 1.0, 3: 1.0}, {1: 1.0}]
    numbers = local_tasks.evaluate_and_write(encode, "retrieval", path, tmp_path / "out")
    assert (numbers["queries"], numbers["documents"]) == (2, 4)
    assert numbers["recall_at_5"] == numbers["hit_at_10"] == 1


def beir(folder, qrels="q1\td1\t2\nq1\td2\t0\nq2\t7\t1\n"):
    picture(folder / "a.png")
    write_lines(
        folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"question {i}"} for i in (1, 2, 3))
    )
    write_lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "Rain", "text": "falls"},
        {"_id": "d2", "title": "", "text": "Snow"},
        {"_id": 7, "image": "a.png", "title": "A picture"},
    )
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_a_folder_as_beirs(tmp_path):
    queries, documents, relevance = local_files.read_beir(beir(tmp_path), None, LeftOut())
    assert queries == [{"text": "question 1"}, {"text": "question 2"}]  # nobody judged the third
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    assert documents == [
        {"text": "Rain falls"},
        {"text": "Snow"},
        (image, {"type": "text", "text": "A picture"}),
    ]
    assert relevance == [{0: 2.0}, {2: 1.0}]
    (tmp_path / "qrels.tsv").unlink()
    write_lines(
        tmp_path / "qrels.jsonl", {"query-id": "q1", "corpus-id": "d1", "score": 2, "more": 1}
    )
    assert local_files.read_beir(tmp_path, None, LeftOut())[2] == [{0: 2.0}]


# ---- STS

PAIRS = [('a "b', "c, d", 5.0), ("e", "f", 2.5), ("g", "h", 4.0), ("i", "j", 2.5)]


@pytest.mark.parametrize("layout", ["csv", "csv with a header", "tsv", "jsonl"])
def test_sts_is_scipys(tmp_path, layout):
    rows = [(a, b, str(score)) for a, b, score in PAIRS]
    options, path = {}, tmp_path / f"pairs.{layout.split()[0]}"
    if layout.startswith("csv"):
        text = "".join(
            '"{}","{}",{}\n'.format(*(cell.replace('"', '""') for cell in row)) for row in rows
        )
        if "header" in layout:
            text, options = "one,two,how much\n" + text, {"columns": "one,two,how much"}
        path.write_text(text)
    elif layout == "tsv":  # a quote is a letter
        path.write_text("id\tA\tB\tS\n" + "".join("0\t{}\t{}\t{}\n".format(*row) for row in rows))
        options = {"columns": "A,B,S"}
    else:
        write_lines(path, *({"a": a, "b": {"text": b}, "score": score} for a, b, score in PAIRS))
    numbers = local_tasks.evaluate_and_write(encode, "sts", path, tmp_path / "out", **options)
    a, b = (encode([{"text": row[i]} for row in PAIRS]).astype(np.float64) for i in (0, 1))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # 1, but for float32's rounding
    cosines, scores = (a * b).sum(axis=1) / lengths, [row[2] for row in PAIRS]
    assert abs(numbers["spearman"] - spearmanr(cosines, scores).statistic) < 1e-9
    assert abs(numbers["pearson"] - pearsonr(cosines, scores).statistic) < 1e-9
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["spearman"]
        == numbers["spearman"]
    )
    assert Image.open(tmp_path / "out" / "sts.png").size > (100, 100)


# ---- zero-shot classification


@pytest.mark.parametrize("layout", ["folders", "names", "jsonl"])
def test_zeroshot_is_sklearns(tmp_path, layout):
    labels = ["a_cat", "b", "c", "d", "e", "f", "g"]
    truth = np.random.default_rng(2).integers(0, 7, 60)
    truth[:7] = range(7)
    data, options, items = tmp_path / "data", {"template": ["a photo of a {}.", "{}, drawn"]}, []
    for i, target in enumerate(truth):
        where = (
            f"{labels[target]}/{i:02}.png"
            if layout == "folders"
            else f"{i:02}-{labels[target]}.png"
        )
        picture(data / where, i)
        items.append(
            (f"{labels[target]}/{i:02}" if layout == "folders" else i, data / where, target)
        )
    path = data
    if layout == "names":
        options["label_pattern"] = r"\d+-(\w+)\.png"
    if layout == "jsonl":
        path = write_lines(
            data / "l.jsonl", *({"label": labels[t], "image": file.name} for _, file, t in items)
        )
    numbers = local_tasks.evaluate_and_write(encode, "zeroshot", path, tmp_path / "out", **options)
    order = sorted(items)
    target = [t for *_, t in order]
    vectors = encode([({"type": "image", "image": str(file)},) for _, file, _ in order])
    said = [label.replace("_", " ") for label in labels]
    prompts = [
        encode([{"text": form.format(x)} for x in said])
        for form in ("a photo of a {}.", "{}, drawn")
    ]
    scores = vectors @ unit(sum(prompts)).T
    top = np.argsort(-scores, axis=1)
    assert abs(numbers["accuracy_at_1"] - np.mean(top[:, 0] == target)) < 1e-9
    assert (
        abs(
            numbers["accuracy_at_5"]
            - np.mean([t in row[:5] for t, row in zip(target, top, strict=True)])
        )
        < 1e-9
    )
    assert abs(numbers["balanced_accuracy"] - balanced_accuracy_score(target, top[:, 0])) < 1e-9
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            local_tasks,
            "plot_confusion",
            lambda _, subject, counts, names: drawn.append((counts, names)),
        )
        local_tasks.evaluate(encode, "zeroshot", path, **options).plot(None, "")
    np.testing.assert_array_equal(drawn[0][0], confusion_matrix(target, top[:, 0]))
    assert drawn[0][1] == labels


def test_a_model_that_tells_nothing_apart_gets_nothing(tmp_path):
    path = write_lines(
        tmp_path / "l.jsonl", *({"label": i % 3, "text": f"text {i}"} for i in range(9))
    )

    def same(inputs):
        return np.ones((len(inputs), 4), np.float32) / 2

    numbers = local_tasks.evaluate(same, "zeroshot", path).numbers
    assert numbers["accuracy_at_1"] == numbers["balanced_accuracy"] == 0
    pairs = write_lines(
        tmp_path / "p.jsonl", *({"a": f"{i}", "b": "x", "score": i} for i in range(3))
    )
    with pytest.raises(LcoError, match="all pairs have the same cosine"):
        local_tasks.evaluate(same, "sts", pairs)


def test_the_template_follows_what_the_items_hold(tmp_path):
    for i, name in enumerate(("dog/1.png", "cat/2.png")):
        picture(tmp_path / name, i)
    asked = []
    local_tasks.evaluate(
        lambda inputs: asked.extend(inputs) or encode(inputs), "zeroshot", tmp_path
    )
    assert asked[2:] == [{"text": "a photo of a cat"}, {"text": "a photo of a dog"}]


# ---- mistakes


@pytest.mark.parametrize(
    ("kind", "options", "content", "says"),
    [
        ("sts", {}, "a,b,3\nc,d,3\n", "2 pairs and fewer than two different scores"),
        (
            "sts",
            {},
            "a,b,score\nc,d,3\n",
            r"in\.csv:1: the score is no number \(if this is a header",
        ),
        ("sts", {}, "a,b,1\nc,d,nan\n", r"in\.csv:2: the score is nan"),
        ("sts", {}, "a,b,1\nc,2\n", r"in\.csv:2 has no '2'; it has 0, 1"),
        ("sts", {}, "a,,1\n", r"in\.csv:1: 1 is empty"),
        (
            "sts",
            {"columns": "x,y,score"},
            "a,b,score\nc,d,3\n",
            r"in\.csv:2 has no 'x'; it has a, b, score",
        ),
        ("sts", {"columns": "x,y"}, "", "name three"),
        ("sts", {"template": "{}"}, "", "evaluation of kind sts has the unknown key 'template'"),
        ("anything", {}, "", "it is one of: retrieval, sts, zeroshot"),
        ("retrieval", {}, '{"query": "x"}\n', r"in\.jsonl:1: positive is empty"),
        (
            "retrieval",
            {},
            '{"query": "x", "document": {"image": "no.png"}}\n',
            r"in\.jsonl:1: .* there is no file",
        ),
        ("retrieval", {}, "\n", "holds no record"),
        ("zeroshot", {}, '{"label": "a", "text": "x"}\n', r"has 1 class \(a\)"),
        ("zeroshot", {}, '{"text": "x"}\n', r"in\.jsonl:1: the input has no field 'label'"),
        ("sts", {}, "a,b,1\n" * 2 + "\n", "2 pairs and fewer"),
        (
            "zeroshot",
            {"template": "a"},
            '{"label": 1, "text": "x"}\n{"label": 2, "text": "y"}\n',
            r"no \{\}",
        ),
    ],
)
def test_mistakes_are_sentences(tmp_path, kind, options, content, says):
    path = tmp_path / f"in.{'csv' if kind == 'sts' else 'jsonl'}"
    path.write_text(content)
    with pytest.raises(LcoError, match=says) as error:
        local_tasks.evaluate_and_write(encode, kind, path, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_folders_are_sentences(tmp_path):
    for qrels, says in (
        ("q9\td1\t1\n", r"qrels\.tsv:2: .*queries\.jsonl has no _id 'q9'"),
        ("q1\td1\t1\nq1\td9\t1\n", r"qrels\.tsv:3: .*corpus\.jsonl has no _id 'd9'"),
        ("q1\td1\t0\n", "no score above 0"),
    ):
        with pytest.raises(LcoError, match=says):
            local_tasks.evaluate(encode, "retrieval", beir(tmp_path / "beir", qrels))
    with pytest.raises(LcoError, match=r"cannot be read: No such file"):
        local_tasks.evaluate(encode, "zeroshot", tmp_path / "none")
    picture(tmp_path / "c" / "dog" / "1.png")
    (tmp_path / "c" / "cat").mkdir()
    with pytest.raises(LcoError, match=r"the class .*cat holds no image"):
        local_tasks.evaluate(encode, "zeroshot", tmp_path / "c")
    with pytest.raises(LcoError, match=r"1\.png does not match the label pattern"):
        local_tasks.evaluate(encode, "zeroshot", tmp_path / "c", label_pattern=r"(\w+)\.jpg")
    with pytest.raises(LcoError, match="no regular expression with a group"):
        local_tasks.evaluate(encode, "zeroshot", tmp_path / "c", label_pattern=r"\w+\.png")
    picture(tmp_path / "c" / "2.png")
    with pytest.raises(LcoError, match=r"2\.png lies in no folder of a class"):
        local_tasks.evaluate(encode, "zeroshot", tmp_path / "c")


@pytest.mark.slow
def test_a_model_measured_on_images_and_texts(tiny, tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    pairs = [{"query": {"image": f"{i}.png"}, "document": f"picture number {i}"} for i in range(4)]
    numbers = local_tasks.evaluate_and_write(
        tiny.encode, "retrieval", write_lines(tmp_path / "r.jsonl", *pairs), tmp_path / "out"
    )
    assert 0 < numbers["ndcg_at_10"] <= 1
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["results.json", "retrieval.png"]


# ---- what is left out


class Skipping:
    """`encode` of a model that cannot read some inputs, as `evaluate.py` calls it."""

    def __init__(self, *unreadable):
        self.unreadable = unreadable
        self.left_out = LeftOut(skips=True)

    def __call__(self, inputs):
        vectors = encode(inputs)
        for i, one in enumerate(inputs):
            if any(part in repr(one) for part in self.unreadable):
                self.left_out.inputs[i] = f"input {i} is torn"
                vectors[i] = np.nan
        return vectors

    def numbers(self, kind, path, out, **options):
        return local_tasks.evaluate_and_write(self, kind, path, out, self.left_out, **options)


def check_written(out, numbers, skipped, others=None):
    """Results have the numbers and the counts; the reasons lie beside them."""
    results = json.loads((out / "results.json").read_text())
    assert {name: results[name] for name in numbers} == numbers
    assert results["skipped"] == len(skipped)
    assert results["left out"] == (others or {})
    path = out / "results.json.skipped.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    reasons = [json.loads(line)["reason"] for line in lines]
    for reason, words in zip(reasons, skipped, strict=True):
        assert words in reason


def test_skipped_items_of_zeroshot_do_not_count(tmp_path):
    """The numbers are those of the folder without them; all else is counted."""
    data, clean = tmp_path / "data", tmp_path / "clean"
    for i in range(24):
        for root in (data, clean):
            picture(root / "abcd"[i % 4] / f"{i:02}.png", i)
    for name in ("a/notes.txt", "b/x.svg", "b/y.svg", "c/.hidden"):
        (data / name).write_bytes(b"?")
    picture(data / "00.png")  # of no class
    (clean / "a" / "04.png").unlink()
    skipping = Skipping("a/04.png")
    numbers = skipping.numbers("zeroshot", data, tmp_path / "out")

    def as_named_there(inputs):
        """The vectors that these inputs have in the other folder."""
        return encode(
            [
                one
                if isinstance(one, dict)
                else ({**one[0], "image": one[0]["image"].replace("/clean/", "/data/")},)
                for one in inputs
            ]
        )

    want = local_tasks.evaluate(as_named_there, "zeroshot", clean).numbers
    assert numbers == want
    assert numbers["items"] == 23
    others = {".svg": 2, ".txt": 1, "hidden": 1}
    check_written(tmp_path / "out", numbers, ["lies in no folder of a class", "is torn"], others)
    words = skipping.left_out.in_words(tmp_path / "out" / "results.json")
    assert words[0].startswith("2 skipped: ")
    assert words[1] == "left out: .svg 2, .txt 1, hidden 1"
    with pytest.raises(LcoError, match="lies in no folder"):
        local_tasks.evaluate(encode, "zeroshot", data)


def test_a_class_whose_items_were_skipped_has_no_recall(tmp_path):
    path = write_lines(
        tmp_path / "l.jsonl",
        *({"label": label, "text": f"{label} {i}"} for label in "abc" for i in range(3)),
        {"text": "no label"},
        {"label": "a"},
    )
    path.write_bytes(path.read_bytes() + b"{torn")
    numbers = Skipping("b 0", "b 1", "b 2").numbers("zeroshot", path, tmp_path / "out")
    assert numbers["items"] == 6
    items = [{"text": f"{label} {i}"} for label in "ac" for i in range(3)]
    scores = encode(items) @ encode([{"text": label} for label in "abc"]).T
    hit = (scores.argmax(axis=1) == [0, 0, 0, 2, 2, 2]).reshape(2, 3)
    assert numbers["balanced_accuracy"] == pytest.approx(hit.mean(axis=1).mean())
    malformed = ["no field 'label'", "nothing to embed", "not valid JSON"]
    check_written(tmp_path / "out", numbers, [*malformed, *["is torn"] * 3])


def test_skipped_pairs_do_not_count(tmp_path):
    rows = [("a", "b", 1.0), ("c", "d", 2.0), ("torn", "f", 3.0), ("g", "h", 4.0), ("i", "j", 0.5)]
    path = write_lines(tmp_path / "p.jsonl", *({"a": a, "b": b, "score": x} for a, b, x in rows))
    bad = ['{"a": "x", "b": "y", "score": "nan"}', '{"a": "x", "score": 1}', '"text"', '{"a": ']
    path.write_text(path.read_text() + "\n".join(bad))
    numbers = Skipping("torn").numbers("sts", path, tmp_path / "out")
    kept = [row for row in rows if row[0] != "torn"]
    a, b = (encode([{"text": row[i]} for row in kept]).astype(np.float64) for i in (0, 1))
    wanted = spearmanr((a * b).sum(axis=1), [row[2] for row in kept]).statistic
    assert numbers["pairs"] == 4
    assert numbers["spearman"] == pytest.approx(wanted)
    reasons = ["the score is nan", "has no 'b'", "no names at all", "not valid JSON", "is torn"]
    check_written(tmp_path / "out", numbers, reasons)
    with pytest.raises(LcoError, match=r"fewer than two different scores.*; 8 skipped, the first"):
        Skipping("torn", "a", "c", "g").numbers("sts", path, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_skipped_documents_are_no_candidates(tmp_path):
    """Nor is a query asked whose documents are all skipped."""
    records = [{"query": f"q{i}", "document": [f"d{i}", f"e{i}"]} for i in range(5)]
    path = write_lines(
        tmp_path / "r.jsonl", *records, {"query": "x"}, {"query": "y", "document": 5}
    )
    numbers = Skipping("q1", "d2", "d3", "e3").numbers("retrieval", path, tmp_path / "out")
    clean = [{"query": "q0", "document": ["d0", "e0"], "negative": ["d1", "e1"]}]
    clean += [{"query": "q2", "document": "e2"}, {"query": "q4", "document": ["d4", "e4"]}]
    wanted = write_lines(tmp_path / "clean.jsonl", *clean)
    assert numbers == local_tasks.evaluate(encode, "retrieval", wanted).numbers
    assert (numbers["queries"], numbers["documents"]) == (3, 7)
    others = {"queries whose documents were skipped": 1}
    check_written(tmp_path / "out", numbers, ["is empty", "document", *["torn"] * 4], others)


def test_skipped_rows_of_beirs_folder(tmp_path):
    folder = beir(tmp_path / "beir", "q1\td1\t2\nq9\td1\t1\nq2\td9\t1\nq2\t7\tx\nq2\t7\t1\n")
    for name in ("queries", "corpus"):
        with open(folder / f"{name}.jsonl", "a") as file:
            file.write('{"_id": "gone", "image": "gone.png"}\n{"text": "no id"}\n')
    numbers = Skipping().numbers("retrieval", folder, tmp_path / "out")
    reasons = [*["no file", "no field '_id'"] * 2]
    reasons += ["no _id 'q9'", "no _id 'd9'", "the score is no number"]
    check_written(tmp_path / "out", numbers, reasons, {"queries without a relevant document": 1})


# ---- numbers that are none


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
@pytest.mark.parametrize("kind", ["retrieval", "sts", "zeroshot"])
def test_vectors_without_a_direction_are_the_models_fault(tmp_path, kind, bad):
    """NaN compares with nothing, and would rank first."""
    lines = [
        {"query": f"{i}", "document": f"d{i}", "a": f"{i}", "b": "x", "score": i, "label": i}
        for i in range(4)
    ]
    if kind == "zeroshot":
        lines = [{"label": line["label"], "text": line["a"]} for line in lines]
    path = write_lines(tmp_path / "in.jsonl", *lines)

    def broken(inputs):
        vectors = encode(inputs)
        vectors[2] = bad
        return vectors

    with pytest.raises(
        LcoError, match=r"^the model made a vector that is not finite, or of length"
    ):
        local_tasks.evaluate_and_write(broken, kind, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite_are_the_files_fault(tmp_path):
    pairs = [{"a": f"{i}", "b": "x", "score": 1.7e308 - i * 1e307} for i in range(4)]
    with pytest.raises(LcoError, match=r"^pearson of .*p\.jsonl is nan, which is no score: all v"):
        local_tasks.evaluate(encode, "sts", write_lines(tmp_path / "p.jsonl", *pairs))
    qrels = "q1\td1\t1.7e308\nq1\td2\t1.7e308\nq1\t7\t1.7e308\n"
    with pytest.raises(LcoError, match=r"^ndcg_at_10 of .*beir is nan, .* it holds are too large$"):
        local_tasks.evaluate(encode, "retrieval", beir(tmp_path / "beir", qrels))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_small_vectors_refuse_what_one_evaluation_refuses(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        *({"a": f"{i}", "b": "x", "score": 1.7e308 - i * 1e307} for i in range(4)),
    )
    out = tmp_path / "out"
    with pytest.raises(LcoError, match=r"^pearson of .*p\.jsonl is nan, which is no score: all v"):
        compare_and_write(encode, "sts", path, out)
    qrels = "q1\td1\t1.7e308\nq1\td2\t1.7e308\nq1\t7\t1.7e308\n"
    with pytest.raises(LcoError, match=r"^ndcg_at_10 of .*beir is nan, .* it holds are too large$"):
        compare_and_write(encode, "retrieval", beir(tmp_path / "beir", qrels), out)
    with pytest.raises(LcoError, match="holds scored pairs, and goes with the kind sts"):
        compare_and_write(encode, "retrieval", "builtin:stsb-dev", out)
    with pytest.raises(LcoError, match=r"none\.jsonl cannot be read"):
        compare_and_write(encode, "sts", tmp_path / "none.jsonl", out)
    with pytest.raises(LcoError, match="evaluation of kind sts has the unknown key 'template'"):
        compare_and_write(encode, "sts", path, out, template="{}")
    assert not out.exists()


def test_a_class_whose_templates_cancel_out_is_an_error(tmp_path):
    path = write_lines(tmp_path / "l.jsonl", *({"label": i % 2, "text": f"{i}"} for i in range(4)))

    def opposite(inputs):
        vectors = encode(inputs)
        vectors[6] = -vectors[4]  # the second template of the first class
        return vectors

    with pytest.raises(LcoError, match=r"^the class '0' has no direction: .* other templates$"):
        local_tasks.evaluate(opposite, "zeroshot", path, template=["a {}", "b {}"])


@pytest.mark.slow
def test_the_command_skips_and_counts(tmp_path, run_command):
    """Of a folder with a torn picture, as without it."""
    for i in range(4):
        for root in ("data", "clean"):
            picture(tmp_path / root / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "data" / "a" / "torn.png").write_bytes(b"torn")
    (tmp_path / "data" / "a" / "notes.txt").touch()

    def run(root, *flags):
        out = tmp_path / f"out-{root}"
        command = ["--model=builtin:tiny", "--kind=zeroshot", f"--output={out}"]
        return out, *run_command(evaluate, *command, f"--input={tmp_path / root}", *flags)

    assert run("data")[1] == 2
    out, status, said, err = run("data", "--on-error=skip")
    assert status == 0, err
    results = json.loads((out / "results.json").read_text())
    clean, *_ = run("clean")
    wanted = json.loads((clean / "results.json").read_text())
    for name in ("accuracy_at_1", "balanced_accuracy", "items"):
        assert results[name] == pytest.approx(wanted[name])
    assert (results["skipped"], results["left out"]) == (1, {".txt": 1})
    listed = out / "results.json.skipped.jsonl"
    assert said.splitlines()[-2:] == [
        f"1 skipped: {listed} says which inputs were skipped, and why",
        "left out: .txt 1",
    ]
    assert "torn.png" in listed.read_text()
