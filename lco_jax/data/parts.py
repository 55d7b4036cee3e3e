"""Vectors on their way into an output: rows are cut into units, and a unit's vectors are a part.

A part is a file. The parts lie in a folder beside the output, `<output>.partial`; an output without
an ending is that folder itself. What is left to do is the units that have no part. Parts,
description and output are there complete or not at all, so a kill at any moment, SIGKILL too, costs
the units in work. Any process may write parts; one of them, which has the lock, says what the work
is and joins them. On a bucket there is no lock.
Dimensions: n rows of a part, N of all, D numbers of a vector.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import (
    AnyPath,
    bucket_system,
    checksum_of,
    fingerprint,
    listing,
    on_bucket,
    reaching,
    read_own,
    replace,
    write_bytes,
    write_json,
)
from lco_jax.core.locks import LOCK, acquire
from lco_jax.core.small_vectors import Storage
from lco_jax.data import vectors
from lco_jax.data.folder import Listing
from lco_jax.data.range_files import RANGES, beside, write_ranges
from lco_jax.data.skipped import write_skipped
from lco_jax.data.vectors import difference, same_work

# beside the parts; names that readers of a folder of parquet leave alone
DESCRIPTION, LISTING, ASIDE = "_index.json", "_files.json", ".tmp"
WORK = b"lco_jax.work"  # in a part's metadata: the digest of the work that made it
FOOTER = 2**16  # bytes at the end of a part, among which its footer is
CHECKED_AT_ONCE = 16  # parts; a bucket answers slowly
_PART = re.compile(r"([0-9]{12})-([0-9]{12})\.parquet")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Unit:
    """The rows of an output that are embedded and written together: `first`, and those up to
    `end`.
    """

    first: int
    end: int

    @property
    def rows(self) -> int:
        """n."""
        return self.end - self.first

    @property
    def part(self) -> str:
        """The name of its part."""
        return f"{self.first:012d}-{self.end:012d}.parquet"


def cut(first: int, end: int, rows: int) -> list[Unit]:
    """Units of so many rows."""
    return [Unit(row, min(row + rows, end)) for row in range(first, end, rows)]


@dataclass(frozen=True)
class PartsFolder:
    """A folder of parts, for whoever writes or reads them. work: the digest of their work."""

    path: AnyPath
    work: str

    def write(self, unit: Unit, table: pa.Table) -> None:
        """Write a unit's part: `vectors.part_table`."""
        buffer = pa.BufferOutputStream()
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({WORK: self.work}),
            buffer,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
        with explained(f"{self.path} cannot be written", OSError), reaching(self.path):
            write_bytes(self.path / unit.part, buffer.getvalue().to_pybytes())

    def units(self) -> list[Unit]:
        """The units that have a part, in order."""
        found = [_PART.fullmatch(name) for name in self.names()]
        return sorted(Unit(int(one[1]), int(one[2])) for one in found if one)

    def names(self) -> list[str]:
        """The files that the folder has; none where there is no folder."""
        if on_bucket(self.path):
            with reaching(self.path):
                return list(listing(self.path))
        with suppress(FileNotFoundError):
            return os.listdir(self.path)
        return []

    def is_good(self, unit: Unit) -> bool:
        """Whether a unit's part is complete, as far as its footer tells, and of this work."""
        with reaching(self.path), (self.path / unit.part).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - FOOTER, 0))
            footer = pa.BufferReader(file.read())
        try:
            about = pyarrow.parquet.read_metadata(footer)
        except (pa.ArrowException, OSError):
            return False
        return about.num_rows == unit.rows and about.metadata.get(WORK) == self.work.encode()

    def read(self, unit: Unit, columns: Sequence[str]) -> pa.Table:
        """Columns of a unit's part."""
        part = self.path / unit.part
        damaged = f"{part} is damaged; remove it, and the same command makes it again"
        with explained(damaged, pa.ArrowException, OSError), part.open("rb") as file:
            return pyarrow.parquet.read_table(
                file, columns=list(columns), page_checksum_verification=True
            )

    def keep(self, listing: Listing) -> None:
        """Write what the folder of inputs holds, for all who work on it."""
        with explained(f"{self.path} cannot be written", OSError), reaching(self.path):
            write_bytes(self.path / LISTING, listing.to_bytes())

    def kept(self) -> Listing | None:
        """What `keep` wrote; None where nothing was."""
        with reaching(self.path):
            path = self.path / LISTING
            if not path.exists():
                return None
            with explained(f"{path} is damaged; remove {self.path}", ValueError, TypeError):
                return Listing.from_bytes(path.read_bytes())

    def tables(self, units: Iterable[Unit], columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of units, in their order."""
        return (self.read(unit, columns) for unit in units)


class VectorParts:
    """The parts of `output`, a .npy, a .parquet or a folder of the parts themselves.

    Enter it to work; nobody else can meanwhile. On the way out a folder without a part vanishes.
    work: flag -> value of all that makes the vectors what they are. flag: the one that gave
    `output`.
    """

    def __init__(self, output: AnyPath, work: Mapping[str, Any], flag: str = "--output"):
        self.output, self.work, self.flag = output, dict(work), flag
        self.keeps_parts = not output.suffix
        path = output.with_name(f"{output.name}.partial")
        if self.keeps_parts and on_bucket(output):  # where folders cannot be renamed
            path = output
        self.folder = PartsFolder(path, _digest(self.work))
        self._lock = filelock.FileLock(path / LOCK)

    # ---- who works

    def __enter__(self) -> "VectorParts":
        path = self.folder.path
        if on_bucket(path):
            return self
        with self._writing():
            path.mkdir(parents=True, exist_ok=True)
            taken = f"another process writes {self.flag}={self.output}; wait for it or end it"
            acquire(self._lock, taken)
        return self

    def __exit__(self, *_: object) -> None:
        path = self.folder.path
        with suppress(LcoError), self._writing():  # an error of before matters more
            description = path / DESCRIPTION
            if description.exists() and not self._is_complete(description):
                self._check_description()
                if self.finished() or not self.folder.units():
                    self._remove()
            elif not on_bucket(path) and self.folder.names() == [LOCK]:
                self._delete([LOCK])
                path.rmdir()
        self._lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        cannot = f"{self.flag}={self.output} cannot be written"
        with explained(cannot, OSError), reaching(self.output):
            yield

    # ---- what the work is

    def description(self) -> dict[str, Any] | None:
        """What `describe` wrote; None where nothing was begun. Raises for a folder of others."""
        if not (self.folder.path / DESCRIPTION).exists():
            if strange := [name for name in self.folder.names() if not self._is_ours(name)]:
                what = f"{self.folder.path} holds {min(strange)} and nothing that says what it is"
                raise LcoError(f"{what}; give another {self.flag}")
            return None
        return self._check_description()

    def begun_with(self, key: str) -> Listing | None:
        """The list of inputs that this work was begun with; the work's value of `key` is then that
        of its beginning. None where no such work was begun.
        """
        path = self.folder.path / DESCRIPTION
        if not path.exists() or self._is_complete(path):
            return None
        before = _read_description(path).get("work") or {}
        listing = self.folder.kept()
        if listing is not None and key in before:
            self.work[key] = before[key]
            self.folder = PartsFolder(self.folder.path, _digest(self.work))
        return listing

    def _check_description(self) -> dict[str, Any]:
        found = _read_description(self.folder.path / DESCRIPTION)
        same_work(found.get("work") or {}, self.work, self.folder.path, self.flag)
        return found

    def describe(self, **found: Any) -> None:
        """Write what the work is, and what was found out about it, for those who go on with it."""
        with self._writing():
            write_json(self.folder.path / DESCRIPTION, {"work": self.work, **found})

    def _is_ours(self, name: str) -> bool:
        known = (DESCRIPTION, LISTING, LOCK, RANGES)
        return bool(_PART.fullmatch(name)) or name.endswith(ASIDE) or name in known

    # ---- what is done

    def rows_done(self) -> int:
        """How many rows have a part."""
        return sum(unit.rows for unit in self.folder.units())

    def left(self, units: Iterable[Unit]) -> list[Unit]:
        """The units that have no part. Removes parts that are torn, or of other work, before."""
        units = list(units)
        there = set(self.folder.units())
        found = [unit for unit in units if unit in there]
        with self._writing(), ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
            is_good = dict(zip(found, pool.map(self.folder.is_good, found), strict=True))
        bad = [unit.part for unit in found if not is_good[unit]]
        for part in bad:
            logger.warning("%s is torn, or of other work, and is made again", part)
        with self._writing():
            self._delete(bad)
        return [unit for unit in units if not is_good.get(unit)]

    # ---- the end

    @property
    def record(self) -> AnyPath:
        """The file that says what the output holds."""
        if self.keeps_parts:
            return self.output / DESCRIPTION
        return self.output.with_name(f"{self.output.name}.json")

    def finished(self) -> dict[str, Any] | None:
        """The record of `join`, if its output is there as this work left it.

        Raises for a folder of other work.
        """
        if not self.record.exists() or not self._is_complete(self.record):
            return None
        found = _read_description(self.record)
        if self.keeps_parts:
            same_work(found.get("work") or {}, self.work, self.output, self.flag)
            return found
        if difference(found.get("work") or {}, self.work) is not None:
            return None
        return found if found.get("output") == _state(self.output) else None

    @staticmethod
    def _is_complete(record: AnyPath) -> bool:
        return "vectors" in _read_description(record)

    def join(
        self,
        units: Sequence[Unit],
        storage: Storage,
        ids: type,
        recorded: bool = True,
        **about: Any,
    ) -> dict[str, Any]:
        """Join the units' parts into the output, list the skipped beside it, and remove the folder.

        storage: of the vectors; ids: int or str. A row without a vector is NaN in .npy and null in
        .parquet. Ranges of levels are written beside the output, `<output>.ranges.npy`. An output
        that is a folder keeps the parts. recorded: whether the record is written, which is
        returned. about: more that it is to have.
        """
        with self._writing():
            total = sum(unit.rows for unit in units)
            record = {"work": self.work, "vectors": total, "dimension": storage.dimension}
            record |= {"precision": storage.precision}
            reasons = self.folder.tables(units, ["id", "reason"])
            aside = self.folder.path / f"skipped{ASIDE}"  # which vanishes with the folder
            record["skipped"] = write_skipped(self.output, vectors.skipped_rows(reasons), aside)
            record |= about
            if self.keeps_parts:
                record["parts"] = [unit.part for unit in units]
                self._keep_parts(record)
                return record
            write_ranges(beside(self.output), storage.ranges)
            self._write_output(units, total, storage, ids)
            if recorded:
                self._write_record({**record, "output": _state(self.output)})
            self._remove()
            return record

    def _write_record(self, record: Mapping[str, Any]) -> None:
        aside = self.folder.path / f"record{ASIDE}"  # which vanishes with the folder
        write_json(aside, record)
        replace(aside, self.record)

    def _write_output(self, units: Sequence[Unit], total: int, storage: Storage, ids: type) -> None:
        tables = self.folder.tables(units, ["id", "embedding"])
        id_type = pa.int64() if ids is int else pa.string()
        schema = pa.schema({"id": id_type, "embedding": vectors.vector_type(storage)})
        write = vectors.write_npy if self.output.suffix == ".npy" else vectors.write_parquet
        aside = self.folder.path / f"output{ASIDE}"
        with aside.open("wb") as file:
            write(file, tables, total, schema)
        replace(aside, self.output)

    def _keep_parts(self, record: Mapping[str, Any]) -> None:
        """Make the folder of the parts the output."""
        path = self.folder.path
        kept = {*record["parts"], DESCRIPTION, LOCK, RANGES}
        self._delete([name for name in self.folder.names() if name not in kept])
        write_json(path / DESCRIPTION, record)
        if path != self.output:
            path.rename(self.output)
            (self.output / LOCK).unlink()

    def _remove(self) -> None:
        """Remove the folder, the description last: after a kill on the way the command goes on."""
        ours = [name for name in self.folder.names() if self._is_ours(name)]
        self._delete([name for name in ours if name not in (DESCRIPTION, LOCK)])
        self._delete([name for name in (DESCRIPTION, LOCK) if name in ours])
        if not on_bucket(self.folder.path):
            # it stays where others' files are in it, or one of a process that outlived its driver
            with suppress(OSError):
                self.folder.path.rmdir()

    def _delete(self, names: Sequence[str]) -> None:
        paths = [self.folder.path / name for name in names]
        if on_bucket(self.folder.path) and paths:
            bucket_system(self.folder.path).rm([os.fspath(path) for path in paths])
            return
        for path in paths:
            path.unlink(missing_ok=True)


def _read_description(path: AnyPath) -> dict[str, Any]:
    """What the file says of a work. Raises where it is damaged."""
    damaged = path.parent if path.name == DESCRIPTION else path
    return read_own(path, f"remove {damaged}, and the same command begins anew")


def _digest(work: Mapping[str, Any]) -> str:
    """Text that differs for works whose vectors may. What a run that skips adds does not change the
    others.
    """
    settings = sorted((key, value) for key, value in work.items() if key != "--on-error")
    return blake2b(repr(settings).encode(), digest_size=16).hexdigest()


def _state(output: AnyPath) -> str | None:
    """Text that differs when an output was changed; None where it is not there."""
    if on_bucket(output):
        return checksum_of(listing(output).get(".", {}))
    return fingerprint([(output.name, output.stat())]) if output.exists() else None
