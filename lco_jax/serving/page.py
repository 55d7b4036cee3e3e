"""The search page within a server: its queries go through the server's engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.prompts import Prompt
from lco_jax.serving.engine import Content, Engine, Full
from lco_jax.vector_form import unit


class EngineQueries:
    """`searching.queries.Queries` of an engine, which prepares and embeds in its lanes.

    seconds: until a query is given up. prompt: of queries. dimension: how many of the first numbers
    a query's vector has, as those of the index.
    """

    def __init__(self, engine: Engine, seconds: float, prompt: Prompt, dimension: int):
        self._engine, self._seconds = engine, seconds
        self._prompt, self._dimension = prompt, dimension

    def prepare(self, parts: Sequence[dict[str, Any]], name: str) -> Content:
        """Nothing yet: the engine prepares."""
        has_media = any(part["type"] != "text" for part in parts)
        return Content(name, lambda: list(parts), has_media, self._prompt)

    def embed(self, ready: Content) -> np.ndarray:
        """The unit vector of a query, float32 [D]."""
        try:
            job = self._engine.start([ready])
        except Full as full:
            raise LcoError("others keep the model busy; try again in a minute") from full
        try:
            job.answer.result(self._seconds)
        except TimeoutError as error:
            raise LcoError("the model is busy; try again in a minute") from error
        finally:
            self._engine.end([ready], job)
        return unit(job.vectors[0][: self._dimension])
