"""The vectors of another model by content, which `lco mine` leaves in its folder of vectors.

Dimensions: T contents, G of a vector.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import expanded
from lco_jax.data.content import Content
from lco_jax.data.numbering import Numbering
from lco_jax.data.records import Record

CONTENTS, VECTORS = "contents.jsonl", "vectors.npy"  # in the folder
KEY = "config.loss.guide"


class GuideVectors:
    """folder: of `lco mine --vectors`. Raises where it is none."""

    def __init__(self, folder: str):
        self.folder = expanded(folder)
        self.vectors = _vectors(self.folder)
        self._numbering = Numbering()
        with (self.folder / CONTENTS).open(encoding="utf-8") as lines:
            for line in lines:
                content = json.loads(line)
                self._numbering.number(content if isinstance(content, str) else tuple(content))
        if len(self._numbering) != len(self.vectors):
            counts = f"{len(self._numbering):,} contents and {len(self.vectors):,} vectors"
            raise LcoError(f"{KEY}={self.folder} has {counts}; remove it, and mine again")

    def __call__(self, content: Content, where: str) -> np.ndarray:
        """The vector of a content, float32 [G]. where: file and line of its record, for errors."""
        number = self._numbering.find(content)
        if number is None or not np.isfinite(self.vectors[number]).all():
            advice = "make it with lco mine from these records"
            raise LcoError(f"{where}: {KEY}={self.folder} has no vector of a content; {advice}")
        return self.vectors[number]

    def rows(self, contents: Iterable[tuple[Content, str]]) -> np.ndarray:
        """The vectors of contents, float32 [·, G]. Each is given with `where`, as for a call."""
        found = [self(content, where) for content, where in contents]
        return np.array(found, np.float32).reshape(len(found), self.vectors.shape[1])

    def check(self, records: Iterable[Record]) -> None:
        """Raise for a record of which a vector is missing."""
        for record in progress_bar(records, desc="guide", unit="record", leave=False, delay=2):
            for side in record.sides:
                self(side, record.where)


def open_guide(folder: str, sources: Mapping[str, Iterable[Record]]) -> GuideVectors | None:
    """The guide of a folder; None where that is "". Raises where a record lacks a vector."""
    guide = GuideVectors(folder) if folder else None
    for source in sources.values() if guide else ():
        guide.check(source)
    return guide


def dimension_of(folder: str) -> int:
    """G; 0 where there is no guide, of which the folder is ""."""
    return _vectors(expanded(folder)).shape[1] if folder else 0


def _vectors(folder: Path) -> np.ndarray:
    """float32 [T, G] of unit length, on the disk."""
    for name in (CONTENTS, VECTORS):
        if not (folder / name).is_file():
            made = f"lco mine --model=GUIDE --vectors={folder} makes it"
            raise LcoError(f"{KEY}={folder} holds no {name}; {made}")
    with explained(f"{KEY}: {folder / VECTORS} cannot be read", ValueError, OSError):
        return np.load(folder / VECTORS, mmap_mode="r")
