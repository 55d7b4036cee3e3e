"""Retrieval, STS and zero-shot classification on one's own files, without mteb.

`encode` is a function such as `OmniEmbedder.encode`: a list of inputs -> unit vectors [N, D]. It is called once, after
all files are read and found sound. A side is spelt as in training records (`data/records.py`).

Dimensions: N items or pairs, C classes, T templates, D hidden.
"""

import argparse
import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr

from lco_jax.core.errors import LcoError, check_keys, explained
from lco_jax.core.files import write_json
from lco_jax.data.corpus import Corpus, json_lines
from lco_jax.data.records import Reader, as_input, content_key, listed, parse_record
from lco_jax.evaluation.plots import plot_confusion, plot_ranks, plot_scores
from lco_jax.evaluation.retrieval import ranks, retrieval_metrics

Encode = Callable[
    [list[Any]], np.ndarray
]  # inputs as `OmniEmbedder.encode` takes them, text never bare
QRELS = ("qrels.tsv", "qrels.jsonl", "qrels/test.tsv")
NAMES = {"query": "anchor", "document": "positive"}  # other names of what a record holds
TEMPLATES = {
    "image": "a photo of a {}",
    "video": "a video of {}",
    "audio": "the sound of {}",
}  # text: the label alone


class Outcome(NamedTuple):
    """numbers: name -> value; plot: draws them into a file."""

    numbers: dict[str, float]
    plot: Callable[[Path], None]


def own_retrieval(encode: Encode, path: Path, media_root: Path | None = None) -> Outcome:
    """nDCG@10, MRR@10, recall and hit rate (`retrieval_metrics`), every document a candidate for every query.

    path: a .jsonl of {"query" or "anchor": side, "document" or "positive": side or [side, …], "negative": the same, or
    absent}; what says the same is one query, one document. Or a folder as BEIR's: queries.jsonl, corpus.jsonl ({"_id",
    "title", "text", "image", …}) and one of `QRELS` (query-id, corpus-id, score: the grade; what has none above 0 is
    not asked).
    """
    queries, documents, relevance = (_beir if path.is_dir() else _records)(path, media_root)
    vectors = encode(queries + documents)
    ranked = ranks(vectors[: len(queries)], vectors[len(queries) :], relevance)
    numbers = retrieval_metrics(ranked) | {"queries": len(queries), "documents": len(documents)}
    best = np.array([found.min() for found, _ in ranked])
    return Outcome(numbers, lambda file: plot_ranks(file, best, len(documents)))


def own_sts(
    encode: Encode, path: Path, media_root: Path | None = None, columns: str | None = None
) -> Outcome:
    """Spearman's (tied ranks share their mean) and Pearson's correlation of cosines with people's scores.

    path: a .jsonl with sides of any modality, or texts in a .csv, .tsv or .txt (tabs).
    columns: side, side and score, by name, or in a table without a header by number: by default "a,b,score" in a
    .jsonl, else "0,1,2".
    """
    names = (columns or ("a,b,score" if path.suffix == ".jsonl" else "0,1,2")).split(",")
    if len(names) != 3:
        raise LcoError(f"the columns are {columns!r}; name three: a side, a side, the score")
    first, second, scores = [], [], []
    for (a, b, score), where in _columns(path, names):
        reader = Reader(where, os.path.abspath(media_root or path.parent), os.path.isfile)
        for sides, cell, name in ((first, a, names[0]), (second, b, names[1])):
            if not (side := reader.side(cell, name)):
                raise LcoError(f"{where}: {name} is empty")
            sides.append(as_input(side))
        scores.append(_number(score, where))
    if len(set(scores)) < 2:
        raise LcoError(
            f"{path} has {len(scores)} pairs and fewer than two different scores: nothing to correlate with"
        )
    vectors = encode(first + second).astype(np.float64)
    cosines = (vectors[: len(scores)] * vectors[len(scores) :]).sum(axis=1)
    if np.ptp(cosines) < 1e-6:
        raise LcoError(
            "all pairs have the same cosine: this model tells nothing apart, and nothing correlates"
        )
    spearman, pearson = (
        float(correlate(cosines, scores).statistic) for correlate in (spearmanr, pearsonr)
    )
    numbers = {"spearman": spearman, "pearson": pearson, "pairs": len(scores)}
    return Outcome(numbers, lambda file: plot_scores(file, scores, cosines, spearman))


