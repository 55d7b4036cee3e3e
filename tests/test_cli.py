"""The command lines: what a user who mistypes sees, and `python -m lco_jax.embed` end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import reference

from lco_jax import LcoError, MediaConfig, embed
from lco_jax.core.errors import run_main
from lco_jax.flags import media_config
from lco_jax.train import main
from lco_jax.training import cli
from lco_jax.training.help import comments_of, comments_of_base
from lco_jax.training.values import RULES

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs" / "base.py"
CONFIG = f"--config={BASE}"
TEXTS = [text.replace("\n", " ") for text in reference.TEXTS]  # one line each


@pytest.fixture
def parse(monkeypatch):
    """cli.parse of some arguments, as `main` calls it."""

    def parsed(*args):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, args)])
        monkeypatch.delitem(
            sys.modules, "config_config", raising=False
        )  # where ml_collections puts a config file
        return cli.parse(sys.argv, "What the job does.")

    return parsed


@pytest.fixture
def refusal(parse):
    """The message of the LcoError that the arguments raise: one sentence, no traceback in it."""

    def message(*args):
        with pytest.raises(LcoError) as error:
            parse(*args)
        assert "\n" not in str(error.value)
        assert "Traceback" not in str(error.value)
        return str(error.value)

    return message


# ---- parsing


def test_keys_are_overridden(parse):
    values = parse(
        CONFIG,
        "--output",
        "runs/a",
        "--config.train.steps=7",
        "--config.optimizer.learning_rate=3",
        "--config.data.sources.bundled.path=my.jsonl",
        "--noconfig.export.merged",
    )
    assert values.output == "runs/a"
    assert values.config.train.steps == 7
    assert values.config.optimizer.learning_rate == 3.0
    assert values.config.data.sources.bundled.path == "my.jsonl"
    assert values.config.export.merged is False
    assert values.config.train.batch_size == parse("--config", BASE).config.train.batch_size


def test_earlier_names_of_flags_still_work(parse):
    earlier = parse(CONFIG, "--workdir=a", "--num_processes=2", "--process_id=1")
    now = parse(CONFIG, "--output=a", "--num-processes=2", "--process-id=1")
    for name in ("output", "num-processes", "process-id"):
        assert earlier[name].value == now[name].value


@pytest.mark.parametrize("spelling", [["--config=base:paper"], ["--config", "base:paper"]])
def test_a_configuration_has_a_name_anywhere(parse, monkeypatch, tmp_path, spelling):
    monkeypatch.chdir(tmp_path)
    values = parse(*spelling, "--config.train.steps=7")
    assert (values.config.name, values.config.lora.rank) == ("base", 64)
    assert values.config.train.steps == 7


def test_an_unknown_name_lists_those_there_are(refusal):
    message = refusal("--config=bass")
    assert "--config=bass" in message
    assert "base, cifar10, " in message
    assert "recipes" not in message


def test_what_is_parsed_is_the_argument(monkeypatch):
    """A caller's list, and not whatever sys.argv holds (a notebook's, pytest's)."""
    monkeypatch.setattr(sys, "argv", ["pytest", "-q"])
    assert cli.parse(["train", CONFIG, "--config.train.steps=7"], None).config.train.steps == 7


def test_config_is_needed(refusal):
    for args in ((), ("--output=runs/a",), ("--config.train.steps=3",)):
        assert refusal(*args).startswith("--config is missing")
    assert "--config" in refusal("--config")


@pytest.mark.parametrize(
    "path", ["configs/bass.py", "/no/such/folder/base.py", "configs/base", "configs/b.py:paper"]
)
def test_a_config_file_that_is_not_there_is_named(refusal, path):
    for args in ((f"--config={path}",), ("--config", path)):
        assert path.split(":")[0] in refusal(*args)


@pytest.mark.parametrize(
    "content",
    [
        "def get_config(:\n",
        "import no_such_module\n",
        "x = 1\n",
        "def get_config():\n    return {}['x']\n",
    ],
)
def test_a_config_file_that_does_not_load_is_named(refusal, tmp_path, content):
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert str(path) in refusal(f"--config={path}")


