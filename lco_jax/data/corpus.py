"""What `lco_jax.embed` reads: lines, rows of a table or a folder of media -> inputs for `encode`.

Inputs are read one at a time. In memory are a few rows of a table, or the names of a folder's
files.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow.parquet import FileMetaData, ParquetFile

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint
from lco_jax.data.content import FIELDS, Reader, check_text, describe, media_parts
from lco_jax.data.folder import Listing, as_id, file_kind, list_folder, printable
from lco_jax.data.lines import Line, ending_of, files_of, is_pattern, lines_of
from lco_jax.data.media import MediaConfig
from lco_jax.data.records import as_input, file_lookup
from lco_jax.data.tables import open_table

FORMATS = ("folder", ".txt", ".jsonl", ".parquet")
ROWS_AT_ONCE = 64  # of a table, in memory; rows may hold images
Exists = Callable[[str], bool] | None  # whether a local file is there; None looks for no file


class CorpusItem(NamedTuple):
    """An input. where: file and line, for errors.

    content: as `encode` takes it, a text never bare; or the error of an input that is malformed. id
    is None where that one's cannot be read.
    """

    id: int | str | None
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

    raw: a `Line`, a row of a table, or the name of a media file within the folder.
    folder: where its relative paths start by default.
    """

    number: int
    where: str
    raw: Any
    folder: Path


