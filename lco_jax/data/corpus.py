"""What `lco_jax.embed` reads: lines, rows of a table or a folder of media -> inputs for `encode`, one at a time."""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.lib
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint
from lco_jax.data.media import MediaConfig
from lco_jax.data.prompts import (
    as_messages,
    check_text,
    describe,
    is_conversation,
    is_media_file,
    media_parts,
)
from lco_jax.data.records import FIELDS, Reader, as_input, file_lookup, is_parts

KEYS = tuple(
    key for key in FIELDS if key != "content"
)  # of an object or table: what is embedded; others are metadata
SUFFIXES = (".txt", ".jsonl", ".parquet")
ROWS_AT_ONCE = 64  # of a table, in memory; rows may hold whole images


class CorpusItem(NamedTuple):
    """content: as `encode` takes it, text never bare. where: a file and line, for errors."""

    id: int | str
    content: Any
    where: str


class Contents(NamedTuple):
    """total: inputs. kinds: "text", "image" and so on -> where the first of it stands. ids: int or str."""

    total: int
    kinds: dict[str, str]
    ids: type

    @property
    def has_media(self) -> bool:
        return bool(self.kinds.keys() - {"text"})


@dataclass(frozen=True)
class Corpus:
    """A .txt (a text a line), .jsonl or .parquet file, or a folder of media.

    id_field: the key or column that is an input's id; by default the line or row number from 0, and in a folder the
    path within it. root: the folder that relative paths of media start from, by default the file's own. flag: what gave
    the path, for errors. title: the key of what stands before the text, with a space between.
    """

    path: Path
    id_field: str | None = None
    root: Path | None = None
    flag: str = "--input"
    title: str | None = None

    def __post_init__(self):
        if not self.path.exists():
            raise LcoError(f"{self.flag}={self.path} does not exist")
        if not self.path.is_dir() and self.path.suffix not in SUFFIXES:
            raise LcoError(
                f"{self.flag}={self.path}: give a file that ends in {', '.join(SUFFIXES)}, or a folder of media"
            )
        if self.id_field and (self.path.is_dir() or self.path.suffix == ".txt"):
            raise LcoError(
                f"--id-field={self.id_field}: {self.flag}={self.path} has no fields; leave the flag out"
            )

    def items(self, check_media: bool = False) -> Iterator[CorpusItem]:
        """Every input, in order. check_media: look whether the local files that it names are there.

        Raises naming the file and line of the first that is malformed.
        """
        return self._parsed(self._unread(0), file_lookup(check_media))

    def reader(self) -> Callable[[int, int], Iterator[CorpusItem]]:
        """A function from (first, end) to those inputs, which are to be taken before it is called again.

        Ranges in ascending order cost one pass over the input, of which little is done for what lies between.
        """
        unread, at = self._unread(0), 0

        def read(first: int, end: int) -> Iterator[CorpusItem]:
            nonlocal unread, at
            if first < at or (first > at and self.path.suffix == ".parquet"):
                unread, at = self._unread(first), first
            skipped, at = first - at, end
            return self._parsed(islice(unread, skipped, skipped + end - first), None)

        return read

    def _parsed(
        self, unread: Iterable[Callable[..., CorpusItem]], exists: Callable[[str], bool] | None
    ) -> Iterator[CorpusItem]:
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            for parse in unread:
                yield parse(exists)

    def _unread(self, first: int) -> Iterator[Callable[..., CorpusItem]]:
        """What makes an item of each input from `first` on."""
        return (self._folder if self.path.is_dir() else getattr(self, f"_{self.path.suffix[1:]}"))(
            first
        )

    def fingerprint(self) -> str:
        """What tells whether it has changed: size and time of change of the file, or of each medium of the folder."""
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            if not self.path.is_dir():
                return fingerprint([(self.path.name, self.path.stat())])
            return fingerprint((name, entry.stat()) for name, entry in _walk(self.path))

    def _txt(self, first: int) -> Iterator[Callable[..., CorpusItem]]:
        for number, line, where in islice(_lines(self.path), first, None):
            yield partial(_ready, CorpusItem(number, {"text": line}, where))

    def _jsonl(self, first: int) -> Iterator[Callable[..., CorpusItem]]:
        def parse(exists: Callable | None, number: int, line: str, where: str) -> CorpusItem:
            item = _json(line, where)
            return CorpusItem(
                self._id(item, number, where), self._content(item, where, exists), where
            )

        for number, line, where in islice(_full_lines(self.path), first, None):
            yield partial(parse, number=number, line=line, where=where)

    def _parquet(self, first: int) -> Iterator[Callable[..., CorpusItem]]:
        torn = explained(
            f"{self.path} is torn or not a parquet file", pyarrow.lib.ArrowException, OSError
        )
        with torn, pyarrow.parquet.ParquetFile(self.path) as file:
            names = file.schema_arrow.names
            if not any(name in KEYS for name in names):
                raise LcoError(
                    f"{self.path} has none of the columns {', '.join(KEYS)}; it has {', '.join(names)}"
                )
            if self.id_field and self.id_field not in names:
                raise LcoError(
                    f"{self.path} has no column {self.id_field!r}; its columns: {', '.join(names)}"
                )
            columns = [name for name in names if name in (*KEYS, self.id_field)]
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            group = bisect_right(ends, first)  # whole groups before it are not even decoded
            number = ends[group] - sizes[group] if group < len(ends) else 0

            def parse(exists: Callable | None, number: int, row: dict[str, Any]) -> CorpusItem:
                where = f"{self.path}, row {number}"
                content = {key: _cell(value) for key, value in row.items() if key in KEYS}
                return CorpusItem(
                    self._id(row, number, where), self._content(content, where, exists), where
                )

            for batch in file.iter_batches(
                ROWS_AT_ONCE, row_groups=range(group, len(ends)), columns=columns
            ):
                if number + len(batch) > first:
                    for i, row in enumerate(batch.to_pylist()):
                        if number + i >= first:
                            yield partial(parse, number=number + i, row=row)
                number += len(batch)

    def _folder(self, first: int) -> Iterator[Callable[..., CorpusItem]]:
        found = 0
        for name, entry in _walk(self.path):
            check_text(name, f"the file name {os.fsencode(name)!r} in {self.path}")
            kind = is_media_file(name)
            found += 1
            if found > first:
                yield partial(_ready, CorpusItem(name, ({"type": kind, kind: entry.path},), name))
        if not found:
            raise LcoError(f"{self.flag}={self.path} holds no image, video or audio file")

    def _id(self, item: Any, number: int, where: str) -> int | str:
        if self.id_field is None:
            return number
        if not isinstance(item, Mapping) or self.id_field not in item:
            raise LcoError(f"{where}: the input has no field {self.id_field!r}")
        value = item[self.id_field]
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
        if not isinstance(value, str):
            raise LcoError(
                f"{where}: {self.id_field!r} is {describe(value)}; an id is a string or a 64-bit integer"
            )
        check_text(value, f"{where}: {self.id_field!r}")
        return value

    def _content(self, item: Any, where: str, exists: Callable[[str], bool] | None) -> Any:
        reader = Reader(where, os.path.abspath(self.root or self.path.parent), exists)
        if isinstance(item, str) or (isinstance(item, list) and is_parts(item)):
            side = reader.side(item, "input")
        elif is_conversation(item):
            messages = as_messages(item, where)
            for part in media_parts(messages):
                kind = part["type"]
                part |= reader.media(kind, part[kind], f"a part of type {kind!r}")
            return messages
        elif isinstance(item, Mapping):
            given = {key: item[key] for key in KEYS if item.get(key) is not None}
            if self.title and item.get(self.title):
                given["text"] = f"{item[self.title]} {given.get('text', '')}".strip()
            side = reader.side(given, "input")
            if not side and "text" not in given:
                raise LcoError(
                    f"{where} holds nothing to embed; it needs one of: {', '.join(KEYS)}"
                )
        else:
            raise LcoError(
                f"{where} is {describe(item)}; give a string, an object with any of {', '.join(KEYS)}, or a list of "
                "chat messages"
            )
        return as_input(side)


