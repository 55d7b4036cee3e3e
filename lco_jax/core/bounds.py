"""What a light process may take over a piece of its work: CPU time and memory."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class OutOfTimeError(Exception):
    """Work took all of its time, and ended within a tick of the clock that would have ended it."""


@contextmanager
def bounded(seconds: float, more_bytes: int) -> Iterator[None]:
    """A clock of CPU time, whose alarm ends this process, and a cap on memory.

    more_bytes: beyond those of now. What needs more raises `MemoryError`. Raises `OutOfTimeError`.
    """
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _limit_memory(more_bytes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)
    if time.process_time() - start > seconds:
        raise OutOfTimeError


def _limit_memory(more: int | None) -> None:
    """Allow so many bytes beyond those of now; None: as many as there are.

    Only Linux counts all of a process's data in this limit.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = most
    if more is not None:
        pages = 0
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + more
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
