"""What every source of records is, and the scan that finds bad records when a source is opened."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.records import Record, content_key

ON_BAD = ("error", "skip")
KEYS_SHOWN = 10  # of those that records have beside their contents
SHOWN = 3  # bad records that the log names; all of them count
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Records by index.

    skipped: how many bad ones were left out. max_negatives: the most of a record. modalities: the
    kinds of all records' parts, and "text". has_teacher: whether records have a teacher's scores.
    digests: a number of each record, the same for equal
    ones (int64 [N]); None where records are not read when the source is opened. version: what
    tells the data from changed ones, where digests cannot.
    """

    skipped: int = 0
    max_negatives: int = 0
    modalities: frozenset[str] = frozenset({"text"})
    has_teacher: bool = False
    digests: np.ndarray | None = None
    version: str = ""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def fingerprint(source: Source) -> str:
    """Text that differs when a source has other records, or has them in another order.

    "" where that cannot be told. What the files hold that records name does not count.
    """
    if source.version or source.digests is None:
        return source.version
    digest = blake2b(source.digests.tobytes(), digest_size=8).hexdigest()
    return f"{len(source):,} records with digest {digest}"


class Scan:
    """A pass over all records of a source.

    kept: of each good one, the record or what finds it. digests: a number of each, as `Source` has.
    """

    def __init__(self, on_bad: str):
        if on_bad not in ON_BAD:
            raise LcoError(f"on_bad is {on_bad!r}; it is one of: {', '.join(ON_BAD)}")
        self.on_bad = on_bad
        self.skipped = self.max_negatives = 0
        self.modalities = Source.modalities
        self.has_teacher = False
        self.kept: list[Any] = []
        self.ignored = Counter[str]()
        self._digests: list[int] = []

    @property
    def digests(self) -> np.ndarray:
        return np.array(self._digests, np.int64)

    def check(
        self, read: Callable[..., Record], given: Any, *others: Any, keep: Any = None
    ) -> None:
        """Read one record, and keep it, or `keep` in its place. A bad record raises or counts.

        read: takes `given`, what the source holds, and the others.
        """
        try:
            record = read(given, *others)
        except LcoError as error:
            if self.on_bad == "error":
                tip = "set on_bad to 'skip' to leave such records out"
                raise LcoError(f"{error} ({tip})") from error
            self.skipped += 1
            if self.skipped <= SHOWN:
                logger.warning("skipped: %s", error)
            return
        self.max_negatives = max(self.max_negatives, len(record.negatives))
        self.modalities |= record.modalities
        self.has_teacher |= bool(record.teacher_scores)
        self.ignored.update(record.ignored)
        self.kept.append(record if keep is None else keep)
        self._digests.append(_digest(given))

    def finish(self, what: str) -> None:
        """Log how many were skipped; raise if nothing is left."""
        if self.skipped:
            total = self.skipped + len(self.kept)
            logger.warning("%s: skipped %d bad records of %d", what, self.skipped, total)
        if self.ignored:
            counts = ", ".join(f"{key!r} {n:,}" for key, n in self.ignored.most_common(KEYS_SHOWN))
            logger.warning("%s: keys of records that are ignored: %s", what, counts)
        if not self.kept:
            raise LcoError(f"{what} holds no usable record")


def _digest(given: Any) -> int:
    """A number of what a source holds of a record: a line, a row, a file's name."""
    content = given.strip() if isinstance(given, bytes) else repr(content_key(given)).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


class ListSource(list[Record]):
    """Records in memory."""

    version = ""

    def __init__(
        self, records: Sequence[Record], skipped: int = 0, digests: np.ndarray | None = None
    ):
        super().__init__(records)
        self.skipped, self.digests = skipped, digests
        self.max_negatives = max((len(record.negatives) for record in records), default=0)
        self.modalities = Source.modalities.union(*(record.modalities for record in records))
        self.has_teacher = any(record.teacher_scores for record in records)
