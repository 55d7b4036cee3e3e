"""Decoding in processes of their own, which can be ended.

A few kilobytes can ask a decoder for minutes, for gigabytes, or for its death. So files are decoded
in light processes (`decode_process.py`): each has a clock of its own CPU time and a cap on its
memory, and one that ends takes a single file with it. One that sleeps has a clock here. They start
when they are first needed, serve one file after another, and end with this process.

A message is a line of JSON, and as many bytes as its key "bytes" has.
"""

import atexit
import fcntl
import io
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, BinaryIO

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data import light_process
from lco_jax.data.media import MediaConfig, MediaFile, took_too_long
from lco_jax.data.pipes import Patience, Pipe, SleptTooLong

# (height, width) of a picture, or of a frame and how many there are -> the (height, width) that it
# is resized to
SizeRule = Callable[..., tuple[int, int]]
PIPE_BYTES = 1 << 20  # of a pipe; Linux has 65,536, and a picture would take ten turns
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    # what a process keeps for the next file; without it a picture's memory goes back to the
    # system, and comes anew for the next one
    "MALLOC_TOP_PAD_": str(1 << 23),
}
# How long a process may sleep over a file: so many times its CPU time, and at least so many
# seconds. What a busy machine makes slow must not be dropped. A process that waits for a CPU does
# not sleep, so the load of CPUs does not count at all. The load of disks and of memory does: with
# the default caps, 10 minutes let a mount of 4 MB a second deliver the biggest file. A file on a
# mount that is dead, or a driver that waits for ever, costs this time once a file.
SLEEP_FACTOR, LEAST_SLEEP_SECONDS = 5.0, 300.0
END_SECONDS = 5.0  # that a killed process may take to end; one in a dead disk's driver takes longer
logger = logging.getLogger(__name__)


def decode(
    kind: str,
    file: MediaFile,
    config: MediaConfig,
    size_rule: SizeRule | None = None,
    **more: Any,
) -> np.ndarray:
    """What a file holds, decoded in another process.

    kind: "image", "audio", "sound" (of a video), "samples" or "video". size_rule: asked here, for
    the size of the first picture. more: rate, of "samples", in Hz; opened, of an image that was a
    PIL image (`lazy.Opened`); choice, of a video (`FrameChoice`). Raises for a file that is torn,
    too big or too slow.
    """
    request = {"kind": kind, "label": file.label, "config": plain_fields(config), **more}
    request["has_size_rule"] = size_rule is not None
    content = b""
    if isinstance(file.content, bytes):
        content = file.content
    else:
        request["path"] = os.path.abspath(file.content)
    try:
        reply, array = _ask(request, content, size_rule, _sleep_seconds(config))
    except _Ended as error:
        raise _explained_end(error.status, file.label, config) from error
    except SleptTooLong as error:
        cause = "for a disk, a network or a driver that does not answer"
        waited = f"its decoder waited {_sleep_seconds(config):g} seconds {cause}"
        raise LcoError(f"{file.label} cannot be read: {waited}") from error
    for warning in reply["warnings"]:
        logger.warning(warning)
    if "bug" in reply:
        raise RuntimeError(f"a decoder failed:\n{reply['bug']}")
    if array is None:
        raise LcoError(reply["error"])
    return array


def _sleep_seconds(config: MediaConfig) -> float:
    return max(SLEEP_FACTOR * config.decode_seconds, LEAST_SLEEP_SECONDS)


def _ask(
    request: dict[str, Any],
    content: bytes,
    size_rule: SizeRule | None,
    sleep_seconds: float,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """As `_Worker.ask`. Raises `_Ended` and `SleptTooLong`.

    A process that has served before may have been ended while it waited, for example where memory
    is short. The file is then not to blame, and a new process gets it.
    """
    try:
        with _pool.worker() as worker:
            return worker.ask(request, content, size_rule, sleep_seconds)
    except _Ended as error:
        if not error.may_be_chance:
            raise
    with _pool.worker(new=True) as worker:
        return worker.ask(request, content, size_rule, sleep_seconds)


def plain_fields(options: Any) -> dict[str, Any]:
    """A dataclass's fields for JSON, which knows no number of numpy's."""
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in values.items()
    }


