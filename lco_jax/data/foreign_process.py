"""The process that runs chat templates and regular expressions of others (`foreign.py`).

    python -m lco_jax.data.foreign_process PARENT

reads requests from its standard input and writes replies to its standard output, a line of JSON
each, until the input ends or the process PARENT is gone. It imports neither jax nor transformers.
"""

import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lco_jax.core.bounds import OutOfTimeError, bounded
from lco_jax.core.errors import reason

PARENT_SECONDS = 1.0  # between looks for the parent
# letters that a template may make: so many, and so many times those of the chat
SPARE_LETTERS, FACTOR = 1 << 20, 4
Request = dict[str, Any]
Reply = dict[str, Any]


# ---- chat templates, as transformers renders them (chat_template_utils.py)


class _Generation(Extension):
    """{% generation %} says which letters a model has generated. They are rendered as others."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """What `dict` is to a template: no class, whose attributes would lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """What `namespace` makes, without attributes of Python's own."""

    def __init__(*args: Any, **kwargs: Any):
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, which escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _render(request: Request) -> Reply:
    """The text of each chat, or why there is none."""
    compiled = partial(_compiled, request["template"])
    return {"results": [_one(compiled, chat, request["settings"]) for chat in request["chats"]]}


def _one(compiled: Callable[[], Template], chat: list[Any], settings: Request) -> Reply:
    try:
        text = compiled().render(messages=chat, tools=None, documents=None, **settings)
    except MemoryError:
        raise
    except Exception as error:  # a template raises whatever Python does
        return {"error": reason(error)}
    if len(text) > SPARE_LETTERS and len(text) > SPARE_LETTERS + FACTOR * len(json.dumps(chat)):
        return {"error": f"it makes {len(text)} letters of them"}
    return {"text": text}


# ---- regular expressions


def _match(request: Request) -> Reply:
    """For each name, the indices of the patterns that match all of it."""
    patterns = []
    for pattern in request["patterns"]:
        try:
            patterns.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            return {"bad": pattern, "error": reason(error)}
    return {
        "matches": [
            [i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)]
            for name in request["names"]
        ]
    }


# ---- serving

KINDS = {"render": _render, "match": _match}


def _answer(line: bytes) -> bytes:
    """The reply to a request, or which bound it exceeded."""
    request = json.loads(line)
    try:
        with bounded(request["seconds"], request["more_bytes"] + 16 * len(line)):
            return json.dumps(KINDS[request["kind"]](request)).encode() + b"\n"
    except MemoryError:
        return b'{"exceeded": "memory"}\n'
    except OutOfTimeError:
        return b'{"exceeded": "time"}\n'


def serve(requests: BinaryIO, replies: BinaryIO, parent: int) -> None:
    """Answer requests until there are no more. Nobody asks before the last answer has come."""
    while True:
        while not select.select([requests], [], [], PARENT_SECONDS)[0]:
            if os.getppid() != parent:
                return
        line = requests.readline()
        if not line.endswith(b"\n"):
            return
        replies.write(_answer(line))
        replies.flush()


def main() -> None:
    """Serve the parent that the command line names."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # those are the parent's to answer
        signal.signal(kind, signal.SIG_IGN)
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as replies:
        try:
            serve(requests, replies, int(sys.argv[1]))
        except BrokenPipeError:
            os._exit(0)  # the parent is gone, and nothing more can be said


if __name__ == "__main__":
    main()
