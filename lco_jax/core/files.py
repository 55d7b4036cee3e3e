"""Paths on disks and on buckets, small files and output folders: written aside, renamed, never left
half-written.

A path is a `pathlib.Path`, or an `epath.Path` where it starts with gs:// or s3://. An object of a
bucket is there whole or not at all, and cannot be appended to.
"""

import base64
import hashlib
import importlib.util
import json
import logging
import os
import posixpath
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from etils import epath
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lco_jax.core.errors import LcoError, explained, reason
from lco_jax.core.extras import install_line
from lco_jax.core.hub_ids import is_hub_id

ASSETS = Path(__file__).parent.parent / "assets"
MARK = ".written-by-lco-jax"  # in output folders that are complete
AnyPath: TypeAlias = Path | epath.Path
BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> its package, our extra
# what the clients of buckets raise beside OSError: module, class
BUCKET_ERRORS = (
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
)
for protocol in ("gcs", "s3"):  # other processes write, too: a listing is never an old one
    fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


# ---- paths


def as_path(text: str) -> AnyPath:
    """The path that a flag gives. Raises for other addresses, and where a bucket's package is
    missing.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        return expanded(text)
    if scheme not in BUCKETS:
        known = " or ".join(f"{name}://BUCKET/FOLDER" for name in BUCKETS)
        raise LcoError(f"{text}: give a path of a disk, perhaps a mounted one, or {known}")
    package, extra = BUCKETS[scheme]
    if importlib.util.find_spec(package) is None:
        raise LcoError(f"{text} needs a package more: {install_line(extra)}")
    return epath.Path(text)


def local_path(text: str) -> Path:
    """The path that a flag gives which takes files and folders of disks alone."""
    if "://" in text:
        raise LcoError(f"{text} is not a path of a disk; mount it, or copy it")
    return expanded(text)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path of a disk, in which ~ is the home folder. A shell leaves the ~ of --output=~/x."""
    with explained(f"{path} names no home folder", RuntimeError):
        return Path(path).expanduser()


def on_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a bucket's folder or object."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


# ---- buckets


def bucket_system(path: str | os.PathLike[str]) -> fsspec.AbstractFileSystem:
    """The client of the bucket that a path is on."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """What keeps a bucket from being read or written within becomes one sentence; nothing else."""
    try:
        yield
    except _bucket_errors() as error:
        if not on_bucket(path):
            raise
        why = reason(error)
        if isinstance(error, ImportError):
            extra = BUCKETS[os.fspath(path).partition("://")[0]][1]
            why = install_line(extra)
        elif isinstance(error, FileNotFoundError):
            why = "there is no such bucket or object"
        message = f"{path} cannot be read or written: {why}; docs/training.md says what it takes"
        raise LcoError(message) from error


def _bucket_errors() -> tuple[type[BaseException], ...]:
    """What the clients that are loaded raise."""
    loaded = [(sys.modules[name], kind) for name, kind in BUCKET_ERRORS if name in sys.modules]
    return (OSError, ImportError, *(getattr(module, kind) for module, kind in loaded))


def listing(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What a bucket has below `path`: {name: its size, checksum and so on}; "." is `path`
    itself.
    """
    below = os.fspath(path).partition("://")[2]
    found = bucket_system(path).find(os.fspath(path), detail=True)
    names = {name: posixpath.relpath(name, below) for name in found}
    return {names[name]: found[name] for name in found if ".." not in name.split("/")}


def checksum_of(about: dict[str, Any]) -> str | None:
    """The bucket's checksum of an object; None where it tells none. about: as `listing` has it."""
    return about.get("crc32c") or about.get("ETag")


