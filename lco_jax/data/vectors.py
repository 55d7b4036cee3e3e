"""Files of vectors: the rows that parts have, written as .npy or .parquet, and read back.

Dimensions: N rows, D hidden.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How two works differ, as half a sentence; flag -> value each. --on-error=raise may become
    skip.
    """
    for key in sorted(before.keys() | now.keys()):
        was, is_now = before.get(key), now.get(key)
        loosened = key == "--on-error" and (was, is_now) == ("raise", "skip")
        if was != is_now and not loosened:
            return f"{key} was {was!r} and is {is_now!r}"
    return None


def same_work(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: AnyPath, flag: str
) -> None:
    """Raise where the work in the folder, which `flag` gave, is not that of now."""
    if differs := difference(before, now):
        advice = f"give another {flag}, or remove the folder to start anew"
        raise LcoError(f"{folder} holds other work: {differs}; {advice}")


def part_table(
    ids: Sequence[int | str | None], vectors: np.ndarray, reasons: Mapping[int, str]
) -> pa.Table:
    """Rows as a part stores them. vectors: float32 [N, D]; reasons: {row: why it has no vector}."""
    total, dimension = vectors.shape
    missing = np.zeros(total, bool)
    missing[list(reasons)] = True
    values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    embeddings = pa.FixedSizeListArray.from_arrays(values, dimension, mask=pa.array(missing))
    why = pa.array([reasons.get(row) for row in range(total)], pa.string())
    return pa.table({"id": pa.array(ids), "embedding": embeddings, "reason": why})


def read_vectors(tables: Iterable[pa.Table]) -> tuple[list[int | str], np.ndarray]:
    """Tables of parts -> their ids, and float32 [N, D] with NaN where a row has no vector."""
    ids: list[int | str] = []
    blocks: list[np.ndarray] = []
    for table in tables:
        ids += table["id"].to_pylist()
        blocks.append(_matrix(table))
    return ids, np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)


def _matrix(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    dimension = column.type.list_size
    vectors = np.full((len(column), dimension), np.nan, "<f4")
    present = np.asarray(column.is_valid())
    vectors[present] = column.flatten().to_numpy().reshape(-1, dimension)
    return vectors


def write_npy(file: IO[bytes], tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    """float32 [N, D]."""
    shape = (total, schema.field("embedding").type.list_size)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for table in tables:
        file.write(_matrix(table).tobytes())


def write_parquet(
    file: IO[bytes], tables: Iterator[pa.Table], total: int, schema: pa.Schema
) -> None:
    """The columns of `schema`; called as `write_npy` is."""
    options = {"use_dictionary": False, "write_page_checksum": True}
    with pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(None).cast(schema))


def skipped_rows(tables: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    """Index, id and reason of each row without a vector. tables: with the columns id and reason."""
    first = 0
    for table in tables:
        for row in np.flatnonzero(table["reason"].is_valid()).tolist():
            yield {
                "index": first + row,
                "id": table["id"][row].as_py(),
                "reason": table["reason"][row].as_py(),
            }
        first += len(table)
