"""Which shapes a program has met: each new one is compiled, which long work must not keep doing, nor do twice."""

import logging
from typing import Any

import jax

from lco_jax.core.files import cache_folder

logger = logging.getLogger(__name__)


class ShapeLog:
    """Counts the sets of shapes that `what` was called with, and logs each new one."""

    def __init__(self, what: str):
        self.what, self.seen = what, set[Any]()

    def note(self, *arrays: Any) -> None:
        """Call with every call's arguments."""
        shapes = tuple(x.shape for x in jax.tree.leaves(arrays))
        if shapes not in self.seen:
            self.seen.add(shapes)
            logger.info("%s: new shapes, number %d: %s", self.what, len(self.seen), shapes)

    def __len__(self) -> int:
        return len(self.seen)


def keep_compiled() -> None:
    """Keep compiled programs on disk for the next run, unless jax's own settings or variables say where."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
