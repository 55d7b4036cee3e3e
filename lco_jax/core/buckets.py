"""Storage on buckets, gs://BUCKET/FOLDER: listed, fetched from and copied up to.

gcsfs speaks to them, and orbax through it and tensorstore. An object is there whole or not at all, and can be neither
appended to nor renamed: programs write to a folder on this machine, and `copy_up` makes the bucket's like it.
"""

import argparse
import base64
import hashlib
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from lco_jax.core.errors import LcoError, peer_is_gone, reason

Place = Path | epath.Path  # the latter where it is on a bucket
MARK = ".written-by-lco-jax"  # in output folders that are whole


def on_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a bucket's folder or object."""
    return str(path).startswith("gs://")


def place(path: str) -> Place:
    """A path of either kind. Raises for other addresses."""
    if "://" in path and not on_bucket(path):
        raise LcoError(f"{path}: give a folder, perhaps a mounted one, or gs://BUCKET/FOLDER")
    return epath.Path(path) if on_bucket(path) else Path(path)


def on_disk(path: str) -> Path:
    """The path of a flag that takes folders and files of disks alone, for argparse."""
    if "://" in path:
        raise argparse.ArgumentTypeError(f"{path} is no path of a disk; mount it, or copy it")
    return Path(path)


@contextmanager
def reaching(path: Place | str) -> Iterator[None]:
    """Within, what keeps a bucket from being read or written (no package, rights or bucket) becomes one sentence."""
    try:
        yield
    except Exception as error:
        if not on_bucket(path) or isinstance(error, LcoError) or peer_is_gone(error):
            raise
        known = {
            ImportError: "pip install 'lco-jax[gcs]'",
            FileNotFoundError: "there is no such bucket or object",
        }
        why = known.get(type(error)) or reason(error)
        raise LcoError(
            f"{path} cannot be read or written: {why}; docs/training.md says what it takes"
        ) from None


def listing(path: Place | str) -> dict[str, dict[str, Any]]:
    """{name below `path`: what the bucket knows of the object, such as size and crc32c}; "." is `path` itself."""
    found = _system().find(str(path), detail=True).items()
    return {
        posixpath.relpath(name, str(path)[5:]): about
        for name, about in found
        if ".." not in name.split("/")
    }


def download(path: Place | str, folder: Path, names: Iterable[str]) -> None:
    """Fetch objects below `path` into a folder of this machine; "." goes by its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: str(folder / (posixpath.basename(str(path)) if name == "." else name))
        for name in names
    }
    if files:
        _system().get(_addresses(path, files), list(files.values()))


def copy_up(folder: Path, path: Place) -> None:
    """Copy to the bucket what it has not, or not so. Output folders (`files.written_aside`) become the same, and bear
    their marks only when they are."""
    there = listing(path)
    here = {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }
    marks = [name for name in here if posixpath.basename(name) == MARK]
    changed = [
        name
        for name in here
        if name not in marks and _sum(here[name]) != there.get(name, {}).get("md5Hash")
    ]
    written = tuple(name.removesuffix(MARK) for name in marks)
    if gone := [
        name for name in there if name.startswith(written) and (name in marks or name not in here)
    ]:
        _system().rm(_addresses(path, gone))
    for names in filter(None, (changed, marks)):
        _system().put([str(here[name]) for name in names], _addresses(path, names))


def _addresses(path: Place | str, names: Iterable[str]) -> list[str]:
    return [posixpath.normpath(f"{str(path)[5:]}/{name}") for name in names]


def _sum(file: Path) -> str:
    with open(file, "rb") as content:
        return base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode()


def _system() -> fsspec.AbstractFileSystem:
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = (
        False  # nor orbax's: other processes write, too
    )
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    return fsspec.filesystem("gcs")
