"""What every source of records is, and the scan that finds bad records when a source is opened."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lco_jax.core.errors import LcoError
from lco_jax.data.records import Record

ON_BAD = ("error", "skip")
KEYS_SHOWN = 10  # of those that records have beside their contents
SHOWN = 3  # bad records that the log names; all of them count
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Records by index.

    skipped: how many bad ones were left out. max_negatives: the most of a record. modalities: the
    kinds of all records' parts, and "text".
    """

    skipped: int = 0
    max_negatives: int = 0
    modalities: frozenset[str] = frozenset({"text"})

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Scan:
    """A pass over all records of a source. kept: of each good one, the record or what finds it."""

    def __init__(self, on_bad: str):
        if on_bad not in ON_BAD:
            raise LcoError(f"on_bad is {on_bad!r}; it is one of: {', '.join(ON_BAD)}")
        self.on_bad = on_bad
        self.skipped = self.max_negatives = 0
        self.modalities = Source.modalities
        self.kept: list[Any] = []
        self.ignored = Counter[str]()

    def check(self, read: Callable[..., Record], *arguments: Any, keep: Any = None) -> None:
        """Read one record, and keep it, or `keep` in its place. A bad record raises or counts."""
        try:
            record = read(*arguments)
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
        self.ignored.update(record.ignored)
        self.kept.append(record if keep is None else keep)

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


class ListSource(list[Record]):
    """Records in memory."""

    def __init__(self, records: Sequence[Record], skipped: int = 0):
        super().__init__(records)
        self.skipped = skipped
        self.max_negatives = max((len(record.negatives) for record in records), default=0)
        self.modalities = Source.modalities.union(*(record.modalities for record in records))
