"""`python -m lco_jax.evaluate`: SeaDoc, benchmarks, resuming; stored vectors and the report."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import reference  # noqa: F401, before mteb, which imports transformers
from PIL import Image, ImageDraw, ImageFont

from lco_jax import OmniEmbedder, evaluate
from lco_jax.core.errors import LcoError
from lco_jax.core.extras import install_line
from lco_jax.core.files import ASSETS, read_json
from lco_jax.evaluation.report import TaskScore, write_report
from lco_jax.evaluation.stored_vectors import StoredVectors, digest

ROOT = Path(__file__).parent.parent
LINES = {  # "the newspaper reports", in the scripts of SeaDoc
    "lo": "ໜັງສືພິມລາຍງານ",
    "th": "หนังสือพิมพ์รายงาน",
    "vi": "Tờ báo đưa tin đặc biệt",
    "ms": "Surat khabar melaporkan",
}
PAGES = 4  # of each language


def page(language, number):
    """PNG."""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    if language == "th":
        import fontpkg_noto_sans_thai

        (font,) = fontpkg_noto_sans_thai.ROOT.rglob("*.ttf")
    image = Image.new("RGB", (112, 84), "white")
    font = ImageFont.truetype(font, 10 + number)
    ImageDraw.Draw(image).text((4, 4 + 9 * number), f"{LINES[language]} {number}", "black", font)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_tables(folder, corpus, query, qrels):
    for name, rows in (("corpus", corpus), ("query", query), ("qrels", qrels)):
        (folder / name).mkdir(parents=True)
        pa.parquet.write_table(
            pa.Table.from_pylist(rows), folder / name / "test-00000-of-00001.parquet"
        )
    return folder


@pytest.fixture(autouse=True)
def tables_elsewhere(tmp_path_factory, monkeypatch):
    """`datasets` stores a copy of what it reads; the tests' copies go to a folder of their own."""
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )


@pytest.fixture(scope="module")
def seadoc(tmp_path_factory):
    """A folder as SeaDoc is published.

    One query has two pages, one of them less relevant, and one query has none.
    """
    names = [(language, number) for language in LINES for number in range(PAGES)]
    corpus = [
        {
            "id": f"{language}_{number}",
            "modality": "image",
            "image": {"bytes": page(language, number), "path": None},
        }
        for language, number in names
    ]
    query = [
        {
            "id": f"q{i}",
            "modality": "text",
            "text": f"What does newspaper {number} report, in {language}?",
        }
        for i, (language, number) in enumerate(names)
    ]
    qrels = [
        {"query-id": f"q{i}", "corpus-id": corpus[i]["id"], "score": 1}
        for i in range(len(names) - 1)
    ]
    qrels += [
        {"query-id": "q3", "corpus-id": "lo_0", "score": 2},
        {"query-id": "q4", "corpus-id": "lo_0", "score": 0},
    ]
    return write_tables(tmp_path_factory.mktemp("data") / "seadoc", corpus, query, qrels)


