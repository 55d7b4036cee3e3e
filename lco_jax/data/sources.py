"""Where records come from: jsonl, TFDS, media files, parquet files or hub datasets.

Every source gives its records by index.
"""

import glob
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError, check_keys, explained
from lco_jax.core.files import local_copy, resolve
from lco_jax.data.captions import FilesSource
from lco_jax.data.content import MEDIA
from lco_jax.data.given import file_source, in_assets
from lco_jax.data.instructions import INSTRUCTIONS
from lco_jax.data.lines import files_of, is_pattern, records_in, unpacked
from lco_jax.data.records import (
    ALIKE,
    NEGATIVES,
    SCORES,
    Record,
    file_lookup,
    listed,
    parse_record,
)
from lco_jax.data.scan import ListSource, Scan, Source
from lco_jax.data.tables import open_table
from lco_jax.data.tfds import CaptionedSource, nli_source

KINDS = ("jsonl", "tfds", "files", "parquet")
OF_ALL = ("weight", *INSTRUCTIONS)  # keys of every kind of source


class JsonlSource(Source):
    """The reference's jsonl, one record a line. In memory is the offset of each line.

    path: a file, perhaps packed (.jsonl.gz), with * several files, or a folder of them.
    media_root: the folder that relative paths of media start from, by default the file's folder.
    check_media: whether the scan looks for every local file that a record names.
    """

    def __init__(
        self,
        path: str | Path,
        on_bad: str = "error",
        media_root: str | None = None,
        check_media: bool = True,
    ):
        self.path = in_assets(str(path))
        self.files = jsonl_files(self.path)
        self.roots = [os.path.abspath(media_root or file.parent) for file in self.files]
        self.root = self.roots[0]  # of a single file, or the first
        scan, exists = Scan(on_bad), file_lookup(check_media)
        self.copies: list[Path] = []  # of the files, unpacked
        for which, file in enumerate(self.files):
            with explained(f"{file} cannot be read", OSError):
                self.copies.append(unpacked(file))
                self._scan(scan, which, exists)
        scan.finish(str(self.path))
        self.lines = np.array(scan.kept, np.int64)
        self.skipped, self.max_negatives = scan.skipped, scan.max_negatives
        self.modalities, self.digests = scan.modalities, scan.digests
        self.has_teacher = scan.has_teacher

    def __len__(self) -> int:
        return len(self.lines)

    def _scan(self, scan: Scan, which: int, exists: Callable[[str], bool] | None) -> None:
        """Check all lines of a file."""
        offset = 0
        with self.copies[which].open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    at = which, offset, number
                    scan.check(self._parse, line, which, number, exists, keep=at)
                offset += len(line)

    def __getitem__(self, index: int) -> Record:
        (record,) = self._read(self.lines[index, 0], self.lines[[index]])
        return record

    def __iter__(self) -> Iterator[Record]:
        """All records, with each file opened once."""
        for which in range(len(self.files)):
            yield from self._read(which, self.lines[self.lines[:, 0] == which])

    def _read(self, which: int, lines: np.ndarray) -> Iterator[Record]:
        """Records of one file. lines: where they are."""
        gone = f"{self.files[which]} can no longer be read"
        with explained(gone, OSError), self.copies[which].open("rb") as content:
            for _, offset, number in lines:
                content.seek(offset)
                yield self._parse(content.readline(), which, number)

    def _parse(
        self, line: bytes, which: int, number: int, exists: Callable[[str], bool] | None = None
    ) -> Record:
        file = self.files[which]
        where = f"{file}:{number}"
        with explained(f"{where}: not valid JSON", ValueError, RecursionError):
            given = json.loads(line)
        return parse_record(given, where, self.roots[which], exists)