def test_an_unknown_recipe_is_named(refusal):
    message = refusal(f"{CONFIG}:papre")
    assert "'papre'" in message
    assert "paper" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stps", "train.steps"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("data.sources.bundled.pth", "data.sources.bundled.path"),
        ("lora.rnak", "lora.rank"),
    ],
)
def test_a_misspelt_key_is_corrected(refusal, key, meant):
    """However the other flags are written."""
    wrong = f"--config.{key}=1"
    for args in (
        (CONFIG, wrong),
        ("--config", BASE, wrong),
        (CONFIG, "--output", "runs/a", "--nodistributed", wrong),
    ):
        message = refusal(*args)
        assert f"config.{key}" in message
        assert f"did you mean {meant!r}?" in message


@pytest.mark.parametrize(
    "key", ["train.steps", "optimizer.learning_rate", "export.merged", "train"]
)
def test_a_value_of_the_wrong_type_is_named(refusal, key):
    wrong = f"--config.{key}=many"
    for args in (
        (CONFIG, wrong),
        ("--config", BASE, wrong),
        (CONFIG, "--output", "runs/a", wrong),
    ):
        message = refusal(*args)
        assert f"config.{key}" in message
        assert "many" in message
    assert "1.5" in refusal(CONFIG, "--config.train.steps=1.5")


def test_a_key_may_stand_before_the_config(parse):
    for config in ([CONFIG], ["--config", BASE]):
        values = parse("--output", "runs/a", "--config.train.steps=7", *config)
        assert (values.output, values.config.train.steps) == ("runs/a", 7)


def test_an_unknown_flag_is_named(refusal):
    assert "'outptu'. Did you mean: output" in refusal(CONFIG, "--outptu=runs/a")
    assert "'zzzzzz'" in refusal(CONFIG, "--zzzzzz=1")
    assert "'outptu'" in refusal("--config", BASE, "--outptu=runs/a")
    assert "two" in refusal(CONFIG, "--num-processes=two")


def test_a_positional_argument_is_named(refusal):
    assert "'runs/a'" in refusal(CONFIG, "runs/a")


def test_the_flags_of_processes_go_together(parse):
    with pytest.raises(LcoError, match="go together"):
        cli.join_processes(parse(CONFIG, "--num-processes=2"))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_there_is(parse, capsys, flag):
    steps = parse(CONFIG).config.train.steps
    with pytest.raises(SystemExit) as done:
        parse(flag, CONFIG)
    assert done.value.code == 0
    out = capsys.readouterr().out
    for part in (
        "What the job does.",
        "--output",
        "--num-processes",
        "--debug",
        "--quiet",
        "--config",
        f"  train.steps={steps} ",
        "  data.sources.bundled.kind=jsonl ",
        "[cosine, linear or constant]",
    ):
        assert part in out
    assert "--workdir" not in out
    with pytest.raises(SystemExit) as done:
        parse(flag)
    assert done.value.code == 0
    assert "What the job does." in capsys.readouterr().out


def test_help_has_every_key_with_its_comment_and_what_it_may_be(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help", "--config=base")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    keys = text[text.index("the run:\n") :]
    entries = re.findall(r"^  ([\w.]+)=(.*(?:\n {36}.*)*)", keys, re.MULTILINE)
    about = {key: " ".join(rest.split()) for key, rest in entries}
    assert set(RULES) <= about.keys()
    for key, rule in RULES.items():
        assert about[key].endswith(f" [{rule}]")
        assert comments_of_base()[key], f"{key} has no comment in configs/base.py"
        assert " ".join(comments_of_base()[key].split()) in about[key]
    assert about["data.media.fps"].endswith("frames a second that are taken of a video [a number]")


def test_a_user_sees_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", CONFIG, "--config.train.stps=3"])
    with pytest.raises(SystemExit) as done:
        run_main(main)
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --config.train.stps")
    assert "'train.steps'" in err
    assert err.count("\n") == 1


def test_comments_are_those_beside_and_above():
    source = """
    config.a = ConfigDict()  # a section
    # above,
    # on two lines
    config.a.b = 1  # and beside
    config.a.c = {
        "d": 1,  # of what is in it
    }

    # of nothing

    config.a.e = 2
"""
    assert comments_of(source) == {
        "a": "a section",
        "a.b": "above, on two lines and beside",
        "a.c": "of what is in it",
        "a.e": "",
    }


# ---- embed


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ([], {}),
        (["--no-upright"], {"upright": False}),
        (["--allow-remote", "--fps=1"], {"allow_remote": True, "fps": 1.0}),
    ],
)
def test_caps_that_no_flag_sets_are_the_defaults(flags, changed):
    """Of embed, search, evaluate and generate: a photo is upright, as in Python."""
    given = ["--model=m", "--input=a.txt", "--output=a.npy", *flags]
    assert media_config(embed.make_parser().parse_args(given)) == MediaConfig(**changed)