@pytest.fixture
def run(monkeypatch, run_command, load):
    """The command, which loads a checkpoint once a session."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    return functools.partial(run_command, evaluate)


def scores_of(out, task="SeaDoc"):
    (file,) = out.glob(f"results/*/*/experiments/*/{task}.json")
    return json.loads(file.read_text())["scores"]["test"][0]


def ndcg_at_10(similarity, gains):
    """Järvelin and Kekäläinen 2002, with linear gains as trec_eval. Both [pages]."""
    discounts = 1 / np.log2(np.arange(2, 12))
    found = gains[np.argsort(-similarity, kind="stable")][:10]
    return (found * discounts[: len(found)]).sum() / (
        np.sort(gains)[::-1][:10] * discounts[: len(found)]
    ).sum()


@pytest.mark.slow
def test_seadoc(run, tiny, seadoc, tmp_path):
    status, out, _ = run(f"--seadoc={seadoc}", f"--output={tmp_path}", "--part-size=7")
    assert status == 0
    assert "31 inputs embedded, 0 found in" in out  # a query without an answer is not asked
    corpus, query, qrels = (
        pa.parquet.read_table(seadoc / name).to_pylist() for name in ("corpus", "query", "qrels")
    )
    pages = tiny.encode([{"image": row["image"]["bytes"]} for row in corpus])
    vectors = tiny.encode([{"text": row["text"]} for row in query], max_length=300)
    gains, place = (
        np.zeros((len(query), len(corpus))),
        {row["id"]: i for i, row in enumerate(corpus)},
    )
    for row in qrels:
        gains[int(row["query-id"][1:]), place[row["corpus-id"]]] = row["score"]
    want = [ndcg_at_10(vectors[i] @ pages.T, gains[i]) for i in range(len(query) - 1)]
    got = scores_of(tmp_path)
    assert got["ndcg_at_10"] == pytest.approx(np.mean(want), abs=1e-5)
    assert got["ndcg_at_10"] == got["main_score"] < 1
    for i, name in enumerate(("lao", "thai", "vietnamese", "malay")):
        of_language = want[PAGES * i : PAGES * (i + 1)]
        assert got[f"ndcg_at_10_{name}"] == pytest.approx(np.mean(of_language), abs=1e-6)
    table = (tmp_path / "results.md").read_text()
    assert f"| SeaDoc | DocumentUnderstanding | {100 * np.mean(want):.1f} |" in table
    assert f"| SeaDoc, thai | | {100 * got['ndcg_at_10_thai']:.1f} |" in table
    assert Image.open(tmp_path / "results.png").width > 500
    (meta,) = tmp_path.glob("results/local__builtin:tiny/*/experiments/*/model_meta.json")
    caps = read_json(meta)["experiment_kwargs"]
    assert caps["max_frames"] == 64
    assert (caps["fps"], caps["max_audio_seconds"], caps["max_length"]) == (2.0, 300.0, 300)

    # what is done is not done again; a torn result, or data that changed, is
    (file,) = tmp_path.glob("results/*/*/experiments/*/SeaDoc.json")
    made = file.stat().st_mtime_ns
    assert "0 inputs embedded, 0 found" in run(f"--seadoc={seadoc}", f"--output={tmp_path}")[1]
    assert file.stat().st_mtime_ns == made
    file.write_text(file.read_text()[:300])
    assert "0 inputs embedded, 31 found" in run(f"--seadoc={seadoc}", f"--output={tmp_path}")[1]
    assert scores_of(tmp_path) == got
    other = write_tables(tmp_path / "other", corpus, query, qrels[:1])
    assert "0 inputs embedded, 17 found" in run(f"--seadoc={other}", f"--output={tmp_path}")[1]
    assert scores_of(tmp_path)["ndcg_at_10"] == pytest.approx(want[0], abs=1e-5)


CHILD = """
import os, signal
from benchmarks.peer import import_torchvision
import_torchvision()
from lco_jax import evaluate
from lco_jax.core.errors import run_main
from lco_jax.evaluation.stored_vectors import StoredVectors

stored, add = [], StoredVectors.add
def add_and_die(self, keys, vectors):
    if len(stored) >= 18:  # amid the next addition
        self._file.execute("INSERT INTO vectors VALUES (?, ?)", (keys[0], b"torn"))
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, keys, vectors)
    stored.extend(keys)
