"""Folders that one process at a time works in."""

import filelock

from lco_jax.core.errors import LcoError

LOCK = "_lock"  # in such a folder


def acquire(lock: filelock.BaseFileLock, taken: str) -> None:
    """Take a lock. Raises where another process has it. taken: the sentence that says so."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise LcoError(taken) from error
