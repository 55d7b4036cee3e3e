"""How a command ends: a user's mistake is one sentence, a bug is a traceback."""

import argparse
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NoReturn

from lco_jax.core import console
from lco_jax.core.pipes import unbroken

# The exit statuses of all programs; docs/exit-codes.md says what each of them means.
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
# After these the same command is to be started again: SIGTERM stopped the process; another process
# is gone or hangs.
PREEMPTED, PEER_LOST = 75, 76
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Status codes of jax's errors that blame a program or its size, and never another process.
PROGRAM_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


class LcoError(Exception):
    """A user's mistake, in one sentence: the file, key, record or flag, and what to do about it."""


class TooLong(LcoError):
    """An input has more tokens than the model takes."""


class PeerLost(ConnectionError):
    """Another process of this job is gone, or cannot be reached."""


def reason(error: BaseException) -> str:
    """The first line of an exception's message, in printable characters.

    Decoders put stand-ins for file names into their messages; `error_string` and `strerror` have
    none.
    """
    message = (
        getattr(error, "error_string", None)
        or getattr(error, "strerror", None)
        or str(error).strip()
    )
    first_line = str(message).partition("\n")[0].rstrip(":. ") or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in first_line[:200])


def printable(text: str) -> str:
    """A name on one line, for messages: what cannot be printed is escaped."""
    return text if text.isprintable() else ascii(text)


@contextmanager
def explained(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into an `LcoError`: `what`, and the reason that they give."""
    try:
        yield
    except LcoError:
        raise
    except kinds as error:
        raise LcoError(f"{what}: {reason(error)}") from error


def check_at_least_1(**options: int | None) -> None:
    """Raise if an option is given and is no whole number of at least 1."""
    for name, value in options.items():
        if value is not None and (not is_number(value, Integral) or value < 1):
            raise LcoError(f"{name} is {value!r:.60}; it must be a whole number of at least 1")


def check_bool(**options: bool) -> None:
    """Raise if an option is neither True nor False. A string such as "no" would count as true."""
    for name, value in options.items():
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's, too
            raise LcoError(f"{name} is {value!r:.60}; it must be True or False")


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether a value is a number of this abstract class. True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_keys(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise for a key that is not among the known ones."""
    unknown = sorted(set(given) - set(known), key=str)
    if unknown:
        raise LcoError(f"{where} has the unknown key {unknown[0]!r}; it takes {', '.join(known)}")


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point and end the process with its status.

    An `LcoError` becomes one line on stderr and status `MISTAKE`. The flags of `core/console.py`
    are taken off the command line first: `main` never sees them. With --debug, the traceback of an
    `LcoError` comes before its line.
    """
    with unbroken():
        arguments = sys.argv[1:]
        try:
            manner = console.take_flags(arguments)
        except argparse.ArgumentError as error:
            with console.speaking(console.Manner(as_json="--log-format=json" in sys.argv)):
                _end(MISTAKE, f"error: {error}")
        sys.argv[1:] = arguments
        with console.speaking(manner):
            _run(main, manner)


def _run(main: Callable[[], int | None], manner: console.Manner) -> None:
    """Run an entry point, and explain how it ends."""
    try:
        sys.exit(main())
    except LcoError as error:
        _end(MISTAKE, f"error: {error}", manner.debug)
    except KeyboardInterrupt:
        _end(INTERRUPTED, "interrupted", manner.debug)
    except OSError as error:
        if error.errno in DISK_FULL:
            file = error.filename or "a file"
            message = f"error: {file}: {reason(error)}; make room, then try again"
            _end(MISTAKE, message, manner.debug)
        _fail(manner)
    except Exception:  # one of several processes must not wait for the others
        _fail(manner)


def _end(status: int, message: str, debug: bool = False) -> NoReturn:
    """End for a reason that a sentence explains."""
    if debug:
        console.last_traceback()
    console.last_words(message)
    leave(status)


def _fail(manner: console.Manner) -> NoReturn:
    """End with the traceback of the exception that is being handled, and status `FAILED`."""
    if not _is_one_of_several() and not manner.as_json:
        raise
    console.last_traceback()
    leave(FAILED)


def _is_one_of_several() -> bool:
    """Whether jax connects this process with others. It is not imported for that: it is heavy."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def peer_is_gone(error: BaseException) -> bool:
    """Whether an exception reports that another process of this job is gone.

    jax raises `JaxRuntimeError` when a collective or a barrier fails, orbax a `TimeoutError` that
    such an error caused, `core/exchange.py` a `PeerLost`. Nothing else counts, whatever its message
    says.
    """
    if not _is_one_of_several():
        return False
    import jax

    if isinstance(error, TimeoutError):
        error = error.__cause__
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(PROGRAM_ERRORS)
    return isinstance(error, PeerLost)


def leave(status: int, seconds: float = 5.0) -> NoReturn:
    """End this process. One of several waits at most `seconds` for the others to end.

    jax's own exit would wait minutes for the others, which wait for this one in a collective, and
    then abort.
    """
    if not _is_one_of_several():
        sys.exit(status)
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(seconds)
    os._exit(status)
