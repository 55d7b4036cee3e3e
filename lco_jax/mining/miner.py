"""Records and the vectors of their contents -> the lines of records with mined negatives.

Dimensions: T contents, D hidden, K candidates looked at.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lco_jax.mining.contents import Lines, Numbers, placed
from lco_jax.mining.nearest import Candidates, Excluded, Found, exact
from lco_jax.mining.report import Report
from lco_jax.mining.rules import Rules, choose


class LineForm(NamedTuple):
    """How records are written. folder: of the output, absolute. keeps_given: a record's own
    negatives come before the mined ones. has_scores: with the model's scores as teacher_scores.
    """

    folder: str
    keeps_given: bool
    has_scores: bool


class Related:
    """The contents that records join with a content, as its positive or as its anchor."""

    def __init__(self, numbers: Numbers):
        of = np.concatenate([numbers.anchors, numbers.positives])
        others = np.concatenate([numbers.positives, numbers.anchors])
        order = np.argsort(of, kind="stable")
        self._others = others[order]
        self._starts = np.searchsorted(of[order], np.arange(numbers.total + 1))

    def of(self, number: int) -> np.ndarray:
        """Their numbers, and its own."""
        others = self._others[self._starts[number] : self._starts[number + 1]]
        return np.append(others, number)


class Miner:
    """vectors: float32 [T, D] of unit length; rows of NaN for contents that could not be read."""

    def __init__(
        self, numbers: Numbers, vectors: np.ndarray, contents: Lines, rules: Rules, form: LineForm
    ):
        self.numbers, self.vectors, self.contents = numbers, vectors, contents
        self.rules, self.form = rules, form
        self.candidates = Candidates(vectors, numbers.candidates)
        self.related = Related(numbers)

    def lines(self, first: int, end: int, report: Report) -> Iterator[dict[str, Any]]:
        """The lines of records `first` to `end`, at most `ANCHORS`; `report` counts them.

        A record whose anchor or positive could not be read has none.
        """
        anchors, rows = np.unique(self.numbers.anchors[first:end], return_inverse=True)
        found = self._nearest(anchors)
        for record, row in zip(range(first, end), rows.tolist(), strict=True):
            pair = [self.numbers.anchors[record], self.numbers.positives[record]]
            if not np.isfinite(self.vectors[pair]).all():
                report.leave_out()
                continue
            numbers = self._negatives(record, found.places[row], found.scores[row], report)
            yield self._line([*pair, *numbers])

    def _nearest(self, anchors: np.ndarray) -> Found:
        """Of anchors with these numbers. What a record joins with an anchor is left out."""
        candidates = self.numbers.candidates
        related = [self.related.of(number) for number in anchors.tolist()]
        rows = np.repeat(np.arange(len(anchors)), list(map(len, related)))
        others = np.concatenate(related)
        places = np.searchsorted(candidates, others)
        there = candidates[np.minimum(places, len(candidates) - 1)] == others
        left_out = Excluded(rows[there].astype(np.int32), places[there].astype(np.int32))
        vectors = np.nan_to_num(self.vectors[anchors])
        return self.candidates.nearest(vectors, left_out, self.rules.range)

    def _negatives(
        self, record: int, places: np.ndarray, scores: np.ndarray, report: Report
    ) -> list[int]:
        """The numbers of a record's negatives. places, scores: [K], of its anchor."""
        numbers = self.numbers.candidates[places]
        positive = self._score(record)
        is_nearest = not (scores >= positive).any()
        kept: list[int] = []
        if self.form.keeps_given:
            given = self.numbers.negatives_of(record)
            kept = [one for one in given.tolist() if np.isfinite(self.vectors[one]).all()]
            is_new = ~np.isin(numbers, kept)
            numbers, scores = numbers[is_new], scores[is_new]
        choice = choose(scores, positive, self.rules, record)
        report.add(scores, positive, is_nearest, choice, self.rules)
        return [*kept, *numbers[choice.chosen].tolist()]

    def _score(self, record: int) -> float:
        """Of a record's anchor with its positive."""
        anchor, positive = self.numbers.anchors[record], self.numbers.positives[record]
        return float(exact(self.vectors[anchor], self.vectors[positive]))

    def _line(self, sides: list[int]) -> dict[str, Any]:
        """sides: the numbers of anchor, positive and negatives."""
        anchor, positive, *negatives = (
            placed(self.contents[number], self.form.folder) for number in sides
        )
        line: dict[str, Any] = {"anchor": anchor, "positive": positive}
        if negatives:
            line["negatives"] = negatives
        if self.form.has_scores:
            scores = exact(self.vectors[sides[0]], self.vectors[sides[1:]])
            line["teacher_scores"] = [round(score, 6) for score in scores.tolist()]
        return line