def jsonl_files(path: Path) -> list[Path]:
    """The files of a `JsonlSource` of this path."""
    if not path.is_dir():
        return files_of(path)
    found = records_in(path, (".jsonl",))
    if not found:
        raise LcoError(f"{path}: the folder holds no .jsonl file")
    return found


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Each holds contents, spelt as in jsonl; those of `negatives` may hold lists of them. None: those
    of "negative" and "negatives" that the table has.
    teacher_scores: the column of a teacher's scores, lists of numbers. None: that of this name, if
    the table has it; "": none.
    kinds: the media (image, audio, video) that some columns hold: paths, encoded bytes, or structs
    of both ({"bytes": …, "path": …}, as Hugging Face datasets have).
    """

    anchor: str = "anchor"
    positive: str = "positive"
    negatives: Sequence[str] | None = None
    teacher_scores: str | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.negatives, str):  # a configuration may name a single column
            object.__setattr__(self, "negatives", (self.negatives,))
        names = [*self.names, *(NEGATIVES if self.negatives is None else ())]
        for name, kind in self.kinds.items():
            if name not in names:
                there = ", ".join(names)
                raise LcoError(f"columns.kinds names {name!r}, which is none of: {there}")
            if kind not in MEDIA:
                kinds = ", ".join(MEDIA)
                raise LcoError(f"columns.kinds.{name} is {kind!r}; it is one of: {kinds}")

    @property
    def names(self) -> list[str]:
        """All of them that are given."""
        scores = [self.teacher_scores] if self.teacher_scores else []
        return [self.anchor, self.positive, *(self.negatives or ()), *scores]

    def within(self, table: pyarrow.parquet.ParquetFile, where: Path) -> "Columns":
        """The same, with the negatives and the teacher's scores that a table has.

        Raises for a slip of their names.
        """
        there = table.schema_arrow.names
        negatives = NEGATIVES if self.negatives is None else ()
        scores = (SCORES,) if self.teacher_scores is None else ()
        for name in set(there) - {*self.names, *negatives, *scores}:
            if meant := get_close_matches(name.lower(), [*negatives, *scores], 1, ALIKE):
                raise LcoError(f"{where} has a column {name!r}; write {meant[0]!r}")
        found = self
        if self.negatives is None:
            found = replace(found, negatives=[name for name in NEGATIVES if name in there])
        if self.teacher_scores is None and SCORES in there:
            found = replace(found, teacher_scores=SCORES)
        return found

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as `parse_record` takes it."""
        negatives = self.negatives or ()
        cells = [(name, cell) for name in negatives for cell in listed(row[name])]
        scores = {SCORES: row[self.teacher_scores]} if self.teacher_scores else {}
        return {
            "anchor": self._content(self.anchor, row[self.anchor]),
            "positive": self._content(self.positive, row[self.positive]),
            "negatives": [self._content(name, cell) for name, cell in cells],
            **scores,
        }

    def _content(self, name: str, cell: Any) -> Any:
        if name not in self.kinds or cell is None:
            return cell
        return {f"{self.kinds[name]}_path": cell}


def parquet_source(
    path: str,
    columns: Columns,
    files: str = "**/*.parquet",
    on_bad: str = "error",
    media_root: str | None = None,
    check_media: bool = True,
) -> ListSource:
    """Records from a parquet file, a folder of them, or a hub dataset, all in memory.

    files: selects the files of a folder or dataset (a glob). media_root, check_media: as for
    `JsonlSource`.
    """
    scan, exists = Scan(on_bad), file_lookup(check_media)
    for file in _parquet_files(path, files):
        root = os.path.abspath(media_root or file.parent)
        with open_table(file, columns.names) as table:
            own = columns.within(table, file)
            rows = table.read(own.names).to_pylist()
        for number, row in enumerate(rows):
            scan.check(parse_record, own.record(row), f"{file}, row {number}", root, exists)
    scan.finish(path)
    return ListSource(scan.kept, scan.skipped, scan.digests)


def _parquet_files(path: str, files: str) -> list[Path]:
    folder = Path(path)
    if folder.is_file() or is_pattern(folder):
        return files_of(folder)
    if not folder.is_dir():
        folder = resolve(path, _patterns(files), kind="dataset")
    names = glob.glob(files, root_dir=folder, recursive=True)  # none that are hidden
    found = sorted(folder / name for name in names if (folder / name).is_file())
    if not found:
        raise LcoError(f"{path} holds no file that matches {files!r}")
    return found


