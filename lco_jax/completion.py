"""What a shell needs to complete `lco`: its programs, their flags, keys, values and paths."""

import argparse
from collections.abc import Mapping
from importlib import import_module

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.extras import install_line
from lco_jax.core.files import as_path, local_path
from lco_jax.flags import new_parser
from lco_jax.training import cli
from lco_jax.training.help import keys_with_values

JOBS = ("train", "pretrain")  # their flags are absl's, and every key of a configuration is one
PATHS = (as_path, local_path)  # the types of flags that name a file or folder
SHELLS = ("bash", "zsh", "tcsh", "fish")


def script(programs: Mapping[str, str], *shell: str) -> str:
    """The script for one of `SHELLS`. programs: name -> what it does."""
    if len(shell) != 1 or shell[0] not in SHELLS:
        raise LcoError(f"lco completion takes one of: {', '.join(SHELLS)}")
    needs = f"lco completion needs a package more: {install_line('completion')}"
    with explained(needs, ImportError):
        import shtab
    parser = argparse.ArgumentParser(prog="lco")
    parser.add_argument("--version", action="store_true")
    verbs = parser.add_subparsers()
    for name, what in programs.items():
        one = parser_of(name)
        for action in one._actions:
            if action.type in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        verbs.add_parser(name, help=what, parents=[one], add_help=False)
    return shtab.complete(parser, shell[0])


def parser_of(program: str) -> argparse.ArgumentParser:
    """The flags of a program, for argparse."""
    if program not in JOBS:
        return import_module(f"lco_jax.{program}").make_parser()
    parser = new_parser(program, None)
    paths = {"output": as_path}
    for flag, text in cli.FLAGS.items():
        if flag == "help":
            continue
        choices = cli.names() if flag == "config" else None
        parser.add_argument(f"--{flag}", help=text, choices=choices, type=paths.get(flag))
    for key, values in keys_with_values().items():
        parser.add_argument(f"--config.{key}", choices=values, help=f"config.{key}")
    return parser
