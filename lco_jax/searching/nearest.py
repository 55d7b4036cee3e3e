"""The nearest of many unit vectors: by looking at all, by their signs, or by a graph.

The graph is usearch's HNSW. Dimensions: N vectors, D numbers of each, W stored values of each, k
asked for.
"""

import hashlib
import logging
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.console import progress_bar, say
from lco_jax.core.errors import explained
from lco_jax.core.files import replace
from lco_jax.core.small_vectors import (
    SIGNS,
    Storage,
    distances,
    lowest,
    quantize_embeddings,
    unit,
    words,
)

EXACT = 100_000  # up to so many vectors, every search looks at all
ADDED_AT_ONCE = 4096
PROPOSED = 4  # by signs, for each that is asked for (sentence-transformers' default is 2)
SAMPLE, NEIGHBOURS = 256, 10  # for the recall that is measured when a graph is built
logger = logging.getLogger(__name__)


class Nearest:
    """vectors: [N, W] as `storage` has them, by default float32 [N, D] of unit length.

    graph: usearch's over them. by_signs: whether signs propose candidates, as they do without a
    choice where only signs are stored. With neither, every search looks at all.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        graph: Any = None,
        storage: Storage | None = None,
        by_signs: bool = False,
    ):
        storage = storage or Storage(vectors.shape[1])
        self._of_length_1 = storage.precision == "float32"
        if storage.precision == "float16":  # numpy takes far longer with it than with float32
            vectors, storage = storage.restore(vectors), Storage(storage.dimension)
        self.stored, self.storage = vectors, storage
        self.graph = graph
        self._signs = None
        if by_signs or storage.precision in SIGNS:
            self._signs = words(storage.all_bits(vectors))

    def __len__(self) -> int:
        return len(self.stored)

    def vector(self, row: int) -> np.ndarray:
        """What is stored of a row, as a unit vector, float32 [D]."""
        if self._of_length_1:
            return self.stored[row]
        return unit(self.storage.restore(self.stored[row]))

    def __call__(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of at most k vectors and their cosines, the nearest first.

        query: float32 [D] of unit length. A graph only proposes candidates, twice as many as asked
        for, and signs four times as many; cosines and order are those of the stored vectors with
        the query as it is.
        """
        if self._signs is not None:
            rows = self._by_signs(query, PROPOSED * k)
            cosines = self.storage.cosines(self.stored[rows], query)
        elif self.graph is not None:
            rows = np.asarray(self.graph.search(query, 2 * k).keys).astype(np.int64)
            cosines = self.storage.cosines(self.stored[rows], query)
        else:
            of_all = self.storage.cosines(self.stored, query)
            rows = lowest(-of_all, k)
            cosines = of_all[rows]
        order = np.lexsort((rows, -cosines))[:k]
        return rows[order], cosines[order]

    def _by_signs(self, query: np.ndarray, count: int) -> np.ndarray:
        """The rows of the vectors with the fewest signs that differ from the query's."""
        bits = quantize_embeddings(query, "ubinary")
        return lowest(distances(self._signs, words(bits)), count)


def with_graph(
    vectors: np.ndarray, keys: list[str], folder: Path, name: str, storage: Storage | None = None
) -> Nearest:
    """`Nearest` with a graph, which is stored in `folder` and built again for other vectors.

    vectors, storage: as `Nearest` has them. keys: of the vectors, [N]. name: of the kind, for files
    and progress. A new graph has its recall measured: how many of the ten nearest neighbours of a
    sample of the vectors it finds. The file's name has a digest of the vectors and one of the file
    itself: usearch believes what it reads, and reads beyond its memory where a file is torn.
    """
    from usearch.index import Index as Graph  # of the extra: most libraries are small

    digest = _digest_of(vectors, keys)
    for path in sorted(folder.glob(f"{name}-{digest}-*.usearch")):
        if path.stem.endswith(f"-{_checksum(path)}"):
            with explained(f"{path} cannot be read; remove it", ValueError, RuntimeError):
                return Nearest(vectors, Graph.restore(path, view=True), storage)
        logger.warning("%s is torn, and is made again", path)
    storage = storage or Storage(vectors.shape[1])
    graph = Graph(ndim=storage.dimension, metric="cos", dtype="f16")
    _fill(graph, vectors, storage, name)
    with explained(f"{folder} cannot be written", OSError, RuntimeError):
        _store(graph, folder, name, digest)
    nearest = Nearest(vectors, graph, storage)
    say(f"graph of {name}: recall@{NEIGHBOURS} {recall(nearest):.3f} against exact search")
    return nearest


def _digest_of(vectors: np.ndarray, keys: list[str]) -> str:
    digest = blake2b("".join(keys).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(vectors))
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    with explained(f"{path} cannot be read", OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _store(graph: Any, folder: Path, name: str, digest: str) -> None:
    """Write a kind's graph, and remove those of before."""
    aside = folder / f"{name}.tmp"
    graph.save(aside)
    path = folder / f"{name}-{digest}-{_checksum(aside)}.usearch"
    replace(aside, path)
    for old in folder.glob(f"{name}-*.usearch"):
        if old != path:
            old.unlink()


def _fill(graph: Any, vectors: np.ndarray, storage: Storage, name: str) -> None:
    """Add vectors to a graph; their keys are their rows."""
    with progress_bar(total=len(vectors), desc=f"graph of {name}", unit="vector") as progress:
        for start in range(0, len(vectors), ADDED_AT_ONCE):
            block = vectors[start : start + ADDED_AT_ONCE]
            graph.add(np.arange(start, start + len(block)), storage.restore(block))
            progress.update(len(block))


def recall(nearest: Nearest) -> float:
    """The share that the graph finds of the ten nearest neighbours of each vector of a sample."""
    rows = np.random.default_rng(0).permutation(len(nearest))[:SAMPLE]
    exact = Nearest(nearest.stored, storage=nearest.storage)
    found = 0
    for row in rows.tolist():
        vector = nearest.vector(row)
        best, _ = exact(vector, NEIGHBOURS + 1)
        proposed, _ = nearest(vector, NEIGHBOURS + 1)
        found += len(set(best) & set(proposed) - {row})
    return found / (len(rows) * min(NEIGHBOURS, len(nearest) - 1))
