"""Contents of a user's files -> vectors, as the flags of the evaluate command say."""

import argparse
from functools import cached_property
from typing import Any

import numpy as np

from lco_jax.calibration import dimension_of
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import explained
from lco_jax.data.media import MediaConfig
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.left_out import LeftOut
from lco_jax.evaluation.vector_sizes import as_compared
from lco_jax.flags import check_prompt_name, load_embedder, say_prompts
from lco_jax.sides import encode_sides


class FilesEncoder:
    """What embeds a user's files. A task calls it after it has checked them: only then is the
    model loaded.

    args: the flags of the evaluate command; raises for what this model does not have.
    """

    def __init__(self, args: argparse.Namespace, media: MediaConfig, left_out: LeftOut):
        self.args, self.media, self.left_out = args, media, left_out
        self.checkpoint = open_checkpoint(args.model)
        self.dimension = dimension_of(args, self.checkpoint)
        check_prompt_name(args, self.checkpoint)

    @cached_property
    def embedder(self) -> OmniEmbedder:
        """The model. Before it is loaded, the output folder is made."""
        with explained(f"--output={self.args.output} cannot be written", OSError):
            self.args.output.mkdir(parents=True, exist_ok=True)
        say_prompts(self.args, self.checkpoint, queries=self.args.kind == "retrieval")
        return load_embedder(self.args, self.checkpoint, self.media, None)

    def encode(self, contents: list[Any]) -> np.ndarray:
        """Vectors of contents, in the form that the flags ask for."""
        return self._as_compared(self._encode(contents, self.args.prompt_name))

    def encode_sides(self, count: int, contents: list[Any]) -> np.ndarray:
        """The same of `count` queries and of the documents after them, each with its prompt where
        no flag gives one for all.
        """
        if self.args.prompt is None and self.args.prompt_name is None:
            vectors = encode_sides(self.embedder, self._encode, count, contents)
        else:
            vectors = self._encode(contents, self.args.prompt_name)
        return self._as_compared(vectors, count)

    def _encode(self, contents: list[Any], prompt_name: str | None) -> np.ndarray:
        """Vectors of contents, whose prompt is that of the flags, of this name, or the default."""
        args = self.args
        return self.embedder.encode(
            contents,
            prompt_name,
            args.prompt,
            batch_size=args.batch_size,
            max_length=args.max_length,
            on_error=args.on_error,
            workers=args.workers or 0,
            show_progress_bar=True,
            truncate_dim=self.embedder.dimension if args.small_vectors else self.dimension,
        )

    def _as_compared(self, vectors: np.ndarray, queries: int = 0) -> np.ndarray:
        """What is left of vectors in the precision that the flags ask for. It is noted which were
        skipped. queries: how many of the first are queries, which ranges are not of.
        """
        self.left_out.inputs = dict(self.embedder.skipped)
        if self.args.precision is not None:
            there = np.isfinite(vectors).all(axis=1)
            ranged = vectors[queries:][there[queries:]]
            vectors[there] = as_compared(vectors[there], self.args.precision, ranged)
        return vectors
