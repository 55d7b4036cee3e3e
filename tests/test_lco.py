"""The command `lco`."""

import subprocess
import sys
from pathlib import Path

import pytest

from lco_jax import __main__ as lco
from lco_jax import __version__

PACKAGE = Path(lco.__file__).parent


def call(*args):
    command = [sys.executable, "-m", "lco_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_names_every_program():
    programs = {path.stem for path in PACKAGE.glob("*.py") if "run_main(main)" in path.read_text()}
    assert programs == lco.VERBS.keys()


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_lists_the_programs_without_jax(args):
    done = call(*args)
    assert done.returncode == 0
    assert all(f"lco {verb} " in done.stdout for verb in lco.VERBS)
    code = "import sys; from lco_jax import __main__; print('jax' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout == "False\n"


def test_its_version_is_the_packages():
    assert call("--version").stdout == f"lco-jax {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "says"),
    [("trian", "did you mean 'train'?"), ("fly", "lco has no program 'fly' (lco --help")],
)
def test_an_unknown_program_is_one_sentence(verb, says):
    done = call(verb)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["embed", "convert", "plan"])
def test_help_of_a_program_has_the_name_that_was_typed(verb):
    done = call(verb, "--help")
    assert done.returncode == 0
    assert f"usage: lco {verb}" in done.stdout


def test_a_program_fails_as_it_does_alone(tmp_path):
    done = call(
        "embed", "--model=builtin:none", f"--input={tmp_path}", f"--output={tmp_path}/x.npy"
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "builtin:none" in done.stderr


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """What bash offers for the last of some words."""
    pytest.importorskip("shtab")
    made = call("completion", "bash")
    assert made.returncode == 0, made.stderr
    script = tmp_path_factory.mktemp("bash") / "lco"
    script.write_text(made.stdout)

    def offered(*words):
        code = (
            'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '_shtab_lco; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "-c", code, "bash", str(script), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    return offered


def test_a_shell_completes_programs_flags_values_and_paths(completions, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    assert completions("lco", "pre") == ["pretrain"]
    assert completions("lco", "train", "--config.model.dt") == ["--config.model.dtype"]
    assert completions("lco", "train", "--config.export.merged", "") == ["True", "False"]
    assert "smollm2" in completions("lco", "train", "--config", "")
    assert completions("lco", "embed", "--quan") == ["--quantize"]
    assert completions("lco", "embed", "--input", f"{tmp_path}/mi") == [f"{tmp_path}/mine.jsonl"]


def test_a_shell_that_is_not_known_is_one_sentence():
    done = call("completion", "ksh")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "bash, zsh, tcsh, fish" in done.stderr
