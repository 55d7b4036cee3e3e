"""The configurations as a page of the documentation: their texts, keys, values and comments."""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from lco_jax.training.cli import CONFIGS, names
from lco_jax.training.help import comments_of

SECTIONS = {"": "The run"}  # keys without a section
BAR = r"\|"  # a bar within a cell of a table


def configs() -> str:
    """Every key of base with its comment, and of every other configuration what differs."""
    base = _values("base")
    sections = [f"## base\n\n{_text('base')}\n", *_key_tables(base)]
    for name in names():
        if name != "base":
            sections.append(f"## {name}\n\n{_text(name)}\n\n{_differences(name, base)}\n")
    return "\n".join(sections)


def _key_tables(values: Mapping[str, Any]) -> Iterator[str]:
    """A table for each section of the keys of base."""
    comments = _comments("base")
    sections: dict[str, list[str]] = {}
    for key, comment in comments.items():  # in the order of the file
        if key in values:
            section, _, _ = key.rpartition(".")
            sections.setdefault(section, []).append(_row(key, values[key], comment))
    for section, rows in sections.items():
        what = comments.get(section, "")
        head = ["| key | value | |", "|---|---|---|"]
        yield "\n".join([f"### {SECTIONS.get(section, section)}", "", what, "", *head, *rows, ""])


def _differences(name: str, base: Mapping[str, Any]) -> str:
    """What a configuration sets to another value than base does, and why if it says so."""
    comments = _comments(name)
    differing = {key: value for key, value in _values(name).items() if base.get(key) != value}
    rows = [_row(key, value, comments.get(key, "")) for key, value in differing.items()]
    return "\n".join(["| what differs from base | value | |", "|---|---|---|", *rows])


def _row(key: str, value: Any, what: str) -> str:
    cells = [f"`{key}`", f"`{value!r}`", what]
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _values(name: str) -> dict[str, Any]:
    """Every key and value of a configuration. The sources of the data are one value."""
    config = import_module(f"lco_jax.configs.{name}").get_config()
    return dict(_flat(config.to_dict()))


def _flat(tree: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{start}{name}"
        if isinstance(value, dict) and key != "data.sources":
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _text(name: str) -> str:
    """The docstring of a configuration's file."""
    return ast.get_docstring(ast.parse(_source(name))) or ""


def _comments(name: str) -> dict[str, str]:
    """Key -> its comment in a configuration's file."""
    return comments_of(_source(name))


def _source(name: str) -> str:
    return (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
