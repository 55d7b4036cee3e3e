"""The tests of a world folder: who is asked what, and how an answer counts.

Dimensions: Q queries, M documents, R relevant ones of a query, N distinct inputs, D hidden.
"""

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.corpus import json_lines
from lco_jax.data.records import Reader, as_input, content_key, parse_record
from lco_jax.evaluation.retrieval import ranks, retrieval_metrics


@dataclass
class Inputs:
    """Distinct inputs in the order in which they were first named, each encoded once."""

    sides: list[Any] = field(default_factory=list)
    places: dict[Hashable, int] = field(default_factory=dict)

    def place(self, side: Any) -> int:
        """Where among the inputs a side stands, put there if it is new."""
        at = self.places.setdefault(content_key(side), len(self.sides))
        if at == len(self.sides):
            self.sides.append(as_input(side))
        return at


@dataclass
class Finding:
    """Queries and documents (places among the inputs) and, of each query, its relevant documents'
    numbers.

    name: of the numbers. mrr, ndcg: whether these stand beside recall@1 (nDCG: one relevant
    document each). parts: name -> the queries of a part.
    """

    name: str
    queries: list[int]
    documents: list[int]
    relevant: list[dict[int, float]]
    mrr: bool = False
    ndcg: bool = False
    parts: Mapping[str, list[int]] = field(default_factory=dict)

    def score(self, vectors: np.ndarray) -> dict[str, float]:
        """The share of queries whose first document is relevant, and what else is asked for;
        vectors [N, D].
        """
        ranked = ranks(vectors[self.queries], vectors[self.documents], self.relevant)
        best = np.array([found.min() for found, _ in ranked])
        numbers = {self.name: np.mean(best == 1)}
        numbers |= {
            f"{self.name}.{part}": np.mean(best[which] == 1) for part, which in self.parts.items()
        }
        if self.mrr:
            numbers[f"{self.name}_mrr"] = np.mean(1 / best)
        if self.ndcg:
            numbers[f"{self.name}_ndcg_at_10"] = retrieval_metrics(ranked)["ndcg_at_10"]
        return {name: float(value) for name, value in numbers.items()}

    def chance(self) -> dict[str, float]:
        """The same, expected of documents in random order."""
        m, many = len(self.documents), np.array([len(row) for row in self.relevant])
        numbers = {self.name: np.mean(many / m)}
        numbers |= {
            f"{self.name}.{part}": np.mean(many[which] / m) for part, which in self.parts.items()
        }
        if self.mrr:
            numbers[f"{self.name}_mrr"] = np.mean([_chance_of_mrr(m, int(r)) for r in many])
        if self.ndcg:  # of one relevant document, whose every rank is as likely
            numbers[f"{self.name}_ndcg_at_10"] = (1 / np.log2(np.arange(2, 12)[:m])).sum() / m
        return {name: float(value) for name, value in numbers.items()}


def _chance_of_mrr(m: int, r: int) -> float:
    """The expected 1 / rank of the first of r relevant documents among m in random order.

    The best of r random ranks is k with probability comb(m - k, r - 1) / comb(m, r).
    """
    return sum(comb(m - k, r - 1) / k for k in range(1, m + 1)) / comb(m, r)


@dataclass
class Choosing:
    """Queries that each choose one of their own options; the first option is the right one, and a
    tie is wrong.

    options: of each query a list of choices, each a list of places whose mean vector stands for it.
    """

    name: str
    queries: list[int]
    options: list[list[list[int]]]
    parts: Mapping[str, list[int]] = field(default_factory=dict)

    def score(self, vectors: np.ndarray) -> dict[str, float]:
        """Accuracy, of all queries and of each part's; vectors [N, D]."""
        right = np.array(
            [self._right(vectors, *one) for one in zip(self.queries, self.options, strict=True)]
        )
        return self._numbers(right)

    def chance(self) -> dict[str, float]:
        """The same, of a random choice."""
        return self._numbers(np.array([1 / len(options) for options in self.options]))

    def _numbers(self, right: np.ndarray) -> dict[str, float]:
        parts = {
            f"{self.name}.{part}": float(right[which].mean()) for part, which in self.parts.items()
        }
        return {self.name: float(right.mean()), **parts}

    @staticmethod
    def _right(vectors: np.ndarray, query: int, options: list[list[int]]) -> float:
        means = np.stack([vectors[places].astype(np.float64).mean(axis=0) for places in options])
        scores = (means / np.linalg.norm(means, axis=1, keepdims=True) @ vectors[query]).astype(
            np.float32
        )
        return float(scores[0] > scores[1:].max())


