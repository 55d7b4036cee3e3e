"""Retrieval on held-out triplets: does an anchor find its positive among all positives and all hard negatives?

Dimensions: N records, C candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lco_jax.data.records import Record, Side, side_key

Encode = Callable[[list[Side]], np.ndarray]  # sides (texts, or tuples of parts) -> unit vectors [N, D]


@dataclass(frozen=True)
class Retrieval:
    """recall_at_1 and mrr in [0, 1]; similarity [N, C]: anchors × candidates, the first N of them the positives."""

    recall_at_1: float
    mrr: float
    similarity: np.ndarray


def retrieval(encode: Encode, records: Sequence[Record]) -> Retrieval:
    """Recall@1 and mean reciprocal rank; a tie with a wrong candidate counts against the anchor.

    Candidates that say the same as the right answer, word for word and pixel for pixel, are not counted as wrong.
    """
    candidates = [record.positive for record in records] + [side for record in records for side in record.negatives]
    vectors = encode([record.anchor for record in records] + candidates)
    similarity = vectors[: len(records)] @ vectors[len(records) :].T
    own = similarity[np.arange(len(records)), np.arange(len(records))]
    numbers: dict = {}
    said = np.array([numbers.setdefault(side_key(side), len(numbers)) for side in candidates])
    same = said[None, :] == said[: len(records), None]
    rank = 1 + ((similarity >= own[:, None]) & ~same).sum(axis=1)
    return Retrieval(float((rank == 1).mean()), float((1.0 / rank).mean()), similarity)
