"""A queue in order of turns, in which a client with one input passes a client with thousands."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What waits. turn: those with the least go first, and of equal ones those that came first.

    is_wanted: whether anybody still waits for it.
    """

    turn: int

    @property
    def is_wanted(self) -> bool: ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Things that wait for their turn. Any number of threads may use it.

    drop: called with each thing that is wanted no more, which nobody gets.
    """

    def __init__(self, drop: Callable[[T], None]):
        self._drop = drop
        self._heap: list[tuple[int, int, T]] = []  # (turn, order of coming, thing)
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, things: Iterable[T]) -> None:
        """More things."""
        with self._changed:
            for thing in things:
                heapq.heappush(self._heap, (thing.turn, next(self._numbers), thing))
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
            if not one[2].is_wanted:
                self._drop(one[2])
            elif chosen and fits and not fits(chosen, one[2]):
                passed.append(one)
            else:
                chosen.append(one[2])
        for one in passed:
            heapq.heappush(self._heap, one)
        return chosen

    def close(self) -> None:
        """Let those who wait go."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
