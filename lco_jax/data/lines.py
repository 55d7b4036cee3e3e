"""Files of lines or rows, one or several, perhaps packed by gzip.

A path with *, ? or [ that is no file itself names all files that match, in the order of their
names. `**` goes through folders.
"""

import glob
import gzip
import os
import shutil
import zlib
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import cache_folder, written_aside

PACKED = ".gz"
MARK = b"\xef\xbb\xbf"  # some editors write it at the beginning of a file


class Line(NamedTuple):
    """A line without its end. number: from 0, over all files. where: file and line, for errors.

    folder: of its file.
    """

    number: int
    where: str
    raw: bytes
    folder: Path

    def text(self) -> str:
        """Its text. Raises if it is not UTF-8."""
        unreadable = f"{self.where}: not valid UTF-8 (save the file in that encoding)"
        with explained(unreadable, UnicodeDecodeError):
            return self.raw.decode()


def ending_of(path: str | os.PathLike[str]) -> str:
    """The ending of a file's name: that of a.jsonl.gz is .jsonl."""
    return Path(os.fspath(path).removesuffix(PACKED)).suffix


def is_pattern(path: Path) -> bool:
    """Whether a path names several files."""
    return glob.has_magic(str(path)) and not path.exists()


def files_of(path: Path) -> list[Path]:
    """The files that a path names. Raises if a pattern names none, or files of several endings."""
    if not is_pattern(path):
        return [path]
    names = sorted(glob.glob(str(path), recursive=True))
    found = [Path(name) for name in names if os.path.isfile(name)]
    if not found:
        raise LcoError(f"{path} matches no file")
    endings = sorted({ending_of(file) for file in found})
    if len(endings) > 1:
        raise LcoError(f"{path} matches files that end in {' and '.join(endings)}; name one kind")
    return found


def records_in(folder: Path, endings: Container[str]) -> list[Path]:
    """The files of these endings in a folder and below, in the order of their names.

    None of them is hidden, or in a hidden folder, where editors and notebooks keep copies.
    """
    names = glob.glob("**/*", root_dir=folder, recursive=True)
    found = [folder / name for name in sorted(names) if ending_of(name) in endings]
    return [file for file in found if file.is_file()]


def opened(file: Path) -> IO[bytes]:
    """A file, unpacked as it is read if it is packed."""
    return gzip.open(file) if file.suffix == PACKED else file.open("rb")  # type: ignore[return-value]


def unpacking(file: Path) -> AbstractContextManager[None]:
    """Around reads of a packed file: a torn one becomes an `LcoError`."""
    return explained(
        f"{file} is torn or not packed by gzip", EOFError, gzip.BadGzipFile, zlib.error
    )


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of all files that a path names."""
    number = 0
    for file in files_of(path):
        with unpacking(file), opened(file) as content:
            for at, raw in enumerate(content):
                if not at:
                    raw = raw.removeprefix(MARK)
                ended = raw.removesuffix(b"\n").removesuffix(b"\r")
                yield Line(number, f"{file}:{at + 1}", ended, file.parent)
                number += 1


def unpacked(file: Path) -> Path:
    """A file whose lines can be read in any order: itself, or its unpacked copy in the cache."""
    if file.suffix != PACKED:
        return file
    about = file.stat()
    state = f"{file.absolute()}\0{about.st_size}\0{about.st_mtime_ns}"
    folder = cache_folder() / "unpacked" / blake2b(state.encode(), digest_size=8).hexdigest()
    copy = folder / file.name.removesuffix(PACKED)
    if not copy.exists():
        with (
            written_aside(folder, first_wins=True) as aside,
            unpacking(file),
            opened(file) as content,
            open(aside / copy.name, "wb") as target,
        ):
            shutil.copyfileobj(content, target)
    return copy
