"""Vectors on their way into a file: numbered parts in a folder beside it, joined when all are there.

A kill at any moment, SIGKILL too, costs the part in the making: parts, manifest and output are each written aside and
then renamed. Dimensions: n rows of a part, N of all, D hidden.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import read_json, write_json

PART_SECONDS = 30.0  # of work that a part holds, unless it is full before, or a block of inputs takes longer
MANIFEST = "manifest.json"
_PART = re.compile(r"(\d{12})-(\d{12})\.parquet")  # its first row, and the one after its last


class VectorParts:
    """The parts of `output`, a .npy or .parquet, in `<output>.partial`. Enter it to write.

    work: flag -> value of all that makes the vectors what they are; a folder of other work is refused.
    part_rows: rows that fill a part. done: rows in whole parts, from which the caller goes on. flag: gave `output`.
    """

    def __init__(self, output: Path, work: Mapping[str, Any], part_rows: int, flag: str = "--output"):
        self.output, self.work, self.part_rows, self.flag = output, dict(work), part_rows, flag
        self.folder = output.with_name(f"{output.name}.partial")
        self.done, self._waiting, self._since = 0, list[pa.Table](), time.monotonic()

    def __enter__(self) -> "VectorParts":
        with explained(f"{self.flag}={self.output} cannot be written", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            with explained(f"another process writes {self.flag}={self.output}; wait for it or end it", BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets it go, however we end
            self._check_manifest()
            for part in self._whole_parts():
                self.done = _range(part)[1]
        except LcoError:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        try:
            if failure is not None and self._waiting:
                self._write_part()
            if self.folder.exists() and not self.done:
                self._remove()
        finally:
            os.close(self._lock)

    def _check_manifest(self) -> None:
        """Write what this work is, or compare it with what the folder holds."""
        manifest = self.folder / MANIFEST
        if not manifest.exists() and (strange := [x.name for x in self.folder.iterdir() if x.suffix != ".tmp"]):
            raise LcoError(f"{self.folder} holds {min(strange)} and no manifest of ours; give another {self.flag}")
        same_work(manifest, self.work, self.flag)

    def _whole_parts(self) -> Iterator[Path]:
        """The parts that follow each other from row 0. What lies beyond a gap is made again, and deleted here."""
        end = 0
        for part in sorted(x for x in self.folder.iterdir() if _PART.fullmatch(x.name)):
            if _range(part)[0] == end:
                end = _range(part)[1]
                yield part
            else:
                part.unlink()

    def add(self, ids: Sequence[int | str], vectors: np.ndarray, reasons: Mapping[int, str]) -> None:
        """Take the next rows. vectors: float32 [n, D]; reasons: {row: why it has no vector}."""
        n, dimension = vectors.shape
        missing = np.zeros(n, bool)
        missing[list(reasons)] = True
        values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        columns = {
            "id": pa.array(ids),
            "embedding": pa.FixedSizeListArray.from_arrays(values, dimension, mask=pa.array(missing)),
            "reason": pa.array([reasons.get(i) for i in range(n)], pa.string()),
        }
        self._waiting.append(pa.table(columns))
        if sum(map(len, self._waiting)) >= self.part_rows or time.monotonic() - self._since >= PART_SECONDS:
            self._write_part()

    def _write_part(self) -> None:
        table = pa.concat_tables(self._waiting)
        end = self.done + len(table)
        with explained(f"{self.folder} cannot be written", OSError):
            aside = self.folder / "part.tmp"
            pyarrow.parquet.write_table(table, aside, compression="none", use_dictionary=False)
            _rename(aside, self.folder / f"{self.done:012d}-{end:012d}.parquet")
        self.done, self._waiting, self._since = end, [], time.monotonic()

    def finish(self, total: int, dimension: int, ids: type) -> int:
        """Join the parts into the output, list the skipped beside it, and remove the folder; how many were skipped.

        total: N; dimension: D; ids: int or str. A row without a vector is NaN in .npy and null in .parquet.
        """
        if self._waiting:
            self._write_part()
        if self.done != total:
            raise LcoError(f"{self.folder} holds {self.done} of {total} vectors: the input changed while it was read")
        aside, skipped = self.folder / "output.tmp", self.output.with_name(f"{self.output.name}.skipped.jsonl")
        write = _write_npy if self.output.suffix == ".npy" else _write_parquet
        schema = pa.schema(
            {"id": pa.int64() if ids is int else pa.string(), "embedding": pa.list_(pa.float32(), dimension)}
        )
        with explained(f"{self.flag}={self.output} cannot be written", OSError):
            count = self._write_skipped(self.folder / "skipped.tmp")
            write(aside, self.tables(), total, schema)
            if count:
                _rename(self.folder / "skipped.tmp", skipped)
            else:
                skipped.unlink(missing_ok=True)  # of an earlier output
            _rename(aside, self.output)
        self._remove()
        return count

    def tables(self, columns: Sequence[str] = ("id", "embedding")) -> Iterator[pa.Table]:
        """The whole parts, in order."""
        for part in self._whole_parts():
            torn = f"{part} is torn; remove it, and the same command makes it again"
            with explained(torn, pa.ArrowException, OSError):
                table = pyarrow.parquet.read_table(part, columns=list(columns), memory_map=True)
            yield table

    def _write_skipped(self, path: Path) -> int:
        """A line of JSON a row without a vector; how many."""
        count = first = 0
        with open(path, "w", encoding="utf-8") as file:
            for table in self.tables(["id", "reason"]):
                for at in np.flatnonzero(table["reason"].is_valid()).tolist():
                    name, reason = table["id"][at].as_py(), table["reason"][at].as_py()
                    line = {"index": first + at, "id": name, "reason": reason}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
                first += len(table)
        return count

    def _remove(self) -> None:
        """Delete our files, the manifest last: a kill on the way leaves a folder that the same command continues."""
        names = sorted((x.name for x in self.folder.iterdir()), reverse=True)
        for name in [*(x for x in names if _PART.fullmatch(x) or x.endswith(".tmp")), MANIFEST]:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file of theirs there
            self.folder.rmdir()


def same_work(manifest: Path, work: Mapping[str, Any], flag: str) -> None:
    """Write what the work in a manifest's folder is. Raises if it is of other work; "raise" may become "skip".

    work: as of `VectorParts`. flag: gave the folder.
    """
    before = read_json(manifest) if manifest.exists() else work
    loosened = before.get("--on-error") == "raise" and work.get("--on-error") == "skip"
    for key in sorted(before.keys() | work.keys()):
        was, now = before.get(key), work.get(key)
        if was != now and not (loosened and key == "--on-error"):
            raise LcoError(
                f"{manifest.parent} holds other work: {key} was {was!r} and is {now!r}; give another "
                f"{flag}, or remove the folder to start anew"
            )
    write_json(manifest, work)


def read_vectors(tables: Iterable[pa.Table]) -> tuple[list[int | str], np.ndarray]:
    """Tables as they are written here -> their ids, and float32 [N, D] with NaN where a row has no vector."""
    ids, blocks = [], [np.zeros((0, 0), np.float32)]
    for table in tables:
        ids += table["id"].to_pylist()
        blocks.append(_matrix(table["embedding"].combine_chunks()))
    return ids, np.concatenate(blocks[1:] or blocks)


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    vectors = np.full((len(column), column.type.list_size), np.nan, "<f4")
    vectors[np.asarray(column.is_valid())] = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return vectors


def _range(part: Path) -> tuple[int, int]:
    """Its first row, and the one after its last."""
    first, end = part.stem.split("-")
    return int(first), int(end)


def _rename(aside: Path, target: Path) -> None:
    """Into place, once its bytes are on the disk: then a power cut cannot leave the name without them."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    aside.replace(target)


def _write_npy(path: Path, tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    dimension = schema.field("embedding").type.list_size
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        for table in tables:
            file.write(_matrix(table["embedding"].combine_chunks()).tobytes())


def _write_parquet(path: Path, tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))
