"""The candidates that are nearest to anchors: all are looked at, a tile of scores at a time.

Dimensions: A anchors of a block, C candidates of a block, N all candidates, D hidden, k nearest
that are kept, E pairs that are left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ANCHORS, CANDIDATES = 4096, 16384  # of a tile: 256 MiB of scores
SPARE = 32  # candidates beyond those asked for, among which exact scores decide
STEP = 256  # a block's size is a multiple of it
EXACT_ANCHORS = 64  # whose candidates' vectors are in memory at once


class Found(NamedTuple):
    """The nearest of each anchor, the best first: places among the candidates int32 [A, k], -1
    where there are no more, and cosines float32 [A, k].
    """

    places: np.ndarray
    scores: np.ndarray


class Excluded(NamedTuple):
    """Pairs that are no candidates, int32 [E] each: the anchor's row in its block, and a place
    among the candidates.
    """

    rows: np.ndarray
    places: np.ndarray


class Candidates:
    """All candidates, for `nearest`. vectors: float32 [T, D] of unit length, on a disk or in
    memory, NaN where a content could not be read; numbers: the candidates' rows in it, [N].
    """

    def __init__(self, vectors: np.ndarray, numbers: np.ndarray):
        self.vectors, self.numbers = vectors, numbers
        self.block = min(CANDIDATES, _rounded(len(numbers)))

    def __len__(self) -> int:
        return len(self.numbers)

    def nearest(self, anchors: np.ndarray, left_out: Excluded, k: int) -> Found:
        """The k nearest candidates of anchors, float32 [A, D], A at most `ANCHORS`.

        Products in float32 propose some more than k, and exact scores order them; of equal ones the
        first in the corpus wins. What an anchor finds depends on no other.
        """
        padded = np.zeros((_rounded(len(anchors)), anchors.shape[1]), np.float32)
        padded[: len(anchors)] = anchors
        wanted = min(k + SPARE, len(self))
        scores = jnp.full((len(padded), wanted), -jnp.inf)
        places = jnp.full((len(padded), wanted), -1, jnp.int32)
        queries = jnp.asarray(padded)
        order = np.argsort(left_out.places, kind="stable")
        left_out = Excluded(left_out.rows[order], left_out.places[order])
        for first in range(0, len(self), self.block):
            block = self._block(first)
            rows, columns = self._within(left_out, first, len(padded))
            jax.block_until_ready(scores)  # or blocks would pile up on the device
            scores, places = _closer(scores, places, queries, block, first, rows, columns)
        return self._exact(anchors, np.asarray(places)[: len(anchors)], k)

    def _block(self, first: int) -> np.ndarray:
        """The vectors of a block [C, D]; rows of NaN behind the last candidate."""
        block = np.full((self.block, self.vectors.shape[1]), np.nan, np.float32)
        numbers = self.numbers[first : first + self.block]
        block[: len(numbers)] = self.vectors[numbers]
        return block

    def _within(self, left_out: Excluded, first: int, absent: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that are left out of a block: rows and columns. A power of two of them, so that
        few programs are compiled; the last ones have the row `absent`.
        """
        start, end = np.searchsorted(left_out.places, [first, first + self.block])
        size = 1 << max(int(end - start) - 1, 0).bit_length()
        rows, columns = np.full(size, absent, np.int32), np.zeros(size, np.int32)
        rows[: end - start] = left_out.rows[start:end]
        columns[: end - start] = left_out.places[start:end] - first
        return rows, columns

    def _exact(self, anchors: np.ndarray, places: np.ndarray, k: int) -> Found:
        """Order by exact scores, and keep k."""
        kept = min(k, places.shape[1])
        found = Found(
            np.full((len(places), kept), -1, np.int32),
            np.full((len(places), kept), -np.inf, np.float32),
        )
        for start in range(0, len(places), EXACT_ANCHORS):
            some = slice(start, start + EXACT_ANCHORS)
            own = places[some]
            scores = exact(anchors[some][:, None], self.vectors[self.numbers[own]])
            scores[own < 0] = -np.inf
            order = np.lexsort((own, -scores))[:, :kept]
            found.places[some] = np.take_along_axis(own, order, axis=1)
            found.scores[some] = np.take_along_axis(scores, order, axis=1)
        return found


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors [..., D] and [..., D]: float32 [...], summed in float64, so that
    equal vectors have equal ones wherever they are.
    """
    return np.sum(a.astype(np.float64) * b, axis=-1).astype(np.float32)


@jax.jit
def _closer(
    scores: Array,
    places: Array,
    anchors: Array,
    block: Array,
    first: Array,
    rows: Array,
    columns: Array,
) -> tuple[Array, Array]:
    """The best of those found before and of a block's: scores and places [A, k].

    scores, places: of before, [A, k]. block: [C, D], whose first candidate has the place `first`;
    NaN where there is none. rows, columns: of the pairs that are left out.
    """
    present = jnp.all(jnp.isfinite(block), axis=-1)
    vectors = jnp.where(present[:, None], block, 0.0)
    products = jnp.einsum("ad,cd->ac", anchors, vectors, precision=jax.lax.Precision.HIGHEST)
    products = jnp.where(present, products, -jnp.inf)
    products = products.at[rows, columns].set(-jnp.inf, mode="drop")
    own = jnp.where(jnp.isneginf(products), -1, first + jnp.arange(block.shape[0]))
    best, at = jax.lax.top_k(jnp.concatenate([scores, products], axis=1), scores.shape[1])
    both = jnp.concatenate([places, own.astype(jnp.int32)], axis=1)
    return best, jnp.take_along_axis(both, at, axis=1)


def _rounded(size: int) -> int:
    return -(-max(size, 1) // STEP) * STEP
