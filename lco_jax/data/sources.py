"""Where records come from: jsonl, TFDS, media files, parquet folders or hub datasets. All are random access."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.lib
from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import ASSETS, local_copy, on_bucket, read_json, resolve
from lco_jax.data.captions import FilesSource
from lco_jax.data.prompts import MEDIA
from lco_jax.data.records import Record, file_lookup, listed, parse_record
from lco_jax.data.scan import ListSource, Scan, Source
from lco_jax.data.tfds import CaptionedSource, nli_source

KINDS = ("jsonl", "tfds", "files", "parquet")


class JsonlSource:
    """The reference's jsonl, one record a line. Holds one offset a line in memory and reads lines on demand.

    media_root: the folder that relative paths of media start from, by default the file's own. check_media: whether the
    scan looks for every local file that a record names.
    """

    def __init__(
        self,
        path: str | Path,
        on_bad: str = "error",
        media_root: str | None = None,
        check_media: bool = True,
    ):
        name = str(path)  # `assets:NAME` is a file that ships with the package
        self.path = (
            ASSETS / name.removeprefix("assets:") if name.startswith("assets:") else Path(path)
        )
        self.root = os.path.abspath(media_root or self.path.parent)
        scan, offset, exists = Scan(on_bad), 0, file_lookup(check_media)
        with explained(f"{self.path} cannot be read", OSError), open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    scan.check(partial(self._parse, line, number, exists), (offset, number))
                offset += len(line)
        scan.finish(str(self.path))
        self.lines = np.array(scan.kept, np.int64)
        self.skipped, self.max_negatives, self.modalities = (
            scan.skipped,
            scan.max_negatives,
            scan.modalities,
        )

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        offset, number = self.lines[index]
        with (
            explained(f"{self.path} can no longer be read", OSError),
            open(self.path, "rb") as file,
        ):
            file.seek(offset)
            return self._parse(file.readline(), number)

    def _parse(
        self, line: bytes, number: int, exists: Callable[[str], bool] | None = None
    ) -> Record:
        where = f"{self.path}:{number}"
        with explained(f"{where}: not valid JSON", ValueError):
            content = json.loads(line)
        return parse_record(content, where, self.root, exists)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table. Each holds sides, spelt as in jsonl; those of `negatives` also lists of sides.

    kinds: of some columns, the media they hold (image, audio, video): paths, encoded bytes, or structs of both
    ({"bytes": …, "path": …}, as Hugging Face datasets have).
    """

    anchor: str = "anchor"
    positive: str = "positive"
    negatives: Sequence[str] = ("negative",)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        negatives = (self.negatives,) if isinstance(self.negatives, str) else tuple(self.negatives)
        object.__setattr__(self, "negatives", negatives)  # however a configuration spells them
        for name, kind in self.kinds.items():
            if name not in self.names:
                raise LcoError(
                    f"columns.kinds names {name!r}, which is none of the columns: {', '.join(self.names)}"
                )
            if kind not in MEDIA:
                raise LcoError(
                    f"columns.kinds.{name} is {kind!r}; it is one of: {', '.join(MEDIA)}"
                )

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [self.anchor, self.positive, *self.negatives]

    def content(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as `parse_record` takes it."""
        negatives = [
            self._side(name, item) for name in self.negatives for item in listed(row[name])
        ]
        anchor, positive = (self._side(name, row[name]) for name in (self.anchor, self.positive))
        return {"anchor": anchor, "positive": positive, "negatives": negatives}

    def _side(self, name: str, cell: Any) -> Any:
        if name not in self.kinds or cell is None:
            return cell
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        return {f"{self.kinds[name]}_path": cell}


def parquet_source(
    path: str,
    columns: Columns,
    files: str = "**/*.parquet",
    on_bad: str = "error",
    media_root: str | None = None,
    check_media: bool = True,
) -> ListSource:
    """Records from a parquet file, a folder of them, or a hub dataset; `files` selects among them (a glob).

    All of it is held in memory. media_root, check_media: as for `JsonlSource`.
    """
    folder = Path(path)
    if folder.is_file():
        paths = [folder]
    else:
        if not folder.is_dir():
            folder = resolve(path, [files, files.removeprefix("**/")], kind="dataset")
        paths = sorted(folder.glob(files))
    if not paths:
        raise LcoError(f"{path} holds no file that matches {files!r}")
    scan, exists = Scan(on_bad), file_lookup(check_media)
    for file in paths:
        with explained(
            f"{file} is torn or not a parquet file", pyarrow.lib.ArrowException, OSError
        ):
            table = pyarrow.dataset.dataset(file, format="parquet")
            if missing := [name for name in columns.names if name not in table.schema.names]:
                raise LcoError(
                    f"{file} has no column {missing[0]!r}; its columns: {', '.join(table.schema.names)}"
                )
            rows = table.to_table(columns=columns.names).to_pylist()
        root = os.path.abspath(media_root or file.parent)
        for number, row in enumerate(rows):
            scan.check(
                partial(parse_record, columns.content(row), f"{file}, row {number}", root, exists)
            )
    scan.finish(path)
    return ListSource(scan.kept, scan.skipped)


def open_source(name: str, spec: Mapping[str, Any], on_bad: str = "error") -> Source:
    """Open one entry of `config.data.sources`: its `kind` (one of `KINDS`) and that kind's arguments."""
    if isinstance(spec, ConfigDict):
        spec = spec.to_dict()
    if not isinstance(spec, Mapping):
        raise LcoError(
            f"config.data.sources.{name} must be a mapping with a kind, and is {spec!r:.60}"
        )
    kind = spec.get("kind")
    if kind not in KINDS:
        raise LcoError(
            f"config.data.sources.{name}.kind is {kind!r}; it is one of: {', '.join(KINDS)}"
        )
    arguments = {
        key: value
        for key, value in spec.items()
        if key not in ("kind", "weight") and value is not None
    }
    for key in {"columns", "values"} & set(arguments):
        if not isinstance(arguments[key], Mapping):
            raise LcoError(
                f"config.data.sources.{name}.{key} must be a mapping, and is {arguments[key]!r:.60}"
            )
    subset = str(arguments.get("name")).split(":")[0] + "/*"
    for key, pattern in (
        ("path", arguments.get("files", "*")),
        ("data_dir", subset),
        ("media_root", "*"),
    ):
        if on_bucket(arguments.get(key, "")):
            arguments[key] = str(local_copy(arguments[key], [pattern, pattern.removeprefix("**/")]))
    try:
        if kind == "parquet":
            arguments["columns"] = Columns(**arguments.get("columns", {}))
        tfds = CaptionedSource if "caption" in arguments else nli_source
        makers = {
            "jsonl": JsonlSource,
            "tfds": tfds,
            "files": FilesSource,
            "parquet": parquet_source,
        }
        return makers[kind](**arguments, on_bad=on_bad)
    except TypeError as error:
        raise LcoError(
            f"config.data.sources.{name}: {str(error).split(') ')[-1].split('() ')[-1]}"
        ) from None


def open_file(path: Path, media_root: Path | None = None) -> Source:
    """Open a .jsonl or .parquet file of records, or the source of a configuration that a .json file holds.

    media_root: as for `JsonlSource`, in the place of what the source says.
    """
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise LcoError(
            f"{path}: give a .jsonl or .parquet file of records, or a .json file that holds a source of them"
        )
    spec = (
        read_json(path) if path.suffix == ".json" else {"kind": path.suffix[1:], "path": str(path)}
    )
    try:
        return open_source(
            str(path), spec if media_root is None else {**spec, "media_root": str(media_root)}
        )
    except LcoError as error:  # which speaks of a configuration
        raise LcoError(str(error).replace("config.data.sources.", "")) from None
