"""What can be found: the inputs of a corpus, with the files that the page may show, and vectors."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError, reason
from lco_jax.data.content import ADDRESS, is_conversation
from lco_jax.data.corpus import CorpusItem
from lco_jax.searching.nearest import Nearest

TEXT_SHOWN = 600  # letters of a text that the page shows


class NotAsListed(LcoError):
    """A file is no longer the one that was listed."""


class File(NamedTuple):
    """A local file of an entry. about: of the file, when it was listed; None if there was none."""

    kind: str
    path: str
    about: os.stat_result | None

    @classmethod
    def of(cls, kind: str, path: str) -> "File":
        """The file at a path, as it is now."""
        with suppress(OSError, ValueError):
            return cls(kind, path, os.stat(path))
        return cls(kind, path, None)

    @property
    def mark(self) -> list[int] | None:
        """Its size and time of change in ns, which a copy of the folder keeps."""
        return None if self.about is None else [self.about.st_size, self.about.st_mtime_ns]

    def open(self) -> int:
        """A descriptor of the very file that was listed. Raises `NotAsListed` where it is gone, is
        another one, or cannot be read.

        A link or another file in its place has another number, also of equal size and time.
        """
        try:
            # a pipe in its place must not be waited for
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError as error:
            gone = "The file is gone since it was indexed; start the search again."
            raise NotAsListed(gone) from error
        except (OSError, ValueError) as error:
            raise NotAsListed(f"The file cannot be read: {reason(error)}.") from error
        if self.about is None or _identity(os.fstat(descriptor)) != _identity(self.about):
            os.close(descriptor)
            changed = "The file has changed since it was indexed; start the search again."
            raise NotAsListed(changed)
        return descriptor

    def check(self) -> None:
        """Raise `NotAsListed` unless the path still leads to the very file that was listed."""
        os.close(self.open())


def _identity(about: os.stat_result) -> tuple[int, ...]:
    return (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


@dataclass(frozen=True)
class Entry:
    """An input.

    key: 32 hexadecimal digits; they differ where the content, a path, or a file's size or time of
    change differs. kind: of the first medium, or "text". label: where the input is. text: its
    beginning. parts: chat parts, as `encode` takes them; none of an input that is malformed.
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
        malformed = isinstance(item.content, LcoError)
        parts = [] if malformed else _parts(item.content)
        media = [part for part in parts if part["type"] != "text"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        files = []
        for part in media:
            files += _files(part)
        marks = [file.mark for file in files]
        # of a malformed input: what is wrong, and where
        given = str(item.content) if malformed else item.content
        content = json.dumps([given, marks]).encode()
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
        return [File.of("image", frame) for frame in source]
    if isinstance(source, str) and not ADDRESS.match(source):
        return [File.of(kind, source)]
    return []


class Library:
    """Entries with their vectors, in one index for each kind.

    So a search of one kind is as quick and as exact as a search of all. vectors: [N, W] as they are
    stored, one for each entry. index: makes a `Nearest` of a kind's vectors, keys and name.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        vectors: np.ndarray,
        index: Callable[..., Nearest],
    ):
        if len(vectors) != len(entries) or not np.isfinite(vectors).all():
            raise LcoError("the index has vectors that are not finite, or not one for each input")
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
            self._kinds[kind] = (chosen, index(vectors[rows], keys, kind))

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many entries."""
        return {kind: len(entries) for kind, (entries, _) in self._kinds.items()}

    def vector(self, key: str) -> np.ndarray:
        """What is stored of an entry, as a unit vector, float32 [D]."""
        _, index = self._kinds[self.entries[key].kind]
        return index.vector(self._rows[key])

    def nearest(self, query: np.ndarray, kinds: Iterable[str], k: int) -> list[tuple[Entry, float]]:
        """At most k entries of these kinds, with cosines, the nearest to a unit vector first."""
        found = []
        for kind in kinds:
            entries, index = self._kinds[kind]
            for row, cosine in zip(*index(query, k), strict=True):
                found.append((entries[row], float(cosine)))
        return sorted(found, key=lambda one: -one[1])[:k]
