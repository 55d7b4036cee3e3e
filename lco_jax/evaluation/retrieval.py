"""Retrieval: does an anchor find its positive, does a query find its documents?

Dimensions: N records or queries, M documents, R relevant documents of a query, D hidden.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lco_jax.core.console import progress_bar
from lco_jax.data.records import Content, Record, content_key

Encode = Callable[[list[Content]], np.ndarray]  # contents -> unit vectors [N, D]
Ranked = Sequence[tuple[np.ndarray, np.ndarray]]  # what `ranks` returns
QUERIES, DOCUMENTS = (
    256,
    4096,
)  # scores are computed for a block of so many at a time


@dataclass(frozen=True)
class Retrieval:
    """recall_at_1, mrr: in [0, 1]; candidates: how many; similarity [N, N]: anchors, positives."""

    recall_at_1: float
    mrr: float
    candidates: int
    similarity: np.ndarray


def retrieval(
    encode: Encode, records: Sequence[Record], encode_queries: Encode | None = None
) -> Retrieval:
    """Recall@1 and mean reciprocal rank; a tie with a wrong candidate counts against the anchor.

    Candidates are all positives and negatives. Equal contents (the same words, the same pixels)
    are one candidate. encode_queries: of anchors, where they have another instruction.
    """
    contents = [record.positive for record in records]
    for record in records:
        contents += record.negatives
    candidates = {content_key(content): content for content in contents}
    index_of = {key: index for index, key in enumerate(candidates)}
    positives = [index_of[content_key(record.positive)] for record in records]

    queries, found = [record.anchor for record in records], list(candidates.values())
    if encode_queries is None:
        anchors, documents = np.split(encode(queries + found), [len(records)])
    else:
        anchors, documents = encode_queries(queries), encode(found)
    best = best_ranks(
        ranks(
            anchors,
            documents,
            [{positive: 1.0} for positive in positives],
        )
    )
    return Retrieval(
        recall_at_1=float((best == 1).mean()),
        mrr=float((1 / best).mean()),
        candidates=len(documents),
        similarity=anchors @ documents[positives].T,
    )


def ranks(
    queries: np.ndarray,
    documents: np.ndarray,
    relevance: Sequence[Mapping[int, float]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each query's relevant documents: ranks among all documents, from 1, int [R]; grades [R].

    queries [N, D], documents [M, D]: unit vectors. relevance: for each query {document's index:
    grade}, all grades above 0. The ranks are exact. A tie counts against the query: documents that
    are not relevant come first, then the less relevant. Scores are summed in float64 and rounded to
    float32, so equal vectors tie wherever they are. The N × M scores never exist at once.
    """
    relevant = [np.array(list(row), np.int64) for row in relevance]
    grades = [np.array(list(row.values()), np.float64) for row in relevance]
    queries = queries.astype(np.float64)
    scores = []  # of the relevant documents
    for query, indices in zip(queries, relevant, strict=True):
        scores.append((documents[indices].astype(np.float64) @ query).astype(np.float32))
    counts = _count_irrelevant_above(queries, documents, relevant, scores)
    found = []
    for count, score, grade in zip(counts, scores, grades, strict=True):
        order = np.lexsort((grade, -score))
        count[order] += np.arange(1, len(order) + 1)
        found.append((count, grade))
    return found


def _count_irrelevant_above(
    queries: np.ndarray,
    documents: np.ndarray,
    relevant: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """How many documents that are not relevant score as high as each relevant one: int [R]."""
    counts = [np.zeros(len(indices), np.int64) for indices in relevant]
    starts = range(0, len(documents), DOCUMENTS)
    for first in progress_bar(starts, desc="ranking", unit="block", leave=False, delay=2):
        block = documents[first : first + DOCUMENTS].astype(np.float64).T
        for start in range(0, len(queries), QUERIES):
            products = (queries[start : start + QUERIES] @ block).astype(np.float32)
            for i, row in enumerate(products, start):
                here = relevant[i] - first
                row[here[(here >= 0) & (here < len(row))]] = -np.inf
                counts[i] += (row >= scores[i][:, None]).sum(axis=1)
    return counts


def ranks_of_scores(
    rows: Iterable[np.ndarray], relevance: Sequence[Mapping[int, float]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `ranks`, of a row of scores of all documents, [M], for each query."""
    found = []
    for scores, graded in zip(rows, relevance, strict=True):
        relevant = np.array(list(graded), np.int64)
        grades = np.array(list(graded.values()), np.float64)
        own = scores[relevant]
        others = np.delete(scores, relevant)
        count = (others >= own[:, None]).sum(axis=1)
        count[np.lexsort((grades, -own))] += np.arange(1, len(own) + 1)
        found.append((count, grades))
    return found


def best_ranks(ranked: Ranked) -> np.ndarray:
    """The rank of each query's first relevant document, int [N]."""
    return np.array([found.min() for found, _ in ranked])


def retrieval_metrics(ranked: Ranked) -> dict[str, float]:
    """Means over queries: nDCG@10, MRR@10, and recall and hit rate at 1, 5 and 10, in [0, 1].

    A document's gain is its grade (linear, as in trec_eval and mteb), its discount log2(rank + 1).
    """
    best = best_ranks(ranked)
    numbers = {
        "ndcg_at_10": np.mean([_ndcg_at_10(found, grades) for found, grades in ranked]),
        "mrr_at_10": np.mean(np.where(best <= 10, 1 / best, 0)),
    }
    for k in (1, 5, 10):
        numbers[f"recall_at_{k}"] = np.mean([np.mean(found <= k) for found, _ in ranked])
        numbers[f"hit_at_{k}"] = np.mean(best <= k)
    return {name: float(value) for name, value in numbers.items()}


def _ndcg_at_10(found: np.ndarray, grades: np.ndarray) -> float:
    ideal_ranks = np.arange(1, len(grades) + 1)
    ideal_grades = np.sort(grades)[::-1]
    return _gain(found, grades) / _gain(ideal_ranks, ideal_grades)


def _gain(found: np.ndarray, grades: np.ndarray) -> float:
    """The discounted gain of the first ten documents."""
    discounted = grades / np.log2(found + 1)
    return discounted[found <= 10].sum()
