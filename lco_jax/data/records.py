"""A training record: an anchor, a positive, and any number of hard negatives (the reference's any2any format)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lco_jax.core.errors import LcoError
from lco_jax.data.prompts import MEDIA, check_text

FIELDS = ("text", *(f"{kind}_path" for kind in MEDIA))


@dataclass(frozen=True)
class Record:
    """Texts of one record. `where` names its origin (file and line) for errors."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    where: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Anchor, positive, negatives."""
        return (self.anchor, self.positive, *self.negatives)


def parse_record(content: Any, where: str) -> Record:
    """Read `{"anchor": side, "positive": side, "negative": side | [side, …] | absent}`.

    A side is a string or {"text": …, "image_path": …}, where "" means absent. Raises `LcoError` naming `where`.
    """
    if not isinstance(content, Mapping):
        raise LcoError(f"{where}: a record is an object with anchor and positive, and this is {content!r:.60}")
    if unknown := set(content) - {"anchor", "positive", "negative", "negatives"}:
        raise LcoError(f"{where}: unknown key {min(unknown)!r}; a record has anchor, positive and negative")
    sides = {}
    for name in ("anchor", "positive"):
        if name not in content:
            raise LcoError(f"{where}: the record has no {name!r}")
        sides[name] = _side(content[name], name, where)
        if not sides[name]:
            raise LcoError(f"{where}: {name} is empty")
    negatives: list[str] = []
    for name in ("negative", "negatives"):
        given = content.get(name)
        given = [] if given is None else given if isinstance(given, list) else [given]
        negatives += [text for text in (_side(side, name, where) for side in given) if text]
    return Record(sides["anchor"], sides["positive"], tuple(negatives), where)


def _side(side: Any, name: str, where: str) -> str:
    if isinstance(side, str):
        check_text(side, f"{where}: {name}")
        return side
    if not isinstance(side, Mapping):
        raise LcoError(f"{where}: {name} must be a string or an object with text, and is {side!r:.60}")
    if unknown := set(side) - set(FIELDS):
        raise LcoError(f"{where}: {name} has the unknown key {min(unknown)!r}; it takes {', '.join(FIELDS)}")
    for field in FIELDS:
        if not isinstance(side.get(field, ""), str | None):
            raise LcoError(f"{where}: {name}.{field} must be a string, and is {side[field]!r:.60}")
        if field != "text" and side.get(field):
            raise LcoError(f"{where}: {name} has {field}; this version trains on text only")
    text = side.get("text") or ""
    check_text(text, f"{where}: {name}")
    return text
