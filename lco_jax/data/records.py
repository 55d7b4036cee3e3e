"""A training record: an anchor, a positive, and any number of hard negatives (the reference's any2any format).

A side is text or content. Text is a `str`; whatever holds media is a tuple of chat parts in their order, such as
({"type": "image", "image": "/data/a.png"}, {"type": "text", "text": "a cat"}). Media is a path, an address, encoded
bytes, a list of a video's frames, or, from TFDS, decoded arrays.
"""

import os
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, check_keys
from lco_jax.data.prompts import MEDIA, check_text, is_media_file

Content = str | tuple[dict[str, Any], ...]

KEYS = {kind: (kind, f"{kind}_path") for kind in MEDIA}
FIELDS = ("text", *(key for keys in KEYS.values() for key in keys), "content")
ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE
)  # what is no path of this machine
ABSENT = (None, "", b"", [])


@dataclass(frozen=True)
class Record:
    """Sides of one record. `where` names its origin (file and line) for errors."""

    anchor: Content
    positive: Content
    negatives: tuple[Content, ...]
    where: str

    @property
    def sides(self) -> tuple[Content, ...]:
        """Anchor, positive, negatives."""
        return (self.anchor, self.positive, *self.negatives)

    @property
    def modalities(self) -> frozenset[str]:
        """What its sides hold."""
        parts = (part for side in self.sides if not isinstance(side, str) for part in side)
        return frozenset({"text", *(part["type"] for part in parts)})


def as_input(side: Content) -> dict[str, str] | tuple[dict[str, Any], ...]:
    """A side as `encode` takes it. Texts are named as such, for a bare string may be a file's name."""
    return {"text": side} if isinstance(side, str) else side


def content_key(side: Content) -> Hashable:
    """A value that is equal for sides that say the same: equal text, or equal parts (arrays by their content)."""
    return side if isinstance(side, str) else _key(side)


