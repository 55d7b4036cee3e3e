"""What `lco_jax.embed` reads: lines, rows of a table or a folder of media -> inputs for `encode`.

Inputs are read one at a time; nothing but a few rows of a table is in memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow.parquet import FileMetaData

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint
from lco_jax.data.content import (
    FIELDS,
    Reader,
    check_text,
    describe,
    media_kind,
    media_parts,
)
from lco_jax.data.media import MediaConfig
from lco_jax.data.records import as_input, file_lookup
from lco_jax.data.tables import open_table

FORMATS = ("folder", ".txt", ".jsonl", ".parquet")
ROWS_AT_ONCE = 64  # of a table, in memory; rows may hold images
Exists = Callable[[str], bool] | None  # whether a local file is there; None looks for no file


class CorpusItem(NamedTuple):
    """content: as `encode` takes it, a text never bare. where: file and line, for errors."""

    id: int | str
    content: Any
    where: str


class Contents(NamedTuple):
    """What all inputs are.

    total: how many. kinds: "text", "image" and so on -> the place of the first. ids: int or str.
    """

    total: int
    kinds: dict[str, str]
    ids: type

    @property
    def has_media(self) -> bool:
        """Whether an input is more than a text."""
        return bool(self.kinds.keys() - {"text"})


class _Row(NamedTuple):
    """An input before it is parsed. number: from 0. where: file and line, for errors.

    raw: a line, a row of a table, or the path of a media file.
    """

    number: int
    where: str
    raw: Any


@dataclass(frozen=True)
class Corpus:
    """A .txt (a text a line), .jsonl or .parquet file, or a folder of media.

    id_field: the key or column that is an input's id. The default is the line or row number from
    0, and in a folder the path within it.
    root: the folder that relative paths of media start from; by default the file's folder.
    flag: the flag that gave the path, for errors.
    title: the key of a text that is put before the text, with a space between.
    """

    path: Path
    id_field: str | None = None
    root: Path | None = None
    flag: str = "--input"
    title: str | None = None

    def __post_init__(self):
        given = f"{self.flag}={self.path}"
        if not self.path.exists():
            raise LcoError(f"{given} does not exist")
        if self.format not in FORMATS:
            endings = ", ".join(FORMATS[1:])
            raise LcoError(f"{given}: give a file that ends in {endings}, or a folder of media")
        if self.id_field and self.format in ("folder", ".txt"):
            raise LcoError(f"--id-field={self.id_field}: {given} has no fields; leave the flag out")

    @cached_property
    def format(self) -> str:
        """One of `FORMATS`."""
        return "folder" if self.path.is_dir() else self.path.suffix

    def items(self, check_media: bool = False) -> Iterator[CorpusItem]:
        """Every input, in order. check_media: raise for a local file that is not there.

        Raises for the first malformed input, naming its file and line.
        """
        return self._parsed(self._rows(0), file_lookup(check_media))

    def reader(self) -> Callable[[int, int], Iterator[CorpusItem]]:
        """A function from (first, end) to those inputs. Take them before you call it again.

        Ranges in ascending order cost one pass over the input. Inputs between them are skipped
        before they are parsed.
        """
        rows = self._rows(0)
        position = 0

        def read(first: int, end: int) -> Iterator[CorpusItem]:
            nonlocal rows, position
            skips_row_groups = self.format == ".parquet" and first > position
            if first < position or skips_row_groups:
                rows = self._rows(first)
                position = first
            some = islice(rows, first - position, end - position)
            position = end
            return self._parsed(some, None)

        return read

    def fingerprint(self) -> str:
        """What changes with the input: its size and time of change, or those of each medium."""
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            if self.format == "folder":
                return fingerprint((name, entry.stat()) for name, entry in _media_files(self.path))
            return fingerprint([(self.path.name, self.path.stat())])

    def _rows(self, first: int) -> Iterator[_Row]:
        """The inputs from `first` on, not yet parsed."""
        match self.format:
            case "folder":
                return islice(self._folder(), first, None)
            case ".txt":
                return islice(_lines(self.path), first, None)
            case ".jsonl":
                return islice(_full_lines(self.path), first, None)
        return self._table(first)

    def _parsed(self, rows: Iterable[_Row], exists: Exists) -> Iterator[CorpusItem]:
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            for row in rows:
                yield self._parse(row, exists)

    def _parse(self, row: _Row, exists: Exists) -> CorpusItem:
        number, where, raw = row
        if self.format == "folder":
            kind = media_kind(raw)
            return CorpusItem(where, ({"type": kind, kind: raw},), where)
        if self.format == ".txt":
            return CorpusItem(number, {"text": raw}, where)
        item = _json(raw, where) if self.format == ".jsonl" else raw
        id = self._id(item, row)
        root = os.path.abspath(self.root or self.path.parent)
        reader = Reader(where, root, exists)
        content = reader.read(self._embedded(item), "input")
        return CorpusItem(id, as_input(content), where)

    def _embedded(self, item: Any) -> Any:
        """What is embedded of an input. Other keys of an object or a row are metadata."""
        if not isinstance(item, Mapping):
            return item
        fields = {key: item[key] for key in FIELDS if item.get(key) is not None}
        if self.title and item.get(self.title):
            text = fields.get("text", "")
            fields["text"] = f"{item[self.title]} {text}".strip()
        return fields

    def _id(self, item: Any, row: _Row) -> int | str:
        if self.id_field is None:
            return row.number
        if not isinstance(item, Mapping) or self.id_field not in item:
            raise LcoError(f"{row.where}: the input has no field {self.id_field!r}")
        value = item[self.id_field]
        label = f"{row.where}: {self.id_field!r}"
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
        if not isinstance(value, str):
            raise LcoError(f"{label} is {describe(value)}; an id is a string or a 64-bit integer")
        check_text(value, label)
        return value

    def _folder(self) -> Iterator[_Row]:
        number = -1
        for number, (name, entry) in enumerate(_media_files(self.path)):
            check_text(name, f"the file name {os.fsencode(name)!r} in {self.path}")
            yield _Row(number, name, entry.path)
        if number < 0:
            raise LcoError(f"{self.flag}={self.path} holds no image, video or audio file")

    def _table(self, first: int) -> Iterator[_Row]:
        ids = [self.id_field] if self.id_field else []
        with open_table(self.path, ids) as file:
            columns = [*ids, *self._fields(file.schema_arrow.names)]
            groups, start = _groups_from(file.metadata, first)
            for batch in file.iter_batches(ROWS_AT_ONCE, groups, sorted(set(columns))):
                skipped = max(0, first - start)
                rows = batch.slice(skipped).to_pylist()
                for number, row in enumerate(rows, start + skipped):
                    yield _Row(number, f"{self.path}, row {number}", row)
                start += len(batch)

    def _fields(self, columns: list[str]) -> list[str]:
        fields = [name for name in FIELDS if name in columns]
        if not fields:
            wanted, there = ", ".join(FIELDS), ", ".join(columns)
            raise LcoError(f"{self.path} has none of the columns {wanted}; it has {there}")
        return fields


def scan(items: Iterable[CorpusItem], media: MediaConfig, check_media: bool) -> Contents:
    """Go through all inputs once. check_media: raise for addresses that `media` refuses."""
    total = 0
    kinds: dict[str, str] = {}
    ids = None
    for item in items:
        total += 1
        ids = ids or type(item.id)
        if type(item.id) is not ids:
            types = "ids must be of one type in all inputs"
            raise LcoError(f"{item.where}: its id is {describe(item.id)}, and {types}")
        for kind, medium in _media(item.content):
            kinds.setdefault(kind, item.where)
            if check_media and not media.allow_remote and _is_remote(medium):
                give = "give --allow-remote if you trust the input with your network"
                raise LcoError(f"{item.where}: its {kind} is at an http address; {give}")
    return Contents(total, kinds, ids or int)


def _media(content: Any) -> Iterator[tuple[str, Any]]:
    """("text", None) of a text, and the kind of each medium of other inputs with the medium."""
    if isinstance(content, dict):
        yield "text", None
        return
    messages = content if isinstance(content, list) else [{"content": content}]
    for part in media_parts(messages):
        yield part["type"], part[part["type"]]


def json_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(number from 0, value, file and line for errors) of each line of a .jsonl with content."""
    for number, where, line in _full_lines(path):
        yield number, _json(line, where), where


