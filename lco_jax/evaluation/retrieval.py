"""Retrieval: does an anchor find its positive among all positives and all hard negatives, a query its documents?

Dimensions: N records or queries, M documents, R relevant documents of a query, D hidden.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from lco_jax.data.records import Content, Record, content_key

Encode = Callable[
    [list[Content]], np.ndarray
]  # sides (texts, or tuples of parts) -> unit vectors [N, D]

QUERIES, DOCUMENTS = 256, 4096  # of whose scores there is one block at a time


@dataclass(frozen=True)
class Retrieval:
    """recall_at_1 and mrr in [0, 1]; candidates: how many; similarity [N, N]: of anchors with positives."""

    recall_at_1: float
    mrr: float
    candidates: int
    similarity: np.ndarray


def retrieval(encode: Encode, records: Sequence[Record]) -> Retrieval:
    """Recall@1 and mean reciprocal rank; a tie with a wrong candidate counts against the anchor.

    Candidates are all positives and negatives; those that say the same, word for word and pixel for pixel, are one.
    """
    positives = [content_key(record.positive) for record in records]
    negatives = [side for record in records for side in record.negatives]
    candidates: dict[Hashable, Content] = dict(
        zip(positives, (record.positive for record in records), strict=True)
    )
    candidates |= {content_key(side): side for side in negatives}
    vectors = encode([record.anchor for record in records] + list(candidates.values()))
    anchors, others = vectors[: len(records)], vectors[len(records) :]
    place = {key: i for i, key in enumerate(candidates)}
    right = [place[key] for key in positives]
    rank = np.array(
        [found.min() for found, _ in ranks(anchors, others, [{at: 1.0} for at in right])]
    )
    return Retrieval(
        float((rank == 1).mean()),
        float((1.0 / rank).mean()),
        len(others),
        anchors @ others[right].T,
    )


def ranks(
    queries: np.ndarray, documents: np.ndarray, relevance: Sequence[Mapping[int, float]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each query, of its relevant documents: ranks among all documents, from 1, int [R], and grades [R]; exact.

    queries [N, D], documents [M, D]: unit vectors. relevance: of each query {document's index: grade}, all above 0.
    Ties count against the query: what is not relevant comes first, then the less relevant. Scores are summed in float64
    and rounded to float32, so equal vectors tie wherever they stand. The N × M scores are never there at once.
    """
    which = [np.fromiter(row, np.int64, len(row)) for row in relevance]
    grades = [np.fromiter(row.values(), np.float64, len(row)) for row in relevance]
    queries = queries.astype(np.float64)
    own = [
        (documents[at].astype(np.float64) @ query).astype(np.float32)
        for at, query in zip(which, queries, strict=True)
    ]
    above = [
        np.zeros(len(at), np.int64) for at in which
    ]  # how many that are not relevant come before
    for first in tqdm(
        range(0, len(documents), DOCUMENTS), desc="ranking", unit="block", leave=False, delay=2
    ):
        block = documents[first : first + DOCUMENTS].astype(np.float64).T
        for start in range(0, len(queries), QUERIES):
            scores = (queries[start : start + QUERIES] @ block).astype(np.float32)
            for i, row in enumerate(scores, start):
                row[which[i][(which[i] >= first) & (which[i] < first + len(row))] - first] = -np.inf
                above[i] += (row >= own[i][:, None]).sum(axis=1)
    for i, (score, grade) in enumerate(zip(own, grades, strict=True)):
        above[i][np.lexsort((grade, -score))] += np.arange(1, len(score) + 1)
    return list(zip(above, grades, strict=True))


def retrieval_metrics(ranked: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Means over queries of what `ranks` gives: nDCG@10, MRR@10, and recall and hit rate at 1, 5 and 10, in [0, 1].

    A document's gain is its grade (linear, as in trec_eval and mteb), its discount log2(rank + 1).
    """
    gain = lambda ranks, grades: (grades / np.log2(ranks + 1))[ranks <= 10].sum()
    ideal = lambda grades: gain(np.arange(1, len(grades) + 1), np.sort(grades)[::-1])
    best = np.array([ranks.min() for ranks, _ in ranked])
    numbers = {
        "ndcg_at_10": np.mean([gain(ranks, grades) / ideal(grades) for ranks, grades in ranked]),
        "mrr_at_10": np.mean(np.where(best <= 10, 1 / best, 0)),
    }
    for k in (1, 5, 10):
        numbers[f"recall_at_{k}"] = np.mean([(ranks <= k).mean() for ranks, _ in ranked])
        numbers[f"hit_at_{k}"] = np.mean(best <= k)
    return {name: float(value) for name, value in numbers.items()}
