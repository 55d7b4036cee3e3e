"""The contents of records and of a corpus, each once: what is embedded and searched.

They are numbered as they come, and written as lines of a jsonl, which `lco embed` reads.
Dimensions: N records, T contents.
"""

import filecmp
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import replace
from lco_jax.data.content import ADDRESS, MEDIA, Content, Part
from lco_jax.data.corpus import CorpusItem
from lco_jax.data.numbering import Numbering
from lco_jax.data.records import Record


class Numbers(NamedTuple):
    """The numbers of the contents of all records, int32.

    anchors, positives: [N]. negatives: of all records, one after another; those of record i begin
    at starts[i], int64 [N + 1]. candidates: of what may become a negative, in ascending order.
    total: T. digest: text that differs where contents or records do.
    """

    anchors: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    starts: np.ndarray
    candidates: np.ndarray
    total: int
    digest: str

    def negatives_of(self, record: int) -> np.ndarray:
        """Those that the record came with."""
        return self.negatives[self.starts[record] : self.starts[record + 1]]


def number_contents(
    records: Iterable[Record],
    corpus: Iterable[CorpusItem] | None,
    path: Path,
    corpus_name: str = "the corpus",
) -> Numbers:
    """Number all contents, and write them to `path`, a line each, unless it holds them already.

    corpus: what may become a negative in place of the records' positives and negatives.
    corpus_name: what errors call it. Raises for media that have no name, which a jsonl cannot hold,
    and for a corpus that holds no content.
    """
    sides: list[int] = []  # anchor, positive, negatives of one record after another
    counts: list[int] = []
    others: list[int] = []
    aside = path.with_name(f"{path.name}.tmp")
    with explained(f"{path.parent} cannot be written", OSError), aside.open("wb") as file:
        writer = _Writer(file)
        for record in records:
            sides += [writer.number(side, record.where) for side in record.sides]
            counts.append(len(record.negatives))
        if corpus is not None:
            others = [writer.number(*one) for one in _of_corpus(corpus)]
    if corpus is not None and not others:
        needs = "name a file or folder with a text or a medium that can be read"
        raise LcoError(f"{corpus_name} holds nothing that may become a negative; {needs}")
    _keep(aside, path)
    candidates = None if corpus is None else np.unique(np.array(others, np.int32))
    return _as_numbers(np.array(sides, np.int32), np.array(counts, np.int64), candidates, writer)


def _as_numbers(
    sides: np.ndarray, counts: np.ndarray, candidates: np.ndarray | None, writer: "_Writer"
) -> Numbers:
    """All numbers. sides: the anchor, positive and negatives of one record after another; counts:
    of each record's negatives, [N]. candidates: by default what records hold.
    """
    first = np.concatenate([[0], np.cumsum(counts + 2)])[:-1]
    is_negative = np.ones(len(sides), bool)
    is_negative[first] = is_negative[first + 1] = False
    anchors, positives, negatives = sides[first], sides[first + 1], sides[is_negative]
    starts = np.concatenate([[0], np.cumsum(counts)])
    if candidates is None:
        candidates = np.unique(np.concatenate([positives, negatives]))
    for array in (anchors, positives, negatives, starts, candidates):
        writer.digest.update(np.ascontiguousarray(array))
    total, digest = len(writer.numbering), writer.digest.hexdigest()
    return Numbers(anchors, positives, negatives, starts, candidates, total, digest)


class _Writer:
    """Numbers contents, and writes a line of each new one. digest: of the lines."""

    def __init__(self, file: IO[bytes]):
        self.file, self.numbering, self.digest = file, Numbering(), blake2b(digest_size=8)

    def number(self, content: Content, where: str) -> int:
        """The number of a content. where: its file and line, for errors."""
        known = len(self.numbering)
        check_named(content, where)
        found = self.numbering.number(content)
        if found == known:
            line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
            self.file.write(line)
            self.digest.update(line)
        return found


def _of_corpus(items: Iterable[CorpusItem]) -> Iterator[tuple[Content, str]]:
    """The contents of a corpus, and where each stands; what is malformed was named before."""
    for item in items:
        if isinstance(item.content, LcoError):
            continue
        if isinstance(item.content, list):
            raise LcoError(f"{item.where} is a chat; a negative is a text, media or both")
        content = item.content["text"] if isinstance(item.content, dict) else item.content
        if content:
            yield _absolute(content), item.where


def _absolute(content: Content) -> Content:
    """A content whose media have absolute paths: its line is read from another folder."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        medium = part[part["type"]]
        is_path = part["type"] != "text" and isinstance(medium, str) and not ADDRESS.match(medium)
        parts.append({**part, part["type"]: os.path.abspath(medium)} if is_path else part)
    return tuple(parts)


def _keep(aside: Path, path: Path) -> None:
    """Take a new file in the place of an old one, unless they are equal."""
    if path.exists() and filecmp.cmp(aside, path, shallow=False):
        aside.unlink()
    else:
        replace(aside, path)


def check_named(content: Content, where: str) -> None:
    """Raise for a medium that is no path or address."""
    for part in () if isinstance(content, str) else content:
        medium = part[part["type"]]
        names = medium if isinstance(medium, list) else [medium]
        if not all(isinstance(name, str) for name in names):
            raise LcoError(
                f"{where}: its {part['type']} has no file of its own, and mined records are a "
                "jsonl, which names files; write such media to files, and name these"
            )


class Lines:
    """The contents that `number_contents` wrote, by number."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            lengths = [len(line) for line in file]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._file = path.open("rb")

    def __getitem__(self, number: int) -> Content:
        self._file.seek(self._starts[number])
        content = json.loads(self._file.readline())
        return content if isinstance(content, str) else tuple(content)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def placed(content: Content, folder: str) -> str | dict[str, Any] | list[Part]:
    """A content as a line of a jsonl in `folder` has it: media below the folder get names that
    start there, so that both may move together.
    """
    if isinstance(content, str):
        return content
    parts = [
        {
            key: _placed(value, folder) if key == part["type"] and key != "text" else value
            for key, value in part.items()
        }
        for part in content
    ]
    kinds = [part["type"] for part in parts]
    in_order = [kind for kind in (*MEDIA, "text") if kind in kinds]
    if kinds != in_order or any(part.keys() != {"type", part["type"]} for part in parts):
        return parts
    return {part["type"]: part[part["type"]] for part in parts}


def _placed(medium: str | Sequence[str], folder: str) -> Any:
    if not isinstance(medium, str):
        return [_placed(one, folder) for one in medium]
    below = os.path.join(folder, "")
    path = medium if ADDRESS.match(medium) else os.path.normpath(medium)
    return path.removeprefix(below)