StoredVectors.add = add_and_die
run_main(evaluate.main)
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes(run, seadoc, tmp_path):
    flags = [f"--seadoc={seadoc}", "--part-size=6"]
    command = [
        sys.executable,
        "-c",
        CHILD,
        "--model=builtin:tiny",
        *flags,
        f"--output={tmp_path / 'killed'}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    assert not list((tmp_path / "killed").rglob("SeaDoc.json"))
    status, out, _ = run(*flags, f"--output={tmp_path / 'killed'}")
    assert status == 0
    stored = 15 + 6  # the queries, and the pages up to the kill
    assert f"{31 - stored} inputs embedded, {stored} found in" in out
    assert run(*flags, f"--output={tmp_path / 'whole'}")[0] == 0
    assert scores_of(tmp_path / "killed") == scores_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_benchmark_goes_on_where_a_task_cannot(run, tmp_path, monkeypatch):
    import mteb
    from mteb import mocks

    tasks = (
        mocks.MockSTSTask(),
        mocks.MockAudioReranking(),
        mocks.MockZeroShotClassificationTask(),
    )
    benchmark = mteb.Benchmark(name="MIEB(lite)", tasks=tasks, description="")
    monkeypatch.setattr(mteb, "get_benchmark", {"MIEB(lite)": benchmark}.__getitem__)
    status, out, err = run("--benchmark=MIEB(lite)", f"--output={tmp_path}")
    assert status == 1
    assert "MockAudioReranking: not measured: " in err
    assert "'audio'" in err
    assert f"2 of 3 tasks measured: {tmp_path}/results.md" in out
    table = (tmp_path / "results.md").read_text()
    assert "| LCO-Embedding-Omni-7B (multimodal) | 68.8 |" in table
    assert "| **local/builtin:tiny, 2 tasks only** |" in table
    sts = scores_of(tmp_path, "MockSTSTask")["main_score"]
    assert f"| MockSTSTask | STS | {100 * sts:.1f} |" in table


@pytest.mark.slow
def test_a_torn_page(run, tmp_path):
    corpus = [{"id": f"p{i}", "image": page("lo", i)[: 60 if i == 1 else None]} for i in range(3)]
    query = [{"id": f"q{i}", "text": f"page {i}"} for i in range(3)]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"p{i}", "score": 1} for i in range(3)]
    flags = [
        f"--seadoc={write_tables(tmp_path / 'data', corpus, query, qrels)}",
        f"--output={tmp_path / 'out'}",
    ]
    status, _, err = run(*flags)
    assert status == 1
    assert "SeaDoc: not measured: SeaDoc default test document, row 1: image of 60 bytes" in err
    for _ in range(2):  # measured, and read from what was
        assert run(*flags, "--on-error=skip")[0] == 0
        assert (
            "- skipped, with a vector of zeros: 1\n"
            in (tmp_path / "out" / "results.md").read_text()
        )


def test_names_of_tasks_and_benchmarks(run, tmp_path):
    status, _, err = run("--benchmark=MIEB(lit)", f"--output={tmp_path}")
    assert (status, err) == (
        2,
        "error: --benchmark: 'MIEB(lit)' not found. Did you mean: MIEB(lite)?\n",
    )
    status, _, err = run("--tasks=STS12,STSBenchmarc", f"--output={tmp_path}")
    assert (status, err) == (
        2,
        "error: --tasks: 'STSBenchmarc' not found. Did you mean: 'STSBenchmark'?\n",
    )


def test_without_mteb(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    status, _, err = run("--tasks=STS12", f"--output={tmp_path}")
    assert status == 2
    assert install_line("eval") in err


CORPUS = [
    {"id": "p1", "image": b"x", "language": "Lao"},
    {"id": "p2", "image": b"y", "language": "?"},
]
QUERY = [{"id": "q1", "text": "a"}, {"id": "q2", "text": "b"}]


@pytest.mark.parametrize(
    ("corpus", "query", "qrels", "said"),
    [
        (CORPUS, QUERY, [("q1", "p3", 1)], "qrels, row 0: its corpus-id 'p3' is not in corpus"),
        (
            CORPUS,
            QUERY,
            [("q1", "p1", 1), ("q3", "p1", 1)],
            "qrels, row 1: its query-id 'q3' is not in query",
        ),
        (CORPUS, QUERY, [("q1", "p1", 0)], "qrels has no score above 0"),
        (CORPUS, QUERY * 2, [("q1", "p1", 1)], "query has the id 'q1' twice"),
        (
            CORPUS,
            [{"id": "q1", "txt": "a"}],
            [("q1", "p1", 1)],
            "query has no column 'text'; it has id, txt",
        ),
    ],
)
def test_seadoc_tables_that_do_not_match(tmp_path, corpus, query, qrels, said):
    from lco_jax.evaluation.seadoc import SeaDoc

    qrels = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in qrels]
    with pytest.raises(LcoError) as raised:
        SeaDoc(str(write_tables(tmp_path / "data", corpus, query, qrels))).load_data()
    assert said in str(raised.value)


