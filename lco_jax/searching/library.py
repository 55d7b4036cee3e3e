"""What can be found: the inputs of a corpus, with the files that the page may show, and vectors."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.data.content import ADDRESS, is_conversation
from lco_jax.data.corpus import CorpusItem
from lco_jax.searching.nearest import Nearest

TEXT_SHOWN = 600  # letters of a text that the page shows


class File(NamedTuple):
    """A local file of an entry. mark: what `mark_of` returned when the file was read."""

    kind: str
    path: str
    mark: list[int] | None


def mark_of(path: str) -> list[int] | None:
    """A file's size and time of change in ns; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


@dataclass(frozen=True)
class Entry:
    """An input.

    key: 32 hexadecimal digits; they differ where the content, a path, or a file's size or time of
    change differs. kind: of the first medium, or "text". label: where the input is. text: its
    beginning. parts: chat parts, as `encode` takes them.
    """

    key: str
    kind: str
    label: str
    text: str
    files: list[File]
    parts: list[dict[str, Any]]
    item: CorpusItem

    @classmethod
    def of(cls, item: CorpusItem, root: Path) -> "Entry":
        """root: the folder that labels start from."""
        parts = _parts(item.content)
        media = [part for part in parts if part["type"] != "text"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        files = []
        for part in media:
            files += _files(part)
        marks = [file.mark for file in files]
        content = json.dumps([item.content, marks]).encode()
        return cls(
            key=blake2b(content, digest_size=16).hexdigest(),
            kind=media[0]["type"] if media else "text",
            label=item.where.removeprefix(f"{root}/"),
            text="\n".join(texts)[:TEXT_SHOWN],
            files=files,
            parts=parts,
            item=item,
        )


def _parts(content: Any) -> list[dict[str, Any]]:
    """The parts of all turns of a content; a text alone is one part."""
    turns = [turn["content"] for turn in content] if is_conversation(content) else [content]
    parts = []
    for turn in turns:
        for part in [turn] if isinstance(turn, dict) else turn:
            parts.append({"type": "text", **part})
    return parts


def _files(part: dict[str, Any]) -> list[File]:
    """The local files of a medium: itself, or the frames of a clip."""
    kind, source = part["type"], part[part["type"]]
    if isinstance(source, list):
        return [File("image", frame, mark_of(frame)) for frame in source]
    if isinstance(source, str) and not ADDRESS.match(source):
        return [File(kind, source, mark_of(source))]
    return []


class Library:
    """Entries with their vectors, in one index for each kind.

    So a search of one kind is as quick and as exact as a search of all. vectors: float32 [N, D] of
    unit length, one for each entry. index: makes a `Nearest` of a kind's vectors, keys and name.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        vectors: np.ndarray,
        index: Callable[..., Nearest],
    ):
        self.entries = {entry.key: entry for entry in entries}
        self._rows = {}  # key -> row among its kind
        self._kinds = {}  # kind -> entries, index
        rows_of: dict[str, list[int]] = {}
        for row, entry in enumerate(entries):
            rows_of.setdefault(entry.kind, []).append(row)
        for kind, rows in rows_of.items():
            chosen = [entries[row] for row in rows]
            keys = [entry.key for entry in chosen]
            self._rows |= {key: row for row, key in enumerate(keys)}
            self._kinds[kind] = (
                chosen,
                index(vectors[rows], keys, kind),
            )

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many entries."""
        return {kind: len(entries) for kind, (entries, _) in self._kinds.items()}

    def vector(self, key: str) -> np.ndarray:
        """An entry's vector, float32 [D]."""
        _, index = self._kinds[self.entries[key].kind]
        return index.vectors[self._rows[key]]

    def nearest(self, query: np.ndarray, kinds: Iterable[str], k: int) -> list[tuple[Entry, float]]:
        """At most k entries of these kinds, with cosines, the nearest to a unit vector first."""
        found = []
        for kind in kinds:
            entries, index = self._kinds[kind]
            for row, cosine in zip(*index(query, k), strict=True):
                found.append((entries[row], float(cosine)))
        return sorted(found, key=lambda one: -one[1])[:k]
