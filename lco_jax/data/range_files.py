"""Files of the ranges of levels, which int8 and uint8 vectors are stored with, and calibrations."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import AnyPath, reaching, write_bytes
from lco_jax.core.small_vectors import checked_ranges
from lco_jax.data.vectors import matrix

RANGES = "_ranges.npy"  # in a folder of parts; readers of parquet leave the name alone


def beside(output: AnyPath) -> AnyPath:
    """Where the ranges of an output lie that is a file."""
    return output.with_name(f"{output.name}.ranges.npy")


def write_ranges(path: AnyPath, ranges: np.ndarray | None) -> None:
    """Write ranges [2, D], or, of None, remove those of an earlier output."""
    if ranges is None:
        if path.exists():
            path.unlink()
        return
    content = BytesIO()
    np.save(content, ranges)
    write_bytes(path, content.getvalue())


def read_ranges(path: AnyPath, dimension: int) -> np.ndarray | None:
    """Ranges, float32 [2, D]; None where there is no file."""
    with reaching(path):
        if not path.exists():
            return None
        with explained(f"{path} is damaged; remove it", OSError, ValueError, EOFError):
            return checked_ranges(np.load(BytesIO(path.read_bytes())), dimension, str(path))


def read_calibration(path: Path, dimension: int) -> np.ndarray:
    """The vectors of a .npy, or of a .parquet as the embed command writes it: float32 [M, D].

    Raises for what is none, is of another dimension, or is not of floats.
    """
    where = f"--calibration={path}"
    if path.suffix not in (".npy", ".parquet"):
        raise LcoError(f"{where}: give a number of inputs, or a .npy or .parquet of vectors")
    with explained(f"{where} cannot be read", OSError, ValueError, EOFError, pa.ArrowException):
        vectors = np.load(path) if path.suffix == ".npy" else _of_parquet(path, where)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.shape[1] != dimension:
        what = f"{vectors.dtype} of shape {vectors.shape}"
        raise LcoError(f"{where} holds {what}; give floats of shape (N, {dimension})")
    vectors = vectors[np.isfinite(vectors).all(axis=1)].astype(np.float32)
    if len(vectors) < 2:
        raise LcoError(f"{where} holds {len(vectors)} vectors; ranges are of two or more")
    return vectors


def _of_parquet(path: Path, where: str) -> np.ndarray:
    table = pyarrow.parquet.read_table(path)
    names = table.column_names
    if "embedding" not in names or not pa.types.is_fixed_size_list(table["embedding"].type):
        raise LcoError(f"{where} has no column embedding of vectors")
    vectors, there = matrix(table)
    return vectors[there]