def read_tests(world: Path, templates: Sequence[str]) -> tuple[Inputs, list[Finding | Choosing]]:
    """All tests of a world, and the inputs that they name."""
    inputs = Inputs()
    tests: list[Finding | Choosing] = []
    for file, kind in files(world, "retrieval"):
        rows = [
            (row["text"], reader.side(row["media"], "media"))
            for row, reader in rows_of(file, "media", "text")
        ]
        texts, media = ([inputs.place(side) for side in sides] for sides in zip(*rows, strict=True))
        tests += _both_ways(
            ("text", kind), texts, media, list(range(len(rows))), ndcg=kind == "page"
        )
    if (file := world / "tests" / "cross.jsonl").exists():
        tests += _cross(file, inputs)
    if (file := world / "tests" / "text.jsonl").exists():
        tests.append(_triplets(file, inputs))
    if (file := world / "tests" / "minimal.jsonl").exists():
        tests.append(_minimal(file, inputs))
    for file, kind in files(world, "zeroshot"):
        rows = [
            (reader.side(row["media"], "media"), row["label"])
            for row, reader in rows_of(file, "media", "label")
        ]
        labels = sorted({label for _, label in rows})
        if len(labels) < 2:
            raise LcoError(f"{file} has {len(labels)} class, and there must be two or more")
        classes = {one: [inputs.place(t.replace("{}", one)) for t in templates] for one in labels}
        options = [
            [classes[label], *(classes[one] for one in labels if one != label)] for _, label in rows
        ]
        tests.append(
            Choosing(f"zeroshot_{kind}", [inputs.place(side) for side, _ in rows], options)
        )
    return inputs, tests


def _both_ways(
    kinds: tuple[str, str], a: list[int], b: list[int], concepts: list[Any], **more: Any
) -> list[Finding]:
    """a finds b and b finds a; what is of the same concept is relevant."""
    same: dict[Any, dict[int, float]] = {}
    for i, concept in enumerate(concepts):
        same.setdefault(concept, {})[i] = 1.0
    relevant = [same[concept] for concept in concepts]
    make = partial(Finding, relevant=relevant, **more)
    return [make(f"{kinds[0]}_to_{kinds[1]}", a, b), make(f"{kinds[1]}_to_{kinds[0]}", b, a)]


def _cross(file: Path, inputs: Inputs) -> list[Finding]:
    """Images and sounds by concept, which no record ever pairs."""
    rows = list(rows_of(file, "image", "audio", "concept"))
    a, b = (
        [inputs.place(reader.side(row[kind], kind)) for row, reader in rows]
        for kind in ("image", "audio")
    )
    groups = {"held_out": True, "seen": False}
    parts = {
        name: [i for i, (row, _) in enumerate(rows) if row.get("held_out") is so]
        for name, so in groups.items()
    }
    parts = {name: which for name, which in parts.items() if which}
    return _both_ways(
        ("image", "audio"), a, b, [row["concept"] for row, _ in rows], mrr=True, parts=parts
    )


def _triplets(file: Path, inputs: Inputs) -> Finding:
    """Anchors find their positives among all positives and negatives, equal texts being one
    document.
    """
    documents: dict[int, int] = {}
    queries, relevant = [], []
    for row, reader in rows_of(file, "anchor", "positive"):
        record = parse_record(row, reader.where, reader.root, reader.exists)
        numbers = [
            documents.setdefault(inputs.place(side), len(documents)) for side in record.sides[1:]
        ]
        queries.append(inputs.place(record.anchor))
        relevant.append({numbers[0]: 1.0})
    return Finding("text_to_text", queries, list(documents), relevant)


def _minimal(file: Path, inputs: Inputs) -> Choosing:
    """Which of two texts that differ in one attribute is nearer?"""
    queries, options, parts = [], [], {}
    for i, (row, reader) in enumerate(rows_of(file, "media", "right", "wrong", "attribute")):
        queries.append(inputs.place(reader.side(row["media"], "media")))
        options.append([[inputs.place(row["right"])], [inputs.place(row["wrong"])]])
        parts.setdefault(row["attribute"], []).append(i)
    return Choosing("minimal", queries, options, parts)


def files(world: Path, test: str) -> Iterator[tuple[Path, str]]:
    """tests/TEST_KIND.jsonl and KIND of each there is, in the order of their names."""
    if not (world / "tests").is_dir():
        raise LcoError(f"{world} has no folder tests, and so is no world to measure on")
    for file in sorted((world / "tests").glob(f"{test}_*.jsonl")):
        yield file, file.stem.removeprefix(f"{test}_")


def rows_of(file: Path, *keys: str) -> Iterator[tuple[dict[str, Any], Reader]]:
    """Every object of a .jsonl, in which these keys must stand, and what reads its sides."""
    empty = True
    for _, row, where in json_lines(file):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise LcoError(f"{where} must be an object that has {', '.join(keys)}")
        empty = False
        yield row, Reader(where, os.path.abspath(file.parent), os.path.isfile)
    if empty:
        raise LcoError(f"{file} holds no line")
