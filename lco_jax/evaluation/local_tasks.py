"""Retrieval, STS and zero-shot classification on a user's files, without mteb.

Dimensions: N items or pairs, C classes, T templates, D hidden.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError, check_keys, explained
from lco_jax.core.files import write_json
from lco_jax.data.lines import files_of
from lco_jax.evaluation.local_files import read_beir, read_labelled, read_records
from lco_jax.evaluation.plots import plot_confusion, plot_ranks, plot_scores
from lco_jax.evaluation.retrieval import best_ranks, ranks, retrieval_metrics
from lco_jax.evaluation.sts import Encode, agreement, is_builtin, open_pairs

TEMPLATES = {
    "image": "a photo of a {}",
    "video": "a video of {}",
    "audio": "the sound of {}",
}


class Outcome(NamedTuple):
    """numbers: name -> value; plot: draws them into a file."""

    numbers: dict[str, float]
    plot: Callable[[Path], None]


def retrieval(encode: Encode, path: Path, media_root: Path | None = None) -> Outcome:
    """nDCG@10, MRR@10, recall and hit rate; every document is a candidate for every query.

    path: a .jsonl of {"query" or "anchor": content, "document" or "positive": content or
    [content, …], "negative": the same, or absent}. Or a folder as BEIR's: queries.jsonl,
    corpus.jsonl ({"_id", "title", "text", "image", …}) and one of `QRELS` (query-id, corpus-id,
    score: the grade). A query without a grade above 0 is not asked.
    """
    read = read_beir if path.is_dir() else read_records
    queries, documents, relevance = read(path, media_root)
    vectors = encode(queries + documents)
    ranked = ranks(vectors[: len(queries)], vectors[len(queries) :], relevance)
    numbers = retrieval_metrics(ranked)
    numbers |= {
        "queries": len(queries),
        "documents": len(documents),
    }
    best = best_ranks(ranked)
    return Outcome(
        numbers,
        lambda file: plot_ranks(file, best, len(documents)),
    )


def sts(
    encode: Encode,
    path: Path,
    media_root: Path | None = None,
    columns: str | None = None,
) -> Outcome:
    """Semantic textual similarity: the correlation of cosines with people's scores.

    path, columns: as `sts.open_pairs` has them.
    """
    _, pairs = open_pairs(str(path), media_root, columns)
    found = agreement(encode, pairs)
    numbers = {
        "spearman": found.spearman,
        "pearson": found.pearson,
        "pairs": len(pairs.scores),
    }
    return Outcome(
        numbers,
        lambda file: plot_scores(file, pairs.scores, found.cosines, found.spearman),
    )


def zeroshot(
    encode: Encode,
    path: Path,
    media_root: Path | None = None,
    template: str | Sequence[str] | None = None,
    label_pattern: str | None = None,
) -> Outcome:
    """Accuracy@1 and @5, and the mean over classes of accuracy@1.

    A class is the mean of its templates' vectors. A tie with a wrong class counts as wrong.

    path: a folder that has a folder of media for each class; or one of media whose names hold the
    class; or a .jsonl or .parquet of inputs as `lco_jax.embed` reads them, with "label" beside.
    template: one or several texts in which {} stands for the label, its underscores as spaces. By
    default that of `TEMPLATES` for the items' modality, or else the label alone.
    label_pattern: a regular expression for the end of a path, from the start of a name on; its
    first group is the label.
    """
    items, names = read_labelled(path, media_root, label_pattern)
    labels, target = np.unique(names, return_inverse=True)
    if len(labels) < 2:
        raise LcoError(
            f"{path} has {len(labels)} class ({', '.join(labels)}), and there must be two or more"
        )
    templates = [template] if isinstance(template, str) else template or [_template_for(items)]
    vectors = encode(items + _prompts(templates, labels)).astype(np.float64)
    n = len(items)
    by_template = vectors[n:].reshape(len(templates), len(labels), -1)
    rank, confusion = _classify(vectors[:n], by_template.mean(axis=0), target)
    recalls = confusion.diagonal() / confusion.sum(axis=1)
    numbers = {
        "accuracy_at_1": float((rank <= 1).mean()),
        "accuracy_at_5": float((rank <= 5).mean()),
        "balanced_accuracy": float(recalls.mean()),
        "items": n,
        "classes": len(labels),
    }
    return Outcome(
        numbers,
        lambda file: plot_confusion(file, confusion, list(labels)),
    )


def _classify(
    items: np.ndarray, classes: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the items' right classes, from 1, [N], and the confusion [C, C].

    items [N, D]: unit vectors. classes [C, D]: of any length. target: the right classes, [N].
    """
    classes = classes / np.linalg.norm(classes, axis=1, keepdims=True)
    scores = (items @ classes.T).astype(np.float32)  # [N, C]
    rows = np.arange(len(target))
    right = scores[rows, target]
    scores[rows, target] = -np.inf
    rank = 1 + (scores >= right[:, None]).sum(axis=1)
    predicted = np.where(rank == 1, target, scores.argmax(axis=1))
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (target, predicted), 1)
    return rank, confusion


