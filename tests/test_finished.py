"""A finished run that is given again says so at once, and nothing else counts as finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lco_jax.training import cli
from lco_jax.training.finished import results_if_finished, table
from lco_jax.training.run import claim_workdir

ROOT = Path(__file__).parents[1]
RECALL = {"recall_at_1": 0.22, "mrr": 0.349, "candidates": 399}
RESULTS = {
    "steps": 62,
    "first_loss": 2.668,
    "last_loss": 0.159,
    "before": {"text": RECALL, "stsb-dev": {"spearman": 0.535}},
    "after": {
        "text": {**RECALL, "recall_at_1": 0.755, "mrr": 0.873},
        "stsb-dev": {"spearman": 0.722},
    },
}


def configured(folder, *flags):
    data = [f"--config.data.sources.bundled.path={folder / 'mine.jsonl'}", "--config.eval.path="]
    return ["--config=base", f"--output={folder / 'run'}", *data, *flags]


def parsed(folder, *flags):
    return cli.parse(["train", *configured(folder, *flags)], "").config


@pytest.fixture
def home(tmp_path):
    """The folder of a run that has ended, beside its data."""
    (tmp_path / "mine.jsonl").write_text('{"anchor": "a", "positive": "b"}\n')
    run = tmp_path / "run"
    for name in ("adapter", "merged"):
        (run / name).mkdir(parents=True)
    claim_workdir(run, parsed(tmp_path), 62, {"bundled": "1 records"}, "generative")
    (run / "results.json").write_text(json.dumps(RESULTS))
    return run


def test_it_is_known(home):
    assert results_if_finished(home, parsed(home.parent)) == RESULTS


@pytest.mark.parametrize(
    "flag",
    ["seed=1", "eval.path=assets:lab/text.jsonl", "export.merged=False", "train.epochs=2.0"],
)
def test_another_configuration_is_another_run(home, flag):
    assert results_if_finished(home, parsed(home.parent, f"--config.{flag}")) is None


def _rewritten(path):
    """As an editor saves: another file under that name, with the time of the old one."""
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_text(path.read_text())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "harm",
    {
        "data that changed": lambda run: _rewritten(run.parent / "mine.jsonl"),
        "a run that went on": lambda run: _rewritten(run / "config.json"),
        "no adapter": lambda run: (run / "adapter").rmdir(),
        "no merged model": lambda run: (run / "merged").rmdir(),
        "no results": lambda run: (run / "results.json").unlink(),
        "torn results": lambda run: (run / "results.json").write_text('{"steps": 6'),
        "other results": lambda run: (run / "results.json").write_text("{}"),
        "no configuration": lambda run: (run / "config.json").unlink(),
    }.items(),
    ids=lambda harm: harm[0],
)
def test_a_run_that_is_not_as_it_was_left_is_opened(home, harm):
    harm[1](home)
    assert results_if_finished(home, parsed(home.parent)) is None


@pytest.mark.parametrize("program", ["train", "pretrain"])
def test_it_says_so_without_jax(home, program):
    arguments = ["train", *configured(home.parent)]
    code = f"""
import sys
from importlib import import_module
sys.argv = {arguments}
assert import_module("lco_jax.{program}").main() == 0
assert not {{"jax", "transformers", "orbax", "grain"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, *shown = done.stdout.splitlines()
    assert first.startswith(f"{home} holds this very run, which is finished")
    assert shown[: len(table(RESULTS)) - 1] == table(RESULTS)[1:]
    assert f"adapter       {home}/adapter" in shown


def test_the_table_has_a_row_a_file():
    rows = [line.split("  ") for line in table(RESULTS) if line]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["held out", "before", "after"],
        ["text, 399 candidates: recall@1; MRR", "0.220; 0.349", "0.755; 0.873"],
        ["stsb-dev: Spearman", "0.535", "0.722"],
        ["training loss, first and last step", "2.668", "0.159"],
    ]


@pytest.mark.parametrize(
    ("results", "rows"),
    [
        ({"steps": 3, "first_loss": None, "last_loss": None}, []),
        (
            {"before": {"loss": 3.2}, "after": {"loss": 1.1}},
            ["loss of answers, nats a token", "3.200", "1.100"],
        ),
    ],
)
def test_the_table_of_other_results(results, rows):
    lines = [line for line in table(results) if line]
    assert [line.split("   ")[0] for line in lines[1:]] == rows[:1]
    assert all(cell in lines[-1] for cell in rows)
