"""Which of an anchor's nearest candidates become its negatives.

Dimensions: K candidates, the nearest first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SKIPPED, RATIO, MARGIN = "skip-top", "max-ratio", "margin"
RULES = (SKIPPED, RATIO, MARGIN)  # in the order in which they drop


@dataclass(frozen=True)
class Rules:
    """negatives: how many of a record. range: so many nearest candidates are looked at.

    skip_top: so many of them are dropped. max_ratio: what scores this part of the positive's score
    or more is dropped (NV-Retriever, arXiv 2407.15831: 0.95); None: nothing is. margin: what scores
    more than the positive less this is dropped; None: nothing is.
    sample: draw among those left, in place of the nearest; seed: of that.
    """

    negatives: int
    range: int
    skip_top: int
    max_ratio: float | None
    margin: float | None
    sample: bool
    seed: int


class Choice(NamedTuple):
    """What becomes of the candidates of a record.

    chosen: the columns of its negatives, in ascending order. dropped: by each of `RULES`, bool [K].
    """

    chosen: np.ndarray
    dropped: dict[str, np.ndarray]


def choose(scores: np.ndarray, positive: float, rules: Rules, record: int) -> Choice:
    """Choose among candidates with the scores float32 [K], -inf where there is none.

    positive: the score of the record's positive. record: its number, for what is drawn.
    """
    left = np.isfinite(scores)
    scores = scores.astype(np.float64)
    margin = -np.inf if rules.margin is None else rules.margin
    broken = {
        SKIPPED: np.arange(len(scores)) < rules.skip_top,
        RATIO: scores >= highest(positive, rules.max_ratio),
        MARGIN: scores > positive - margin,
    }
    dropped = {}
    for rule in RULES:
        dropped[rule] = left & broken[rule]
        left = left & ~broken[rule]
    columns = np.flatnonzero(left)
    if rules.sample and len(columns) > rules.negatives:
        random = np.random.default_rng([rules.seed, record])
        columns = np.sort(random.choice(columns, rules.negatives, replace=False))
    return Choice(columns[: rules.negatives], dropped)


def highest(positive: float, max_ratio: float | None) -> float:
    """The score at which the ratio begins to drop. Of a positive that scores below 0 it lies as far
    below as it would of one above.
    """
    if max_ratio is None:
        return np.inf
    return positive - (1 - max_ratio) * abs(positive)