def open_source(
    name: str, spec: Mapping[str, Any], on_bad: str = "error", key: str = "config.data.sources"
) -> Source:
    """Open an entry of `config.data.sources`: its kind (of `KINDS`) and that kind's arguments.

    key: what errors call the mapping that holds the entry.
    """
    return _open(spec, f"{key}.{name}", on_bad)


def open_file(path: Path, media_root: Path | None = None, on_bad: str = "error") -> Source:
    """Open a .jsonl or .parquet file of records, or the source that a .json file describes.

    A .json file holds what an entry of `config.data.sources` holds.
    media_root: as for `JsonlSource`; it replaces that of the .json file. on_bad: "error", or
    "skip": bad records are left out and counted.
    """
    spec = file_source(path)
    if spec is None:
        described = "a .json file that describes a source of them"
        raise LcoError(f"{path}: give a .jsonl or .parquet file of records, or {described}")
    if media_root is not None:
        spec = {**spec, "media_root": str(media_root)}
    return _open(spec, str(path), on_bad)


def _open(spec: Any, where: str, on_bad: str) -> Source:
    if isinstance(spec, ConfigDict):
        spec = spec.to_dict()
    if not isinstance(spec, Mapping):
        raise LcoError(f"{where} must be a mapping with a kind, and is {spec!r:.60}")
    kind = spec.get("kind")
    if kind not in KINDS:
        raise LcoError(f"{where}.kind is {kind!r}; it is one of: {', '.join(KINDS)}")
    given = {key: value for key, value in spec.items() if value is not None}
    arguments = {key: given[key] for key in given.keys() - {"kind", *OF_ALL}}
    _check_instructions(given, where)
    for key in arguments.keys() & {"columns", "values"}:
        if not isinstance(arguments[key], Mapping):
            raise LcoError(f"{where}.{key} must be a mapping, and is {arguments[key]!r:.60}")
    if kind == "parquet":
        columns = arguments.get("columns", {})
        _check_arguments(Columns, columns, f"{where}.columns")
        arguments["columns"] = Columns(**columns)
    maker = _maker(kind, arguments)
    _check_arguments(maker, arguments, where, OF_ALL)
    _fetch_from_buckets(arguments)
    return maker(**arguments, on_bad=on_bad)


def _check_instructions(given: Mapping[str, Any], where: str) -> None:
    for key in INSTRUCTIONS:
        if not isinstance(given.get(key, ""), str):
            raise LcoError(f"{where}.{key} is {given[key]!r:.60}; it must be a text")


def _maker(kind: str, arguments: Mapping[str, Any]) -> Callable[..., Source]:
    if kind == "tfds":
        return CaptionedSource if "caption" in arguments else nli_source
    return {"jsonl": JsonlSource, "files": FilesSource, "parquet": parquet_source}[kind]


def _check_arguments(
    maker: Callable, arguments: Mapping[str, Any], where: str, others: Sequence[str] = ()
) -> None:
    """Raise for an unknown argument, and for one that is missing. others: keys beside them."""
    parameters = dict(inspect.signature(maker).parameters)
    parameters.pop("on_bad", None)
    check_keys(arguments, [*parameters, *others], where)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise LcoError(f"{where} has no {name!r}; give it")


def _fetch_from_buckets(arguments: dict[str, Any]) -> None:
    """Replace what is on a bucket by its copy on this machine."""
    subset = str(arguments.get("name")).split(":")[0]
    patterns = {
        "path": arguments.get("files", "*"),
        "data_dir": f"{subset}/*",
        "media_root": "*",
    }
    for key in arguments.keys() & patterns.keys():
        arguments[key] = str(local_copy(arguments[key], _patterns(patterns[key])))


def _patterns(files: str) -> list[str]:
    """A glob for the hub and buckets, where `**/` does not match the top folder."""
    return [files, files.removeprefix("**/")]
