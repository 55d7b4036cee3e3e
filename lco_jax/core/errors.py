"""What a user sees when something they gave us is wrong: one sentence, no traceback."""

import sys
from collections.abc import Callable


class LcoError(Exception):
    """Bad input. The message is one sentence that names the file, key, record or flag, and what to do."""


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
