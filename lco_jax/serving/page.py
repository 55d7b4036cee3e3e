"""The search page within a server: its queries go through the server's engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.serving.engine import Content, Engine, Full


class EngineQueries:
    """`searching.queries.Queries` of an engine, which prepares and embeds in its lanes."""

    def __init__(self, engine: Engine, seconds: float):
        self._engine, self._seconds = engine, seconds

    def prepare(self, parts: Sequence[dict[str, Any]], name: str) -> Content:
        """Nothing yet: the engine prepares."""
        has_media = any(part["type"] != "text" for part in parts)
        return Content(name, lambda: list(parts), has_media)

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
        return job.vectors[0]
