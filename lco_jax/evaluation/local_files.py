"""Reads a user's files for evaluation: queries with their documents, scored pairs, labelled media.

Contents are written as in training records (`data/records.py`). They are returned as
`OmniEmbedder.encode` takes them, text never bare. Errors name the file and line.
"""

import csv
import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.corpus import Corpus, json_lines
from lco_jax.data.lines import ending_of
from lco_jax.data.records import Reader, Record, as_input, content_key, listed, parse_record

LABELLED = (".jsonl", ".parquet")
TABLES = (".csv", ".tsv", ".txt")
QRELS = ("qrels.tsv", "qrels.jsonl", "qrels/test.tsv")
NAMES = {
    "query": "anchor",
    "document": "positive",
}  # other names for what a record holds
Queries = tuple[list[Any], list[Any], list[dict[int, float]]]  # queries, documents, relevance


def read_records(path: Path, media_root: Path | None) -> Queries:
    """Queries, documents, and for each query {document's index: 1.0} of a .jsonl of records.

    Equal contents are one query, or one document.
    """
    root = os.path.abspath(media_root or path.parent)
    queries: dict[Hashable, Any] = {}
    documents: dict[Hashable, Any] = {}
    relevant: dict[Hashable, set[Hashable]] = {}
    for _, line, where in _lines(path):
        for record in _records_of(line, where, root):
            query = content_key(record.anchor)
            queries.setdefault(query, as_input(record.anchor))
            relevant.setdefault(query, set()).add(content_key(record.positive))
            for content in (record.positive, *record.negatives):
                documents.setdefault(content_key(content), as_input(content))
    if not queries:
        raise LcoError(f"{path} holds no record")
    index_of = {key: index for index, key in enumerate(documents)}
    relevance = [{index_of[key]: 1.0 for key in keys} for keys in relevant.values()]
    return (
        list(queries.values()),
        list(documents.values()),
        relevance,
    )


def _records_of(line: Any, where: str, root: str) -> Iterator[Record]:
    """A record for each of a line's documents."""
    if isinstance(line, Mapping):
        line = {NAMES.get(key, key): value for key, value in line.items()}
        documents = [one for one in listed(line.get("positive")) if one is not None]
        for document in documents or [""]:
            yield parse_record(
                {**line, "positive": document},
                where,
                root,
                os.path.isfile,
            )
    else:
        parse_record(line, where)  # raises


def read_beir(folder: Path, media_root: Path | None) -> Queries:
    """Queries that have a relevant document, all documents, and for each query {index: grade}."""
    queries = _by_id(folder / "queries.jsonl", media_root)
    documents = _by_id(folder / "corpus.jsonl", media_root)
    index_of = {name: index for index, name in enumerate(documents)}
    file = _qrels(folder)
    relevance: dict[str, dict[int, float]] = {}
    for cells, where in read_columns(file, ("query-id", "corpus-id", "score")):
        query, document = str(cells[0]), str(cells[1])
        if query not in queries:
            raise LcoError(f"{where}: {folder / 'queries.jsonl'} has no _id {query!r}")
        if document not in documents:
            raise LcoError(f"{where}: {folder / 'corpus.jsonl'} has no _id {document!r}")
        grade = _number(cells[2], where)
        if grade > 0:
            relevance.setdefault(query, {})[index_of[document]] = grade
    if not relevance:
        raise LcoError(f"{file} has no score above 0, and so no relevant document")
    asked = [queries[name] for name in relevance]
    return (
        asked,
        list(documents.values()),
        list(relevance.values()),
    )


def _qrels(folder: Path) -> Path:
    for name in QRELS:
        if (folder / name).exists():
            return folder / name
    raise LcoError(f"{folder} has none of {', '.join(QRELS)}")


def _by_id(path: Path, media_root: Path | None) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for item in Corpus(path, "_id", media_root, "--input", "title").items(check_media=True):
        if str(item.id) in contents:
            raise LcoError(f"{item.where}: an earlier line has the _id {item.id!r}, too")
        contents[str(item.id)] = item.content
    return contents