def test_embed_a_txt(tmp_path, tiny):
    texts, out = tmp_path / "texts.txt", tmp_path / "new" / "vectors.npy"
    texts.write_text("\n".join([*TEXTS, ""]), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "lco_jax.embed",
        "--model=builtin:tiny",
        f"--input={texts}",
        f"--output={out}",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    got = np.load(out)
    assert got.dtype == np.float32
    assert got.shape == (len(TEXTS), tiny.dimension)
    assert np.abs(got - tiny.encode(TEXTS)).max() < 1e-6
    assert sorted(path.name for path in out.parent.iterdir()) == ["vectors.npy", "vectors.npy.json"]


@pytest.mark.parametrize("ids", ["field", "line"])
def test_embed_a_jsonl(tmp_path, tiny, run_embed, ids):
    chat = [{"role": "user", "content": "three"}]
    items = (
        [{"text": "one", "key": "k1"}, {"text": "two " * 30, "key": "k0"}]
        if ids == "field"
        else ["one", chat]
    )
    lines, out = tmp_path / "items.jsonl", tmp_path / "vectors.parquet"
    lines.write_text("\n\n".join(json.dumps(item) for item in items), encoding="utf-8")
    field = ["--id-field=key"] if ids == "field" else []
    options = ["--max-length=8", "--prompt= In one word:", *field]
    status, _, err = run_embed(f"--input={lines}", f"--output={out}", *options)
    assert status == 0, err
    table = pyarrow.parquet.read_table(out).to_pydict()
    assert table["id"] == (["k1", "k0"] if ids == "field" else [0, 2])
    inputs = [{"text": item["text"]} for item in items] if ids == "field" else items
    want = tiny.encode(inputs, max_length=8, prompt=" In one word:")
    assert np.abs(np.array(table["embedding"], np.float32) - want).max() < 1e-6
    if ids == "field":
        assert np.abs(want - tiny.encode(inputs)).max() > 1e-3


def test_embed_in_parts_keeps_the_order(tmp_path, tiny, run_embed):
    texts = [f"{'word ' * (i % 5)}{i}" for i in range(8)]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts))
    for suffix in ("npy", "parquet"):
        out = tmp_path / f"vectors.{suffix}"
        assert (
            run_embed(f"--input={lines}", f"--output={out}", "--batch-size=2", "--part-size=3")[0]
            == 0
        )
        table = (
            pyarrow.parquet.read_table(out).to_pydict()
            if suffix == "parquet"
            else {"embedding": np.load(out)}
        )
        assert np.abs(np.array(table["embedding"], np.float32) - tiny.encode(texts)).max() < 1e-6
        assert table.get("id", list(range(8))) == list(range(8))


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_embed_of_nothing(tmp_path, tiny, run_embed, suffix):
    (tmp_path / "none.txt").write_text("")
    out = tmp_path / f"vectors.{suffix}"
    assert run_embed(f"--input={tmp_path / 'none.txt'}", f"--output={out}")[0] == 0
    if suffix == "npy":
        assert np.load(out).shape == (0, tiny.dimension)
    else:
        assert pyarrow.parquet.read_table(out).num_rows == 0


GOOD = '{"text": "fine", "key": 1}'


