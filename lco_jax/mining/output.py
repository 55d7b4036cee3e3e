"""The jsonl of mined records on its way: what is done lies in `<output>.partial` until all is."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint, read_own, replace, write_json
from lco_jax.core.locks import LOCK, acquire
from lco_jax.data.vectors import difference, same_work

LINES, STATE = "lines.jsonl", "state.json"


class MinedLines:
    """The lines of `output`. Enter it to write; nobody else can meanwhile.

    work: flag -> value of all that makes the lines what they are. done: how many records were
    looked at; found: what was counted of them, as `add` was given it.
    """

    def __init__(self, output: Path, work: Mapping[str, Any]):
        self.output, self.work = output, dict(work)
        self.folder = _partial(output)
        self.done, self.found = 0, None
        self._lock = filelock.FileLock(self.folder / LOCK)

    @property
    def record(self) -> Path:
        """The file that says what the output holds."""
        return _record(self.output)

    @property
    def picture(self) -> Path:
        """The file of the histogram."""
        return self.output.with_suffix(".report.png")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote, if the output is there as this work left it."""
        if not self.record.exists() or not self.output.exists():
            return None
        found = read_own(self.record, "remove it, and the same command begins anew")
        same = difference(found.get("work") or {}, self.work) is None
        return found if same and found.get("output") == _state(self.output) else None

    def __enter__(self) -> "MinedLines":
        with explained(f"--output={self.output} cannot be written", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            taken = f"another process writes --output={self.output}; wait for it or end it"
            acquire(self._lock, taken)
            try:
                self._go_on()
            except BaseException:
                self._lock.release()
                raise
        return self

    def _go_on(self) -> None:
        """Find what an earlier process did of this work; raise for other work."""
        size, state = 0, self.folder / STATE
        if state.exists():
            found = read_own(state, f"remove {self.folder}, and the same command begins anew")
            same_work(found["work"], self.work, self.folder, "--output")
            lines = self.folder / LINES
            if lines.exists() and lines.stat().st_size >= found["bytes"]:
                self.done, self.found, size = found["done"], found["found"], found["bytes"]
        self._file = (self.folder / LINES).open("ab")
        self._file.truncate(size)  # a kill may have left a line behind what was counted

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()
        if not self.done and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def add(self, lines: Sequence[Mapping[str, Any]], done: int, found: Any) -> None:
        """Write the lines of some more records. done, found: as the class says, with these."""
        with explained(f"--output={self.output} cannot be written", OSError):
            for line in lines:
                self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            state = {"work": self.work, "done": done, "found": found, "bytes": size}
            write_json(self.folder / STATE, state)
        self.done, self.found = done, found

    def finish(self, report: Mapping[str, Any]) -> None:
        """Put the lines in their place, and write the report beside them."""
        with explained(f"--output={self.output} cannot be written", OSError):
            replace(self.folder / LINES, self.output)
            state = {"work": self.work, "output": _state(self.output)}
            write_json(self.record, {**report, **state})
            shutil.rmtree(self.folder)


def check_ours(output: Path) -> None:
    """Raise where `output`, or the report beside it, is there and no round of mining wrote it.

    An output that was changed since is its owner's.
    """
    if (_partial(output) / STATE).exists():  # a round that found nothing of others' was begun
        return
    record = _record(output)
    report = read_own(record, "remove it, or give another --output") if record.exists() else {}
    if record.exists() and "work" not in report:
        raise LcoError(f"{record} exists and lco mine did not write it; give another --output")
    if output.exists() and report.get("output") != _state(output):
        what = "exists, and no report beside it says that lco mine wrote it as it is"
        raise LcoError(f"--output={output} {what}; give another --output, or remove it")


def _partial(output: Path) -> Path:
    """The folder of what is done of an output."""
    return output.with_name(f"{output.name}.partial")


def _record(output: Path) -> Path:
    """The file that says what an output holds."""
    return output.with_suffix(".report.json")


def _state(output: Path) -> str:
    return fingerprint([(output.name, output.stat())])
