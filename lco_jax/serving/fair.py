"""A queue in which a client with one input passes a client with thousands."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests take turns: of each, one thing at a time. Any number of threads may use it.

    wanted: whether a thing that waits is still wanted. drop: called with each that is not, which
    nobody gets.
    """

    def __init__(self, wanted: Callable[[T], bool], drop: Callable[[T], None]):
        self._wanted, self._drop = wanted, drop
        self._heap: list[tuple[int, int, T]] = []  # (turn, order of coming, thing)
        self._numbers = itertools.count()
        self._turn = 0  # of what was taken last
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, things: Iterable[T]) -> None:
        """The things of one request, in their order."""
        with self._changed:
            for place, thing in enumerate(things):
                heapq.heappush(self._heap, (self._turn + place, next(self._numbers), thing))
            self._changed.notify()

    def take(self, most: int, fits: Callable[[list[T], T], bool] | None = None) -> list[T]:
        """Wait for something -> at most `most` things, in order; none once the queue is closed.

        fits: whether a thing may go with those that were chosen before it; by default it may.
        """
        with self._changed:
            while not self._is_closed:
                chosen = self._choose(most, fits)
                if chosen:
                    if self._heap:
                        self._changed.notify()
                    return chosen
                self._changed.wait()
        return []

    def _choose(self, most: int, fits: Callable[[list[T], T], bool] | None) -> list[T]:
        chosen: list[T] = []
        passed = []
        while self._heap and len(chosen) < most and len(passed) < 4 * most:
            one = heapq.heappop(self._heap)
            if not self._wanted(one[2]):
                self._drop(one[2])
                continue
            if chosen and fits and not fits(chosen, one[2]):
                passed.append(one)
                continue
            chosen.append(one[2])
            self._turn = max(self._turn, one[0])
        for one in passed:
            heapq.heappush(self._heap, one)
        return chosen

    def close(self) -> None:
        """Let those who wait go."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