def read_pairs(
    path: Path, media_root: Path | None, columns: Sequence[str]
) -> tuple[list[Any], list[Any], list[float]]:
    """The first contents, the second contents, and the scores. columns: the three names."""
    root = os.path.abspath(media_root or path.parent)
    first, second, scores = [], [], []
    for cells, where in read_columns(path, columns):
        reader = Reader(where, root, os.path.isfile)
        for contents, cell, name in zip((first, second), cells, columns, strict=False):
            content = reader.side(cell, name)
            if not content:
                raise LcoError(f"{where}: {name} is empty")
            contents.append(as_input(content))
        scores.append(_number(cells[2], where))
    return first, second, scores


def read_labelled(
    path: Path, media_root: Path | None, pattern: str | None
) -> tuple[list[Any], list[str]]:
    """Contents, and the label of each. pattern: finds the label in a path within the folder."""
    if not path.is_dir() and ending_of(path) not in LABELLED:
        raise LcoError(f"{path}: give a file that ends in .jsonl or .parquet, or a folder of media")
    id_field = None if path.is_dir() else "label"
    items = list(Corpus(path, id_field, media_root, "--input").items(check_media=True))
    contents = [item.content for item in items]
    names = [str(item.id) for item in items]
    if not path.is_dir():
        return contents, names
    if pattern:
        return contents, [_matched(path, name, pattern) for name in names]
    labels = [_folder_of(path, name) for name in names]
    for folder in sorted(path.iterdir()):
        hidden = folder.name.startswith(".")
        if folder.is_dir() and not hidden and folder.name not in labels:
            raise LcoError(
                f"the class {folder} holds no image, video or audio file; fill it or remove it"
            )
    return contents, labels


def _matched(path: Path, name: str, pattern: str) -> str:
    """The label that a pattern finds at the end of a path within the folder."""
    wrong = f"the label pattern {pattern!r} is no regular expression with a group"
    with explained(wrong, re.error, IndexError):
        match = re.fullmatch(f"(?:.*/)?(?:{pattern})", name)
        label = match and match[1]
    if label is None:
        raise LcoError(
            f"{path / name} does not match the label pattern {pattern!r}; "
            "move it, or give a label pattern that fits"
        )
    return label


def _folder_of(path: Path, name: str) -> str:
    """The class's folder that a medium lies in."""
    label, _, below = name.partition("/")
    if not below:
        raise LcoError(
            f"{path / name} lies in no folder of a class; move it, or give a label pattern"
        )
    return label


def read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[list[Any], str]]:
    """The cells of these columns, with file and line, of each row of a .jsonl or of a table.

    A table is a .csv, or a .tsv or .txt with tabs, in UTF-8. Its first row is the header, unless
    all names are numbers: then they number the columns, from 0.
    """
    if ending_of(path) == ".jsonl":
        rows = ((line, where) for _, line, where in _lines(path))
    elif path.suffix in TABLES:
        rows = _table(path, header=not all(map(str.isdecimal, names)))
    else:
        raise LcoError(
            f"{path}: give a file that ends in .jsonl, .csv, .tsv or .txt (columns between tabs)"
        )
    for row, where in rows:
        known = row if isinstance(row, Mapping) else {}
        for name in names:
            if name not in known:
                has = ", ".join(known) or "no names at all"
                raise LcoError(f"{where} has no {name!r}; it has {has}")
        yield [known[name] for name in names], where


def _lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    with explained(f"{path} cannot be read", OSError):
        yield from json_lines(path)


def _table(path: Path, header: bool) -> Iterator[tuple[dict[str, str], str]]:
    """Each row as {column's name or number: cell}, with file and line."""
    style = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    wrong = f"{path} cannot be read as a table in UTF-8"
    with (
        explained(wrong, OSError, UnicodeDecodeError, csv.Error),
        open(path, encoding="utf-8-sig", newline="") as file,
    ):
        rows = csv.reader(file, **style)
        columns = next(rows, []) if header else None
        for row in rows:
            if row:
                names = columns or map(str, range(len(row)))
                yield (
                    dict(zip(names, row, strict=False)),
                    f"{path}:{rows.line_num}",
                )


def _number(cell: Any, where: str) -> float:
    wrong = f"{where}: the score is no number (if this is a header, name the columns)"
    with explained(wrong, ValueError, TypeError):
        number = float(cell)
    if not math.isfinite(number):
        raise LcoError(f"{where}: the score is {number}, and must be finite")
    return number
