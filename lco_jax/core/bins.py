"""Things of some size go to bins of some size."""

import heapq
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import NamedTuple

import numpy as np


def bucket(n: int, granularity: int = 8) -> int:
    """The least m ≥ n of the form k · 2^j with k ≤ 2 · granularity.

    Such sizes are few, and m exceeds n by less than n / granularity.
    """
    step = 1
    while n > 2 * granularity * step:
        step *= 2
    return -(-n // step) * step


def spread(sizes: Iterable[int], bins: int) -> np.ndarray:
    """Which of `bins` each item goes to: the largest first, each to the least filled bin.

    Deterministic.
    """
    sizes = np.fromiter(sizes, np.int64)
    heap = [(0, number) for number in range(bins)]  # how full each bin is; the least full is first
    chosen = np.zeros(len(sizes), np.int64)
    for item in np.argsort(-sizes, kind="stable"):
        filled, least_full = heap[0]
        chosen[item] = least_full
        filled += int(sizes[item])
        heapq.heapreplace(heap, (filled, least_full))
    return chosen


class RowAssignment(NamedTuple):
    """For each of N items, its row [N], and where in the row it starts [N]."""

    row: np.ndarray
    start: np.ndarray

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self.row.max(initial=-1)) + 1


def assign_rows(lengths: Iterable[int], row_length: int) -> RowAssignment:
    """Best fit, the longest item first: each goes to the fullest row that still holds it.

    Deterministic.
    """
    lengths = np.fromiter(lengths, np.int64)
    longest = lengths.max(initial=0)
    if longest > row_length:
        raise ValueError(f"an item of {longest} does not fit a row of {row_length}")
    free = np.full(len(lengths), row_length, np.int64)  # no more rows than items are needed
    rows = np.zeros(len(lengths), np.int32)
    starts = np.zeros(len(lengths), np.int32)
    opened = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = lengths[item]
        fitting = np.flatnonzero(free[: opened + 1] >= length)
        fullest = fitting[free[fitting].argmin()]
        rows[item] = fullest
        starts[item] = row_length - free[fullest]
        free[fullest] -= length
        opened = max(opened, fullest + 1)
    return RowAssignment(rows, starts)


def cheapest_cut(count: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """The cheapest way to cut `count` things in a row into pieces: (begin, end) of each piece.

    cost: of a piece (begin, end); infinite for a piece that is not allowed.
    """
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]  # for the first n things
    for end in range(1, count + 1):
        options = []
        for begin in range(end):
            cost_before, pieces = best[begin]
            total = cost_before + cost(begin, end)
            options.append((total, [*pieces, (begin, end)]))
        best.append(min(options, key=itemgetter(0)))
    return best[-1][1]
