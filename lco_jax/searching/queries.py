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
    """Queries of a model. embed: `OmniEmbedder.embed`, which raises for what has no direction.

    dimension: how many of the first numbers a query's vector has, as those of the index; None: all.
    """

    def __init__(
        self,
        preparation: Preparation,
        embed: Callable[[Sequence[Processed]], np.ndarray],
        dimension: int | None = None,
    ):
        self._preparation = preparation
        self._embed = embed
        self._dimension = dimension

    def prepare(self, parts: Sequence[dict[str, Any]], name: str) -> Any:
        """As `Queries` has it. name: what errors call the query."""
        [ready] = self._preparation([(list(parts), name)])
        if isinstance(ready, LcoError):
            raise ready
        return ready

    def embed(self, ready: Any) -> np.ndarray:
        """As `Queries` has it."""
        vector = self._embed([ready])[0][: self._dimension]
        return vector / np.linalg.norm(vector)
