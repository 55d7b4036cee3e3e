"""What keeps a run from dying or stalling without a word: SIGTERM, peers that are gone, steps that do not end."""

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

from lco_jax.core.errors import PEER_LOST, PREEMPTED, LcoError, leave, peer_is_gone, reason

MEET = 300  # seconds in which processes are to have met
FIRST = 6  # times its patience a run waits for its first step, which is compiled


def leave_on_sigterm() -> None:
    """From now on SIGTERM ends this process at once, with `PREEMPTED`, until another handler is set."""
    action = _sigterm_action()

    def handler(*_: object) -> None:
        print(
            "stopped by SIGTERM; there was nothing to save: the same command begins or resumes",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(PREEMPTED)

    handler.action_before = (
        action  # of several processes it is jax's, which `Preemption` wants back
    )
    signal.signal(signal.SIGTERM, handler)


class Preemption:
    """While open, tells between steps whether the run is to save and end: SIGTERM came to some
    process of it.

    reached: `RunStore.reached_preemption`. Several processes hear of it by jax's preemption
    service, which `jax.distributed.initialize` starts (unless `jax_enable_preemption_service` is
    False, with which nobody would hear): its own handler, in C++, notes a SIGTERM; within a second
    its coordination service tells all processes, and they agree on the step after the one that the
    foremost has reached. One process alone has no such service, but a handler.
    """

    def __init__(self, reached: Callable[[int], bool]):
        self.reached = reached
        self.came: list[int] | None = (
            None  # signals; None while SIGTERM still ends the process at once
        )

    def heed(self) -> None:
        """Call when there is something to save: from now on SIGTERM is noted."""
        if self.came is None:
            self.came = []
            action = getattr(self.before, "action_before", None)
            if not jax.distributed.is_initialized():
                signal.signal(signal.SIGTERM, lambda number, _: self.came.append(number))
            elif action is not None:
                _sigterm_action(action)

    def now(self, step: int) -> bool:
        """Whether to save at this step, and end. Every process asks at every step."""
        return self.reached(step) if jax.distributed.is_initialized() else bool(self.came)

    def __enter__(self) -> "Preemption":
        self.before = signal.getsignal(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:  # a handler that Python does not know is still there
            signal.signal(signal.SIGTERM, self.before)


def _sigterm_action(new: ctypes.Array | None = None) -> ctypes.Array:
    """What the system does on SIGTERM (a `struct sigaction`, not looked into), after making it
    `new`.

    `signal.signal` cannot bring back a handler that was not set from Python.
    """
    before = ctypes.create_string_buffer(1024)
    ctypes.CDLL(None).sigaction(signal.SIGTERM, new, before)
    return before


@contextmanager
def meeting() -> Iterator[int]:
    """Within, processes meet; where that takes more than the seconds it gives, this one says so and ends."""

    def end() -> None:
        print(
            f"the other processes have not come in {MEET} s; the same command begins or resumes",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(PEER_LOST)

    timer = threading.Timer(MEET, end)
    timer.daemon = True
    timer.start()
    yield MEET
    timer.cancel()


@contextmanager
def peers() -> Iterator[None]:
    """A collective that fails within because another process is gone ends this one: a sentence, and `PEER_LOST`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LcoError) or not peer_is_gone(error):
            raise
        print(
            f"\n{_me()}: another process is gone, or late ({reason(error)}); see what it said last. The same command "
            "resumes from the newest checkpoint",
            file=sys.stderr,
        )
        leave(
            PEER_LOST, seconds=0.0 if jax.process_index() else 1.0
        )  # the others hang on to the first


class Watchdog(threading.Thread):
    """While open: ends the process with a sentence and `PEER_LOST` where no step ends for `patience` seconds.

    The first step may take `FIRST` times as long. patience: 0 waits for ever. Time in which this process itself was
    stopped does not count. Nothing gentler than ending it gets a process out of a collective that will never end.
    """

    def __init__(self, patience: float, step: int):
        super().__init__(daemon=True)
        self.patience, self.step, self.left = patience, step, FIRST * patience
        self.tick, self.closed, self.watched = (
            min(1.0, patience / 4),
            threading.Event(),
            threading.get_ident(),
        )

    def ended(self, step: int) -> None:
        """Call when a step's results are there."""
        self.step, self.left = step + 1, self.patience

    def run(self) -> None:
        while not self.closed.wait(self.tick):
            self.left -= self.tick
            if self.left <= 0:
                stack = traceback.extract_stack(sys._current_frames()[self.watched])
                here = next((x for x in reversed(stack) if "lco_jax" in x.filename), stack[-1])
                print(
                    f"\n{_me()}: step {self.step} has not ended in the time given to it (config.train.patience is "
                    f"{self.patience:g} s). This process waits in {Path(here.filename).name}, line {here.lineno} "
                    f"({here.name}); one that hangs elsewhere, or is gone, keeps the others waiting. The same command "
                    "resumes from the newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PEER_LOST)

    def __enter__(self) -> "Watchdog":
        if self.patience:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"
