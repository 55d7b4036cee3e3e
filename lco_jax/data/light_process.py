"""Starts the light processes that do what this one must not: decode files, run templates."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parents[2]  # where this package lies


def start(module: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that runs a module of this package, with pipes to it, and the number of this
    process as its argument.

    It finds what this process finds to import, whatever folder it runs in. more: of its
    environment.
    """
    places = [str(PACKAGES), *(os.path.abspath(place) for place in sys.path if place)]
    return subprocess.Popen(
        (sys.executable, "-P", "-m", module, str(os.getpid())),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # a process that forks must not send what a buffer holds once more
        cwd="/",
        env={**os.environ, **(more or {}), "PYTHONPATH": os.pathsep.join(places)},
    )


def write_all(stream: Any, content: bytes | memoryview) -> None:
    """Write to a stream without a buffer, which may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]
