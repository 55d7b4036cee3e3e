"""The vectors of another model by content, which `lco mine` leaves in its folder of vectors.

Dimensions: T contents, G of a vector.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import expanded, fingerprint, read_own
from lco_jax.data.content import Content
from lco_jax.data.guide_files import CONTENTS, KEY, VECTORS
from lco_jax.data.numbering import Numbering
from lco_jax.data.records import Record

# among the flags of a work that made vectors: what tells its input from others
INPUT_STATE = "what --input holds"
AGAIN = "remove the folder, and mine again"

logger = logging.getLogger(__name__)


class GuideVectors:
    """folder: of `lco mine --vectors`. Raises where it is none, or where its contents are not those
    of its vectors.
    """

    def __init__(self, folder: str):
        self.folder = expanded(folder)
        self.vectors = _vectors(self.folder)
        _check_made_of(self.folder)
        self._numbering = _numbered(self.folder / CONTENTS)
        if len(self._numbering) != len(self.vectors):
            counts = f"{len(self._numbering):,} contents and {len(self.vectors):,} vectors"
            raise LcoError(f"{KEY}={self.folder} has {counts}; {AGAIN}")

    def __call__(self, content: Content, where: str) -> np.ndarray:
        """The vector of a content, float32 [G]; of one that could not be read when it was mined,
        NaN. Raises for a content without a row. where: file and line of its record, for errors.
        """
        number = self._numbering.find(content)
        if number is None:
            advice = "make it with lco mine from these records"
            raise LcoError(f"{where}: {KEY}={self.folder} has no vector of a content; {advice}")
        return self.vectors[number]

    def fault(self, where: str) -> LcoError:
        """Why a content whose vector is NaN cannot be used."""
        why = f"{KEY}={self.folder} has no vector of a medium that could not be read when it was"
        advice = "mend the medium and mine again, or set config.data.on_bad=skip"
        return LcoError(f"{where}: {why} mined; {advice}")

    def rows(self, contents: Iterable[tuple[Content, str]]) -> np.ndarray:
        """The vectors of contents, float32 [·, G]. Each is given with `where`, as for a call."""
        found = [self(content, where) for content, where in contents]
        return np.array(found, np.float32).reshape(len(found), self.vectors.shape[1])

    def check(self, records: Iterable[Record], on_bad: str = "error") -> int:
        """How many records have a content that could not be read when it was mined; raises for the
        first of them unless `on_bad` is "skip", and for a record of which a row is missing.
        """
        skipped = 0
        for record in progress_bar(records, desc="guide", unit="record", leave=False, delay=2):
            rows = self.rows((side, record.where) for side in record.sides)
            is_bad = not np.isfinite(rows).all()
            if is_bad and on_bad == "error":
                raise self.fault(record.where)
            skipped += is_bad
        return skipped


def open_guide(
    folder: str, sources: Mapping[str, Iterable[Record]], on_bad: str = "error"
) -> GuideVectors | None:
    """The guide of a folder; None where that is "". on_bad: as `GuideVectors.check` has it."""
    if not folder:
        return None
    guide = GuideVectors(folder)
    for name, source in sources.items():
        if skipped := guide.check(source, on_bad):
            reason = "a medium that could not be read when the guide was mined"
            logger.warning("%s: %d records are skipped, with %s", name, skipped, reason)
    return guide


def guide_dimension(folder: str) -> int:
    """G; 0 where there is no guide, of which the folder is ""."""
    return _vectors(expanded(folder)).shape[1] if folder else 0


def _vectors(folder: Path) -> np.ndarray:
    """float32 [T, G] of unit length, on the disk."""
    for name in (CONTENTS, VECTORS):
        if not (folder / name).is_file():
            made = f"lco mine --model=GUIDE --vectors={folder} makes it"
            raise LcoError(f"{KEY}={folder} holds no {name}; {made}")
    with explained(f"{KEY}: {folder / VECTORS} cannot be read", ValueError, OSError, EOFError):
        found = np.load(folder / VECTORS, mmap_mode="r")
    if found.ndim != 2 or found.dtype.kind != "f":
        raise LcoError(f"{KEY}: {folder / VECTORS} holds no vectors; {AGAIN}")
    return found


def _check_made_of(folder: Path) -> None:
    """Raise unless the vectors are those of the contents, as the record beside them says."""
    record = folder / f"{VECTORS}.json"
    found = read_own(record, AGAIN)
    work = found.get("work") or {}
    made_of = fingerprint([(CONTENTS, (folder / CONTENTS).stat())])
    made = fingerprint([(VECTORS, (folder / VECTORS).stat())])
    if (work.get(INPUT_STATE), found.get("output")) != (made_of, made):
        what = f"the vectors in {folder} were not made of the contents that are there now"
        copied = "copy a folder with its times (cp -a, rsync -a)"
        raise LcoError(f"{KEY}: {what}; {AGAIN}, or {copied}")


def _numbered(path: Path) -> Numbering:
    """The contents of a guide, numbered by their lines."""
    numbering = Numbering()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            with explained(f"{KEY}: {path}:{number} is damaged; {AGAIN}", ValueError):
                content = json.loads(line)
            if not isinstance(content, str | list):
                raise LcoError(f"{KEY}: {path}:{number} is no content; {AGAIN}")
            numbering.number(content if isinstance(content, str) else tuple(content))
    return numbering
