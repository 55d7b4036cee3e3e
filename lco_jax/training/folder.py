"""A run's folder: one trainer at a time works in it, and it holds what is ours."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import filelock
import jax

from lco_jax.core.errors import DISK_FULL, LcoError, explained, reason
from lco_jax.core.files import AnyPath, as_path, check_target, on_bucket, reaching, try_to_write
from lco_jax.core.locks import acquire

LOCK = ".lock"


@contextmanager
def held(output: AnyPath) -> Iterator[AnyPath]:
    """A run's folder, in which no other trainer works meanwhile; `output` may begin with ~.

    The first of a job's processes locks it for all. A process that is gone locks nothing, and a
    folder on a bucket cannot be locked. What keeps the run from writing there becomes one sentence.
    """
    home = as_path(os.fspath(output))
    if on_bucket(home) or jax.process_index() != 0:
        yield home
        return
    lock = filelock.FileLock(home / LOCK)
    with explained(f"--output={home} cannot be written", OSError):
        was_there = home.exists()
        home.mkdir(parents=True, exist_ok=True)
        advice = "wait for it, end it, or give another --output"
        acquire(lock, f"another trainer works in {home}; {advice}")
        try_to_write(home)  # a lock can be held of a file that is there already
    try:
        yield home
    except OSError as error:
        if error.errno in DISK_FULL or not _is_below(home, error.filename):
            raise
        advice = "where it is there and can be written, the same command resumes"
        raise LcoError(f"{error.filename} failed: {reason(error)}; {advice}") from error
    finally:
        with suppress(OSError):
            (home / LOCK).unlink()
            if not was_there:
                home.rmdir()  # unless something came of it: then this raises
        lock.release()


def _is_below(home: AnyPath, name: Any) -> bool:
    """Whether a name, as an OSError has it, is that of a file of the folder."""
    if not isinstance(name, str | os.PathLike):
        return False
    path, folder = os.path.abspath(name), os.path.abspath(home)
    return path == folder or path.startswith(f"{folder}{os.sep}")


def check_outputs(home: AnyPath, config: Mapping[str, Any]) -> None:
    """Raise if a folder that the run's end would write is somebody else's."""
    if jax.process_index() != 0:
        return
    with reaching(home):
        if config["tune"]["decoder"] == "lora":
            check_target(home / "adapter")
        if config["export"]["merged"]:
            check_target(home / "merged")
