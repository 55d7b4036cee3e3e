"""What fewer numbers and fewer bits cost: one evaluation, again with vectors of every size.

Dimensions: N queries, M documents, D numbers of a vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import write_json, write_text
from lco_jax.core.small_vectors import (
    LEVELS,
    Storage,
    distances,
    lowest,
    quantize_embeddings,
    ranges_of,
    shortened,
    words,
)
from lco_jax.evaluation.left_out import Encode, LeftOut, embed_all
from lco_jax.evaluation.local_tasks import asked_and_documents, check_finite, checked_options
from lco_jax.evaluation.plots import plot_sizes, subject_of
from lco_jax.evaluation.retrieval import ranks, ranks_of_scores, retrieval_metrics
from lco_jax.evaluation.sts import agreement, open_pairs

SHARES = (1, 2, 4, 8, 16)  # of D: all of it, a half, …
PROPOSED = 40  # documents that signs propose for re-ranking: four for each of the ten that count


class Form(NamedTuple):
    """How vectors are compared.

    precision: of what is searched. reranked: "" if the query has it, too, and that is all; "query"
    if the query's own floats are compared with it; else the precision of what is stored beside the
    signs, by which the query's floats rank what the signs propose.
    """

    dimension: int
    precision: str
    reranked: str = ""

    @property
    def bytes(self) -> int:
        """Of a document's vector, with what it is re-ranked by."""
        beside = [self.reranked] if self.reranked not in ("", "query") else []
        kinds = [self.precision, *beside]
        # the number of bytes does not depend on ranges
        ranges = np.zeros((2, self.dimension))
        return sum(Storage(self.dimension, kind, ranges).bytes for kind in kinds)

    def __str__(self) -> str:
        if self.reranked == "query":
            return f"{self.precision}, query in float32"
        return f"{self.precision}, then {self.reranked}" if self.reranked else self.precision


class Row(NamedTuple):
    """A form, and its numbers by name."""

    form: Form
    numbers: dict[str, float]


OF_RETRIEVAL = (
    ("float32", ""),
    ("float16", ""),
    ("int8", ""),
    ("int8", "query"),
    ("binary", ""),
    ("binary", "query"),
    ("binary", "int8"),
    ("binary", "float32"),
)
OF_STS = (("float32", ""), ("float16", ""), ("int8", ""), ("binary", ""))