def _explained_end(status: int, label: str, config: MediaConfig) -> Exception:
    """What the end of a process while it decoded a file says of the file."""
    if status == -signal.SIGPROF:
        return LcoError(took_too_long(label, config))
    if status < 0:
        name = signal.Signals(-status).name
        return LcoError(f"{label} cannot be decoded: its decoder was ended by {name}")
    return RuntimeError(f"a decoder ended with status {status}; its reason stands above")


class _Ended(Exception):
    """A process ended in the midst of a file. status: as `Popen` has it.

    may_be_chance: whether the end may have nothing to do with the file.
    """

    def __init__(self, status: int, may_be_chance: bool):
        super().__init__(status)
        self.status = status
        self.may_be_chance = may_be_chance


class _Worker:
    """A process that decodes, one file at a time. files: how many it has served."""

    def __init__(self):
        self.files = 0
        self.process = light_process.start("lco_jax.data.decode_process", ENVIRONMENT)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
            with suppress(AttributeError, OSError):  # not on macOS; not beyond a user's share
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.patience = Patience(self.process.pid)
        self.requests = Pipe(self.process.stdin, self.patience)  # type: ignore[arg-type]
        self.replies = io.BufferedReader(Pipe(self.process.stdout, self.patience))  # type: ignore[arg-type]

    def ask(
        self,
        request: dict[str, Any],
        content: bytes,
        size_rule: SizeRule | None,
        sleep_seconds: float,
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """(the reply, the array that it brings). Raises `_Ended` and `SleptTooLong`."""
        self.patience.left = sleep_seconds
        try:
            answer = self._exchange(request, content, size_rule)
        except (EOFError, BrokenPipeError) as error:
            status = self.process.wait()
            may_be_chance = self.files > 0 and status != -signal.SIGPROF
            raise _Ended(status, may_be_chance) from error
        self.files += 1
        return answer

    def _exchange(
        self, request: dict[str, Any], content: bytes, size_rule: SizeRule | None
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        send(self.requests, request, content)
        reply = receive(self.replies)
        while "size" in reply:
            assert size_rule is not None
            height, width = size_rule(*reply["size"])
            send(self.requests, {"size": [int(height), int(width)]})
            reply = receive(self.replies)
        if "shape" not in reply:
            return reply, None
        array = np.empty(reply["shape"], reply["dtype"])
        if self.replies.readinto(array.data.cast("B")) < reply["bytes"]:
            raise EOFError
        return reply, array

    def end(self) -> None:
        """Kill the process. One that a dead disk holds ends when that lets it go."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.requests.close()
        self.replies.close()


def send(stream: Any, message: dict[str, Any], content: bytes | memoryview = b"") -> None:
    """Write a message to a stream without a buffer."""
    line = json.dumps({**message, "bytes": len(content)}).encode() + b"\n"
    for part in (line, content):
        light_process.write_all(stream, part)


def receive(stream: BinaryIO) -> dict[str, Any]:
    """The next message without its bytes. Raises `EOFError` if there is none."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


class _Pool:
    """The processes of this one: as many as decode at a time."""

    def __init__(self):
        self.idle: list[_Worker] = []
        self.lock = threading.Lock()
        self.places = threading.BoundedSemaphore(max(4, os.cpu_count() or 1))

    @contextmanager
    def worker(self, new: bool = False) -> Iterator[_Worker]:
        """One for a file. Whatever is raised meanwhile ends it: its pipes may hold half a word."""
        with self.places:
            worker = None if new else self._idle()
            worker = worker or _Worker()
            try:
                yield worker
            except BaseException:
                worker.end()
                raise
            with self.lock:
                self.idle.append(worker)

    def _idle(self) -> _Worker | None:
        """One that waits for work. Those that were ended while they waited are forgotten."""
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.end()
        return None

    def close(self) -> None:
        with self.lock:
            while self.idle:
                self.idle.pop().end()


_pool = _Pool()
_of_other_processes: list[_Pool] = []  # kept, so that nothing of them is closed or waited for


def _begin_after_fork() -> None:
    global _pool
    _of_other_processes.append(_pool)
    _pool = _Pool()


def _close() -> None:
    _pool.close()


os.register_at_fork(after_in_child=_begin_after_fork)
atexit.register(_close)