def local_copy(path: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> Path:
    """A bucket's object as a file, or its objects below `path` that match as a folder, in the
    cache.

    What is there already is not fetched again, unless names, sizes or checksums differ. A path of a
    disk stays as it is. Raises where there is nothing.
    """
    if not on_bucket(path):
        return expanded(path)
    with reaching(path):
        there = listing(path)
    names = [name for name in sorted(there) if name == "." or _matches(name, patterns)]
    if not names:
        raise LcoError(f"{path} holds nothing that matches {' or '.join(patterns)}")
    digest = blake2b(os.fspath(path).encode(), digest_size=8)
    for name in names:
        about = there[name]
        digest.update(f"{name}\0{about['size']}\0{checksum_of(about)}\0".encode())
    folder = cache_folder() / "buckets" / digest.hexdigest()
    if not folder.is_dir():
        with written_aside(folder, first_wins=True) as aside, reaching(path):
            _download(path, aside, names)
    if names == ["."]:
        return folder / posixpath.basename(os.fspath(path))
    return folder


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def local_workdir(home: AnyPath, pattern: str, process: int) -> Path:
    """Where a process of a run at `home` writes: there, unless that is on a bucket.

    Then it is a folder of its own in the cache, with the bucket's files that match `pattern`.
    """
    if not on_bucket(home):
        return expanded(home)
    name = os.fspath(home).partition("://")[2].replace("/", "_")
    folder = cache_folder() / "workdirs" / f"{name}-{process}"
    shutil.rmtree(folder, ignore_errors=True)
    with reaching(home):
        names = [name for name in listing(home) if fnmatch(name, pattern)]
        _download(home, folder, names)
    return folder


def upload(folder: Path, path: AnyPath) -> None:
    """Copy to the bucket what it does not have, or has differently.

    Output folders (`written_aside`) lose what is no longer in them, and get their marks when all
    else is there.
    """
    there = listing(path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    here = {file.relative_to(folder).as_posix(): file for file in files}
    marks = {name for name in here if posixpath.basename(name) == MARK}
    outputs = tuple(name.removesuffix(MARK) for name in marks)
    for name in there:
        is_gone = name in marks or name not in here
        if name.startswith(outputs) and is_gone:
            bucket_system(path).rm_file(f"{path}/{name}")
    others = sorted(here.keys() - marks)
    changed = [name for name in others if not _is_same(here[name], there.get(name, {}))]
    for name in (*changed, *sorted(marks)):
        bucket_system(path).put_file(str(here[name]), f"{path}/{name}")


def _download(path: str | os.PathLike[str], folder: Path, names: Iterable[str]) -> None:
    """Fetch objects below `path` into a folder of this machine; "." keeps its name."""
    folder.mkdir(parents=True, exist_ok=True)
    own_name = posixpath.basename(os.fspath(path))
    targets = {name: str(folder / (own_name if name == "." else name)) for name in names}
    if targets:
        bucket_system(path).get(_addresses(path, targets), list(targets.values()))


def _addresses(path: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    below = os.fspath(path).partition("://")[2]
    return [posixpath.normpath(f"{below}/{name}") for name in names]


def _is_same(file: Path, about: dict[str, Any]) -> bool:
    """Whether a bucket's object has the bytes of a file."""
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "md5")
    of_gcs, of_s3 = base64.b64encode(digest.digest()).decode(), f'"{digest.hexdigest()}"'
    return about.get("md5Hash") == of_gcs or about.get("ETag") == of_s3


# ---- what is read


def resolve(
    path_or_id: str | os.PathLike[str], patterns: Sequence[str], kind: str = "model"
) -> Path:
    """A local folder as it is, or the files of a bucket's folder or a hub repository that match, in
    a cache.

    kind: "model" or "dataset". Raises if it is none of these.
    """
    if on_bucket(path_or_id):
        return local_copy(path_or_id, patterns)
    path = expanded(path_or_id)
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists():
        raise LcoError(f"{name} is a file, and must be a folder")
    if not is_hub_id(name):
        raise LcoError(f"{name} is no folder here, and no hub id (those look like owner/name)")
    absent = f"{name} is no folder here and could not be fetched from the hub"
    with explained(absent, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))


def cache_folder() -> Path:
    """Where what can be made again is stored: the built-in checkpoint, compiled programs."""
    return expanded(os.environ.get("LCO_JAX_CACHE", "~/.cache/lco_jax"))


def check_is_file(path: AnyPath) -> None:
    """Raise for what is no regular file and no link to one: to read a pipe may take for ever."""
    if not on_bucket(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a broken link, a pipe or a device"
        raise LcoError(f"{path} is {what}, and must be a file")


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file. Raises if the file is missing, torn or holds anything else."""
    if not path.exists():
        raise LcoError(f"{path} does not exist")
    check_is_file(path)
    # ValueError: or not UTF-8; RecursionError: nested thousands of levels deep
    with explained(f"{path} is not valid JSON", ValueError, RecursionError):
        content = json.loads(path.read_bytes().decode())
    if not isinstance(content, dict):
        raise LcoError(f"{path} holds a {type(content).__name__}, and must hold an object")
    return content


def read_own(path: AnyPath, advice: str) -> dict[str, Any]:
    """As `read_json`, of a file that we wrote. advice: what to do where it is damaged."""
    try:
        return read_json(path)
    except LcoError as error:
        raise LcoError(f"{error}; {advice}") from error


def fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    """Text that differs when files have changed: how many, and a digest of names, sizes and times
    of change.
    """
    digest, count = blake2b(digest_size=8), 0
    for name, about in files:
        line = f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0"
        digest.update(line.encode(errors="surrogateescape"))
        count += 1
    return f"{count} files with digest {digest.hexdigest()}"


# ---- what is written


@contextmanager
def written_aside(target: AnyPath, first_wins: bool = False) -> Iterator[Path]:
    """A fresh local folder that takes the place of `target` when the block ends well, and vanishes
    otherwise.

    Replaces an earlier folder of that name only if this function wrote it or it is empty (a mark
    says so).
    first_wins: for caches that several processes fill with the same content; a folder that came
    meanwhile stays.
    """
    if on_bucket(target):
        with tempfile.TemporaryDirectory() as folder, reaching(target):
            check_target(target)
            yield Path(folder)
            _mark(Path(folder))
            upload(Path(folder), target)
        return
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    aside.mkdir()
    try:
        yield aside
        _mark(aside)
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


def _mark(folder: Path) -> None:
    """Mark a folder as complete. Its files may be read as the umask says: those of safetensors, and
    of whatever else writes to a temporary file first, are 0600.
    """
    (folder / MARK).touch()
    mode = stat.S_IMODE((folder / MARK).stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def check_target(target: AnyPath) -> None:
    """Raise where a folder cannot be written without harm to what is there."""
    if target.is_file():
        raise LcoError(f"{target} is a file; give an output folder")
    if target.exists() and any(target.iterdir()) and not (target / MARK).exists():
        raise LcoError(
            f"{target} exists and was not written by lco_jax; give another output folder"
        )


def try_to_write(folder: AnyPath) -> None:
    """Make a file in a folder of a disk, and remove it. Raises `OSError` where that cannot be."""
    probe = folder / f".{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write a file that is there complete, also after a kill or a power cut, or not at all."""
    if on_bucket(path):
        bucket_system(path).pipe_file(os.fspath(path), content)
        return
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        aside.write_bytes(content)
        replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace(aside: AnyPath, target: AnyPath) -> None:
    """Rename a file, once its bytes are on the disk: a power cut cannot leave the name without
    them.
    """
    if on_bucket(target):
        bucket_system(target).mv(os.fspath(aside), os.fspath(target))
        return
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, target)


def write_text(path: AnyPath, text: str) -> None:
    """Write a small file, and the folder for it, as `write_bytes` does."""
    if not on_bucket(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def write_json(path: AnyPath, content: Any) -> None:
    """Write JSON as the hub's files have it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
