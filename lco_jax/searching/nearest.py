"""The nearest of many unit vectors: all of them looked at, or an HNSW graph (usearch) where they are too many for that.

Dimensions: N vectors, D hidden, k asked for.
"""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.core.errors import explained

EXACT = 100_000  # up to so many vectors are all looked at
ADDED_AT_ONCE = 4096
SAMPLE, NEIGHBOURS = 256, 10  # of the recall that is measured when a graph is built


class Nearest:
    """vectors: float32 [N, D] of unit length. graph: usearch's over them, or None: then the search is exact."""

    def __init__(self, vectors: np.ndarray, graph: Any = None):
        self.vectors, self.graph = vectors, graph

    def __call__(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """query: float32 [D] of unit length -> the rows of at most k vectors and their cosines, the nearest first.

        A graph only proposes candidates, twice as many as asked for: cosines and order are those of float32 vectors.
        """
        if self.graph is None:
            cosines = self.vectors @ query
            k = min(k, len(cosines))
            rows = np.argpartition(-cosines, k - 1)[:k]
            cosines = cosines[rows]
        else:
            rows = np.asarray(self.graph.search(query, 2 * k).keys).astype(np.int64)
            cosines = self.vectors[rows] @ query
        order = np.lexsort((rows, -cosines))[:k]
        return rows[order], cosines[order]


def with_graph(vectors: np.ndarray, keys: list[str], folder: Path, name: str) -> Nearest:
    """`Nearest` with a graph, which is kept in `folder` and built again when the vectors are others.

    keys: of the vectors, [N]. name: of the kind, for files and progress. A graph that is built has its recall measured:
    how many of the ten nearest neighbours of a sample of the vectors it finds.
    """
    from usearch.index import Index as Graph  # of the extra: most libraries are small

    path = folder / f"{name}-{blake2b(''.join(keys).encode(), digest_size=8).hexdigest()}.usearch"
    if path.exists():
        with explained(
            f"{path} is torn; remove it, and the same command makes it again",
            ValueError,
            RuntimeError,
        ):
            return Nearest(vectors, Graph.restore(path, view=True))
    graph = Graph(ndim=vectors.shape[1], metric="cos", dtype="f16")
    with tqdm(total=len(vectors), desc=f"graph of {name}", unit="vector") as progress:
        for start in range(0, len(vectors), ADDED_AT_ONCE):
            block = vectors[start : start + ADDED_AT_ONCE]
            graph.add(np.arange(start, start + len(block)), block)
            progress.update(len(block))
    with explained(f"{folder} cannot be written", OSError, RuntimeError):
        graph.save(aside := folder / f"{name}.tmp")
        os.replace(aside, path)
        for old in set(folder.glob(f"{name}-*.usearch")) - {path}:
            old.unlink()
    nearest = Nearest(vectors, graph)
    print(f"graph of {name}: recall@{NEIGHBOURS} {recall(nearest):.3f} against exact search")
    return nearest


def recall(nearest: Nearest) -> float:
    """Of the ten nearest neighbours of each vector of a sample, itself left out, the share that the graph finds."""
    rows = np.random.default_rng(0).permutation(len(nearest.vectors))[:SAMPLE]
    exact, found = Nearest(nearest.vectors), 0
    for row in rows.tolist():
        best, proposed = (
            set(search(nearest.vectors[row], NEIGHBOURS + 1)[0]) for search in (exact, nearest)
        )
        found += len((best & proposed) - {row})
    return found / (len(rows) * min(NEIGHBOURS, len(nearest.vectors) - 1))
