"""What can be found: the inputs of a corpus, each with the files that the page may show, and their vectors."""

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

TEXT_SHOWN = 600  # letters of a text that the page is given


class File(NamedTuple):
    """A local file of an entry. mark: what `mark_of` said when it was read."""

    kind: str
    path: str
    mark: list[int] | None


def mark_of(path: str) -> list[int] | None:
    """A file's size and time of change in ns; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


@dataclass(frozen=True)
class Entry:
    """An input. kind: of its first medium, or "text"; label: where it stands; text: its beginning; parts: of a chat.

    key: 32 hexadecimal digits, others for another content, path, size or time of change of a file.
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
        turns = item.content if is_conversation(item.content) else [{"content": item.content}]
        turns = [
            [turn["content"]] if isinstance(turn["content"], dict) else turn["content"]
            for turn in turns
        ]
        parts = [{"type": "text", **part} for turn in turns for part in turn]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")[:TEXT_SHOWN]
        sources = [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]
        paths = [(kind, x) for kind, x in sources if isinstance(x, str) and not ADDRESS.match(x)]
        paths += [
            ("image", frame) for _, x in sources if isinstance(x, list) for frame in x
        ]  # of a clip
        files = [File(kind, path, mark_of(path)) for kind, path in paths]
        key = blake2b(
            json.dumps([item.content, [file.mark for file in files]]).encode(), digest_size=16
        ).hexdigest()
        kind = sources[0][0] if sources else "text"
        return cls(key, kind, item.where.removeprefix(f"{root}/"), text, files, parts, item)


class Library:
    """Entries with their vectors, in one index a kind, so that a search of one kind is as quick and as exact as of all.

    vectors: float32 [N, D] of unit length, a row an entry. index: from a kind's vectors, keys and name to a `Nearest`.
    """

    def __init__(
        self, entries: Sequence[Entry], vectors: np.ndarray, index: Callable[..., Nearest]
    ):
        self.entries = {entry.key: entry for entry in entries}
        self._row: dict[str, int] = {}  # among its kind
        self._kinds: dict[str, tuple[list[Entry], Nearest]] = {}
        for kind in dict.fromkeys(entry.kind for entry in entries):
            rows = [row for row, entry in enumerate(entries) if entry.kind == kind]
            chosen = [entries[row] for row in rows]
            self._row |= {entry.key: i for i, entry in enumerate(chosen)}
            self._kinds[kind] = chosen, index(vectors[rows], [entry.key for entry in chosen], kind)

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> entries."""
        return {kind: len(entries) for kind, (entries, _) in self._kinds.items()}

    def vector(self, key: str) -> np.ndarray:
        """An entry's, float32 [D]."""
        return self._kinds[self.entries[key].kind][1].vectors[self._row[key]]

    def nearest(self, query: np.ndarray, kinds: Iterable[str], k: int) -> list[tuple[Entry, float]]:
        """At most k entries of these kinds with their cosines, the nearest to a unit vector [D] first."""
        found = []
        for entries, index in map(self._kinds.__getitem__, kinds):
            found += [
                (entries[row], float(cosine)) for row, cosine in zip(*index(query, k), strict=True)
            ]
        return sorted(found, key=lambda one: -one[1])[:k]
