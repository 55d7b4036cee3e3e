"""Reads a user's files for evaluation: queries with their documents, scored pairs, labelled media.

Contents are written as in training records (`data/records.py`). They are returned as
`OmniEmbedder.encode` takes them, text never bare. Errors name the file and line.
"""

import csv
import math
import os
import re
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.corpus import Corpus, CorpusItem, full_lines, json_value
from lco_jax.data.lines import Line, ending_of
from lco_jax.data.records import Reader, Record, as_input, content_key, listed, parse_record
from lco_jax.evaluation.left_out import LeftOut

LABELLED = (".jsonl", ".parquet")
TABLES = (".csv", ".tsv", ".txt")
QRELS = ("qrels.tsv", "qrels.jsonl", "qrels/test.tsv")
NAMES = {
    "query": "anchor",
    "document": "positive",
}  # other names for what a record holds
Queries = tuple[list[Any], list[Any], list[dict[int, float]]]  # queries, documents, relevance


def read_records(path: Path, media_root: Path | None, left_out: LeftOut) -> Queries:
    """Queries, documents, and for each query {document's index: 1.0} of a .jsonl of records.

    Equal contents are one query, or one document. left_out: what is done with bad records.
    """
    root = os.path.abspath(media_root or path.parent)
    queries: dict[Hashable, Any] = {}
    documents: dict[Hashable, Any] = {}
    relevant: dict[Hashable, set[Hashable]] = {}
    for line in _lines(path):
        records: list[Record] = []
        with left_out.record():
            records = list(_records_of(json_value(line), line.where, root))
        for record in records:
            query = content_key(record.anchor)
            queries.setdefault(query, as_input(record.anchor))
            relevant.setdefault(query, set()).add(content_key(record.positive))
            for content in (record.positive, *record.negatives):
                documents.setdefault(content_key(content), as_input(content))
    if not queries:
        raise LcoError(f"{path} holds no record{left_out.why_nothing()}")
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


def read_beir(folder: Path, media_root: Path | None, left_out: LeftOut) -> Queries:
    """Queries that have a relevant document, all documents, and for each query {index: grade}.

    left_out: what is done with bad records, and how many queries have no relevant document.
    """
    queries = _by_id(folder / "queries.jsonl", media_root, left_out)
    documents = _by_id(folder / "corpus.jsonl", media_root, left_out)
    relevance = _grades(folder, queries, documents, left_out)
    if unasked := len(queries) - len(relevance):
        left_out.others["queries without a relevant document"] += unasked
    asked = [queries[name] for name in relevance]
    return (
        asked,
        list(documents.values()),
        list(relevance.values()),
    )


def _grades(
    folder: Path, queries: Container[str], documents: Iterable[str], left_out: LeftOut
) -> dict[str, dict[int, float]]:
    """{query: {index of a relevant document: grade}}. Raises if there is none."""
    file = _qrels(folder)
    index_of = {name: index for index, name in enumerate(documents)}
    relevance: dict[str, dict[int, float]] = {}
    for row, where in _rows(file, header=True):
        with left_out.record():
            cells = _cells(row, ("query-id", "corpus-id", "score"), where)
            query, document = str(cells[0]), str(cells[1])
            if query not in queries:
                raise LcoError(f"{where}: {folder / 'queries.jsonl'} has no _id {query!r}")
            if document not in index_of:
                raise LcoError(f"{where}: {folder / 'corpus.jsonl'} has no _id {document!r}")
            grade = _number(cells[2], where)
            if grade > 0:
                relevance.setdefault(query, {})[index_of[document]] = grade
    if not relevance:
        nothing = "has no score above 0, and so no relevant document"
        raise LcoError(f"{file} {nothing}{left_out.why_nothing()}")
    return relevance


def _qrels(folder: Path) -> Path:
    for name in QRELS:
        if (folder / name).exists():
            return folder / name
    raise LcoError(f"{folder} has none of {', '.join(QRELS)}")


def _by_id(path: Path, media_root: Path | None, left_out: LeftOut) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    corpus = Corpus(path, "_id", media_root, "--input", "title", left_out.skips)
    for item in corpus.items(check_media=True):
        with left_out.record():
            content = _content(item)
            if str(item.id) in contents:
                raise LcoError(f"{item.where}: an earlier line has the _id {item.id!r}, too")
            contents[str(item.id)] = content
    return contents