def embed_cases():
    """name: (input file's name, its content or None, output's name, further arguments, what the
    message holds).
    """
    bad = {
        "torn": ('{"text": "x"', "not valid JSON"),
        "number": ("3", "int"),
        "no text": ('{"txt": "x"}', "text"),
        "no content": ('{"text": null, "image": ""}', "text"),
        "image": ('{"text": "x", "image": "a.png"}', "image"),
        "image part": (
            '[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]',
            "image",
        ),
    }
    cases = {
        f"line: {name}": (
            "in.jsonl",
            f"{GOOD}\n\n{line}\n{GOOD}",
            "out.npy",
            [],
            ("in.jsonl:3", named),
        )
        for name, (line, named) in bad.items()
    }
    field = ["--id-field=key"]
    return {
        **cases,
        "line: no id": (
            "in.jsonl",
            f'{GOOD}\n{{"text": "x"}}',
            "out.parquet",
            field,
            ("in.jsonl:2", "'key'"),
        ),
        "line: chat has no id": (
            "in.jsonl",
            f'{GOOD}\n[{{"role": "user", "content": "x"}}]',
            "out.parquet",
            field,
            ("in.jsonl:2", "'key'"),
        ),
        "line: ids of two kinds": (
            "in.jsonl",
            f'{GOOD}\n{{"text": "x", "key": "one"}}',
            "out.parquet",
            field,
            ("in.jsonl:2", "one type"),
        ),
        "line: too long": (
            "in.txt",
            "fine\n" + "word " * 40_000,
            "out.npy",
            [],
            ("in.txt:2", "32768"),
        ),
        "not utf-8": ("in.txt", b"fine\n\xff\xfe\n", "out.npy", [], ("in.txt",)),
        "input suffix": ("in.csv", "fine", "out.npy", [], ("in.csv", ".jsonl")),
        "output suffix": ("in.txt", "fine", "out.txt", [], ("out.txt", ".parquet")),
        "no input": ("in.txt", None, "out.npy", [], ("in.txt",)),
        "id without parquet": ("in.jsonl", GOOD, "out.npy", field, ("--id-field", ".parquet")),
        "batch size": ("in.txt", "fine", "out.npy", ["--batch-size=0"], ("--batch-size=0",)),
        "max length": (
            "in.txt",
            "fine and long",
            "out.npy",
            ["--max-length=-1"],
            ("--max-length=-1",),
        ),
        "model": ("in.txt", "fine", "out.npy", ["--model=/no/such/model"], ("/no/such/model",)),
        "adapter": (
            "in.txt",
            "fine",
            "out.npy",
            ["--adapter=/no/such/adapter"],
            ("/no/such/adapter",),
        ),
        "output below a file": ("in.txt", "fine", "in.txt/out.npy", [], ("out.npy",)),
        "output is a folder": ("in.txt", "fine", "folder.npy", [], ("folder.npy",)),
    }


@pytest.mark.parametrize("case", embed_cases())
def test_embed_errors_are_one_line_and_leave_nothing(tmp_path, run_embed, case):
    source, content, target, extra, named = embed_cases()[case]
    folder = tmp_path / "folder.npy"
    folder.mkdir()
    if content is not None:
        (tmp_path / source).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run_embed(
        f"--input={tmp_path / source}", f"--output={tmp_path / target}", *extra
    )
    assert status == 2
    assert out == ""
    last = err.rstrip("\n").split("\n")[-1]  # a progress bar may stand before it
    assert last.startswith("error: ")
    assert all(part in last for part in named)
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_the_earlier_output(tmp_path, run_embed):
    (tmp_path / "in.txt").write_text("fine\n" + "word " * 40_000)
    for suffix in ("npy", "parquet"):
        out = tmp_path / f"out.{suffix}"
        out.write_bytes(b"what was there")
        assert run_embed(f"--input={tmp_path / 'in.txt'}", f"--output={out}")[0] == 2
        assert out.read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 3


def test_the_arguments_of_embed_are_checked_by_argparse(run_embed):
    for args in (
        (),
        ("--input=a.txt",),
        ("--input=a.txt", "--output=b.npy", "--dtype=float64"),
        ("--unknown=1",),
    ):
        status, _, err = run_embed(*args)
        assert status == 2
        assert "usage: python -m lco_jax.embed" in err
    status, out, _ = run_embed("--help")
    assert status == 0
    assert "--id-field" in out