def _json(line: str, where: str) -> Any:
    with explained(f"{where}: not valid JSON", ValueError, RecursionError):
        return json.loads(line)


def _full_lines(path: Path) -> Iterator[_Row]:
    """As `_lines`, without blank lines."""
    return (row for row in _lines(path) if row.raw.strip())


def _lines(path: Path) -> Iterator[_Row]:
    """Lines without their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            where = f"{path}:{number + 1}"
            encoding = "utf-8" if number else "utf-8-sig"  # some editors write a mark first
            unreadable = f"{where}: not valid UTF-8 (save the file in that encoding)"
            with explained(unreadable, UnicodeDecodeError):
                text = line.decode(encoding)
            yield _Row(number, where, text.removesuffix("\n").removesuffix("\r"))


def _groups_from(table: FileMetaData, first: int) -> tuple[range, int]:
    """The row groups from the one that holds row `first` on, and the number of their first row."""
    start = 0
    for group in range(table.num_row_groups):
        rows = table.row_group(group).num_rows
        if first < start + rows:
            return range(group, table.num_row_groups), start
        start += rows
    return range(0), start


def _is_remote(source: Any) -> bool:
    if isinstance(source, list):
        return any(map(_is_remote, source))
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def _media_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """(path within the folder, entry) of each media file, in the order of the paths.

    Hidden files and folders are left out, whatever they end in.
    """

    with os.scandir(folder) as entries:
        named = {_name_of(entry): entry for entry in entries}
    for name, entry in sorted(named.items()):
        if name.startswith("."):
            continue
        if name.endswith("/"):
            yield from _media_files(Path(entry.path), prefix + name)
        elif media_kind(name) and entry.is_file():
            yield prefix + name, entry


def _name_of(entry: os.DirEntry) -> str:
    """Its name, with a slash after that of a folder."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
