"""Retrieval, STS and zero-shot classification on a user's files, without mteb.

Dimensions: N items or pairs, C classes, T templates, D hidden.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError, check_keys, explained
from lco_jax.core.files import write_json
from lco_jax.data.lines import files_of
from lco_jax.evaluation.left_out import Encode, EncodeSides, LeftOut, embed_all
from lco_jax.evaluation.local_files import read_beir, read_labelled, read_records
from lco_jax.evaluation.plots import plot_confusion, plot_ranks, plot_scores, subject_of
from lco_jax.evaluation.retrieval import best_ranks, ranks, retrieval_metrics
from lco_jax.evaluation.sts import agreement, is_builtin, open_pairs

TEMPLATES = {
    "image": "a photo of a {}",
    "video": "a video of {}",
    "audio": "the sound of {}",
}


LEAST_LENGTH = 1e-6  # of the mean of unit vectors; what rounding leaves is no direction


class Outcome(NamedTuple):
    """numbers: name -> value; plot: draws them into a file, under a line that says of what."""

    numbers: dict[str, float]
    plot: Callable[[Path, str], None]


def retrieval(encode: Encode, path: Path, left_out: LeftOut, **options: Any) -> Outcome:
    """nDCG@10, MRR@10, recall and hit rate; every document is a candidate for every query.

    path: a .jsonl of {"query" or "anchor": content, "document" or "positive": content or
    [content, …], "negative": the same, or absent}. Or a folder as BEIR's: queries.jsonl,
    corpus.jsonl ({"_id", "title", "text", "image", …}) and one of `QRELS` (query-id, corpus-id,
    score: the grade). A query without a grade above 0 is not asked. options: those of
    `asked_and_documents`.
    """
    queries, candidates, relevance = asked_and_documents(encode, path, left_out, **options)
    ranked = ranks(queries, candidates, relevance)
    numbers = retrieval_metrics(ranked)
    numbers |= {
        "queries": len(queries),
        "documents": len(candidates),
    }
    best = best_ranks(ranked)
    return Outcome(
        numbers,
        lambda file, subject: plot_ranks(file, subject, best, len(candidates)),
    )


def asked_and_documents(
    encode: Encode,
    path: Path,
    left_out: LeftOut,
    media_root: Path | None = None,
    encode_sides: EncodeSides | None = None,
) -> tuple[np.ndarray, np.ndarray, list[dict[int, float]]]:
    """(vectors of the queries that are asked [N, D], of the documents, of each query {document:
    grade}). path: as `retrieval` has it. encode_sides: in the place of `encode`, where queries may
    have another instruction than documents.
    """
    read = read_beir if path.is_dir() else read_records
    queries, documents, relevance = read(path, media_root, left_out)
    n = len(queries)
    if encode_sides is not None:
        encode = partial(encode_sides, n)
    vectors, there = embed_all(encode, queries + documents, left_out)
    asked, relevance = _askable(there[:n], there[n:], relevance, left_out)
    return vectors[asked], vectors[n:][there[n:]], relevance


def _askable(
    has_query: np.ndarray,
    has_document: np.ndarray,
    relevance: Sequence[Mapping[int, float]],
    left_out: LeftOut,
) -> tuple[list[int], list[dict[int, float]]]:
    """(the queries that have a vector and a relevant document that has one, their relevance).

    Documents are numbered among those that have a vector.
    """
    number = np.cumsum(has_document) - 1
    asked, kept = [], []
    for query, grades in enumerate(relevance):
        found = {int(number[one]): grade for one, grade in grades.items() if has_document[one]}
        if has_query[query] and found:
            asked.append(query)
            kept.append(found)
        elif has_query[query]:
            left_out.others["queries whose documents were skipped"] += 1
    if not asked:
        raise LcoError(f"no query is left that can be asked{left_out.why_nothing()}")
    return asked, kept


def sts(
    encode: Encode,
    path: Path,
    left_out: LeftOut,
    media_root: Path | None = None,
    columns: str | None = None,
) -> Outcome:
    """Semantic textual similarity: the correlation of cosines with people's scores.

    path, columns: as `sts.open_pairs` has them.
    """
    _, pairs = open_pairs(str(path), media_root, columns, left_out)
    found = agreement(encode, pairs, left_out)
    numbers = {
        "spearman": found.spearman,
        "pearson": found.pearson,
        "pairs": len(found.scores),
    }
    return Outcome(
        numbers,
        lambda file, subject: plot_scores(
            file, subject, found.scores, found.cosines, found.spearman
        ),
    )


def zeroshot(
    encode: Encode,
    path: Path,
    left_out: LeftOut,
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
    items, names = read_labelled(path, media_root, label_pattern, left_out)
    labels, target = np.unique(names, return_inverse=True)
    if len(labels) < 2:
        raise LcoError(
            f"{path} has {len(labels)} class ({', '.join(labels)}), and there must be two or more"
        )
    templates = [template] if isinstance(template, str) else template or [_template_for(items)]
    n = len(items)
    vectors, there = embed_all(encode, items + _prompts(templates, labels), left_out)
    _check_classified(there[:n], there[n:], path, left_out)
    vectors = vectors.astype(np.float64)
    classes = _directions(vectors[n:], labels)
    kept = there[:n]
    rank, confusion = _classify(vectors[:n][kept], classes, target[kept])
    return Outcome(
        _accuracies(rank, confusion),
        lambda file, subject: plot_confusion(file, subject, confusion, list(labels)),
    )


def _check_classified(
    has_item: np.ndarray, has_prompt: np.ndarray, path: Path, left_out: LeftOut
) -> None:
    """Raise unless all prompts of classes and at least one item have a vector."""
    if not has_prompt.all():
        raise LcoError(left_out.inputs[len(has_item) + int(np.argmin(has_prompt))])
    if not has_item.any():
        raise LcoError(f"{path} holds no item that could be embedded{left_out.why_nothing()}")


def _accuracies(rank: np.ndarray, confusion: np.ndarray) -> dict[str, float]:
    """The numbers of a classification. rank, confusion: as `_classify` has them."""
    items_of_class = confusion.sum(axis=1)
    measured = items_of_class > 0  # not all of them were skipped
    recalls = confusion.diagonal()[measured] / items_of_class[measured]
    return {
        "accuracy_at_1": float((rank <= 1).mean()),
        "accuracy_at_5": float((rank <= 5).mean()),
        "balanced_accuracy": float(recalls.mean()),
        "items": len(rank),
        "classes": len(confusion),
    }


def _classify(
    items: np.ndarray, classes: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the items' right classes, from 1, [N], and the confusion [C, C].

    items [N, D], classes [C, D]: unit vectors. target: the right classes, [N].
    """
    scores = (items @ classes.T).astype(np.float32)  # [N, C]
    rows = np.arange(len(target))
    right = scores[rows, target]
    scores[rows, target] = -np.inf
    rank = 1 + (scores >= right[:, None]).sum(axis=1)
    predicted = np.where(rank == 1, target, scores.argmax(axis=1))
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (target, predicted), 1)
    return rank, confusion


