"""Small files and output folders: read with a clear error, written aside and renamed, never left half-written."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises if the file is missing, torn or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LcoError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LcoError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LcoError(f"{path} holds a {type(content).__name__}, and must hold an object")
    return content


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    Replaces an earlier folder of that name only if this function wrote it or it is empty (a mark says so).
    """
    mark = ".written-by-lco-jax"
    if target.exists() and any(target.iterdir()) and not (target / mark).exists():
        raise LcoError(f"{target} exists and was not written by lco_jax; give another output folder")
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        (aside / mark).touch()
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file aside, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as the hub's files have it, aside and then renamed."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
