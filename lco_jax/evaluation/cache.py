"""Vectors by what they are the vectors of, in a file that only grows: what a killed evaluation did is not done again.

Dimensions: N inputs, D hidden.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import write_json

KEY_BYTES = 16
SYNC_SECONDS = 30.0  # of work that a power cut may cost; a kill costs nothing that was added


def digest(content: Any) -> bytes:
    """16 bytes that tell contents apart: any nesting of text, numbers, bytes, files (their bytes), pictures, arrays."""
    seen = blake2b(digest_size=KEY_BYTES)
    for leaf in _leaves(content):
        seen.update(len(leaf).to_bytes(8, "little") + leaf)
    return seen.digest()


def _leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        value = sorted(value.items())
    elif isinstance(value, Image.Image):
        value = (value.mode, value.size, value.getpalette("RGBA"), value.tobytes())
    elif isinstance(value, np.ndarray):
        value = (value.dtype.str, value.shape, value.tobytes())
    elif isinstance(value, Path):
        with explained(f"{value} cannot be read", OSError):
            value = value.read_bytes()
    if isinstance(value, list | tuple):
        yield b"%d parts" % len(value)
        for part in value:
            yield from _leaves(part)
    else:
        yield value if isinstance(value, bytes) else f"{type(value).__name__} {value}".encode()


class VectorCache:
    """Digest of an input -> float32 [D], in `<root>/<digest of settings>/vectors.bin`. Enter it to use.

    settings: all that a vector depends on beside its input; they are kept next to the vectors, to be read by people.
    The file holds records of a digest and D numbers and is memory-mapped. What was added survives a kill; a record that
    was cut short is dropped on entering.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], dimension: int):
        self.folder, self.settings = root / digest(settings).hex(), dict(settings)
        self.record = np.dtype([("key", "u1", KEY_BYTES), ("vector", "<f4", dimension)])

    def __enter__(self) -> "VectorCache":
        with explained(f"{self.folder} cannot be written", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "settings.json", self.settings)
            self._file = open(self.folder / "vectors.bin", "ab", buffering=0)
        try:
            with explained(
                f"another process writes {self.folder}; wait for it or end it", BlockingIOError
            ):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except LcoError:
            self._file.close()
            raise
        self._count, self._synced = (
            os.fstat(self._file.fileno()).st_size // self.record.itemsize,
            time.monotonic(),
        )
        self._file.truncate(self._count * self.record.itemsize)
        keys = self._table()["key"] if self._count else ()
        self._rows = {key.tobytes(): row for row, key in enumerate(keys)}
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Append vectors [N, D] under their digests."""
        records = np.zeros(len(keys), self.record)
        records["key"], records["vector"] = (
            np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            vectors,
        )
        with explained(f"{self.folder} cannot be written", OSError):
            self._file.truncate(
                self._count * self.record.itemsize
            )  # what an earlier attempt left of its own
            if self._file.write(records.tobytes()) < records.nbytes:
                raise OSError("the disk is full")
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._rows |= {key: self._count + i for i, key in enumerate(keys)}
        self._count += len(keys)

    def vectors(self, keys: Sequence[bytes]) -> np.ndarray:
        """float32 [N, D] of digests that are all there."""
        return (
            np.asarray(self._table()["vector"][[self._rows[key] for key in keys]])
            if keys
            else np.zeros((0, 0))
        )

    def empty(self) -> int:
        """How many vectors are 0."""
        return int((~self._table()["vector"].any(axis=1)).sum()) if self._count else 0

    def _table(self) -> np.memmap:
        return np.memmap(self._file.name, self.record, mode="r")