def _prompts(templates: Sequence[str], labels: Sequence[str]) -> list[dict[str, str]]:
    """The texts of all labels in the first template, then in the second, and so on."""
    prompts = []
    for template in templates:
        if "{}" not in template:
            raise LcoError(f"the template {template!r} has no {{}} in the place of the label")
        prompts += [{"text": template.replace("{}", label.replace("_", " "))} for label in labels]
    return prompts


def _template_for(items: Sequence[Any]) -> str:
    """The template of the items' modality; the label alone if they have several."""
    kinds = set()
    for item in items:
        kinds |= {part["type"] for part in item} if isinstance(item, tuple) else {"text"}
    return TEMPLATES.get(kinds.pop(), "{}") if len(kinds) == 1 else "{}"


KINDS = {  # the function, its options, its main number
    "retrieval": (retrieval, ("media_root",), "ndcg_at_10"),
    "sts": (sts, ("media_root", "columns"), "spearman"),
    "zeroshot": (
        zeroshot,
        ("media_root", "template", "label_pattern"),
        "accuracy_at_1",
    ),
}


def add_flags(parser: argparse.ArgumentParser, files: str) -> None:
    """--kind, and a flag for every option but --media-root. files: the flag with the files."""
    group = parser.add_argument_group(f"what {files} holds")
    group.add_argument("--kind", choices=KINDS)
    group.add_argument(
        "--columns",
        help="of sts: content,content,score, by name or number",
    )
    group.add_argument(
        "--template",
        action="append",
        help="of zeroshot: {} is the label; may be repeated",
    )
    group.add_argument(
        "--label-pattern",
        help="of zeroshot: a regular expression that finds labels in file names",
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that `evaluate` takes as options; it refuses those that its kind does not take."""
    names = ("media_root", "columns", "template", "label_pattern")
    return {name: getattr(args, name) for name in names}


def evaluate(encode: Encode, kind: str, path: str | Path, **options: Any) -> Outcome:
    """Evaluate a model on the files at `path`, or of kind sts on one of `sts.BUILTIN`.

    encode: called once, after all files are read. kind: one of `KINDS`; options: that kind's. None
    means that an option is not given.
    """
    if kind not in KINDS:
        raise LcoError(f"the kind is {kind!r}; it is one of: {', '.join(KINDS)}")
    function, takes, _ = KINDS[kind]
    given = {key: value for key, value in options.items() if value is not None}
    check_keys(given, takes, f"evaluation of kind {kind}")
    if is_builtin(str(path)):
        if kind != "sts":
            raise LcoError(f"{path} holds scored pairs, and goes with the kind sts")
    else:
        with explained(f"{path} cannot be read", OSError):
            os.stat(files_of(Path(path))[0])
    return function(encode, Path(path), **given)


def evaluate_and_write(
    encode: Encode,
    kind: str,
    path: str | Path,
    out: Path,
    **options: Any,
) -> dict[str, float]:
    """As `evaluate`; writes results.json and KIND.png into `out`, and returns the numbers."""
    numbers, plot = evaluate(encode, kind, path, **options)
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise LcoError(f"{name} of {path} is {number}, which is no score; nothing is written")
    with explained(f"{out} cannot be written", OSError):
        out.mkdir(parents=True, exist_ok=True)
        plot(out / f"{kind}.png")
        write_json(
            out / "results.json",
            {"kind": kind, "data": str(path), **numbers},
        )
    return numbers
