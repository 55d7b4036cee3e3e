"""What the documentation's site takes from the code and the README; `docs/conf.py` loads it.

A page in docs/ has `<!-- from the code: api -->` (or commands, configs), or `<!-- from README:
Install, Use it -->` with names of sections. What stands between that and `<!-- end -->` tells
readers on GitHub where to look; on the site the thing itself is there.
"""

import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import lco_jax
from lco_jax.__main__ import VERBS
from lco_jax.data.media import MediaConfig
from tools.docs_configs import configs

README = Path(__file__).parents[1] / "README.md"
MARKER = re.compile(
    r"^<!-- from (the code|README): ([^>]+?) -->$.*?^<!-- end -->$", re.DOTALL | re.MULTILINE
)
# `name: what it is`, or several names, or a name with a remark: an item of a docstring's list
ITEM = re.compile(r"(\w+(?:, \w+)*(?: \([^)]*\))?): (\S.*)")
# what a browser fetches by itself; an anchor is followed by a reader alone
FETCHED = re.compile(
    r"<(?:script|link|img|source|iframe)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)"
)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("build-finished", check_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the code's words and README's sections in the places of a page's markers."""
    source[0] = MARKER.sub(_filling, source[0])


def _filling(found: re.Match[str]) -> str:
    origin, what = found.groups()
    if origin == "the code":
        return FROM_CODE[what]()
    return "\n".join(readme_section(name.strip()) for name in what.split(","))


def check_pages(app: Sphinx, error: Exception | None) -> None:
    """Raise if a page of the site fetches anything from the network."""
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        fetched = FETCHED.findall(page.read_text(encoding="utf-8"))
        if fetched:
            raise ExtensionError(f"{page} fetches from the network: {', '.join(fetched)}")


def readme_section(name: str) -> str:
    """A section of the README, with its links as docs/ has them. Raises KeyError for no section."""
    _, *sections = re.split(r"^(?=## )", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    by_name = {section.splitlines()[0].removeprefix("## "): section for section in sections}
    section = by_name[name]
    outside = re.sub(r"\]\((?!docs/|https?:|#)", "](../", section)
    return outside.replace("](docs/", "](")


# ---- the API


def api() -> str:
    """Every public name of the package, for autodoc to fill in; the main one first."""
    names = sorted(lco_jax.__all__, key=lambda name: name != "OmniEmbedder")
    return "\n".join(map(_autodoc, names))


def _autodoc(name: str) -> str:
    value = getattr(lco_jax, name)
    options = ["   :members:"]
    caps = ""
    if not inspect.isclass(value):
        kind, options = "autofunction", []
    elif issubclass(value, Exception):
        kind, options = "autoexception", []
    else:
        kind = "autoclass"
        options += ["   :show-inheritance:"] * (value.__base__ is not object)
    if value is MediaConfig:
        options, caps = [], _caps()  # its fields are a table
    directive = "\n".join([f".. {kind}:: lco_jax.{name}", *options])
    return f"## {name}\n\n```{{eval-rst}}\n{directive}\n```\n{caps}"


def _caps() -> str:
    """The fields of `MediaConfig`."""
    rows = [
        f"| `{one.name}` | `{one.default!r}` | {one.metadata['meaning']} |"
        for one in fields(MediaConfig)
    ]
    return "\n".join(["", "| cap | default | |", "|---|---|---|", *rows, ""])


def as_rst(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring of this project into what autodoc reads.

    Lines of `name: text` become a list of definitions. Only what is between backticks is marked.
    """
    rst: list[str] = []
    in_item = False
    for line in lines:
        item = ITEM.fullmatch(line)
        if item:
            rst += ["", f"``{item[1]}``", f"    {_plain(item[2])}"]
            in_item = True
        elif in_item and line.startswith(" "):
            rst.append(f"    {_plain(line.strip())}")
        else:
            rst += [""] * in_item + [_plain(line)]
            in_item = False
    lines[:] = rst


def _plain(line: str) -> str:
    """A line whose stars, bars and last underscores mean themselves, except in `code`."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"[*|\\]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


# ---- commands


def commands() -> str:
    """A section for each program of `lco`: what the program says of itself."""
    sections = []
    for verb, what in VERBS.items():
        text = inspect.cleandoc(import_module(f"lco_jax.{verb}").__doc__ or "")
        sections.append(f"## lco {verb}\n\n*{what}*\n\n{text}\n")
    return "\n".join(sections)


FROM_CODE = {"api": api, "commands": commands, "configs": configs}
