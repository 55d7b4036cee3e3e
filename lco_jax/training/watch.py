"""What keeps a run from dying or stalling without a word: SIGTERM, peers that are gone, steps that do not end."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lco_jax.core.errors import PEER_LOST, PREEMPTED, LcoError, leave, peer_is_gone, reason

MEET = 300  # seconds in which processes are to have met
FIRST = 6  # times its patience a run waits for its first step, which is compiled


def leave_on_sigterm() -> None:
    """From now on SIGTERM ends this process at once, with `PREEMPTED`, until another handler is set."""

    def handler(*_: object) -> None:
        print("stopped by SIGTERM; there was nothing to save: the same command begins or resumes", file=sys.stderr)
        sys.stderr.flush()
        os._exit(PREEMPTED)

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def meeting() -> Iterator[int]:
    """Within, processes meet; where that takes more than the seconds it gives, this one says so and ends."""

    def end() -> None:
        print(f"the other processes have not come in {MEET} s; the same command begins or resumes", file=sys.stderr)
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
        leave(PEER_LOST, seconds=0.0 if jax.process_index() else 1.0)  # the others hang on to the first


class Watchdog(threading.Thread):
    """While open: ends the process with a sentence and `PEER_LOST` where no step ends for `patience` seconds.

    The first step may take `FIRST` times as long. patience: 0 waits for ever. Time in which this process itself was
    stopped does not count. Nothing gentler than ending it gets a process out of a collective that will never end.
    """

    def __init__(self, patience: float, step: int):
        super().__init__(daemon=True)
        self.patience, self.step, self.left = patience, step, FIRST * patience
        self.tick, self.closed, self.watched = min(1.0, patience / 4), threading.Event(), threading.get_ident()

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
