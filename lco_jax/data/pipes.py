"""Pipes to another process, on which nobody waits for ever.

A process that sleeps, for a dead network mount or a driver that does not answer, uses no CPU, so a
clock of CPU time never ends it. Whoever waits for such a process counts how long it sleeps.
"""

import io
import select
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK_SECONDS = 1.0  # between looks at a process that is waited for


class SleptTooLong(Exception):
    """A process slept longer over its work than it may."""


class Patience:
    """A clock of the time that a process sleeps while this one waits for it.

    left: the seconds that it may still sleep. Time does not count while a thread of the process
    runs, or waits for a CPU as on a busy machine; nor while this process is stopped, or busy
    itself. Where there is no /proc (macOS), all time counts that this process waits.
    """

    def __init__(self, process: int):
        self.process = process
        self.left = 0.0

    def wait(self, poller: Any) -> None:
        """Return when a pipe is ready, or closed. Raises `SleptTooLong`."""
        while not poller.poll(1000 * LOOK_SECONDS):
            if _is_asleep(self.process):
                self.left -= LOOK_SECONDS
            if self.left <= 0:
                raise SleptTooLong


def _is_asleep(process: int) -> bool:
    """Whether no thread of a process runs, or waits for a CPU alone (state R)."""
    for path in Path(f"/proc/{process}/task").glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            state = path.read_text().rpartition(")")[2].split()[0]
            if state == "R":
                return False
    return True


class Pipe(io.RawIOBase):
    """An end of a pipe that does not block, and waits with patience. It reads, or it writes."""

    def __init__(self, end: io.FileIO, patience: Patience):
        super().__init__()
        self._end, self._patience = end, patience
        self._poller = select.poll()
        self._poller.register(end, select.POLLIN if end.readable() else select.POLLOUT)

    def readable(self) -> bool:
        return self._end.readable()

    def writable(self) -> bool:
        return self._end.writable()

    def readinto(self, buffer: Any) -> int | None:
        self._patience.wait(self._poller)
        return self._end.readinto(buffer)

    def write(self, content: Any) -> int | None:
        """As many of the bytes as there is room for."""
        self._patience.wait(self._poller)
        return self._end.write(content)

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()
        super().close()
