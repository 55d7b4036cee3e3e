"""The methods of sentence-transformers' models that are other names, or views, of `OmniEmbedder`'s.

Dimensions: N and M vectors, D numbers of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lco_jax.arguments import as_vectors
from lco_jax.core.errors import LcoError
from lco_jax.data.prompts import PROMPTS, Prompt
from lco_jax.vector_form import unit


class SentenceMethods(ABC):
    """What a model needs beside `encode`, `dimension` and `modalities`, so that code for theirs
    runs on it.

    prompts: name -> what follows an input, for `prompt_name`; at first the reference's prompt for
    each modality. `encode_query` uses "query", and `encode_document` "document", if you add them.
    truncate_dim: how many of the first numbers `encode` returns where its call says nothing; at
    first what the checkpoint's config_sentence_transformers.json says. None: all.
    """

    similarity_fn_name = "cosine"
    truncate_dim: int | None = None

    def __init__(self):
        self.prompts = dict(PROMPTS)

    @property
    @abstractmethod
    def dimension(self) -> int:
        """D."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """The kinds of input that can be embedded."""

    @abstractmethod
    def encode(
        self, inputs: Any, prompt_name: str | None = None, *args: Any, **options: Any
    ) -> Any:
        """Inputs -> vectors."""

    def encode_query(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """`encode` with the prompt called "query", if there is one and no other is given."""
        name = self._name_of(("query",), prompt_name, prompt)
        return self.encode(inputs, name, prompt, *args, **options)

    def encode_document(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """The same with the first prompt that there is of "document", "passage" and "corpus"."""
        name = self._name_of(("document", "passage", "corpus"), prompt_name, prompt)
        return self.encode(inputs, name, prompt, *args, **options)

    def supports(self, modality: str | Sequence[str]) -> bool:
        """Whether a modality, or a mix of several, can be embedded; "message": chat messages."""
        if not isinstance(modality, str | Iterable):
            known = ", ".join(self.modalities)
            raise LcoError(f"modality is {modality!r:.60}; give one of {known}")
        asked = {modality} if isinstance(modality, str) else set(modality)
        return asked <= {*self.modalities, "message"}

    def get_embedding_dimension(self) -> int:
        """D, or `truncate_dim`."""
        return self.dimension if self.truncate_dim is None else self.truncate_dim

    def get_sentence_embedding_dimension(self) -> int:
        """The same, by its name in sentence-transformers before version 6."""
        return self.get_embedding_dimension()

    @staticmethod
    def similarity(embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of each row of [N, D] with each row of [M, D] -> [N, M]; [D] is one row."""
        a, b = _comparable(embeddings1, embeddings2)
        return unit(a) @ unit(b).T

    @staticmethod
    def similarity_pairwise(embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of each row of [N, D] with the same row of the other [N, D] -> [N]."""
        a, b = _comparable(embeddings1, embeddings2)
        if len(a) != len(b):
            raise LcoError(f"{len(a)} and {len(b)} vectors are no pairs; similarity compares all")
        return (unit(a) * unit(b)).sum(axis=-1)

    def _name_of(
        self, names: Sequence[str], prompt_name: str | None, prompt: Prompt | None
    ) -> str | None:
        """The given name, or, where no prompt is given, the first of `names` that there is."""
        if prompt_name is None and prompt is None:
            return next((name for name in names if name in self.prompts), None)
        return prompt_name

    def _prompt_of(self, prompt_name: str | None, prompt: Prompt | None) -> Prompt | None:
        """The prompt that is given, or that has this name; None: the reference's."""
        if prompt is not None or prompt_name is None:
            return prompt
        if not isinstance(prompt_name, str) or prompt_name not in self.prompts:
            known = ", ".join(self.prompts)
            raise LcoError(
                f"prompt_name is {prompt_name!r:.60}, and model.prompts has {known}; add it there"
            )
        return self.prompts[prompt_name]


def _comparable(embeddings1: Any, embeddings2: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float32 [N, D]. Raises for what are no vectors of one dimension."""
    a, b = as_vectors(embeddings1, "embeddings1"), as_vectors(embeddings2, "embeddings2")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise LcoError(f"vectors of shapes {a.shape} and {b.shape} cannot be compared")
    return a, b
