"""What can be found: the inputs of a corpus, each with the files that the page may show, and their vectors."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.data.corpus import Item
from lco_jax.data.prompts import is_conversation
from lco_jax.data.records import ADDRESS
from lco_jax.searching.nearest import Nearest

TEXT_SHOWN = 600  # letters of a text that the page is given


@dataclass(frozen=True)
class File:
    """A local file of an entry. mark: its size and time of change, ns, when it was read; None if it was not there."""

    kind: str
    path: str
    mark: tuple[int, int] | None

    @classmethod
    def at(cls, kind: str, path: str) -> "File":
        """The file as it is now."""
        try:
            found = os.stat(path)
        except OSError:
            return cls(kind, path, None)
        return cls(kind, path, (found.st_size, found.st_mtime_ns))


@dataclass(frozen=True)
class Entry:
    """An input. kind: of its first medium, or "text"; label: where it stands; text: its beginning.

    key: 32 hexadecimal digits, other for another content, path, size or time of change of a file.
    """

    key: str
    kind: str
    label: str
    text: str
    files: tuple[File, ...]
    item: Item

    @classmethod
    def of(cls, item: Item, root: Path) -> "Entry":
        """root: the folder that labels start from."""
        parts = _parts(item.content)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        sources = [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]
        named = [(kind, x) for kind, x in sources if isinstance(x, str)]
        named += [("image", frame) for _, x in sources if isinstance(x, list) for frame in x]  # frames of a clip
        files = tuple(File.at(kind, path) for kind, path in named if not ADDRESS.match(path))
        said = json.dumps([item.content, [file.mark for file in files]])
        return cls(
            blake2b(said.encode(), digest_size=16).hexdigest(),
            sources[0][0] if sources else "text",
            item.where.removeprefix(f"{root}/"),
            "\n".join(texts)[:TEXT_SHOWN],
            files,
            item,
        )

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Its chat parts, for a query that holds them and more."""
        return _parts(self.item.content)


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, dict):
        return [{"type": "text", **content}]
    return [part for message in content for part in message["content"]] if is_conversation(content) else list(content)


class Library:
    """Entries with their vectors, in one index a kind, so that a search of one kind is as quick and as exact as of all.

    vectors: float32 [N, D] of unit length, a row an entry. index: from a kind's vectors, keys and name to a `Nearest`.
    """

    def __init__(self, entries: Sequence[Entry], vectors: np.ndarray, index: Callable[..., Nearest]):
        self.entries = {entry.key: entry for entry in entries}
        self._row: dict[str, int] = {}  # within its kind
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
        for entries, index in (self._kinds[kind] for kind in kinds):
            rows, cosines = index(query, k)
            found += [(entries[row], float(cosine)) for row, cosine in zip(rows, cosines, strict=True)]
        return sorted(found, key=lambda one: -one[1])[:k]
