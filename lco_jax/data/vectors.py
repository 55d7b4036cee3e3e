"""Files of vectors: the rows that parts hold, written as .npy or .parquet, and read back.

Dimensions: N rows, D hidden.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What makes other work of one, as half a sentence; flag -> value each. "raise" may become "skip"."""
    loosened = before.get("--on-error") == "raise" and now.get("--on-error") == "skip"
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not (loosened and key == "--on-error"):
            return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    return None


def same_work(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, flag: str) -> None:
    """Raise where the work that a folder, given by `flag`, holds is not that of now."""
    if differs := difference(before, now):
        raise LcoError(
            f"{folder} holds other work: {differs}; give another {flag}, or remove the folder to start anew"
        )


def read_vectors(tables: Iterable[pa.Table]) -> tuple[list[int | str], np.ndarray]:
    """Tables as they are written here -> their ids, and float32 [N, D] with NaN where a row has no vector."""
    ids, blocks = [], [np.zeros((0, 0), np.float32)]
    for table in tables:
        ids += table["id"].to_pylist()
        blocks.append(_matrix(table["embedding"].combine_chunks()))
    return ids, np.concatenate(blocks[1:] or blocks)


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    vectors = np.full((len(column), column.type.list_size), np.nan, "<f4")
    vectors[np.asarray(column.is_valid())] = (
        column.flatten().to_numpy().reshape(-1, column.type.list_size)
    )
    return vectors


def rename(aside: Path, target: Path) -> None:
    """Into place, once its bytes are on the disk: then a power cut cannot leave the name without them."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    aside.replace(target)


def write_npy(path: Path, tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    """float32 [N, D]."""
    dimension = schema.field("embedding").type.list_size
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        for table in tables:
            file.write(_matrix(table["embedding"].combine_chunks()).tobytes())


def write_parquet(path: Path, tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    """The columns of `schema`, as `write_npy` is called."""
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def write_skipped(path: Path, tables: Iterable[pa.Table]) -> int:
    """A line of JSON a row without a vector; how many. tables: with the columns id and reason."""
    count = first = 0
    with open(path, "w", encoding="utf-8") as file:
        for table in tables:
            for at in np.flatnonzero(table["reason"].is_valid()).tolist():
                name, reason = table["id"][at].as_py(), table["reason"][at].as_py()
                line = {"index": first + at, "id": name, "reason": reason}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
            first += len(table)
    return count