def own_zeroshot(
    encode: Encode,
    path: Path,
    media_root: Path | None = None,
    template: str | Sequence[str] | None = None,
    label_pattern: str | None = None,
) -> Outcome:
    """Accuracy@1 and @5, and the mean over classes of accuracy@1; a tie with a wrong class counts as wrong.

    path: a folder with a folder of media a class, or one of media whose names tell the class, or a .jsonl or .parquet
    of inputs as `lco_jax.embed` reads them, with "label" beside.
    template: one or several, {} in the place of the label (its underscores as spaces), by default that of `TEMPLATES`
    for the items' modality; a class is the mean of its templates' vectors.
    label_pattern: a regular expression for the end of a path, from the start of a name on; its first group: the label.
    """
    items, names = _labelled(path, media_root, label_pattern)
    labels, target = np.unique(names, return_inverse=True)
    if len(labels) < 2:
        raise LcoError(
            f"{path} has {len(labels)} class ({', '.join(labels)}), and there must be two or more"
        )
    kinds = {part["type"] if isinstance(item, tuple) else "text" for item in items for part in item}
    default = TEMPLATES.get(kinds.pop(), "{}") if len(kinds) == 1 else "{}"
    templates = [template] if isinstance(template, str) else list(template or [default])
    if wrong := [one for one in templates if "{}" not in one]:
        raise LcoError(f"the template {wrong[0]!r} has no {{}} in the place of the label")
    prompts = [
        {"text": one.replace("{}", label.replace("_", " "))}
        for one in templates
        for label in labels
    ]
    vectors = encode(items + prompts).astype(np.float64)
    n, row = len(items), np.arange(len(items))
    classes = vectors[n:].reshape(len(templates), len(labels), -1).mean(axis=0)  # [C, D]
    scores = (vectors[:n] @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T).astype(
        np.float32
    )  # [N, C]
    own = scores[row, target]
    scores[row, target] = -np.inf
    rank = 1 + (scores >= own[:, None]).sum(axis=1)
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (target, np.where(rank == 1, target, scores.argmax(axis=1))), 1)
    numbers = {f"accuracy_at_{k}": float((rank <= k).mean()) for k in (1, 5)}
    numbers["balanced_accuracy"] = float((confusion.diagonal() / confusion.sum(axis=1)).mean())
    numbers |= {"items": n, "classes": len(labels)}
    return Outcome(numbers, lambda file: plot_confusion(file, confusion, list(labels)))


KINDS = {  # what measures, the options it takes, its main number
    "retrieval": (own_retrieval, ("media_root",), "ndcg_at_10"),
    "sts": (own_sts, ("media_root", "columns"), "spearman"),
    "zeroshot": (own_zeroshot, ("media_root", "template", "label_pattern"), "accuracy_at_1"),
}


