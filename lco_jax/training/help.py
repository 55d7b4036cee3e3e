"""What --help of a training job says: its flags, and every key with its comment and its values.

The comments are those of configs/base.py, so that they are written once.
"""

import argparse
import re
import shlex
import textwrap
import tokenize
from collections.abc import Mapping
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core import console
from lco_jax.training.cli import dotted
from lco_jax.training.values import FLAG, RULES, Choice, Words

COLUMNS = 100
LEFT = 36  # columns of a flag or of a key with its value
SOURCES = "data.sources"
# what a key may be that has no rule here: its value says so
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}
BASE = Path(__file__).parents[1] / "configs" / "base.py"
SECTIONS = {
    "": "the run",
    "model": "the model",
    "tune": "what is trained",
    "lora": "adapters",
    "data": "data",
    "data.media": "caps on media",
    "instructions": "words about the task beside contents",
    "train": "the loss and the batches",
    "loss": "what is added to the loss",
    "optimizer": "the optimiser",
    "mesh": "devices",
    "checkpoint": "checkpoints",
    "eval": "what is held out",
    "export": "what is written",
    "log": "where metrics go, beside metrics.jsonl",
}


def help_text(doc: str | None, flags: Mapping[str, str], config: ConfigDict, name: str) -> str:
    """The text. flags: name -> what it does. config: whose values are shown, and its name."""
    lines = [(doc or "").rstrip(), "", "flags:"]
    for flag, text in flags.items():
        lines += _entry(f"  --{flag}", text)
    title = f"keys, with the values of --config={name}; each is a flag, as --config.train.epochs=3"
    lines += ["", *_flags_of_every_program(), "", *textwrap.wrap(f"{title}:", COLUMNS)]
    keys = _keys(config)
    for section, title in SECTIONS.items():
        inside = [key for key in keys if _section(key) == section]
        if inside:
            lines += ["", f"{title}:"]
            for key in inside:
                lines += _entry(f"  {key}={_shown(keys[key])}", _about(key, keys[key]))
    return "\n".join(lines)


def keys_with_values() -> dict[str, tuple[str, ...] | None]:
    """Every key that has a rule, with the words that it may be; None where others may be, too."""
    words = {key: rule.words for key, rule in RULES.items() if isinstance(rule, Choice | Words)}
    flags = {key: ("True", "False") for key, rule in RULES.items() if rule is FLAG}
    return dict.fromkeys(RULES) | words | flags


def _flags_of_every_program() -> list[str]:
    parser = console.flags()
    parser.formatter_class = partial(
        argparse.HelpFormatter, max_help_position=LEFT, width=COLUMNS + 2
    )
    text = parser.format_help()
    return text[text.index("what is printed") :].rstrip().splitlines()


def _keys(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, in the order of configs/base.py."""
    order = {key: place for place, key in enumerate(comments_of_base())}
    leaves = dotted(config.to_dict())
    return dict(sorted(leaves.items(), key=lambda leaf: order.get(_commented(leaf[0]), len(order))))


def _commented(key: str) -> str:
    """The key with whose comment a key stands: that of all sources, for what is in one."""
    return SOURCES if key.startswith(f"{SOURCES}.") else key


def _section(key: str) -> str:
    section = key.rpartition(".")[0]
    return section if section in SECTIONS else section.partition(".")[0]


def _shown(value: Any) -> str:
    """A value as a shell takes it."""
    return shlex.quote(str(value))


def _about(key: str, value: Any) -> str:
    """A key's comment, and what it may be."""
    rule = RULES.get(key) or KINDS.get(type(value))
    if key.startswith(f"{SOURCES}.") and not key.endswith(".kind"):
        return ""  # the comment stands beside the kind
    about = comments_of_base().get(_commented(key), "")
    return f"{about} [{rule}]" if rule else about


def _entry(left: str, text: str) -> list[str]:
    """What stands on the left, and the text beside it or, where that has no room, below it."""
    indent = " " * LEFT
    wrapped = textwrap.wrap(text, COLUMNS - LEFT, break_on_hyphens=False) or [""]
    if len(left) < LEFT - 1:
        first, *rest = wrapped
        return [f"{left:{LEFT}}{first}".rstrip(), *(indent + line for line in rest)]
    return [left, *(indent + line for line in wrapped if line)]


def comments_of(source: str) -> dict[str, str]:
    """Key -> its comment: at the end of the line that sets it first, or else in the lines above."""
    found: dict[str, str] = {}
    waiting: list[str] = []  # comments in lines of their own, above what they are about
    key = None
    for token in tokenize.generate_tokens(StringIO(source).readline):
        text = token.string.lstrip("# ") if token.type == tokenize.COMMENT else ""
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            waiting.append(text)
        elif token.type == tokenize.COMMENT and key:
            found[key] = " ".join(filter(None, (found.get(key), text)))
        elif found_key := _set_in(token.line):
            if found_key != key:
                key = found_key
                found[key] = " ".join(waiting)
                waiting = []
        elif token.type == tokenize.NL and not token.line.strip():
            key, waiting = None, []  # an empty line ends what a comment is about
    return found


def _set_in(line: str) -> str | None:
    """The key that a line sets."""
    found = re.match(r"\s*config\.([\w.]+) = ", line)
    return found[1] if found else None


@cache
def comments_of_base() -> dict[str, str]:
    """Key -> its comment in configs/base.py."""
    return comments_of(BASE.read_text(encoding="utf-8"))
