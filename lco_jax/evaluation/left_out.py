"""What an evaluation of a user's files leaves out, counted, with reasons.

Dimensions: N inputs, D hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.finite import check_vectors
from lco_jax.data.folder import rest_in_words
from lco_jax.data.skipped import skipped_in_words, write_skipped

# contents as `OmniEmbedder.encode` takes them, text never bare -> unit vectors [N, D]
Encode = Callable[[list[Any]], np.ndarray]
# the same of (how many of the first are queries, queries and documents)
EncodeSides = Callable[[int, list[Any]], np.ndarray]


class LeftOut:
    """What does not count in the numbers.

    skips: whether bad records are skipped; otherwise the first is raised.
    reasons: why each of the skipped records could not be read.
    inputs: index of an input that could not be embedded -> why. Who embeds fills it.
    others: what else is left out, such as files that are no media -> how many.
    """

    def __init__(self, skips: bool = False):
        self.skips = skips
        self.reasons: list[str] = []
        self.inputs: dict[int, str] = {}
        self.others = Counter[str]()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the reading of one record."""
        try:
            yield
        except LcoError as error:
            self.refuse(error)

    def refuse(self, error: LcoError) -> None:
        """Raise, or count it where bad records are skipped."""
        if not self.skips:
            raise error
        self.reasons.append(str(error))

    @property
    def skipped(self) -> int:
        """How many records and inputs were skipped."""
        return len(self.reasons) + len(self.inputs)

    def recorded(self) -> dict[str, Any]:
        """What the results say of it."""
        return {"skipped": self.skipped, "left out": dict(self.others)}

    def write_reasons(self, results: Path) -> None:
        """Write the list of what was skipped beside the results."""
        reasons = [*self.reasons, *self.inputs.values()]
        write_skipped(results, ({"reason": reason} for reason in reasons))

    def in_words(self, results: Path) -> list[str]:
        """Lines about it; none where nothing is left out."""
        lines = [skipped_in_words(results, self.skipped, "skipped"), rest_in_words(self.others)]
        return [line for line in lines if line]

    def why_nothing(self) -> str:
        """The end of a sentence that says that nothing is left: the first reason."""
        reasons = [*self.reasons, *self.inputs.values()]
        return f"; {len(reasons):,} skipped, the first: {reasons[0]}" if reasons else ""


def embed_all(
    encode: Encode, inputs: list[Any], left_out: LeftOut
) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, [N, D]; which inputs have one, bool [N]). Raises for a model that makes no
    vectors.
    """
    vectors = encode(inputs)
    there = np.ones(len(inputs), bool)
    there[list(left_out.inputs)] = False
    if not there.any():
        raise LcoError(f"nothing could be embedded{left_out.why_nothing()}")
    check_vectors(vectors[there])
    return vectors, there