def add_flags(parser: argparse.ArgumentParser, files: str) -> None:
    """--kind, and a flag for every option but --media-root. files: the flag that gives them."""
    group = parser.add_argument_group(f"what {files} holds")
    group.add_argument("--kind", choices=KINDS)
    group.add_argument("--columns", help="of sts: side,side,score, by name or number")
    group.add_argument(
        "--template", action="append", help="of zeroshot: {} is the label; may be repeated"
    )
    group.add_argument(
        "--label-pattern",
        help="of zeroshot: a regular expression that finds the label in file names",
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `evaluate` takes of flags that were given; one that the kind does not take is its to refuse."""
    return {name: getattr(args, name) for _, takes, _ in KINDS.values() for name in takes}


def evaluate(encode: Encode, kind: str, path: str | Path, **options: Any) -> Outcome:
    """Measure a model on the files at `path`. kind: one of `KINDS`; options: that one's, None as if not given."""
    if kind not in KINDS:
        raise LcoError(f"the kind is {kind!r}; it is one of: {', '.join(KINDS)}")
    function, takes, _ = KINDS[kind]
    given = {key: value for key, value in options.items() if value is not None}
    check_keys(given, takes, f"evaluation of kind {kind}")
    with explained(f"{path} cannot be read", OSError):
        os.stat(path)
        return function(encode, Path(path), **given)


def measure(
    encode: Encode, kind: str, path: str | Path, out: str | Path, **options: Any
) -> dict[str, float]:
    """As `evaluate`; writes `out`/results.json and the picture `out`/KIND.png, and returns the numbers."""
    numbers, plot = evaluate(encode, kind, path, **options)
    with explained(f"{out} cannot be written", OSError):
        Path(out).mkdir(parents=True, exist_ok=True)
        plot(Path(out) / f"{kind}.png")
        write_json(Path(out) / "results.json", {"kind": kind, "data": str(path), **numbers})
    return numbers


def _records(
    path: Path, media_root: Path | None
) -> tuple[list[Any], list[Any], list[dict[int, float]]]:
    root, queries, documents, relevance = os.path.abspath(media_root or path.parent), {}, {}, {}
    for _, content, where in json_lines(path):
        contents = [content]  # a record for every document
        if isinstance(content, Mapping):
            content = {NAMES.get(key, key): value for key, value in content.items()}
            contents = [
                {**content, "positive": side} for side in listed(content.get("positive")) or [""]
            ]
        for one in contents:
            record = parse_record(one, where, root, os.path.isfile)
            queries.setdefault(content_key(record.anchor), as_input(record.anchor))
            for side in record.sides[1:]:
                documents.setdefault(content_key(side), (len(documents), as_input(side)))
            relevant = relevance.setdefault(content_key(record.anchor), {})
            relevant[documents[content_key(record.positive)][0]] = 1.0
    if not queries:
        raise LcoError(f"{path} holds no record")
    return (
        list(queries.values()),
        [side for _, side in documents.values()],
        list(relevance.values()),
    )


def _beir(
    path: Path, media_root: Path | None
) -> tuple[list[Any], list[Any], list[dict[int, float]]]:
    known: dict[str, dict[str, Any]] = {"queries": {}, "corpus": {}}
    for name, found in known.items():
        for item in Corpus(path / f"{name}.jsonl", "_id", media_root, "--data", "title").items(
            check_media=True
        ):
            if found.setdefault(str(item.id), item.content) is not item.content:
                raise LcoError(f"{item.where}: the _id {item.id!r} stands on an earlier line, too")
    file = next((path / name for name in QRELS if (path / name).exists()), None)
    if file is None:
        raise LcoError(f"{path} has none of {', '.join(QRELS)}")
    numbers, relevance = {name: i for i, name in enumerate(known["corpus"])}, {}
    for (*pair, score), where in _columns(file, ("query-id", "corpus-id", "score")):
        query, document = map(str, pair)
        for name, one in (("queries", query), ("corpus", document)):
            if one not in known[name]:
                raise LcoError(f"{where}: {path / name}.jsonl has no _id {one!r}")
        if (grade := _number(score, where)) > 0:
            relevance.setdefault(query, {})[numbers[document]] = grade
    if not relevance:
        raise LcoError(f"{file} has no score above 0, and so no relevant document")
    return (
        [known["queries"][name] for name in relevance],
        list(known["corpus"].values()),
        list(relevance.values()),
    )


def _labelled(
    path: Path, media_root: Path | None, pattern: str | None
) -> tuple[list[Any], list[str]]:
    """Items, and the label of each."""
    if not path.is_dir() and path.suffix not in (".jsonl", ".parquet"):
        raise LcoError(f"{path}: give a file that ends in .jsonl or .parquet, or a folder of media")
    corpus = Corpus(path, None if path.is_dir() else "label", media_root, "--data")
    found = list(corpus.items(check_media=True))
    items, names = [item.content for item in found], [str(item.id) for item in found]
    if not path.is_dir():
        return items, names
    with explained(
        f"the label pattern {pattern!r} is no regular expression with a group", re.error, IndexError
    ):
        matches = [
            re.fullmatch(f"(?:.*/)?(?:{pattern})" if pattern else "([^/]+)/.*", name)
            for name in names
        ]
        labels = [match and match[1] for match in matches]
    if None in labels:
        says = (
            f"does not match the label pattern {pattern!r}"
            if pattern
            else "lies in no folder of a class"
        )
        raise LcoError(
            f"{path / names[labels.index(None)]} {says}; move it, or give a label pattern that fits"
        )
    folders = () if pattern else sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if empty := [name for name in folders if name not in labels and not name.startswith(".")]:
        raise LcoError(
            f"the class {path / empty[0]} holds no image, video or audio file; fill it or remove it"
        )
    return items, labels


def _columns(path: Path, names: Sequence[str]) -> Iterator[tuple[list[Any], str]]:
    """(the cells of these names, file and line) of a .jsonl, or of a .csv, .tsv or .txt (tabs) in UTF-8.

    A table's first row is its header, unless all names are numbers: of columns, from 0.
    """
    if path.suffix == ".jsonl":
        rows = (
            (row if isinstance(row, Mapping) else {}, where) for _, row, where in json_lines(path)
        )
    elif path.suffix in (".csv", ".tsv", ".txt"):
        rows = _table(path, header=not all(map(str.isdecimal, names)))
    else:
        raise LcoError(
            f"{path}: give a file that ends in .jsonl, .csv, .tsv or .txt (columns between tabs)"
        )
    for row, where in rows:
        if missing := [name for name in names if name not in row]:
            raise LcoError(
                f"{where} has no {missing[0]!r}; it has {', '.join(row) or 'no names at all'}"
            )
        yield [row[name] for name in names], where


def _table(path: Path, header: bool) -> Iterator[tuple[dict[str, str], str]]:
    style = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    torn = explained(f"{path} is no table in UTF-8", UnicodeDecodeError, csv.Error)
    with torn, open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, **style)
        names = next(rows, []) if header else None
        for row in filter(None, rows):
            yield (
                dict(zip(names or map(str, range(len(row))), row, strict=False)),
                f"{path}:{rows.line_num}",
            )


def _number(cell: Any, where: str) -> float:
    with explained(
        f"{where}: the score is no number (if this is a header, name the columns)",
        ValueError,
        TypeError,
    ):
        number = float(cell)
    if not math.isfinite(number):
        raise LcoError(f"{where}: the score is {number}, and must be finite")
    return number
