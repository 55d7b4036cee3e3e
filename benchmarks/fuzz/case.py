"""What a case is, and the judgement of what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-4  # between the numbers of two vectors that are to be equal
Job = Mapping[str, Any]  # what `worker.Embedders` runs, of values that JSON has


@dataclass(frozen=True)
class Case:
    """One input.

    kind and number: its address, such as media:123. what: how it was made. job: what is run.
    want: "vector", "error", or "either" of them.
    same: a job whose vector it must have, where it has one. unlike: one whose vector is wrong.
    """

    kind: str
    number: int
    what: str
    job: Job
    want: str = "either"
    same: Job | None = None
    unlike: Job | None = None

    @property
    def address(self) -> str:
        return f"{self.kind}:{self.number}"


def rng_of(seed: int, kind: str, number: int) -> np.random.Generator:
    """The case's own generator, so that it can be made alone."""
    return np.random.default_rng([seed, *kind.encode(), number])


def fault_of(case: Case, reply: Mapping[str, Any], same: Any = None, unlike: Any = None) -> str:
    """Why a reply is a fault; "" if it is none.

    reply: of `watch.Watched.run`. same and unlike: the vectors of the case's jobs of that name.
    """
    if "ended" in reply:
        return reply["ended"]
    if "raised" in reply:
        return "traceback: " + reply["raised"]
    if "refused" in reply:
        return _fault_of_words(case, reply["refused"])
    vector = np.array(reply["vector"], np.float64)
    if not np.isfinite(vector).all():
        return "vector is not finite"
    length = np.linalg.norm(vector)
    if vector.ndim != 1 or abs(length - 1) > TOLERANCE:
        return f"not one unit vector: shape {vector.shape}, length {length:.4g}"
    if case.want == "error":
        return "a vector, where an error is right"
    if same is not None and _difference(vector, same) > TOLERANCE:
        return f"wrong vector: {_difference(vector, same):.2g} off"
    if unlike is not None and _difference(vector, unlike) <= TOLERANCE:
        return "wrong vector: as if what the input asks for were not there"
    return ""


def _fault_of_words(case: Case, words: str) -> str:
    if len(words.strip().splitlines()) != 1:
        return f"not one line: {words[:300]!r}"
    if not words.isprintable():
        return f"not printable: {words[:300]!r}"
    return f"refused: {words[:300]}" if case.want == "vector" else ""


def _difference(a: np.ndarray, b: Any) -> float:
    b = np.array(b, np.float64)
    return float(np.abs(a - b).max()) if a.shape == b.shape else np.inf
