"""Files of vectors: the rows that parts have, written as .npy or .parquet, and read back.

Vectors are as a `Storage` has them. Dimensions: N rows, W stored values of a vector.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath
from lco_jax.core.small_vectors import Storage


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
    """Rows as a part stores them. vectors: [N, W]; reasons: {row: why it has no vector}."""
    total, width = vectors.shape
    missing = np.zeros(total, bool)
    missing[list(reasons)] = True
    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    embeddings = pa.FixedSizeListArray.from_arrays(values, width, mask=pa.array(missing))
    why = pa.array([reasons.get(row) for row in range(total)], pa.string())
    return pa.table({"id": pa.array(ids), "embedding": embeddings, "reason": why})


def vector_type(storage: Storage) -> pa.DataType:
    """The type of a column of vectors."""
    return pa.list_(pa.from_numpy_dtype(storage.dtype), storage.width)


def matrix(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(the vectors of a table [N, W], which rows have one, bool [N]). Those without are NaN, or 0
    among whole numbers.
    """
    column = table["embedding"].combine_chunks()
    width = column.type.list_size
    values = column.flatten().to_numpy()
    missing = np.nan if values.dtype.kind == "f" else 0
    vectors = np.full((len(column), width), missing, values.dtype)
    there = np.asarray(column.is_valid())
    vectors[there] = values.reshape(-1, width)
    return vectors, there


def write_npy(file: IO[bytes], tables: Iterator[pa.Table], total: int, schema: pa.Schema) -> None:
    """[N, W]."""
    column = schema.field("embedding").type
    dtype = np.dtype(column.value_type.to_pandas_dtype()).newbyteorder("<")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (total, column.list_size)}
    np.lib.format.write_array_header_1_0(file, header)
    for table in tables:
        vectors, _ = matrix(table)
        file.write(vectors.astype(dtype, copy=False).tobytes())


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
