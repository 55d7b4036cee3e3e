"""What a user sees when something they gave us is wrong: one sentence, no traceback."""

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

# exit statuses after which the same command is to be started again: SIGTERM stopped it; a process hung or is gone
PREEMPTED, PEER_LOST = 75, 76
# what the failures of a collective or a barrier say when another process is gone
_GONE = re.compile(
    r"gloo|nccl|connection|heartbeat|barrier|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.IGNORECASE
)


class LcoError(Exception):
    """Bad input. The message is one sentence that names the file, key, record or flag, and what to do."""


def reason(error: BaseException) -> str:
    """One line of what an exception says, without the stand-ins for file names that decoders add."""
    said = (
        getattr(error, "error_string", None)
        or getattr(error, "strerror", None)
        or str(error).strip()
    )
    line = (str(said).splitlines() or [""])[0].rstrip(":. ") or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in line[:200])


@contextmanager
def explained(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds that are raised within become an `LcoError`: `what`, and the reason they give."""
    try:
        yield
    except LcoError:
        raise
    except kinds as error:
        raise LcoError(f"{what}: {reason(error)}") from None


def check_keys(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise for a key that is not among the known ones."""
    if unknown := sorted(set(given) - set(known), key=str):
        raise LcoError(f"{where} has the unknown key {unknown[0]!r}; it takes {', '.join(known)}")


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; an `LcoError` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except LcoError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(
                f"error: {error.filename or 'a file'}: {reason(error)}; make room, then try again",
                file=sys.stderr,
            )
            leave(2)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        leave(1)


def peer_is_gone(error: BaseException) -> bool:
    """Whether an exception says that another process of this job is gone."""
    return jax.distributed.is_initialized() and bool(
        _GONE.search(f"{type(error).__name__} {error}")
    )


def leave(status: int, seconds: float = 5.0) -> NoReturn:
    """End this process. One of several ends when all of them do, or after so many `seconds`.

    Left to itself, jax would wait minutes for the others, which wait for this one in a collective, and then abort.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(seconds)
    os._exit(status)
