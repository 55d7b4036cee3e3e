"""Vectors on disk, found by a digest of their input: a killed evaluation embeds nothing twice.

mteb's `CachedEmbeddingWrapper` does not do: it stores nothing before all inputs of a split are
embedded, decodes media to hash them, and puts a document's title before its text a second time.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lco_jax.core.errors import explained
from lco_jax.core.files import write_json
from lco_jax.data.records import content_key


def digest(content: Mapping[str, Any]) -> bytes:
    """16 bytes that tell contents apart.

    Values are text, numbers, bytes, paths (their files' bytes count), images, arrays, or mappings
    and lists of these.
    """
    seen = blake2b(digest_size=16)
    for name, value in sorted(content.items()):
        if isinstance(value, Image.Image):
            value = (
                value.mode,
                value.size,
                value.getpalette("RGBA"),
                value.tobytes(),
            )
        elif isinstance(value, Path):
            with explained(f"{value} cannot be read", OSError):
                value = value.read_bytes()
        seen.update(repr((name, content_key(value))).encode())
    return seen.digest()


class StoredVectors:
    """Digest of an input -> vector, float32 [D], in `<root>/<digest of settings>/vectors.sqlite`.

    settings: all that a vector depends on beside its input; written beside the vectors, for people.
    SQLite keeps what was added when the process is killed, and undoes an addition that was cut
    short. Several processes may use one file.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]):
        self.folder = root / digest(settings).hex()
        with self._writing():
            write_json(self.folder / "settings.json", settings)
            self._file = sqlite3.connect(self.folder / "vectors.sqlite")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS vectors (digest BLOB PRIMARY KEY, vector BLOB)"
            )

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: bytes) -> bool:
        return self._vector(key) is not None

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Store vectors [N, D] under their digests, all of them or none."""
        blobs = [vector.tobytes() for vector in vectors.astype("<f4")]
        with self._writing(), self._file:  # one transaction
            rows = zip(keys, blobs, strict=True)
            self._file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)

    def vectors(self, keys: Sequence[bytes]) -> np.ndarray:
        """The vectors of digests that are all stored, float32 [N, D]."""
        return np.array([np.frombuffer(self._vector(key), "<f4") for key in keys])

    def zeros(self) -> int:
        """How many of the stored vectors are 0."""
        query = "SELECT count(*) FROM vectors WHERE vector = zeroblob(length(vector))"
        return self._file.execute(query).fetchone()[0]

    def _vector(self, key: bytes) -> bytes | None:
        query = "SELECT vector FROM vectors WHERE digest = ?"
        row = self._file.execute(query, (key,)).fetchone()
        return row and row[0]

    def _writing(self) -> AbstractContextManager[None]:
        return explained(
            f"{self.folder} cannot be written",
            OSError,
            sqlite3.Error,
        )