def _key(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _key(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, blake2b(np.ascontiguousarray(value)).digest()
    return blake2b(value).digest() if isinstance(value, bytes) else value


def answer_of(record: Record) -> str:
    """What a generator is to say of a record: its positive. Raises unless that is a text."""
    if not isinstance(record.positive, str) or not record.positive.strip():
        raise LcoError(f"{record.where}: the positive is the answer, and must be a text")
    return record.positive


def parse_record(
    content: Any, where: str, root: str = "", exists: Callable[[str], bool] | None = None
) -> Record:
    """Read `{"anchor": side, "positive": side, "negative": side | [side, …] | absent}`.

    A side is a string; {"text": …, "image_path": …, "video_path": …, "audio_path": …} (or image, video, audio) with a
    path or a list of paths, where "" means absent; {"content": [part, …]}; or the list of parts itself. A list of
    images under video is the frames of one. root: the folder that relative paths start from. exists: asked for every
    local file. Raises `LcoError` naming `where`, the side and its key.
    """
    if not isinstance(content, Mapping):
        raise LcoError(
            f"{where}: a record is an object with anchor and positive, and this is {content!r:.60}"
        )
    check_keys(content, ("anchor", "positive", "negative", "negatives"), f"{where}: the record")
    reader = Reader(where, root, exists)
    sides = {}
    for name in ("anchor", "positive"):
        if name not in content:
            raise LcoError(f"{where}: the record has no {name!r}")
        sides[name] = reader.side(content[name], name)
        if not sides[name]:
            raise LcoError(f"{where}: {name} is empty")
    negatives: list[Content] = []
    for name in ("negative", "negatives"):
        negatives += [
            side for side in (reader.side(item, name) for item in listed(content.get(name))) if side
        ]
    return Record(sides["anchor"], sides["positive"], tuple(negatives), where)


def file_lookup(check: bool) -> Callable[[str], bool] | None:
    """Whether a file is there; sets name the same media often, so the answers are kept, a bounded number of them."""
    return lru_cache(maxsize=100_000)(os.path.isfile) if check else None


def is_parts(value: list) -> bool:
    """Whether a list is one side, not several."""
    return bool(value) and all(isinstance(part, Mapping) and "type" in part for part in value)


def listed(sides: Any) -> list:
    """One side, a list of them, or None, as a list."""
    return (
        []
        if sides is None
        else sides
        if isinstance(sides, list) and not is_parts(sides)
        else [sides]
    )


def _is_still(value: Any) -> bool:
    """Whether a path or address names an image that does not move."""
    return is_media_file(value) == "image" and not value.lower().endswith(".gif")


@dataclass(frozen=True)
class Reader:
    """Reads the sides of one record. Every `name` says where in the record its value stands, for errors.

    where, root, exists: as for `parse_record`.
    """

    where: str
    root: str
    exists: Callable[[str], bool] | None

    def side(self, side: Any, name: str) -> Content:
        if isinstance(side, str):
            check_text(side, f"{self.where}: {name}")
            return side
        if isinstance(side, list) and (not side or is_parts(side)):
            parts = [
                piece for i, part in enumerate(side) for piece in self.part(part, f"{name}[{i}]")
            ]
        elif isinstance(side, Mapping) and "type" in side:
            parts = self.part(side, name)
        elif isinstance(side, Mapping):
            check_keys(side, FIELDS, f"{self.where}: {name}")
            if (content := side.get("content")) not in ABSENT:
                if given := [key for key in FIELDS[:-1] if side.get(key) not in ABSENT]:
                    raise LcoError(
                        f"{self.where}: {name} has both content and {given[0]}; put all of it into content"
                    )
                if not isinstance(content, str) and not (
                    isinstance(content, list) and is_parts(content)
                ):
                    raise LcoError(
                        f"{self.where}: {name}.content must be a list of parts, and is {content!r:.60}"
                    )
                return self.side(content, f"{name}.content")
            parts = [part for kind in MEDIA for part in self.media_of(kind, side, name)]
            parts += self.text(side.get("text"), f"{name}.text")
        else:
            raise LcoError(
                f"{self.where}: {name} must be a string, an object with text or paths, or a list of parts that have a "
                f"type, and is {side!r:.60}"
            )
        if all(part["type"] == "text" for part in parts):
            return "".join(
                part["text"] for part in parts
            )  # chat templates put parts together in the same way
        return tuple(parts)

    def part(self, part: Mapping, name: str) -> list[dict]:
        """One part as a list of at most one: an empty text is none."""
        kind = part["type"]
        if kind not in ("text", *MEDIA):
            raise LcoError(
                f"{self.where}: {name}.type is {kind!r}; it is one of: text, {', '.join(MEDIA)}"
            )
        keys = KEYS.get(kind, ("text",))
        given = {
            key: value for key, value in part.items() if value is not None
        }  # tables fill their rows with None
        check_keys(given, ("type", *keys), f"{self.where}: {name}")
        given = [key for key in keys if key in given]
        if len(given) != 1:
            raise LcoError(
                f"{self.where}: {name} is a part of type {kind!r}; it needs {' or '.join(keys)}"
            )
        value, name = part[given[0]], f"{name}.{given[0]}"
        return self.text(value, name) if kind == "text" else [self.media(kind, value, name)]

    def text(self, text: Any, name: str) -> list[dict]:
        if not isinstance(text, str | None):
            raise LcoError(f"{self.where}: {name} must be a string, and is {text!r:.60}")
        check_text(text or "", f"{self.where}: {name}")
        return [{"type": "text", "text": text}] if text else []

    def media_of(self, kind: str, side: Mapping, name: str) -> list[dict]:
        """What a side's `image` or `image_path` (and so on) gives: one, several in a list, or none."""
        given = [key for key in KEYS[kind] if side.get(key) not in ABSENT]
        if len(given) > 1:
            raise LcoError(f"{self.where}: {name} has both {given[0]} and {given[1]}; keep one")
        if not given:
            return []
        value, name = side[given[0]], f"{name}.{given[0]}"
        if not isinstance(value, list) or (kind == "video" and any(map(_is_still, value))):
            return [self.media(kind, value, name)]
        return [self.media(kind, item, f"{name}[{i}]") for i, item in enumerate(value)]

    def media(self, kind: str, value: Any, name: str) -> dict:
        if kind == "video" and isinstance(value, list) and value:
            return {
                "type": kind,
                kind: [self.path(frame, f"{name}[{i}]") for i, frame in enumerate(value)],
            }
        if kind == "video" and _is_still(value):  # decoders take it, as a video of one frame
            raise LcoError(
                f"{self.where}: {name} is an image, {value!r:.200}; give a video file, or a list of frames"
            )
        return {
            "type": kind,
            kind: value if isinstance(value, bytes) and value else self.path(value, name),
        }

    def path(self, path: Any, name: str) -> str:
        if not isinstance(path, str) or not path:
            raise LcoError(f"{self.where}: {name} must be a path (a string), and is {path!r:.60}")
        check_text(path, f"{self.where}: {name}")
        if ADDRESS.match(path):
            return path
        found = os.path.join(self.root, path)
        if self.exists and not self.exists(found):
            raise LcoError(
                f"{self.where}: {name}: there is no file {found}; relative paths start at the folder of the records, "
                "or at media_root"
            )
        return found
