"""Ends foreign Python code that may run for ever, such as a checkpoint's chat template."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lco_jax.core.errors import LcoError

_INTERVAL = 0.5  # seconds between two looks


class _Overdue(Exception):
    """Raised within the thread whose time is up."""


class _Watched:
    """A thread and the time by which it must be done."""

    def __init__(self, seconds: float):
        self.thread = threading.get_ident()
        self.ends = time.monotonic() + seconds
        self.is_overdue = False


_watched: set[_Watched] = set()
_change = threading.Condition()
_started = threading.Event()


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End what runs within after so many seconds, with an `LcoError` that says `what` did not end.

    Any thread may use it. It ends what is written in Python, between two of its instructions; one
    long call of C code runs to its end. It costs microseconds.
    """
    one = _Watched(seconds)
    has_arrived = False
    try:
        with _change:
            _watched.add(one)
            if not _started.is_set():
                _started.set()
                threading.Thread(target=_watch, name="deadlines", daemon=True).start()
            _change.notify()
        try:
            yield
        except _Overdue:
            has_arrived = True
            raise
        finally:
            with _change:
                _watched.discard(one)
            while one.is_overdue and not has_arrived:  # it must arrive here, and not later
                time.sleep(0.01)
    except _Overdue as error:
        raise LcoError(f"{what} did not end within {seconds:g} s, and was ended") from error


def _watch() -> None:
    """Raise `_Overdue` in each thread whose time is up. It sleeps while nothing is watched."""
    while True:
        with _change:
            while not _watched:
                _change.wait()
            now = time.monotonic()
            for one in [one for one in _watched if one.ends < now]:
                _watched.discard(one)
                one.is_overdue = True
                thread, error = ctypes.c_ulong(one.thread), ctypes.py_object(_Overdue)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
        time.sleep(_INTERVAL)
