"""A query -> its vector, in two steps: many may be prepared while the model embeds another."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.inputs import Preparation
from lco_jax.data.tower_rows import Processed


class Queries(Protocol):
    """What the server embeds queries with."""

    def prepare(self, parts: Sequence[dict[str, Any]], name: str) -> Any:
        """Chat parts, decoded and tokenized. It may run in several threads at once."""
        ...

    def embed(self, ready: Any) -> np.ndarray:
        """What `prepare` returned -> a unit vector, float32 [D]."""
        ...


class ModelQueries:
    """Queries of a model. embed: inputs that are ready -> float32 [N, D]."""

    def __init__(
        self, preparation: Preparation, embed: Callable[[Sequence[Processed]], np.ndarray]
    ):
        self._preparation = preparation
        self._embed = embed

    def prepare(self, parts: Sequence[dict[str, Any]], name: str) -> Any:
        """As `Queries` has it. name: what errors call the query."""
        [ready] = self._preparation([(list(parts), name)])
        if isinstance(ready, LcoError):
            raise ready
        return ready

    def embed(self, ready: Any) -> np.ndarray:
        """As `Queries` has it."""
        return unit_vector(self._embed([ready])[0])


def unit_vector(vector: np.ndarray) -> np.ndarray:
    """A vector of unit length. Raises where it has none."""
    length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        raise LcoError("the query's vector is not finite or zero: the model's weights are at fault")
    return vector / length