def _directions(prompts: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """The classes' unit vectors [C, D]: the means of their templates. Raises for one that has no
    direction.

    prompts [T · C, D]: as `_prompts` has them.
    """
    classes = prompts.reshape(-1, len(labels), prompts.shape[-1]).mean(axis=0)
    lengths = np.linalg.norm(classes, axis=1, keepdims=True)
    for label, length in zip(labels, lengths[:, 0], strict=True):
        if length < LEAST_LENGTH:
            why = "the vectors of its templates are opposite and cancel out"
            raise LcoError(
                f"the class {str(label)!r} has no direction: {why}; give other templates"
            )
    return classes / lengths


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
    "retrieval": (retrieval, ("media_root", "encode_sides"), "ndcg_at_10"),
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


def evaluate(
    encode: Encode,
    kind: str,
    path: str | Path,
    left_out: LeftOut | None = None,
    **options: Any,
) -> Outcome:
    """Evaluate a model on the files at `path`, or of kind sts on one of `sts.BUILTIN`.

    encode: called once, after all files are read. kind: one of `KINDS`; options: that kind's. None
    means that an option is not given. left_out: what is done with bad records; by default the first
    is raised. It gets what was left out. Raises for a number that is not finite.
    """
    given = checked_options(kind, path, options)
    outcome = KINDS[kind][0](encode, Path(path), left_out or LeftOut(), **given)
    check_finite(outcome.numbers, path)
    return outcome


def checked_options(kind: str, path: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises for those that the kind does not take, for a kind that is
    none, and for a path without files.
    """
    if kind not in KINDS:
        raise LcoError(f"the kind is {kind!r}; it is one of: {', '.join(KINDS)}")
    given = {key: value for key, value in options.items() if value is not None}
    check_keys(given, KINDS[kind][1], f"evaluation of kind {kind}")
    if is_builtin(str(path)):
        if kind != "sts":
            raise LcoError(f"{path} holds scored pairs, and goes with the kind sts")
    else:
        with explained(f"{path} cannot be read", OSError):
            os.stat(files_of(Path(path))[0])
    return given


def check_finite(numbers: Mapping[str, float], path: str | Path) -> None:
    """Raise for a number that is not finite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            blame = "all vectors are finite, so the scores that it holds are too large"
            raise LcoError(f"{name} of {path} is {number}, which is no score: {blame}")


def evaluate_and_write(
    encode: Encode,
    kind: str,
    path: str | Path,
    out: Path,
    left_out: LeftOut | None = None,
    model: str = "",
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """As `evaluate`; writes results.json and KIND.png into `out`, and returns the numbers.

    The results also have how many records were skipped and what else is left out, and a list beside
    them has the reasons. model: its name, for the picture. about: what else the results
    are to have.
    """
    left_out = left_out or LeftOut()
    numbers, plot = evaluate(encode, kind, path, left_out, **options)
    with explained(f"{out} cannot be written", OSError):
        out.mkdir(parents=True, exist_ok=True)
        plot(out / f"{kind}.png", subject_of(model, Path(path).name))
        left_out.write_reasons(out / "results.json")
        write_json(
            out / "results.json",
            {"kind": kind, "data": str(path), **(about or {}), **numbers, **left_out.recorded()},
        )
    return numbers
