"""Semantic textual similarity: how well cosines follow what people say.

Dimensions: N pairs, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.files import local_copy
from lco_jax.core.small_vectors import unit
from lco_jax.core.wheels import fetch
from lco_jax.data.lines import ending_of
from lco_jax.evaluation.left_out import Encode, LeftOut, embed_all
from lco_jax.evaluation.local_files import read_pairs

BUILTIN = {f"builtin:stsb-{split}": f"stsb-{split}.tsv" for split in ("dev", "test")}
_BUILTIN_COLUMNS = "5,6,4"


@dataclass(frozen=True)
class ScoredPairs:
    """Row i of `first` and of `second` are a pair, which people gave the score `scores[i]`.

    path: of the file.
    """

    path: Path
    first: list[Any]
    second: list[Any]
    scores: list[float]


@dataclass(frozen=True)
class Agreement:
    """Correlations of cosines with scores. Spearman's gives tied ranks their mean.

    cosines, scores: of the pairs that could be embedded.
    """

    spearman: float
    pearson: float
    cosines: np.ndarray
    scores: list[float]


def open_pairs(
    name: str,
    media_root: Path | None = None,
    columns: str | None = None,
    left_out: LeftOut | None = None,
) -> tuple[str, ScoredPairs]:
    """(a short name, the pairs) of a file, or of one of `BUILTIN`, which are fetched from the
    package index.

    media_root, columns, left_out: as `read_scored` has them.
    """
    if name in BUILTIN:
        if columns is not None:
            raise LcoError(f"{name} has columns of its own, and takes none")
        path = fetch("stsb") / BUILTIN[name]
        return path.stem, read_scored(path, None, _BUILTIN_COLUMNS, left_out)
    if is_builtin(name):
        raise LcoError(f"there is no {name}; there are: {', '.join(BUILTIN)}")
    path = local_copy(name)
    return path.stem, read_scored(path, media_root, columns, left_out)


def is_builtin(name: str) -> bool:
    """Whether a name is one of `BUILTIN`, or is meant to be one, and names no file."""
    return name.startswith("builtin:")


def read_scored(
    path: Path,
    media_root: Path | None = None,
    columns: str | None = None,
    left_out: LeftOut | None = None,
) -> ScoredPairs:
    """The pairs of a .jsonl of contents of any modality, or texts in a .csv, .tsv or .txt (tabs).

    columns: content, content and score, by name, or, in a table without a header, by number; by
    default "a,b,score" in a .jsonl, else "0,1,2". left_out: what is done with bad pairs; by default
    the first is raised. Raises if all scores are the same.
    """
    left_out = left_out or LeftOut()
    default = "a,b,score" if ending_of(path) == ".jsonl" else "0,1,2"
    names = (columns or default).split(",")
    if len(names) != 3:
        raise LcoError(f"the columns are {columns!r}; name three: a content, another, the score")
    first, second, scores = read_pairs(path, media_root, names, left_out)
    _check_scores(scores, path, left_out)
    return ScoredPairs(path, first, second, scores)


def agreement(encode: Encode, pairs: ScoredPairs, left_out: LeftOut | None = None) -> Agreement:
    """How the cosines of the pairs agree with their scores. Raises if all cosines are equal.

    left_out: names the inputs that `encode` skipped; by default none.
    """
    from scipy.stats import pearsonr, spearmanr  # a second, which a run without pairs does without

    left_out = left_out or LeftOut()
    vectors, there = embed_all(encode, pairs.first + pairs.second, left_out)
    count = len(pairs.scores)
    both = there[:count] & there[count:]
    scores = np.array(pairs.scores)[both].tolist()
    _check_scores(scores, pairs.path, left_out)
    vectors = unit(vectors.astype(np.float64))  # those of a few bits are of length 1 nearly
    cosines = (vectors[:count] * vectors[count:]).sum(axis=1)[both]
    if np.ptp(cosines) < 1e-6:
        raise LcoError(
            "all pairs have the same cosine: this model tells nothing apart, and nothing correlates"
        )
    spearman = float(spearmanr(cosines, scores).statistic)
    pearson = float(pearsonr(cosines, scores).statistic)
    return Agreement(spearman, pearson, cosines, scores)


def _check_scores(scores: Sequence[float], path: Path, left_out: LeftOut) -> None:
    """Raise where nothing can correlate with people's scores."""
    if len(set(scores)) < 2:
        raise LcoError(
            f"{path} has {len(scores)} pairs and fewer than two different scores: "
            f"nothing to correlate with{left_out.why_nothing()}"
        )
