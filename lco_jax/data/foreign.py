"""What a checkpoint or an adapter brings that runs: chat templates and regular expressions.

A line of either can ask for hours, for gigabytes, or for the process's death, and for much of that
no instruction of Python's passes at which it could be stopped. So they run in a light process
(`foreign_process.py`), which has a clock of its CPU time and a cap on its memory. It starts when it
is first needed, serves one request after another, and ends with this process.
"""

import atexit
import io
import json
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from lco_jax.core.errors import LcoError
from lco_jax.data import light_process
from lco_jax.data.content import Messages

SECONDS = 10.0  # of CPU time for a request; a chat takes some hundredths of a millisecond
MORE_BYTES = 256 << 20  # of memory, beyond what a request itself needs
Reply = dict[str, Any]


def render(
    template: str, chats: Sequence[Messages], settings: dict[str, Any], what: str
) -> list[str | LcoError]:
    """Each chat as transformers renders it, or an error where the template does not take it.

    settings: what the template sees beside the messages. what: names the template in errors.
    Raises if it takes more than its time or memory, whatever the chats are.
    """
    plain = [[_stated(message) for message in chat] for chat in chats]
    request = {"kind": "render", "template": template, "chats": plain, "settings": settings}
    return [
        one["text"]
        if "text" in one
        else LcoError(f"{what} does not take these messages: {one['error']}")
        for one in _ask(request, what)["results"]
    ]


def _stated(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its keys of None, which transformers leaves out."""
    return {key: value for key, value in message.items() if value is not None}


def matching(patterns: Sequence[str], names: Sequence[str], what: str) -> list[list[int]]:
    """For each name, the indices of the regular expressions that match all of it.

    what: names the expressions in errors. Raises for one that is none, and for what takes too long.
    """
    reply = _ask({"kind": "match", "patterns": list(patterns), "names": list(names)}, what)
    if "bad" in reply:
        raise LcoError(
            f"{what} has {reply['bad']!r:.60}, which is not a regular expression: {reply['error']}"
        )
    return reply["matches"]


# ---- the process


def _ask(request: dict[str, Any], what: str) -> Reply:
    """The reply to a request. Raises where it took more than it may. what: to blame for that."""
    line = json.dumps({**request, "seconds": SECONDS, "more_bytes": MORE_BYTES}).encode() + b"\n"
    with _lock:
        try:
            reply = _running().ask(line)
        except _EndedError as error:
            if error.status == -signal.SIGPROF:
                raise LcoError(_exceeded("time", what)) from error
            reply = _again(line, what)  # it may have been ended while it waited
    if "exceeded" in reply:
        raise LcoError(_exceeded(reply["exceeded"], what))
    return reply


def _again(line: bytes, what: str) -> Reply:
    """The reply of a new process."""
    try:
        return _running().ask(line)
    except _EndedError as error:
        if error.status == -signal.SIGPROF:
            raise LcoError(_exceeded("time", what)) from error
        if error.status < 0:
            name = signal.Signals(-error.status).name
            raise LcoError(f"{what} ended the process that it ran in, by {name}") from error
        reason = f"a process ended with status {error.status}; its reason stands above"
        raise RuntimeError(reason) from error


def _exceeded(bound: str, what: str) -> str:
    if bound == "time":
        return f"{what} did not end within {SECONDS:g} s of CPU time, and was ended"
    return f"{what} needs more than {MORE_BYTES >> 20} MiB of memory, and was ended"


class _EndedError(Exception):
    """The process ended before it answered. status: as `Popen` has it."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class _Process:
    """The process, which answers one request after another."""

    def __init__(self):
        self.popen = light_process.start("lco_jax.data.foreign_process")
        assert self.popen.stdout is not None
        self.replies = io.BufferedReader(self.popen.stdout)  # type: ignore[type-var]

    def ask(self, line: bytes) -> Reply:
        """The reply to a line. Whatever is raised meanwhile ends the process."""
        answer = b""
        try:
            light_process.write_all(self.popen.stdin, line)
            answer = self.replies.readline()
        except BrokenPipeError:
            pass  # it has ended
        except BaseException:  # such as Ctrl-C: its answer would be taken for that of another
            self.popen.kill()
            _forget()
            raise
        if not answer.endswith(b"\n"):
            _forget()
            raise _EndedError(self.popen.wait())
        return json.loads(answer)


_process: _Process | None = None
_of_other_processes: list[_Process] = []  # kept, so that nothing of them is closed or waited for
_lock = threading.Lock()


def _running() -> _Process:
    global _process
    if _process is None:
        _process = _Process()
    return _process


def _forget() -> None:
    global _process
    _process = None


def _begin_after_fork() -> None:
    global _lock
    if _process is not None:
        _of_other_processes.append(_process)
    _forget()
    _lock = threading.Lock()


def _close() -> None:
    if _process is not None:
        _process.popen.kill()
        _process.popen.wait()


os.register_at_fork(after_in_child=_begin_after_fork)
atexit.register(_close)