def _content(item: CorpusItem) -> Any:
    """What an input holds. Raises if it is malformed."""
    if isinstance(item.content, LcoError):
        raise item.content
    return item.content


def read_pairs(
    path: Path, media_root: Path | None, columns: Sequence[str], left_out: LeftOut
) -> tuple[list[Any], list[Any], list[float]]:
    """The first contents, the second contents, and the scores. columns: the three names.

    left_out: what is done with bad pairs.
    """
    root = os.path.abspath(media_root or path.parent)
    pairs: list[tuple[Any, Any, float]] = []
    for row, where in _rows(path, header=not all(map(str.isdecimal, columns))):
        with left_out.record():
            cells = _cells(row, columns, where)
            reader = Reader(where, root, os.path.isfile)
            sides = [_side(reader, cells[i], columns[i]) for i in (0, 1)]
            pairs.append((sides[0], sides[1], _number(cells[2], where)))
    first, second, scores = ([pair[i] for pair in pairs] for i in range(3))
    return first, second, scores


def _side(reader: Reader, cell: Any, name: str) -> Any:
    """A content of a pair. Raises if it is empty."""
    content = reader.side(cell, name)
    if not content:
        raise LcoError(f"{reader.where}: {name} is empty")
    return as_input(content)


def read_labelled(
    path: Path, media_root: Path | None, pattern: str | None, left_out: LeftOut
) -> tuple[list[Any], list[str]]:
    """Contents, and the label of each. pattern: finds the label in a path within the folder.

    left_out: what is done with bad inputs, and what the folder holds beside media.
    """
    if not path.is_dir() and ending_of(path) not in LABELLED:
        raise LcoError(f"{path}: give a file that ends in .jsonl or .parquet, or a folder of media")
    id_field = None if path.is_dir() else "label"
    corpus = Corpus(path, id_field, media_root, "--input", keeps_bad=left_out.skips)
    contents, labels = [], []
    for item in corpus.items(check_media=not (left_out.skips and path.is_dir())):
        with left_out.record():
            content, label = _content(item), str(item.id)
            if pattern and path.is_dir():
                label = _matched(path, label, pattern)
            elif path.is_dir():
                label = _folder_of(path, label)
            contents.append(content)
            labels.append(label)
    if corpus.listing:
        left_out.others.update(corpus.listing.left_out)
    if path.is_dir() and not pattern:
        _check_classes(path, labels, left_out)
    if not contents:
        raise LcoError(f"{path} holds no input{left_out.why_nothing()}")
    return contents, labels


def _check_classes(path: Path, labels: Sequence[str], left_out: LeftOut) -> None:
    """Raise for a folder of a class without a medium."""
    for folder in sorted(path.iterdir()):
        hidden = folder.name.startswith(".")
        if folder.is_dir() and not hidden and folder.name not in labels:
            what = "holds no image, video or audio file; fill it or remove it"
            left_out.refuse(LcoError(f"the class {folder} {what}"))


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


def _rows(path: Path, header: bool) -> Iterator[tuple[Line | dict[str, str], str]]:
    """Each row of a .jsonl or of a table, not yet parsed, with file and line.

    A table is a .csv, or a .tsv or .txt with tabs, in UTF-8. header: whether its first row names
    the columns; otherwise they are numbered from 0.
    """
    if ending_of(path) == ".jsonl":
        return ((line, line.where) for line in _lines(path))
    if path.suffix in TABLES:
        return _table(path, header)
    raise LcoError(
        f"{path}: give a file that ends in .jsonl, .csv, .tsv or .txt (columns between tabs)"
    )


def _cells(row: Line | dict[str, str], names: Sequence[str], where: str) -> list[Any]:
    """A row's cells of these columns."""
    known = json_value(row) if isinstance(row, Line) else row
    known = known if isinstance(known, Mapping) else {}
    for name in names:
        if name not in known:
            has = ", ".join(known) or "no names at all"
            raise LcoError(f"{where} has no {name!r}; it has {has}")
    return [known[name] for name in names]


def _lines(path: Path) -> Iterator[Line]:
    with explained(f"{path} cannot be read", OSError):
        yield from full_lines(path)


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
