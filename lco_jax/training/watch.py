"""What ends a run that cannot go on: SIGTERM, a lost process, a step that does not end."""

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lco_jax.core.console import last_traceback, last_words
from lco_jax.core.errors import PEER_LOST, PREEMPTED, PeerLost, leave, peer_is_gone

MEETING_SECONDS = 300  # within which all processes must have met
FIRST_STEP = 6  # the first step, which is compiled, may take this many times a run's patience


def leave_on_sigterm() -> None:
    """From now on SIGTERM ends this process at once, until a `Preemption` heeds it."""
    signal.signal(signal.SIGTERM, _EndAtOnce(_sigterm_action()))


class _EndAtOnce:
    """A handler of SIGTERM. replaced: what the system did before, `_sigterm_action`'s result."""

    def __init__(self, replaced: ctypes.Array):
        self.replaced = replaced

    def __call__(self, *_: object) -> None:
        _end_at_once(
            PREEMPTED,
            "stopped by SIGTERM; there was nothing to save: the same command begins or resumes",
        )


class Preemption:
    """While open, says after each step whether the run must save and end because SIGTERM came.

    reached: `RunStore.reached_preemption`. For several processes jax's preemption service, which
    `jax.distributed.initialize` starts, does the work: its handler, in C++, notes a SIGTERM; within
    a second its coordination service informs all processes, and they agree on the step after the
    one that the foremost has reached. A single process has no such service, so this class sets a
    handler of its own.
    """

    def __init__(self, reached: Callable[[int], bool]):
        self.reached = reached
        self.heeding = False
        self.came = False

    def heed(self) -> None:
        """Call when there is something to save: from now on SIGTERM is noted."""
        if self.heeding:
            return
        self.heeding = True
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._note)
        elif isinstance(self.before, _EndAtOnce):
            _sigterm_action(self.before.replaced)

    def now(self, step: int) -> bool:
        """Whether to save at this step, and end. Every process must ask at every step."""
        return self.reached(step) if jax.distributed.is_initialized() else self.came

    def _note(self, *_: object) -> None:
        self.came = True

    def __enter__(self) -> "Preemption":
        self.before = signal.getsignal(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:  # None: a handler from outside Python, which is still there
            signal.signal(signal.SIGTERM, self.before)


def _sigterm_action(new: ctypes.Array | None = None) -> ctypes.Array:
    """The system's action on SIGTERM (an opaque `struct sigaction`); then `new` replaces it.

    `signal.signal` cannot bring back a handler that was not set from Python.
    """
    before = ctypes.create_string_buffer(1024)
    ctypes.CDLL(None).sigaction(signal.SIGTERM, new, before)
    return before


@contextmanager
def meeting() -> Iterator[int]:
    """Within, processes meet. This one ends if that takes longer than the seconds yielded."""
    message = (
        f"the other processes have not come in {MEETING_SECONDS} s; "
        "the same command begins or resumes"
    )
    timer = threading.Timer(MEETING_SECONDS, _end_at_once, (PEER_LOST, message))
    timer.daemon = True
    timer.start()
    yield MEETING_SECONDS
    timer.cancel()


@contextmanager
def peers() -> Iterator[None]:
    """Within, the loss of another process ends this one: its traceback, a sentence, `PEER_LOST`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, PeerLost, TimeoutError) as error:
        if not peer_is_gone(error):
            raise
        last_traceback()
        last_words(
            f"\n{_this_process()}: another process is gone, or late; its last words say why. "
            "The same command resumes from the newest checkpoint"
        )
        # the others depend on process 0, which keeps jax's coordination service
        leave(PEER_LOST, seconds=0.0 if jax.process_index() else 1.0)


class Watchdog(threading.Thread):
    """While open, ends the process with `PEER_LOST` when no step ends for `patience` seconds.

    patience: 0 waits for ever; the first step has `FIRST_STEP` times as long. Time in which the
    system had stopped this process does not count. Only the end of a process gets it out of a
    collective that never ends.
    """

    def __init__(self, patience: float, step: int):
        super().__init__(daemon=True)
        self.patience = patience
        self.step = step
        self.seconds_left = FIRST_STEP * patience
        self.tick = min(1.0, patience / 4)
        self.closed = threading.Event()
        self.watched = threading.get_ident()

    def ended(self, step: int) -> None:
        """Call when a step's results have arrived."""
        self.step = step + 1
        self.seconds_left = self.patience

    def run(self) -> None:
        while not self.closed.wait(self.tick):
            self.seconds_left -= self.tick
            if self.seconds_left <= 0:
                _end_at_once(PEER_LOST, self._complaint())

    def _complaint(self) -> str:
        """Which step hangs, and where in this package the watched thread waits."""
        stack = traceback.extract_stack(sys._current_frames()[self.watched])
        ours = [frame for frame in stack if "lco_jax" in frame.filename]
        here = (ours or stack)[-1]
        return (
            f"\n{_this_process()}: step {self.step} has not ended in time "
            f"(config.train.patience is {self.patience:g} s). This process waits in "
            f"{Path(here.filename).name}, line {here.lineno} ({here.name}). If it waits for a "
            "collective, a process that hangs elsewhere, or is gone, is the cause. The same "
            "command resumes from the newest checkpoint"
        )

    def __enter__(self) -> "Watchdog":
        if self.patience:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()


def _end_at_once(status: int, message: str) -> None:
    """End the process from a thread or a handler, without waiting for anything."""
    last_words(message)
    os._exit(status)


def _this_process() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"
