"""Queries and documents as vectors, each with the prompt that the model has for it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lco_jax.embedder import OmniEmbedder

# contents, the name of their prompt -> vectors [N, D]
EncodeNamed = Callable[[list[Any], str | None], np.ndarray]


def encode_sides(
    embedder: OmniEmbedder, encode: EncodeNamed, count: int, contents: list[Any]
) -> np.ndarray:
    """Vectors of `count` queries and of the documents after them; at once where one prompt is of
    both.

    encode: calls the embedder's `encode`, whose `skipped` then is of all contents.
    """
    names = embedder.query_prompt, embedder.document_prompt
    query, document = map(embedder.prompt_of, names)
    if query == document:
        return encode(contents, names[1])
    queries = encode(contents[:count], names[0])
    skipped = embedder.skipped
    documents = encode(contents[count:], names[1])
    skipped_documents = {count + i: why for i, why in embedder.skipped.items()}
    embedder.skipped = skipped | skipped_documents
    return np.concatenate([queries, documents])