def forms(dimension: int, kinds: Sequence[tuple[str, str]]) -> Iterator[Form]:
    """Every kind at every share of D that is a number of its own."""
    widths = dict.fromkeys(max(dimension // share, 1) for share in SHARES)
    for width in widths:
        for precision, reranked in kinds:
            yield Form(width, precision, reranked)


def stored_as(precision: str, vectors: np.ndarray) -> Storage:
    """A storage of unit vectors [N, D]; the ranges of levels are those of these vectors."""
    ranges = ranges_of(vectors, precision) if precision in LEVELS else None
    return Storage(vectors.shape[1], precision, ranges)


def as_compared(vectors: np.ndarray, precision: str, ranged: np.ndarray) -> np.ndarray:
    """Unit vectors [N, D] -> what is left of them in a precision, [N, D], as an index has it: their
    length is about 1.

    ranged: the vectors [M, D] that the ranges of levels are of: of retrieval the documents alone,
    else all.
    """
    storage = stored_as(precision, ranged)
    return storage.restore(storage.store(vectors))


def retrieval_rows(encode: Encode, path: Path, left_out: LeftOut, **options: Any) -> Iterator[Row]:
    """Retrieval as `local_tasks.retrieval` has it, in every form."""
    queries, documents, relevance = asked_and_documents(encode, path, left_out, **options)
    for form in forms(queries.shape[1], OF_RETRIEVAL):
        cut = shortened(queries, form.dimension), shortened(documents, form.dimension)
        yield Row(form, retrieval_metrics(_ranked(form, *cut, relevance)))


def _ranked(
    form: Form,
    queries: np.ndarray,
    documents: np.ndarray,
    relevance: Sequence[Mapping[int, float]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `retrieval.ranks`. queries [N, D], documents [M, D]: unit vectors of the form's D."""
    if form.reranked not in ("", "query"):
        storage = stored_as(form.reranked, documents)
        return _reranked(queries, documents, storage, relevance)
    if form.precision == "binary" and form.reranked:
        return _reranked(queries, documents, stored_as("binary", documents), relevance)
    found = as_compared(documents, form.precision, documents)
    asked = queries if form.reranked else as_compared(queries, form.precision, documents)
    return ranks(asked, found, relevance)


def _reranked(
    queries: np.ndarray,
    documents: np.ndarray,
    storage: Storage,
    relevance: Sequence[Mapping[int, float]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ranks where signs propose documents, and queries with what `storage` has of them rank those.
    Whatever is not proposed comes after, in the order of the signs.
    """
    stored = storage.store(documents)
    signs = words(quantize_embeddings(documents, "ubinary"))
    bits = words(quantize_embeddings(queries, "ubinary"))

    def scores() -> Iterator[np.ndarray]:
        for query, own in zip(queries, bits, strict=True):
            differing = distances(signs, own)
            proposed = lowest(differing, PROPOSED)
            row = -differing.astype(np.float64)
            above = 10.0  # any cosine is above any number of differing signs, which is 0 or less
            row[proposed] = above + storage.cosines(stored[proposed], query)
            yield row

    return ranks_of_scores(scores(), relevance)


def sts_rows(encode: Encode, path: Path, left_out: LeftOut, **options: Any) -> Iterator[Row]:
    """Semantic textual similarity as `local_tasks.sts` has it, in every form."""
    _, pairs = open_pairs(str(path), left_out=left_out, **options)
    vectors, there = embed_all(encode, pairs.first + pairs.second, left_out)
    for form in forms(vectors.shape[1], OF_STS):
        small = np.zeros((len(vectors), form.dimension), np.float32)
        cut = shortened(vectors[there], form.dimension)
        small[there] = as_compared(cut, form.precision, cut)
        found = agreement(_encoded_before(small), pairs, left_out)
        yield Row(form, {"spearman": found.spearman, "pearson": found.pearson})


def _encoded_before(vectors: np.ndarray) -> Encode:
    """What embeds every input as it was embedded before."""
    return lambda _: vectors


class Kind(NamedTuple):
    """rows: evaluates in every form, with the options of `local_tasks.KINDS`. shown: the numbers
    that the table has, and the picture of the first; JSON has all.
    """

    rows: Callable[..., Iterator[Row]]
    shown: tuple[str, ...]


KINDS = {
    "retrieval": Kind(retrieval_rows, ("ndcg_at_10", "recall_at_1", "recall_at_10")),
    "sts": Kind(sts_rows, ("spearman", "pearson")),
}


def compare_and_write(
    encode: Encode,
    kind: str,
    path: str | Path,
    out: Path,
    left_out: LeftOut | None = None,
    model: str = "",
    **options: Any,
) -> list[Row]:
    """Evaluate in every form, and write small_vectors.json, .md and .png into `out`.

    encode, left_out, options: as `local_tasks.evaluate` has them; encode returns whole vectors.
    """
    if kind not in KINDS:
        raise LcoError(f"--small-vectors goes with --kind={' or '.join(KINDS)}")
    left_out = left_out or LeftOut()
    given = checked_options(kind, path, options)
    rows = []
    for row in KINDS[kind].rows(encode, Path(path), left_out, **given):
        check_finite(row.numbers, path)
        rows.append(row)
    about = {"kind": kind, "data": str(path), "proposed": PROPOSED}
    with explained(f"{out} cannot be written", OSError):
        out.mkdir(parents=True, exist_ok=True)
        _write_for_people(out, subject_of(model, Path(path).name), kind, rows)
        left_out.write_reasons(out / "small_vectors.json")
        about |= left_out.recorded() | {"rows": [as_json(row) for row in rows]}
        write_json(out / "small_vectors.json", about)
    return rows


def _write_for_people(out: Path, subject: str, kind: str, rows: Sequence[Row]) -> None:
    """Write the table and the picture."""
    main = KINDS[kind].shown[0]
    lines: dict[str, list[tuple[int, float]]] = {}
    for form, numbers in rows:
        lines.setdefault(str(form), []).append((form.bytes, numbers[main]))
    plot_sizes(out / "small_vectors.png", subject, lines, main)
    page = [f"# {subject}", "", *table(kind, rows), ""]
    write_text(out / "small_vectors.md", "\n".join(page))


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return {**row.form._asdict(), "bytes": row.form.bytes, **row.numbers}


def table(kind: str, rows: Sequence[Row]) -> list[str]:
    """A table in Markdown."""
    names = KINDS[kind].shown
    lines = [f"| numbers | stored as | bytes | {' | '.join(names)} |"]
    lines.append("|---|---|" + "---:|" * (1 + len(names)))
    for form, numbers in rows:
        values = " | ".join(f"{numbers[name]:.4f}" for name in names)
        lines.append(f"| {form.dimension} | {form} | {form.bytes:,} | {values} |")
    return lines