@dataclass(frozen=True)
class Corpus:
    """A .txt (a text a line), .jsonl or .parquet file, or a folder of media.

    Files of lines may be packed by gzip (.jsonl.gz), and a path with * names several files.
    id_field: the key or column that is an input's id. The default is the line or row number from
    0, and in a folder the path within it.
    root: the folder that relative paths of media start from; by default the file's folder.
    flag: the flag that gave the path, for errors.
    title: the key of a text that is put before the text, with a space between.
    keeps_bad: whether malformed inputs are handed on with their errors, instead of raised.
    kept: what the folder held when the work began, by default what it holds now.
    """

    path: Path
    id_field: str | None = None
    root: Path | None = None
    flag: str = "--input"
    title: str | None = None
    keeps_bad: bool = False
    kept: Listing | None = None

    def __post_init__(self):
        given = f"{self.flag}={self.path}"
        if not self.path.exists() and not is_pattern(self.path):
            raise LcoError(f"{given} does not exist")
        if self.format not in FORMATS:
            endings = ", ".join(FORMATS[1:])
            raise LcoError(f"{given}: give a file that ends in {endings}, or a folder of media")
        if self.id_field and self.format in ("folder", ".txt"):
            raise LcoError(f"--id-field={self.id_field}: {given} has no fields; leave the flag out")

    @cached_property
    def format(self) -> str:
        """One of `FORMATS`."""
        return "folder" if self.path.is_dir() else ending_of(self.files[0])

    @cached_property
    def files(self) -> list[Path]:
        """The files of lines or rows."""
        return files_of(self.path)

    @cached_property
    def listing(self) -> Listing | None:
        """What the folder holds, where the input is one."""
        if self.format != "folder":
            return None
        return self.kept or self.listed_now()

    def listed_now(self) -> Listing:
        """What the folder holds now."""
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            return list_folder(self.path)

    def items(self, check_media: bool = False) -> Iterator[CorpusItem]:
        """Every input, in order. check_media: raise for a local file that is not there.

        Raises for the first malformed input, naming its file and line, unless `keeps_bad`.
        """
        if check_media and self.listing:
            self._check_folders(self.listing)
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
        if self.format == "folder":
            return self.listed_now().fingerprint()
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            return fingerprint((file.name, file.stat()) for file in self.files)

    def _rows(self, first: int) -> Iterator[_Row]:
        """The inputs from `first` on, not yet parsed."""
        match self.format:
            case "folder":
                return islice(self._folder(), first, None)
            case ".txt":
                return islice(map(_row_of, lines_of(self.path)), first, None)
            case ".jsonl":
                return islice(map(_row_of, full_lines(self.path)), first, None)
        return self._tables(first)

    def _parsed(self, rows: Iterable[_Row], exists: Exists) -> Iterator[CorpusItem]:
        with explained(f"{self.flag}={self.path} cannot be read", OSError):
            for row in rows:
                yield self._parse(row, exists)

    def _parse(self, row: _Row, exists: Exists) -> CorpusItem:
        try:
            return self._read(row, exists)
        except LcoError as error:
            if not self.keeps_bad:
                raise
            return CorpusItem(self._id_of_bad(row), error, row.where)

    def _read(self, row: _Row, exists: Exists) -> CorpusItem:
        if self.format == "folder":
            return self._medium(row, exists)
        if self.format == ".txt":
            return CorpusItem(row.number, {"text": row.raw.text()}, row.where)
        item = self._value(row)
        id = self._id(item, row)
        root = os.path.abspath(self.root or row.folder)
        reader = Reader(row.where, root, exists)
        content = reader.read(self._embedded(item), "input")
        return CorpusItem(id, as_input(content), row.where)

    def _medium(self, row: _Row, exists: Exists) -> CorpusItem:
        """A file of the folder. Decoders say why one cannot be read, unless `exists` is to."""
        kind, path = file_kind(row.raw), os.path.join(self.path, row.raw)
        if exists and self.listing and row.raw in self.listing.faults:
            raise LcoError(f"{self.path}: {row.where} is {self.listing.faults[row.raw]}; remove it")
        return CorpusItem(as_id(row.raw), ({"type": kind, kind: path},), row.where)

    def _check_folders(self, listing: Listing) -> None:
        """Raise if a folder within cannot be read."""
        for name, why in listing.faults.items():
            if name.endswith("/"):
                raise LcoError(f"{self.path}: the folder {printable(name)} cannot be read: {why}")

    @staticmethod
    def _value(row: _Row) -> Any:
        """What a line or a row of a table holds."""
        return json_value(row.raw) if isinstance(row.raw, Line) else row.raw

    def _id_of_bad(self, row: _Row) -> int | str | None:
        """The id of a malformed input, if it can be read."""
        if self.id_field is None:
            return as_id(row.raw) if self.format == "folder" else row.number
        try:
            return self._id(self._value(row), row)
        except LcoError:
            return None

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
        listing = self.listing or self.listed_now()
        listing.check(f"{self.flag}={self.path}")
        for number, name in enumerate(listing.files):
            yield _Row(number, printable(name), name, self.path)

    def _tables(self, first: int) -> Iterator[_Row]:
        """The rows of all files, from `first` on."""
        start = 0
        ids = [self.id_field] if self.id_field else []
        for path in self.files:
            with open_table(path, ids) as file:
                total = file.metadata.num_rows
                for row in self._table(path, file, max(0, first - start)):
                    yield row._replace(number=start + row.number)
            start += total

    def _table(self, path: Path, file: ParquetFile, first: int) -> Iterator[_Row]:
        ids = [self.id_field] if self.id_field else []
        columns = [*ids, *self._fields(path, file.schema_arrow.names)]
        groups, start = _groups_from(file.metadata, first)
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, sorted(set(columns))):
            skipped = max(0, first - start)
            rows = batch.slice(skipped).to_pylist()
            for number, row in enumerate(rows, start + skipped):
                yield _Row(number, f"{path}, row {number}", row, path.parent)
            start += len(batch)

    @staticmethod
    def _fields(path: Path, columns: list[str]) -> list[str]:
        fields = [name for name in FIELDS if name in columns]
        if not fields:
            wanted, there = ", ".join(FIELDS), ", ".join(columns)
            raise LcoError(f"{path} has none of the columns {wanted}; it has {there}")
        return fields


def scan(items: Iterable[CorpusItem], media: MediaConfig, check_media: bool) -> Contents:
    """Go through all inputs once. check_media: raise for addresses that `media` refuses."""
    total = 0
    kinds: dict[str, str] = {}
    ids = None
    for item in items:
        total += 1
        if isinstance(item.content, LcoError):
            continue
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
    for line in full_lines(path):
        yield line.number, json_value(line), line.where


def json_value(line: Line) -> Any:
    """What a line of a .jsonl holds. Raises if that is no JSON."""
    text = line.text()
    with explained(f"{line.where}: not valid JSON", ValueError, RecursionError):
        return json.loads(text)


def full_lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank."""
    return (line for line in lines_of(path) if line.raw.strip())


def _row_of(line: Line) -> _Row:
    return _Row(line.number, line.where, line, line.folder)


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
