"""A training record: anchor, positive and hard negatives (the reference's any2any format).

Each of them is a content (`content.py`): a text or a tuple of parts. Media are paths, addresses,
encoded bytes, lists of a video's frames or, from TFDS, decoded arrays.
"""

import math
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.packing import MODALITIES
from lco_jax.data.content import Content, Messages, Reader, describe, is_parts
from lco_jax.data.instructions import Instruction

FILES_REMEMBERED = 100_000
NEGATIVES = ("negative", "negatives")
SCORES = "teacher_scores"
KEYS = ("anchor", "positive", *NEGATIVES, SCORES)
TEXT = 1 << MODALITIES.index("text")  # the bits of a text's modalities
ALIKE = 0.9  # how like one of them a key is that must be a slip: positves is, positive_id is not


@dataclass(frozen=True)
class Record:
    """The contents of one record. `where` names its origin (file and line) for errors.

    teacher_scores: a teacher's scores of the anchor with the positive and with each negative; ()
        without a teacher.
    ignored: the keys that it has beside them.
    query, document: the instructions of the anchor, and of the others; None for none.
    """

    anchor: Content
    positive: Content
    negatives: tuple[Content, ...]
    where: str
    teacher_scores: tuple[float, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)
    query: Instruction | None = None
    document: Instruction | None = None

    @property
    def sides(self) -> tuple[Content, ...]:
        """Anchor, positive, negatives."""
        return (self.anchor, self.positive, *self.negatives)

    def instruction(self, side: int) -> Instruction | None:
        """The instruction of a side."""
        return self.document if side else self.query

    def score(self, side: int) -> float:
        """A teacher's score of the anchor with another side; NaN without one."""
        return self.teacher_scores[side - 1] if side and self.teacher_scores else math.nan

    @property
    def modalities(self) -> frozenset[str]:
        """The kinds of all parts, and "text"."""
        parts = (part for side in self.sides if isinstance(side, tuple) for part in side)
        return frozenset({"text", *(part["type"] for part in parts)})


def as_input(side: Content | Messages) -> Any:
    """A content as `encode` takes it, which may take a bare text for a file's name."""
    return {"text": side} if isinstance(side, str) else side


def content_key(side: Content) -> Hashable:
    """A value that is equal for equal contents. Arrays count by what they hold."""
    return _key_of(side)


def content_number(side: Content) -> int:
    """An int32 that is the same for equal contents, in every process."""
    digest = blake2b(repr(content_key(side)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def modality_bits(side: Content) -> int:
    """The modalities of a content, as bits of `MODALITIES`."""
    if isinstance(side, str):
        return TEXT
    return sum(1 << MODALITIES.index(kind) for kind in {part["type"] for part in side})


def _key_of(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _key_of(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_key_of, value))
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return value.shape, value.dtype.str, blake2b(data).digest()
    if isinstance(value, bytes):
        return blake2b(value).digest()
    return value


def answer_of(record: Record) -> str:
    """The positive, which is a generator's answer to the anchor. Raises unless it is a text."""
    if not isinstance(record.positive, str) or not record.positive.strip():
        raise LcoError(f"{record.where}: the positive is the answer, and must be a text")
    return record.positive


def parse_record(
    given: Any, where: str, root: str = "", exists: Callable[[str], bool] | None = None
) -> Record:
    """Read {"anchor": content, "positive": content, "negative": content, a list of them or absent}.

    With "teacher_scores", too: a list of numbers, of the positive and of each negative.
    A content is all that `Reader.side` takes. Other keys are ignored, unless they are slips
    of these; so is None in a list of negatives. where, root, exists: as for `content.Reader`.
    """
    if not isinstance(given, Mapping):
        needs = "a record is an object with anchor and positive"
        raise LcoError(f"{where}: {needs}, and this is {describe(given)}")
    reader = Reader(where, root, exists)
    anchor = _required(reader, given, "anchor")
    positive = _required(reader, given, "positive")
    negatives = []
    for name in NEGATIVES:
        sides = [side for side in listed(given.get(name)) if side is not None]
        contents = [reader.side(side, name) for side in sides]
        negatives += [content for content in contents if content]
    ignored = tuple(str(key) for key in given if key not in KEYS)
    for key in ignored:
        if meant := get_close_matches(key.lower(), KEYS, 1, ALIKE):
            raise LcoError(f"{where}: the record has {key!r}; write {meant[0]!r}")
    scores = _scores(given.get(SCORES), 1 + len(negatives), where)
    return Record(anchor, positive, tuple(negatives), where, scores, ignored)


def _scores(given: Any, candidates: int, where: str) -> tuple[float, ...]:
    """A teacher's scores; () where there are none."""
    if given is None:
        return ()
    scores = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(scores, list) or not all(map(_is_finite, scores)):
        raise LcoError(
            f"{where}: teacher_scores is {describe(given)}; it must be a list of numbers, of the "
            "positive and of each negative"
        )
    if len(scores) != candidates:
        raise LcoError(
            f"{where}: teacher_scores has {len(scores)} numbers, and there are {candidates} "
            "candidates: the positive and each negative"
        )
    return tuple(map(float, scores))


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _required(reader: Reader, given: Mapping, name: str) -> Content:
    if name not in given:
        raise LcoError(f"{reader.where}: the record has no {name!r}")
    content = reader.side(given[name], name)
    if not content:
        raise LcoError(f"{reader.where}: {name} is empty")
    return content


def file_lookup(check: bool) -> Callable[[str], bool] | None:
    """A function that says whether a file is there. It remembers its last answers."""
    return lru_cache(FILES_REMEMBERED)(os.path.isfile) if check else None


def listed(sides: Any) -> list:
    """One content, a list of them, or None, as a list."""
    if sides is None:
        return []
    return sides if isinstance(sides, list) and not is_parts(sides) else [sides]
