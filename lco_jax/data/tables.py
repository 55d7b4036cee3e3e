"""Parquet files, opened with a clear error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.lib
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained


@contextmanager
def open_table(path: Path, columns: Iterable[str]) -> Iterator[pyarrow.parquet.ParquetFile]:
    """The file, which has these columns. Errors of reading it within become one sentence."""
    torn = f"{path} is torn or not a parquet file"
    with (
        explained(torn, pyarrow.lib.ArrowException, OSError),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        there = file.schema_arrow.names
        for name in columns:
            if name not in there:
                raise LcoError(f"{path} has no column {name!r}; its columns: {', '.join(there)}")
        yield file
