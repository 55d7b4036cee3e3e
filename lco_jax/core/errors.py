"""What a user sees when something they gave us is wrong: one sentence, no traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LcoError(Exception):
    """Bad input. The message is one sentence that names the file, key, record or flag, and what to do."""


def reason(error: BaseException) -> str:
    """One line of what an exception says, without the stand-ins for file names that decoders add."""
    said = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error).strip()
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


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; an `LcoError` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except LcoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