def test_languages_of_seadoc(tmp_path, caplog):
    from lco_jax.evaluation.seadoc import SeaDoc

    qrels = [{"query-id": f"q{i}", "corpus-id": f"p{i}", "score": 1} for i in (1, 2)]
    named = SeaDoc(str(write_tables(tmp_path / "named", CORPUS, QUERY, qrels)))
    named.load_data()
    assert named.language_of == {"q1": "lao", "q2": ""}
    assert named.task_specific_scores({q: {"ndcg_cut_10": 0.5} for q in ("q1", "q2")}) == {
        "ndcg_at_10_lao": 0.5
    }
    plain = [{"id": row["id"], "image": row["image"]} for row in CORPUS]
    unnamed = SeaDoc(str(write_tables(tmp_path / "unnamed", plain, QUERY, qrels)))
    unnamed.load_data()
    assert not any(unnamed.language_of.values())
    assert "one score is over all" in caplog.text
    (tmp_path / "named" / "data").mkdir()
    configs = []
    for name in ("corpus", "query", "qrels"):  # as a clone of the hub's may have them
        (tmp_path / "named" / name).rename(tmp_path / "named" / "data" / name)
        configs.append(f"- config_name: {name}\n  data_files: data/{name}/*.parquet\n")
    (tmp_path / "named" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    moved = SeaDoc(str(tmp_path / "named"))
    moved.load_data()
    assert (
        moved.dataset["default"]["test"]["corpus"]["id"]
        == named.dataset["default"]["test"]["corpus"]["id"]
    )
    (tmp_path / "unnamed" / "qrels" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(LcoError, match="has no folder qrels with parquet files"):
        SeaDoc(str(tmp_path / "unnamed")).load_data()


def test_vectors_are_stored_under_their_settings(tmp_path):
    keys = [digest({"text": str(i)}) for i in range(5)]
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    stored = StoredVectors(tmp_path, {"fps": 2})
    stored.add(keys[:2], vectors[:2])
    again = StoredVectors(tmp_path, {"fps": 2})  # of another process, say
    again.add(keys[1:3], vectors[1:3])
    assert [key in stored for key in keys] == [True, True, True, False, False]
    stored.close()
    np.testing.assert_array_equal(again.vectors([keys[2], keys[0], keys[2]]), vectors[[2, 0, 2]])
    assert again.zeros() == 0
    again.add(keys[3:], np.zeros((2, 8), np.float32))
    assert again.zeros() == 2
    assert keys[0] not in StoredVectors(tmp_path, {"fps": 1})


def test_digests_tell_contents_apart(tmp_path):
    file = tmp_path / "a.wav"
    file.write_bytes(b"sound")
    grey, array = Image.new("L", (2, 3)), np.zeros((2, 3), np.uint8)
    contents = [
        {"text": "a"}, {"text": "ab"}, {"text": ""}, {"text": "a", "image": b"b"},
        {"image": b"ab"}, {"image": [b"a", b"b"]}, {"image": [[b"a"], b"b"]},
        {"image": grey}, {"image": Image.new("L", (3, 2))}, {"image": grey.convert("RGB")},
        {"image": array}, {"image": array.T}, {"image": array.astype(np.int8)},
        {"audio": b"ab"}, {"audio": file},
        {"audio": {"array": array, "sampling_rate": 8000}},
        {"audio": {"array": array, "sampling_rate": 16000}},
    ]  # fmt: skip
    assert len({digest(content) for content in contents}) == len(contents)
    assert digest({"audio": file}) == digest({"audio": b"sound"})
    assert digest({"text": "a", "image": b"b"}) == digest({"image": b"b", "text": "a"})


def test_the_report_has_ours_beside_the_published(tmp_path):
    published = read_json(ASSETS / "published.json")["MIEB(lite)"]
    assert published["models"]["E5-V"] == 51.9
    found = [TaskScore(f"task {i}", "STS", 50.0 + i % 3) for i in range(published["tasks"])]
    write_report(tmp_path, "local/ours", "MIEB(lite)", found, {"fps": 2.0})
    lines = (tmp_path / "results.md").read_text().splitlines()
    ranked = [line.split("|")[1].strip() for line in lines[4 : lines.index("", 4)]]
    assert ranked[-2:] == ["E5-V", "**local/ours**"]  # 51.9 and 51.0
    assert "- fps: 2.0" in lines
    assert Image.open(tmp_path / "results.png").width > 500
    write_report(tmp_path, "local/ours", "tasks", [TaskScore("a", "STS", reason="gone")], {})
    assert "| a | STS | gone |" in (tmp_path / "results.md").read_text()