def scan(items: Iterable[CorpusItem], media: MediaConfig, check_media: bool) -> Contents:
    """Go through all inputs once. check_media: raise for addresses that `media` does not let us fetch."""
    total, kinds, ids = 0, {}, None
    for item in items:
        total += 1
        ids = ids or type(item.id)
        if type(item.id) is not ids:
            raise LcoError(
                f"{item.where}: its id is {describe(item.id)}, and ids must be of one type in all inputs"
            )
        if isinstance(item.content, dict):
            kinds.setdefault("text", item.where)
            continue
        parts = media_parts(
            item.content if isinstance(item.content, list) else [{"content": item.content}]
        )
        for part in parts:
            kind = part["type"]
            kinds.setdefault(kind, item.where)
            if check_media and not media.allow_remote and _is_remote(part[kind]):
                remote = f"{item.where}: its {kind} is at an http address"
                raise LcoError(
                    f"{remote}; give --allow-remote if you trust the input with your network"
                )
    return Contents(total, kinds, ids or int)


def json_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(number from 0, value, file and line for errors) of every line of a .jsonl that is not blank."""
    return ((number, _json(line, where), where) for number, line, where in _full_lines(path))


def _ready(item: CorpusItem, _: Callable | None) -> CorpusItem:
    return item


def _json(line: str, where: str) -> Any:
    with explained(f"{where}: not valid JSON", ValueError, RecursionError):
        return json.loads(line)


def _full_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """As `_lines`, without those that are blank."""
    return (line for line in _lines(path) if line[1].strip())


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """(number from 0, line without its end, file and line for errors)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            where = f"{path}:{number + 1}"
            with explained(
                f"{where}: not valid UTF-8 (save the file in that encoding)", UnicodeDecodeError
            ):
                text = line.decode(
                    "utf-8" if number else "utf-8-sig"
                )  # some editors begin files with a mark
            yield number, text.removesuffix("\n").removesuffix("\r"), where


def _is_remote(source: Any) -> bool:
    if isinstance(source, list):
        return any(map(_is_remote, source))
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def _cell(cell: Any) -> Any:
    """A table's cell as in jsonl: Hugging Face's {"bytes": …, "path": …} become the one that is there."""
    if isinstance(cell, Mapping) and cell.keys() & {"bytes", "path"}:
        return cell.get("bytes") or cell.get("path")
    return [_cell(value) for value in cell] if isinstance(cell, list) else cell


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """(path within the folder, entry) of every file that ends like a medium, in the order of the paths.

    Hidden files and folders are left out: they are no pictures, whatever they end in.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(
        found, key=lambda entry: entry.name + "/" * entry.is_dir(follow_symlinks=False)
    ):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif is_media_file(entry.name) and entry.is_file():
            yield prefix + entry.name, entry
