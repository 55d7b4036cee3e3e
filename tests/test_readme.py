"""The README, pasted block by block: what it says, the programs do and print.

`bash` and `python` blocks run as they are. A `text` block is what the block before it prints. `sh`
blocks need large checkpoints, a download or files of the reader: their flags are checked alone.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lco_jax import OmniEmbedder, convert
from lco_jax.__main__ import VERBS
from lco_jax.training import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+")
TRAINING = ("train", "pretrain")
ROUNDING = 0.02  # what another processor's rounding may change of a number after training


class Block(NamedTuple):
    """A fenced block, and what the README says that it prints ("": nothing)."""

    language: str
    text: str
    printed: str


def blocks():
    found = [*BLOCK.findall(README), ("", "")]
    for (language, text), (next_language, next_text) in pairwise(found):
        if language != "text":
            yield Block(language, text, next_text if next_language == "text" else "")


def commands(language):
    """The words of each command in the blocks of a language; comments and installing left out."""
    for block in blocks():
        if block.language == language:
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


def program(words):
    """(the program, its arguments) of `lco VERB …` and `python -m lco_jax.VERB …`."""
    if words[0].endswith("lco"):
        return words[1], words[2:]
    assert words[1] == "-m", words
    return words[2].removeprefix("lco_jax."), words[3:]


PROGRAMS = [program(words) for words in commands("sh") if "pip" not in words[0]]


# ---- commands that need more than this machine has


def helped(monkeypatch, capsys, verb, *arguments):
    """What a program prints for --help."""
    monkeypatch.setattr(sys, "argv", [verb, *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(import_module(f"lco_jax.{verb}").main())
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("verb", "arguments"), [one for one in PROGRAMS if one[0] in TRAINING])
def test_a_training_command_is_understood(verb, arguments):
    """Every flag is read, with the configuration and the keys that it names."""
    values = cli.parse([verb, *arguments], "")
    assert values.config.name


@pytest.mark.parametrize(("verb", "arguments"), [one for one in PROGRAMS if one[0] not in TRAINING])
def test_a_command_has_the_flags_that_it_is_given(monkeypatch, capsys, verb, arguments):
    assert verb in VERBS
    text = helped(monkeypatch, capsys, verb, *[word for word in arguments[:1] if word == "soup"])
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    assert flags
    for flag in flags:
        assert re.search(rf"{flag}\b", text), flag


def test_the_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = extras["optional-dependencies"].keys()
    named = re.findall(r"(?:lco-jax|\.whl|'\.)\[([\w,-]+)\]", README)
    assert {"cuda12", "cuda13", "tpu", "test", "docs"} <= {*named}
    for one in named:
        assert set(one.split(",")) <= known, one


# ---- blocks that run


def fresh_folder(folder):
    """What a clone has that the blocks use, and a .venv whose programs are this environment's."""
    for name in ("lco_jax", "configs"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, start in (("python", ""), ("lco", "-m lco_jax ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {start}"$@"\n')
        (programs / name).chmod(0o755)


def run(block, folder):
    """What a block prints. Its installing is CI's (.ci/run runs the same lines)."""
    if block.language == "python":
        (folder / "block.py").write_text(block.text)
        command = [".venv/bin/python", "block.py"]
    else:
        script = re.sub(r"^python3 -m venv .* && (?=\.venv)", "", block.text)
        command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": ""},  # one device, as a reader has, and not eight
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=500,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_prints(output, promised):
    """Each promised line is printed, in this order; numbers may differ by `ROUNDING`."""
    lines = iter(output.splitlines())
    for line in promised.splitlines():
        words = NUMBER.sub("#", line)
        near = next((one for one in lines if NUMBER.sub("#", one) == words), None)
        assert near is not None, f"not printed: {line}\n{output}"
        for promise, number in zip(NUMBER.findall(line), NUMBER.findall(near), strict=True):
            assert float(number) == pytest.approx(float(promise), abs=ROUNDING), (line, near)


def numbers_of_the_first_command():
    """The table's rows: (before, after), each a list of numbers."""
    table = README[README.index("| what the first command prints") :].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        *_, before, after = row.strip("|").split("|")
        yield [[float(one) for one in cell.split(";")] for cell in (before, after)]


def assert_whole(folder, output, again, monkeypatch):
    """What a run said that it wrote is there and goes together, and convert writes it again."""
    for name in ("adapter", "merged", "loss.png", "similarity.png"):
        said = output.splitlines()[-1].split()[1:]
        assert f"{folder.name}/{name}" in output or name in {word.strip(",") for word in said}
        assert (folder / name).exists()
    results = json.loads((folder / "results.json").read_text())
    for kind in ("text", "image", "audio"):
        before, after = (results[when][kind]["mrr"] for when in ("before", "after"))
        assert 0 < before < after - 0.03 <= 1, kind
    scores = [results[when]["text"]["recall_at_1"] for when in ("before", "after")]
    line = "| text | recall@1 | 200 anchors, 399 candidates | {:.3f} | {:.3f} |".format(*scores)
    for name in ("adapter", "merged"):
        assert line in (folder / name / "README.md").read_text(), name
    texts = ["A man rides a horse.", "Two dogs are running."]
    merged = OmniEmbedder.from_pretrained(folder / "merged").encode(texts)
    adapted = OmniEmbedder.from_pretrained("builtin:lab", adapter=folder / "adapter").encode(texts)
    assert np.abs(merged - adapted).max() < 1e-5
    flags = [f"--workdir={folder}", f"--out={again}", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["convert", *flags])
    assert convert.main() == 0
    assert line in (again / "README.md").read_text()
    converted = OmniEmbedder.from_pretrained(again).encode(texts)
    assert np.abs(converted - merged).max() < 1e-6
    adapters = [folder / "adapter", folder / f"{again.name}-adapter"]
    first, second = (path / "adapter_model.safetensors" for path in adapters)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_the_blocks_run_one_after_another(tmp_path, monkeypatch):
    """The first of them is the main job: trained on text, it finds images and sounds."""
    fresh_folder(tmp_path)
    ran = []
    for block in blocks():
        if block.language in ("bash", "python") and "pytest" not in block.text:
            output = run(block, tmp_path)
            assert_prints(output, block.printed)
            if not ran:
                base = tmp_path / "runs" / "base"
                assert_whole(base, output, base / "export", monkeypatch)
            ran.append(block.language)
    assert ran.count("bash") >= 3
    assert "python" in ran
    results = json.loads((tmp_path / "runs/base/results.json").read_text())
    *retrieval, loss = numbers_of_the_first_command()
    for kind, promised in zip(("text", "image", "audio"), retrieval, strict=True):
        for when, numbers in zip(("before", "after"), promised, strict=True):
            found = results[when][kind]
            ours = [found["recall_at_1"], found["mrr"]][: len(numbers)]
            assert ours == pytest.approx(numbers, abs=ROUNDING), (kind, when)
    ours = [results["first_loss"], results["last_loss"]]
    assert ours == pytest.approx([loss[0][0], loss[1][0]], abs=ROUNDING)
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists()
