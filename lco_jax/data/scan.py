"""What every source of records is, and the scan that finds bad records when a source is opened."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lco_jax.core.errors import LcoError
from lco_jax.data.records import Record

ON_BAD = ("error", "skip")
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Records by index. skipped: how many bad ones were left out; max_negatives: the most that a record holds;
    modalities: what its records hold."""

    skipped: int = 0
    max_negatives: int = 0
    modalities: frozenset[str] = frozenset({"text"})

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Scan:
    """Counts what a pass over all records finds, and keeps a token of each good one."""

    def __init__(self, on_bad: str):
        if on_bad not in ON_BAD:
            raise LcoError(f"on_bad is {on_bad!r}; it is one of: {', '.join(ON_BAD)}")
        self.on_bad, self.skipped, self.max_negatives, self.kept = on_bad, 0, 0, []
        self.modalities: frozenset[str] = frozenset({"text"})

    def check(self, read: Callable[[], Record], token: Any = None) -> None:
        """Read one record; keep `token`, by default the record. A bad one raises or is counted."""
        try:
            record = read()
        except LcoError as error:
            if self.on_bad == "error":
                raise LcoError(
                    f"{error} (set on_bad to 'skip' to leave such records out)"
                ) from None
            self.skipped += 1
            if self.skipped <= 3:
                logger.warning("skipped: %s", error)
            return
        self.max_negatives = max(self.max_negatives, len(record.negatives))
        self.modalities |= record.modalities
        self.kept.append(record if token is None else token)

    def finish(self, what: str) -> None:
        """Say how many were skipped; raise if nothing is left."""
        if self.skipped:
            logger.warning(
                "%s: skipped %d bad records of %d",
                what,
                self.skipped,
                self.skipped + len(self.kept),
            )
        if not self.kept:
            raise LcoError(f"{what} holds no usable record")


class ListSource(list[Record]):
    """Records in memory."""

    def __init__(self, records: Sequence[Record], skipped: int = 0):
        super().__init__(records)
        self.skipped = skipped
        self.max_negatives = max((len(record.negatives) for record in records), default=0)
        self.modalities = frozenset({"text"}).union(*(record.modalities for record in records))
