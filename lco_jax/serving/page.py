"""The search page within a server: its queries go through the server's engine."""

from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException

from lco_jax.core.small_vectors import shortened
from lco_jax.data.prompts import Prompt
from lco_jax.searching.server import BUSY
from lco_jax.serving.engine import Content, Engine, Full


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
        """The unit vector of a query, float32 [D]. Refuses with 503 where the engine is busy."""
        try:
            job = self._engine.start([ready])
        except Full as full:
            raise HTTPException(503, BUSY) from full
        try:
            if not wait([job.answer], self._seconds).done:
                raise HTTPException(503, BUSY)
            job.answer.result()  # raises what the query failed with
        finally:
            self._engine.end([ready], job)
        return shortened(job.vectors[0], self._dimension)
