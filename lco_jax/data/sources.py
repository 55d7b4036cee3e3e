"""Where records come from: jsonl files, TFDS datasets, parquet folders or hub datasets. All are random access."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.dataset
import pyarrow.lib
from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.core.files import resolve
from lco_jax.data.records import Record, parse_record

ASSETS = Path(__file__).parent.parent / "assets"
ON_BAD = ("error", "skip")
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Records by index; `skipped` counts the bad ones left out, `max_negatives` is the most a record holds."""

    skipped: int
    max_negatives: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class _Checked:
    """Counts what a scan over all records finds. Every source is scanned once, when it is opened."""

    def __init__(self, on_bad: str):
        if on_bad not in ON_BAD:
            raise LcoError(f"on_bad is {on_bad!r}; it is one of: {', '.join(ON_BAD)}")
        self.on_bad, self.skipped, self.max_negatives, self.kept = on_bad, 0, 0, []

    def check_record(self, content: Any, where: str, token: Any = None) -> None:
        """Parse one record (or what a function returns); keep `token`, by default the record, or raise or count."""
        try:
            record = parse_record(content() if callable(content) else content, where)
        except LcoError as error:
            if self.on_bad == "error":
                raise LcoError(f"{error} (set on_bad to 'skip' to leave such records out)") from None
            self.skipped += 1
            if self.skipped <= 3:
                logger.warning("skipped: %s", error)
            return
        self.max_negatives = max(self.max_negatives, len(record.negatives))
        self.kept.append(record if token is None else token)

    def finish(self, what: str) -> None:
        if self.skipped:
            logger.warning("%s: skipped %d bad records of %d", what, self.skipped, self.skipped + len(self.kept))
        if not self.kept:
            raise LcoError(f"{what} holds no usable record")


class JsonlSource:
    """The reference's jsonl, one record a line. Holds one offset a line in memory and reads lines on demand."""

    def __init__(self, path: str | Path, on_bad: str = "error"):
        self.path = _asset(path)
        checked, offset = _Checked(on_bad), 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        checked.check_record(
                            partial(_json, line, self._where(number)), self._where(number), (offset, number)
                        )
                    offset += len(line)
        except OSError as error:
            raise LcoError(f"{self.path} cannot be read: {error.strerror}") from None
        checked.finish(str(self.path))
        self.lines = np.array(checked.kept, np.int64)
        self.skipped, self.max_negatives = checked.skipped, checked.max_negatives

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        offset, number = self.lines[index]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return parse_record(_json(file.readline(), self._where(number)), self._where(number))

    def _where(self, number: int) -> str:
        return f"{self.path}:{number}"


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LcoError(f"{where}: not valid JSON: {error}") from None


class ListSource(list[Record]):
    """Records in memory."""

    def __init__(self, records: Sequence[Record], skipped: int = 0):
        super().__init__(records)
        self.skipped = skipped
        self.max_negatives = max((len(record.negatives) for record in records), default=0)


def nli_source(name: str, split: str = "train", data_dir: str | None = None, on_bad: str = "error") -> ListSource:
    """A TFDS dataset with `premise`, `hypothesis` and `label` as triplets: premise, entailed, contradicted.

    Every premise that has both gives one triplet per entailed hypothesis, with its contradictions in turn. Needs no
    TensorFlow: the dataset must be prepared as array_record (TFDS's `data_source`).
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features, rows = builder.info.features, builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises many kinds for one cause: it is not there in this form
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if data_dir is not None and not (folder := Path(data_dir) / name.split(":")[0]).is_dir():
            reason = f"there is no folder {folder}"
        raise LcoError(f"the TFDS dataset {name!r} ({split}, data_dir {data_dir}) cannot be read: {reason}") from None
    if missing := {"premise", "hypothesis", "label"} - set(features):
        raise LcoError(
            f"the TFDS dataset {name!r} has no feature {min(missing)!r}; its features: {', '.join(features)}"
        )
    label_names = getattr(features["label"], "names", None)
    if not label_names:
        raise LcoError(f"the TFDS dataset {name!r} has a label without names; it needs a ClassLabel")
    sides: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["label"] >= 0:  # -1: the annotators did not agree
            kind = sides.setdefault(row["premise"].decode(), {})
            kind.setdefault(label_names[row["label"]], []).append(row["hypothesis"].decode())
    checked = _Checked(on_bad)
    for premise, kinds in sides.items():
        contradictions = kinds.get("contradiction", [])
        for i, entailed in enumerate(kinds.get("entailment", []) if contradictions else []):
            where = f"tfds:{name}/{split}, premise {premise!r:.40}"
            negative = contradictions[i % len(contradictions)]
            checked.check_record({"anchor": premise, "positive": entailed, "negative": negative}, where)
    if not checked.kept and not checked.skipped:
        raise LcoError(f"the TFDS dataset {name!r} ({split}) has no premise with an entailment and a contradiction")
    checked.finish(name)
    return ListSource(checked.kept, checked.skipped)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; `negatives` may hold strings or lists of strings."""

    anchor: str = "anchor"
    positive: str = "positive"
    negatives: tuple[str, ...] = ("negative",)


