"""The methods of sentence-transformers' models that are other names, or views, of `OmniEmbedder`'s.

Dimensions: N and M vectors, D numbers of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lco_jax.arguments import as_vectors
from lco_jax.core.errors import LcoError
from lco_jax.data.inputs import Preparation
from lco_jax.data.instructions import PLACES, Instruction, Instructions
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import PROMPTS, Prompt, summed_up
from lco_jax.vector_form import unit


class SentenceMethods(ABC):
    """What a model needs beside `encode`, `dimension` and `modalities`, so that code for theirs
    runs on it.

    prompts: name -> text, for `prompt_name`: those that the model was trained with, as its folder
    says. `encode_query` uses "query", and `encode_document` "document"; add them where they are not
    there. prompt_place: where each of them stands, one of `instructions.PLACES`. By default that is
    "instead": in the place of the reference's prompt, after an input; then the reference's prompt
    for each modality is there, too, by the modality's name. default_prompt_name: of the one for an
    input that is given none.
    truncate_dim: how many of the first numbers `encode` returns where its call says nothing; at
    first what the folder says. None: all.
    """

    similarity_fn_name = "cosine"
    truncate_dim: int | None = None
    processor: Processor

    def __init__(self, instructions: Instructions | None = None):
        self.set_instructions(instructions or Instructions())

    def set_instructions(self, instructions: Instructions) -> None:
        """Take these for the prompts, with their place and the default."""
        self.prompt_place = instructions.place
        self.default_prompt_name = instructions.default
        self.prompts = all_prompts(instructions)

    @property
    def prompt_place(self) -> str:
        """Where prompts stand, one of `instructions.PLACES`; setting another raises."""
        return self._prompt_place

    @prompt_place.setter
    def prompt_place(self, place: str) -> None:
        if place not in PLACES:
            raise LcoError(f"prompt_place is {place!r:.60}; it is one of: {', '.join(PLACES)}")
        self._prompt_place = place

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
        if prompt_name is None and prompt is None:
            prompt_name = self.query_prompt
        return self.encode(inputs, prompt_name, prompt, *args, **options)

    def encode_document(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """The same with the first prompt that there is of "document", "passage" and "corpus"."""
        if prompt_name is None and prompt is None:
            prompt_name = self.document_prompt
        return self.encode(inputs, prompt_name, prompt, *args, **options)

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

    @property
    def query_prompt(self) -> str | None:
        """The name of the prompt of queries, if there is one."""
        return query_name(self.prompts)

    @property
    def document_prompt(self) -> str | None:
        """The name of the prompt of documents, if there is one."""
        return document_name(self.prompts)

    def prompt_of(self, prompt_name: str | None = None, prompt: Prompt | None = None) -> Prompt:
        """The prompt that is given, or that has this name, or the default, at its place;
        `summed_up`, the reference's alone, where that is no text.
        """
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            prompt = self._named(name) or summed_up
        if not isinstance(prompt, str) or self.prompt_place == "instead":
            return prompt
        return Instruction(prompt, self.prompt_place) if prompt else summed_up

    def preparation(
        self,
        prompt_name: str | None = None,
        prompt: Prompt | None = None,
        max_length: int | None = None,
    ) -> Preparation:
        """The function that makes inputs ready for the model, with options as `encode` has them."""
        return Preparation(self.processor, self.prompt_of(prompt_name, prompt), max_length)

    def _named(self, name: str | None) -> str:
        """The text of a prompt; "" for no name."""
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.prompts:
            known = ", ".join(self.prompts)
            raise LcoError(
                f"prompt_name is {name!r:.60}, and model.prompts has {known}; add it there"
            )
        return self.prompts[name]


def all_prompts(instructions: Instructions) -> dict[str, str]:
    """Name -> text of a model's prompts: those that it was trained with, and the reference's, where
    prompts stand in their place.
    """
    return {**(PROMPTS if instructions.place == "instead" else {}), **instructions.prompts}


def query_name(prompts: Mapping[str, str]) -> str | None:
    """The name of the prompt of queries, if there is one among these."""
    return "query" if "query" in prompts else None


def document_name(prompts: Mapping[str, str]) -> str | None:
    """The name of the prompt of documents, if there is one among these."""
    names = ("document", "passage", "corpus")
    return next((name for name in names if name in prompts), None)


def _comparable(embeddings1: Any, embeddings2: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float32 [N, D]. Raises for what are no vectors of one dimension."""
    a, b = as_vectors(embeddings1, "embeddings1"), as_vectors(embeddings2, "embeddings2")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise LcoError(f"vectors of shapes {a.shape} and {b.shape} cannot be compared")
    return a, b
