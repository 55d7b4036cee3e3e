"""`POST /v2/embed` as Cohere's clients speak it.

Dimensions: N inputs, D numbers of a vector.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lco_jax.core.small_vectors import SIGNS, quantize_embeddings, shortened
from lco_jax.data.content import describe
from lco_jax.serving.contents import Reader, check_keys, refused
from lco_jax.serving.engine import Content
from lco_jax.serving.openai_form import dimensions_of, encoded

TYPES = ("float", "int8", "uint8", "binary", "ubinary", "base64")
INPUT_TYPES = ("search_query", "search_document", "classification", "clustering", "image")
TRUNCATE = ("NONE", "START", "END")
SOURCES = ("texts", "images", "inputs")
KEYS = (
    *("model", "input_type", *SOURCES, "embedding_types", "output_dimension"),
    *("truncate", "priority"),
)


@dataclass(frozen=True)
class Asked:
    """A request. texts: what the answer repeats, if there are texts."""

    contents: list[Content]
    dimensions: int | None
    types: list[str]
    texts: list[str] | None


def read(
    body: Mapping[str, Any], reader: Reader, dimension: int, default: int | None = None
) -> Asked:
    """The request of a JSON object. dimension, default: as `openai_form.read` has them."""
    check_keys(body, KEYS, "")
    prompt, room = reader.prompt_room(_one_of(body, "input_type", INPUT_TYPES))
    cut = partial(reader.cut, end=_one_of(body, "truncate", TRUNCATE) or "END", room=room)
    types = body.get("embedding_types") or ["float"]
    if not isinstance(types, list) or not all(one in TYPES for one in types):
        known = ", ".join(TYPES)
        raise refused("embedding_types", f"is {describe(types)}; give a list of these: {known}")
    dimensions = dimensions_of(body, "output_dimension", dimension, default)
    if (dimensions or dimension) % 8 and set(SIGNS) & set(types):
        raise refused("output_dimension", "must be a multiple of 8 for binary vectors")
    key, given = _given(body)
    contents = [_content(key, one, f"{key}[{i}]", reader, cut) for i, one in enumerate(given)]
    contents = [content._replace(prompt=prompt) for content in contents]
    return Asked(contents, dimensions, types, given if key == "texts" else None)


def _given(body: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """(which of the keys has the inputs, the inputs)."""
    keys = [key for key in SOURCES if body.get(key) is not None]
    if len(keys) != 1:
        raise refused("texts", "or images or inputs must be given, and only one of them")
    given = body[keys[0]]
    if not isinstance(given, list) or not given:
        raise refused(keys[0], f"is {describe(given)}; give a list that is not empty")
    return keys[0], given


def _one_of(body: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str | None:
    value = body.get(key)
    if value is not None and value not in known:
        raise refused(key, f"is {describe(value)}; it is one of: {', '.join(known)}")
    return value


def _content(key: str, given: Any, name: str, reader: Reader, cut: Callable[[str], str]) -> Content:
    if key == "images":
        return reader.image(given, name)
    if key == "inputs":
        if not isinstance(given, Mapping):
            raise refused(name, f'is {describe(given)}; give {{"content": [part, …]}}')
        check_keys(given, ("content",), name)
        return reader.content(given.get("content"), name)
    if not isinstance(given, str):
        raise refused(name, f"is {describe(given)}, and must be a string")
    return reader.text(given, name, cut)


# ---- answers


def answer(asked: Asked, vectors: np.ndarray, tokens: int) -> bytes:
    """The answer. vectors: float32 [N, D], unit length. tokens: of all inputs together."""
    vectors = shortened(vectors, asked.dimensions)
    by_type = ", ".join(f'"{kind}": {_written(vectors, kind)}' for kind in asked.types)
    about = {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type",
        "texts": asked.texts or [],
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
    }
    return f'{json.dumps(about)[:-1]}, "embeddings": {{{by_type}}}}}'.encode()


def _written(vectors: np.ndarray, kind: str) -> str:
    """The JSON of vectors, one at a time: other threads get their turn in between."""
    if kind == "base64":
        return json.dumps([encoded(vector) for vector in vectors])
    return f"[{', '.join(json.dumps(vector.tolist()) for vector in _quantized(vectors, kind))}]"


def _quantized(vectors: np.ndarray, kind: str) -> np.ndarray:
    """Signs as `encode` packs them. Whole numbers are of each vector's own scale: its largest
    number becomes 127, and for uint8 255. Cosines between them are those of the vectors, nearly.
    """
    if kind == "float":
        return vectors
    if kind in SIGNS:
        return quantize_embeddings(vectors, kind)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    levels = np.rint(vectors / np.where(largest == 0, 1, largest) * 127)
    return levels.astype(np.int8) if kind == "int8" else (levels + 128).astype(np.uint8)