def parquet_source(path: str, columns: Columns, files: str = "**/*.parquet", on_bad: str = "error") -> ListSource:
    """Records from a parquet file, a folder of them, or a hub dataset; `files` selects among them (a glob)."""
    folder = Path(path)
    if folder.is_file():
        paths = [folder]
    else:
        if not folder.is_dir():
            folder = resolve(path, [files, files.removeprefix("**/")], kind="dataset")
        paths = sorted(folder.glob(files))
    if not paths:
        raise LcoError(f"{path} holds no file that matches {files!r}")
    checked = _Checked(on_bad)
    for file in paths:
        try:
            table = pyarrow.dataset.dataset(file, format="parquet")
            wanted = [columns.anchor, columns.positive, *columns.negatives]
            if missing := [name for name in wanted if name not in table.schema.names]:
                raise LcoError(f"{file} has no column {missing[0]!r}; its columns: {', '.join(table.schema.names)}")
            rows = table.to_table(columns=wanted).to_pylist()
        except (pyarrow.lib.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise LcoError(f"{file} is torn or not a parquet file: {reason}") from None
        for number, row in enumerate(rows):
            negatives = [row[name] for name in columns.negatives if row[name] is not None]
            flat = [side for cell in negatives for side in (cell if isinstance(cell, list) else [cell])]
            content = {"anchor": row[columns.anchor], "positive": row[columns.positive], "negatives": flat}
            where = f"{file}, row {number}"
            checked.check_record(content, where)
    checked.finish(path)
    return ListSource(checked.kept, checked.skipped)


def _asset(path: str | Path) -> Path:
    """`assets:NAME` is a file that ships with the package."""
    return ASSETS / str(path).removeprefix("assets:") if str(path).startswith("assets:") else Path(path)


def open_source(name: str, spec: Mapping[str, Any], on_bad: str = "error") -> Source:
    """Open one entry of `config.data.sources`: its `kind` (jsonl, tfds, parquet) and that kind's arguments."""
    if not isinstance(spec, Mapping | ConfigDict):
        raise LcoError(f"config.data.sources.{name} must be a mapping with a kind, and is {spec!r:.60}")
    arguments = {key: value for key, value in spec.items() if key not in ("kind", "weight") and value is not None}
    kind = spec.get("kind")
    try:
        if kind == "jsonl":
            return JsonlSource(**arguments, on_bad=on_bad)
        if kind == "tfds":
            return nli_source(**arguments, on_bad=on_bad)
        if kind == "parquet":
            columns = arguments.pop("columns", {})
            if not isinstance(columns, Mapping | ConfigDict):
                raise LcoError(f"config.data.sources.{name}.columns must be a mapping, and is {columns!r:.60}")
            columns = dict(columns)
            negatives = columns.pop("negatives", Columns.negatives)
            negatives = (negatives,) if isinstance(negatives, str) else tuple(negatives)
            return parquet_source(**arguments, columns=Columns(**columns, negatives=negatives), on_bad=on_bad)
    except TypeError as error:
        raise LcoError(f"config.data.sources.{name}: {str(error).split(') ')[-1].split('() ')[-1]}") from None
    raise LcoError(f"config.data.sources.{name}.kind is {kind!r}; it is one of: jsonl, tfds, parquet")
