"""The shapes that a program was called with. Each new set of them is compiled, which takes time."""

import logging
from typing import Any

import jax

from lco_jax.core.files import cache_folder

logger = logging.getLogger(__name__)


class ShapeLog:
    """Counts the sets of shapes that a program was called with, and logs each new one."""

    def __init__(self, program: str):
        self.program = program
        self.seen = set[Any]()

    def note(self, *arrays: Any) -> None:
        """Call it with the arguments of every call."""
        shapes = tuple(x.shape for x in jax.tree.leaves(arrays))
        if shapes not in self.seen:
            self.seen.add(shapes)
            logger.debug("%s: new shapes, number %d: %s", self.program, len(self.seen), shapes)

    def __len__(self) -> int:
        return len(self.seen)


def keep_compiled() -> None:
    """Store compiled programs on disk for later runs, unless jax's settings name a folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
