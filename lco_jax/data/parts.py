"""Vectors on their way into an output: the parts that one process or many have made, in a folder beside it.

The rows are cut into units. A process makes the unit whose file it has locked, and writes what it has of it as a part.
The kernel, or a file server, lets go of the locks of a process that dies, and whoever comes next goes on after its last
part. A kill at any moment, SIGKILL too, costs the part in the making: parts, index and output are each written aside
and then renamed. Should two make the same rows (a server that does not keep locks), the output has them once.
Dimensions: n rows of a part, N of all, D hidden.
"""

import fcntl
import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint, read_json, write_json, write_text
from lco_jax.data import vectors
from lco_jax.data.vectors import difference, same_work

PART_SECONDS = (
    30.0  # of work that a part holds, unless it is full before, or a block of inputs takes longer
)
STALE = 600.0  # seconds in which a process shows no sign of life, after which others make its unit as well
# beside the parts; names that readers of a folder of parquet leave alone
INDEX, LOCK, SETTLED, UNIT = "_index.json", "_lock", "_settled.json", ".unit"
OURS = (".tmp", UNIT, SETTLED)
ENDED = b"done"  # what a unit's file holds at last: locks carry it to all, where NFS may show an old list of the parts
_PART = re.compile(r"(\d{12})-(\d{12})\.parquet")  # its first row, and the one after its last


class Unit:
    """Rows `first` to `end` of an output, to be added in order. lock: the descriptor of its file; None: alone."""

    def __init__(self, parts: "VectorParts", first: int, end: int, lock: int | None = None):
        self.parts, self.first, self.end, self._lock = parts, first, end, lock
        self._row, self._waiting, self._since = first, list[pa.Table](), time.monotonic()

    def __len__(self) -> int:
        return self.end - self.first

    def add(
        self, ids: Sequence[int | str], vectors: np.ndarray, reasons: Mapping[int, str]
    ) -> None:
        """Take the next rows. vectors: float32 [n, D]; reasons: {row: why it has no vector}."""
        n, dimension = vectors.shape
        missing = np.zeros(n, bool)
        missing[list(reasons)] = True
        values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        columns = {
            "id": pa.array(ids),
            "embedding": pa.FixedSizeListArray.from_arrays(
                values, dimension, mask=pa.array(missing)
            ),
            "reason": pa.array([reasons.get(i) for i in range(n)], pa.string()),
        }
        self._waiting.append(pa.table(columns))
        waiting = sum(map(len, self._waiting))
        if self._row + waiting == self.end:
            self.close(ended=True)
        elif waiting >= self.parts.part_rows or time.monotonic() - self._since >= PART_SECONDS:
            self._write()

    def alive(self) -> None:
        """Give others a sign of life."""
        if self._lock is not None:
            with suppress(OSError):  # all is done, and a file server has forgotten the file
                os.utime(self._lock)

    def close(self, ended: bool = False) -> None:
        """Write what waits, and let others have the rest."""
        if self._waiting:
            self._write()
        self.parts.open.discard(self)
        if self._lock is not None:
            if ended:
                with suppress(OSError):  # the parts tell it, too
                    os.pwrite(self._lock, ENDED, 0)
                    os.fsync(self._lock)
            os.close(self._lock)
            self._lock = None

    def _write(self) -> None:
        table = pa.concat_tables(self._waiting)
        end = self._row + len(table)
        aside = (
            self.parts.folder / f"_{self._row:012d}-{token_hex(4)}.tmp"
        )  # numbers of processes repeat in containers
        # without the folder, or in that of other work: we were thought dead, and others have made these rows
        with (
            explained(f"{self.parts.folder} cannot be written", OSError),
            suppress(FileNotFoundError),
        ):
            _write_part(table, aside)
            if self.parts.ours():  # asked once `aside` is there, which vanishes with its folder
                vectors.rename(aside, self.parts.folder / f"{self._row:012d}-{end:012d}.parquet")
            else:
                aside.unlink()
        self.parts.made += len(table)
        self._row, self._waiting, self._since = end, [], time.monotonic()


