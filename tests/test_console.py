"""What programs say: how much, in which form, and that a bar's time is true."""

import json
import logging
import re
import subprocess
import sys
from datetime import datetime
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs import base
from lco_jax import __main__ as lco
from lco_jax.core import console
from lco_jax.core.errors import LcoError, run_main
from lco_jax.training.metrics import read_metrics
from lco_jax.training.reports import Pace, StepReports

ROOT = Path(__file__).parents[1]
logger = logging.getLogger("lco_jax.made_up")


@pytest.fixture
def run(monkeypatch, capsys):
    """(status, stdout, stderr) of a program with these flags."""

    def ran(program, *flags):
        monkeypatch.setattr(sys, "argv", ["program", *flags])
        with pytest.raises(SystemExit) as ended:
            run_main(program)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return ran


def program():
    assert sys.argv == ["program"], "a flag of the console reached the program"
    console.say("a result", {"loss": 0.5})
    for _ in console.progress_bar(range(2), desc="working"):
        pass
    with console.waiting("compiling"):
        logger.debug("a shape")
    logger.warning("a file is torn")
    console.say_metrics("step 3", {"step": 3, "loss": 0.25})
    logging.getLogger("absl").error("a library's traceback")
    logging.getLogger("other").warning("of another library")


@pytest.mark.parametrize(
    ("flags", "out", "there", "absent"),
    [
        ([], "a result\n", ["working", "compiling"], ["a shape", "step 3"]),
        (["--quiet"], "", [], ["working", "compiling", "a shape", "step 3"]),
        (["--verbose"], "a result\n", ["working", "debug: lco_jax.made_up: a shape"], ["step 3"]),
    ],
)
def test_how_much_is_said(run, flags, out, there, absent):
    status, said, err = run(program, *flags)
    assert (status, said) == (0, out)
    for words in (*there, "warning: a file is torn\n", "warning: other: of another library"):
        assert words in err
    for words in (*absent, "traceback"):
        assert words not in err


def test_json_is_an_object_a_line_on_stderr(run):
    status, out, err = run(program, "--log-format=json", "--verbose")
    assert (status, out) == (0, "")
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("INFO", "a result"),
        ("DEBUG", "a shape"),
        ("WARNING", "a file is torn"),
        ("INFO", "step 3"),
        ("WARNING", "of another library"),
    ]
    assert [line.get("metrics") for line in lines if line["level"] == "INFO"] == [
        {"loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]
    assert lines[1]["logger"] == "lco_jax.made_up"
    assert datetime.fromisoformat(lines[0]["time"]).utcoffset().total_seconds() == 0


@pytest.mark.parametrize("library", ["transformers", "huggingface_hub"])
def test_a_library_that_logs_by_itself_is_json_once(run, library):
    def warns():
        theirs = import_module(f"{library}.utils.logging")
        theirs.get_logger(f"{library}.made_up").warning("a flag is ignored")

    before = logging.getLogger(library).handlers, logging.getLogger(library).propagate
    _, out, err = run(warns, "--log-format=json")
    line = json.loads(err)
    assert (line["level"], line["message"], out) == ("WARNING", "a flag is ignored", "")
    assert before == (logging.getLogger(library).handlers, logging.getLogger(library).propagate)


@pytest.mark.parametrize(
    ("error", "status", "level"),
    [
        (LcoError("a.jsonl:7: bad"), 2, "ERROR"),
        (KeyboardInterrupt(), 130, "ERROR"),
        (ValueError("a bug"), 1, "CRITICAL"),
    ],
)
def test_how_a_program_ends_is_json_too(run, error, status, level):
    def fails():
        raise error

    ended, out, err = run(fails, "--log-format=json")
    (line,) = map(json.loads, err.splitlines())
    assert (ended, out, line["level"]) == (status, "", level)
    assert str(error) in line["message"] or line["message"] == "interrupted"
    assert ("Traceback" in line.get("traceback", "")) == (status == 1)


@pytest.mark.parametrize("flags", [["--quiet", "--verbose"], ["--log-format=xml"]])
def test_flags_that_cannot_be_are_one_sentence(run, flags):
    status, out, err = run(program, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert flags[-1].partition("=")[0] in err


def test_nothing_stays_as_a_program_has_set_it(run, capsys):
    before = (logging.getLogger("lco_jax").level, list(logging.getLogger().handlers))
    run(program, "--quiet", "--log-format=json")
    assert (logging.getLogger("lco_jax").level, list(logging.getLogger().handlers)) == before
    console.say("as ever")
    assert capsys.readouterr().out == "as ever\n"


def test_flags_that_exclude_each_other_are_json_where_json_was_asked_for(run):
    status, out, err = run(program, "--log-format=json", "--quiet", "--verbose")
    assert (status, out) == (2, "")
    assert "exclude each other" in json.loads(err)["message"]


@pytest.mark.parametrize("verb", lco.VERBS)
def test_every_program_takes_the_flags(run, verb):
    """Each ends at what is wrong beside them, in JSON; and help lists them."""
    main = import_module(f"lco_jax.{verb}").main
    status, out, err = run(main, "--quiet", "--log-format=json", "--no-such-flag=1")
    assert (status, out) == (2, "")
    (line,) = map(json.loads, err.splitlines())
    assert line["level"] == "ERROR"
    status, out, _ = run(main, "--help")
    assert status == 0
    for flag in ("--quiet", "--verbose", "--log-format", "--debug"):
        assert flag in out


# ---- the bar of training


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_the_time_that_is_left_is_true_after_three_steps(clock):
    """Compiling takes half a minute, a step half a second, and one more program ten seconds."""
    pace = Pace(clock)
    clock.now += 30
    pace.restart()
    assert pace.seconds is None
    for compiled in (False, False, True, False):
        clock.now += 10.5 if compiled else 0.5
        assert pace.step_ended(compiled) == (10.5 if compiled else 0.5)
        assert pace.seconds == pytest.approx(0.5)


def test_the_bar_says_compiling_until_the_first_step_is_under_way(tmp_path, capsys):
    made = StepReports(base.get_config(), tmp_path, 62, 0)
    assert "compiling:   0%" in capsys.readouterr().err
    for step in range(4):
        metrics = {"loss": 0.5, "finite": True, "tokens": 9, "programs": 1}
        made.record(step, metrics | {"record_losses": jnp.zeros(1)}, ("a.jsonl:1",))
    made.flush()
    made.close()
    last = capsys.readouterr().err.split("\r")[-1]
    shown = r"training: +6%\|.*\| 4/62 in 00:0\d, 00:0\d left, [\d,]+ records/s, loss 0\.500"
    assert re.fullmatch(shown, last.strip())
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_an_ordinary_run_says_little_and_warns_of_nothing(tmp_path):
    """Of the libraries, too: stdout has some ten lines, stderr bars alone."""
    command = [
        sys.executable, "-m", "lco_jax.train", "--config=tiny", f"--output={tmp_path / 'run'}",
        "--config.train.steps=3", "--config.optimizer.warmup_steps=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line]) <= 12
    bars = r"(held out, (before|after)|training|compiling).*"
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert [line for line in lines if not re.fullmatch(bars, line.strip())] == []
