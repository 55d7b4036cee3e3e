"""Small files and output folders: read with a clear error, written aside and renamed, never left half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lco_jax.core.buckets import MARK, Place, download, listing, on_bucket, reaching
from lco_jax.core.errors import LcoError, explained

ASSETS = Path(__file__).parent.parent / "assets"


def resolve(
    path_or_id: str | os.PathLike[str], patterns: Sequence[str], kind: str = "model"
) -> Path:
    """A local folder as it is, or the files of a bucket's folder or a hub repository that match `patterns`, in a cache.

    kind: "model" or "dataset". Raises if it is neither a folder nor to be had from the bucket or the hub.
    """
    if on_bucket(path_or_id):
        return fetched(path_or_id, patterns)
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists():
        raise LcoError(f"{name} is a file, and must be a folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LcoError(f"{name} is no folder here, and no hub id (those look like owner/name)")
    absent = f"{name} is no folder here and could not be fetched from the hub"
    with explained(absent, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))


def fetched(path: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> Path:
    """What is on a bucket, in the cache as the bucket has it: an object's file, or a folder of the objects below `path`
    that match `patterns`. What is local stays where it is. Raises where there is nothing."""
    if not on_bucket(path):
        return Path(path)
    with reaching(path):
        there = listing(path)
    names = sorted(
        name for name in there if name == "." or any(fnmatch(name, one) for one in patterns)
    )
    if not names:
        raise LcoError(f"{path} holds nothing that matches {' or '.join(patterns)}")
    state = repr(
        [(str(path), name, there[name]["size"], there[name].get("crc32c")) for name in names]
    )
    folder = cache_folder() / "buckets" / blake2b(state.encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        with written_aside(folder, first_wins=True) as aside, reaching(path):
            download(path, aside, names)
    return folder / Path(path).name if names == ["."] else folder


def mirrored(home: Place, pattern: str) -> Path:
    """Where a run writes that lives at `home`: there, or, of a bucket, in an own folder of the cache, with what is on
    the bucket and matches `pattern`."""
    if not on_bucket(home):
        return home
    folder = (
        cache_folder() / "workdirs" / f"{str(home)[5:].replace('/', '_')}-{jax.process_index()}"
    )
    shutil.rmtree(folder, ignore_errors=True)
    with reaching(home):
        download(home, folder, [name for name in listing(home) if fnmatch(name, pattern)])
    return folder


def cache_folder() -> Path:
    """Where what can be made again is kept: the built-in checkpoint, compiled programs."""
    return Path(os.environ.get("LCO_JAX_CACHE", Path.home() / ".cache" / "lco_jax"))


def read_json(path: Place) -> dict[str, Any]:
    """The object in a JSON file. Raises if the file is missing, torn or not an object."""
    if not path.exists():
        raise LcoError(f"{path} does not exist")
    with explained(
        f"{path} is not valid JSON", ValueError
    ):  # of either kind: no JSON, and no UTF-8
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise LcoError(f"{path} holds a {type(content).__name__}, and must hold an object")
    return content


def fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """What tells whether files have changed: how many, and a digest of their names, sizes and times of change."""
    seen, count = blake2b(digest_size=8), 0
    for name, found in files:
        seen.update(
            f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
        count += 1
    return f"{count} files with digest {seen.hexdigest()}"


@contextmanager
def written_aside(target: Path, first_wins: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    Replaces an earlier folder of that name only if this function wrote it or it is empty (a mark says so).
    first_wins: for caches that several processes fill with the same content; a folder that came meanwhile stays.
    """
    if str(target).startswith("gs:"):
        raise LcoError(
            f"{target}: outputs go to a folder, from where they can be copied to a bucket"
        )
    if target.is_file():
        raise LcoError(f"{target} is a file; give an output folder")
    if target.exists() and any(target.iterdir()) and not (target / MARK).exists():
        raise LcoError(
            f"{target} exists and was not written by lco_jax; give another output folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    aside.chmod(0o755)
    try:
        yield aside
        (aside / MARK).touch()
        if first_wins:
            with suppress(OSError):  # it is there already
                aside.rename(target)
            return
        old = aside.with_suffix(".old")
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Place, text: str) -> None:
    """Write a small file aside, then rename it into place; an object is there whole or not at all."""
    if on_bucket(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Place, content: Any) -> None:
    """Write JSON as the hub's files have it, aside and then renamed."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