class VectorParts:
    """The parts of `output`, a .npy, a .parquet or a folder of the parts themselves, in `<output>.partial`.

    Enter it to write: on the way out what waits is written, and a folder without a part vanishes.
    work: flag -> value of all that makes the vectors what they are; a folder of other work is refused.
    part_rows: of a unit, and the most of a part. made: rows that this process has written. flag: gave `output`.
    """

    def __init__(
        self, output: Path, work: Mapping[str, Any], part_rows: int = 0, flag: str = "--output"
    ):
        self.output, self.work, self.part_rows, self.flag = output, dict(work), part_rows, flag
        self.folder = output.with_name(f"{output.name}.partial")
        self.made, self._others, self.open, self.left = 0, 0, set[Unit](), dict[int, int]()
        self._signs: dict[
            int, tuple[int, float]
        ] = {}  # of units in other hands: time of change, and when it was seen

    def __enter__(self) -> "VectorParts":
        return self

    def __exit__(self, *_: object) -> None:
        for unit in list(self.open):
            unit.close()
        with suppress(LcoError):  # others are at work there, or it is not ours
            if self.folder.exists():
                with self.alone(wait=False), self._writing():
                    if self.whole() or not (self._pieces() or any(map(_is_held, self._units()))):
                        self._remove({})

    @contextmanager
    def alone(self, wait: bool = True) -> Iterator[None]:
        """Within, no other process is; one that comes waits, or raises. Makes the folder, if need be."""
        while (lock := self._lock(wait)) is None:
            pass
        try:
            self._check_index()
            yield
        finally:
            os.close(lock)

    def _check_index(self) -> None:
        """Write what this work is, or compare it with what the folder holds."""
        index = self.folder / INDEX
        if not index.exists():
            if strange := [
                x for x in os.listdir(self.folder) if not x.endswith((".tmp", UNIT)) and x != LOCK
            ]:
                raise LcoError(
                    f"{self.folder} holds {min(strange)} and no index of ours; give another {self.flag}"
                )
        elif (before := read_json(index)) != {"work": self.work}:
            same_work(before.get("work") or {}, self.work, self.folder, self.flag)
        else:
            return
        write_json(index, {"work": self.work})

    def ours(self) -> bool:
        """Whether the folder is still that of this work; who wakes late may find it gone, or another's."""
        with suppress(LcoError, FileNotFoundError):
            index = read_json(self.folder / INDEX)
            return index.keys() == {"work"} and difference(self.work, index["work"]) is None
        return False

    def _writing(self) -> AbstractContextManager:
        return explained(f"{self.flag}={self.output} cannot be written, or locked", OSError)

    def _open(self, name: str) -> int | None:
        """The descriptor of a file to lock; None if the folder was removed meanwhile."""
        with self._writing(), suppress(FileNotFoundError):
            return os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        return None

    def _lock(self, wait: bool) -> int | None:
        """The descriptor of a lock on the folder; None if the folder was removed meanwhile."""
        with self._writing():
            with suppress(FileExistsError):  # `exist_ok` raises where it is removed at once
                self.folder.mkdir(parents=True)
            if (lock := self._open(LOCK)) is None:
                return None
            busy = not _locks(lock, wait)
            with suppress(FileNotFoundError):
                if not busy and os.path.samestat(os.fstat(lock), os.stat(self.folder / LOCK)):
                    return lock
            os.close(lock)
        if busy:
            raise LcoError(
                f"another process writes {self.flag}={self.output}; wait for it or end it"
            )
        return None

    # ---- the rows that are there

    def _pieces(self) -> list[tuple[int, int, Path]]:
        """(row, row, part) of the rows that parts hold, in order, each row once: of its part from the first row on."""
        pieces, reached, names = [], 0, list[str]()
        with suppress(FileNotFoundError):  # others have finished
            names = os.listdir(self.folder)
        found = [
            (*map(int, name.groups()), name[0]) for name in map(_PART.fullmatch, names) if name
        ]
        for first, end, name in sorted(found, key=lambda part: (part[0], -part[1])):
            if end > reached:
                pieces.append((max(first, reached), end, self.folder / name))
                reached = end
        return pieces

    @property
    def done(self) -> int:
        """Rows that parts hold, whoever made them."""
        return sum(end - first for first, end, _ in self._pieces())

    def news(self) -> int:
        """Rows that others have made since this was last asked."""
        before, self._others = self._others, max(self._others, self.done - self.made)
        return self._others - before

    @property
    def next_row(self) -> int:
        """The one after all that parts hold."""
        return max((end for _, end, _ in self._pieces()), default=0)

    def tables(self, columns: Sequence[str] = ("id", "embedding")) -> Iterator[pa.Table]:
        """The rows that are there, in order."""
        for first, _, part in self._pieces():
            yield _read_part(part, first, list(columns))

    # ---- units

    def settled(self, settle: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `settle` said to the first process that came here: JSON."""
        with self.alone():
            if not (self.folder / SETTLED).exists():
                write_json(self.folder / SETTLED, settle())
            return read_json(self.folder / SETTLED)

    def divide(self, total: int) -> None:
        """Rows 0 to total are to be made. left: of each unit that lacks some, its first row and the one after it."""
        pieces, units = self._pieces(), range(0, total, self.part_rows)
        self.left = {row: min(row + self.part_rows, total) for row in units}
        self.left = {row: end for row, end in self.left.items() if _reached(row, pieces) < end}

    def claim(self) -> Unit | None:
        """The next unit that nobody makes, or what a process that died has left of it; None: there is none now."""
        for first, end in list(self.left.items()):
            if (lock := self._open(f"_{first:012d}{UNIT}")) is None:  # another process has finished
                self.left.clear()
                break
            if not self.ours():
                self.left.clear()
            elif _locks(lock) or self._is_stale(first, lock):
                del self.left[first]
                row = (
                    end
                    if os.pread(lock, len(ENDED), 0) == ENDED
                    else _reached(first, self._pieces())
                )
                if row < end:
                    self.open.add(unit := Unit(self, row, end, lock))
                    unit.alive()
                    return unit
            os.close(lock)
            if not self.left:
                break
        return None

    def alive(self) -> None:
        """Give others a sign of life; call it often."""
        for unit in list(self.open):  # a thread may claim meanwhile
            unit.alive()

    def _is_stale(self, first: int, lock: int) -> bool:
        """Whether whoever holds a unit has given no sign of life for long: it hangs, or its lock outlives it."""
        changed, now = os.fstat(lock).st_mtime_ns, time.monotonic()
        if self._signs.get(first, (None,))[0] != changed:
            self._signs[first] = (changed, now)
        return now - self._signs[first][1] > STALE

    # ---- the end

    def whole(self) -> dict[str, Any] | None:
        """The record of `finish`, if its output is there as this work left it; raises for a folder of other work."""
        if not self.record.exists() or not self.output.exists():
            return None
        found = read_json(self.record)
        if not self.output.suffix:
            same_work(found.get("work", {}), self.work, self.output, self.flag)
        as_left = not self.output.suffix or found.get("output") == _state(self.output)
        return found if as_left and difference(found.get("work", {}), self.work) is None else None

    @property
    def record(self) -> Path:
        """Where it is said what the output holds."""
        return (
            self.output / INDEX
            if self.output.suffix == ""
            else self.output.with_name(f"{self.output.name}.json")
        )

    def finish(self, total: int, dimension: int, ids: type) -> dict[str, Any] | None:
        """`join`, unless another process has; None where rows are missing, which `left` then has."""
        with self.alone(), self._writing():
            if record := self.whole():  # by another process, meanwhile
                return record
            write_text(
                self.folder / "look.tmp", ""
            )  # NFS lists a folder anew after a change of our own
            if self.done < self.made:
                raise LcoError(f"{self.folder} was removed meanwhile; the same command begins anew")
            self.divide(total)
            if not self.left:
                return self.join(total, dimension, ids)
            for unit in self._units():  # a part was lost
                if int(unit.stem[1:]) in self.left:
                    with open(unit, "r+b") as file:
                        if _locks(file.fileno()):
                            file.truncate()
            return None

    def join(self, total: int, dimension: int, ids: type, recorded: bool = True) -> dict[str, Any]:
        """Join the parts into the output, list the skipped beside it, and remove the folder; call it `alone`.

        total: N; dimension: D; ids: int or str. A row without a vector is NaN in .npy and null in .parquet. A folder
        keeps its parts, and an index of them. recorded: what is returned, for `whole`.
        """
        with self._writing():
            skipped, record = (
                self.output.with_name(f"{self.output.name}.skipped.jsonl"),
                {"work": self.work},
            )
            count = vectors.write_skipped(
                self.folder / "skipped.tmp", self.tables(["id", "reason"])
            )
            if count:
                vectors.rename(self.folder / "skipped.tmp", skipped)
            else:
                skipped.unlink(missing_ok=True)  # of an earlier output
            record |= {"vectors": total, "dimension": dimension, "skipped": count}
            if not self.output.suffix:
                files = [self._exact(*piece) for piece in self._pieces()]
                self._remove({**record, "parts": files}, files)
                self.folder.rename(self.output)
                (
                    self.output / LOCK
                ).unlink()  # only now: whoever made another would think itself alone
                return record
            kind, aside = pa.int64() if ids is int else pa.string(), self.folder / "output.tmp"
            schema = pa.schema({"id": kind, "embedding": pa.list_(pa.float32(), dimension)})
            write = vectors.write_npy if self.output.suffix == ".npy" else vectors.write_parquet
            write(aside, self.tables(), total, schema)
            vectors.rename(aside, self.output)
            if recorded:
                write_json(self.record, {**record, "output": _state(self.output)})
            self._remove(record)
            return record

    def _exact(self, first: int, end: int, part: Path) -> str:
        """The name of a part that holds these rows and no others: another may hold its first ones."""
        name = f"{first:012d}-{end:012d}.parquet"
        if part.name != name:
            aside = self.folder / "part.tmp"
            _write_part(_read_part(part, first), aside)
            vectors.rename(aside, self.folder / name)
        return name

    def _units(self) -> list[Path]:
        return list(self.folder.glob(f"_*{UNIT}"))

    def _remove(self, record: Mapping[str, Any], but: Sequence[str] | None = None) -> None:
        """Delete our files, or the others. A kill on the way leaves a folder that the same command continues."""
        write_json(
            self.folder / INDEX, {"work": self.work, "vectors": 0, **record}
        )  # nobody adds to it now: `ours`
        kept = {*(but or ()), INDEX, LOCK}
        while names := [
            x
            for x in os.listdir(self.folder)
            if x not in kept and (_PART.fullmatch(x) or x.endswith(OURS))
        ]:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
        if but is None:
            for name in (INDEX, LOCK):  # the lock last: until then nobody comes in
                (self.folder / name).unlink()
            with suppress(OSError):  # somebody put a file of theirs there, or it stays
                self.folder.rmdir()


def _read_part(part: Path, first: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part from row `first` of the output on."""
    with explained(
        f"{part} is torn; remove it, and the same command makes it again",
        pa.ArrowException,
        OSError,
    ):
        table = pyarrow.parquet.read_table(part, columns=columns, memory_map=True)
    return table.slice(first - int(part.name[:12]))


def _write_part(table: pa.Table, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)


def _reached(row: int, pieces: Sequence[tuple[int, int, Path]]) -> int:
    """The first row from `row` on that is in no piece."""
    for first, end, _ in pieces[bisect_right(pieces, row, key=lambda piece: piece[1]) :]:
        if first > row:
            break
        row = end
    return row


def _locks(file: int, wait: bool = False) -> bool:
    """Whether the lock on an open file is had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_held(unit: Path) -> bool:
    with open(unit, "r+b") as file:
        return not _locks(file.fileno())


def _state(output: Path) -> str:
    """What tells whether an output was changed."""
    return fingerprint([(output.name, output.stat())])
