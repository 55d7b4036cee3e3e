"""`POST /v1/embeddings` as OpenAI's clients and vLLM's speak it.

Dimensions: N inputs, D numbers of a vector.
"""

import base64
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lco_jax.core.errors import is_number
from lco_jax.core.small_vectors import shortened
from lco_jax.data.content import describe
from lco_jax.serving.contents import Reader, check_keys, refused
from lco_jax.serving.engine import Content

ENCODINGS = ("float", "base64")
# what a request may say that has one meaning here: key -> the values that mean it
FIXED = {
    "add_generation_prompt": (True,),
    "continue_final_message": (True, False),
    "add_special_tokens": (True, False),
    "mm_processor_kwargs": ({},),
    "normalize": (True,),
    "use_activation": (True,),
}
KEYS = ("model", "input", "messages", "encoding_format", "dimensions", "user", *FIXED)


@dataclass(frozen=True)
class Asked:
    """A request. dimensions: numbers of each vector, or None for all."""

    contents: list[Content]
    dimensions: int | None
    encoding: str


def read(
    body: Mapping[str, Any], reader: Reader, dimension: int, default: int | None = None
) -> Asked:
    """The request of a JSON object. dimension: D. default: how many numbers of each vector it has
    if it does not say; None: D.
    """
    check_keys(body, KEYS, "")
    for key, meant in FIXED.items():
        value = body.get(key)
        if value is not None and value not in meant:
            values = " or ".join(map(json.dumps, meant))
            raise refused(key, f"is {describe(value)}; here it can only be {values}")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ENCODINGS:
        raise refused("encoding_format", f"is {describe(encoding)}; it is float or base64")
    dimensions = dimensions_of(body, "dimensions", dimension, default)
    return Asked(_contents(body, reader), dimensions, encoding)


def dimensions_of(
    body: Mapping[str, Any], key: str, dimension: int, default: int | None
) -> int | None:
    """How many numbers of each vector are asked for. dimension: as many as there are."""
    dimensions = body.get(key)
    if dimensions is None:
        return default
    if not is_number(dimensions, int) or not 1 <= dimensions <= dimension:
        raise refused(key, f"is {describe(dimensions)}; it is from 1 to {dimension}")
    return dimensions


def _contents(body: Mapping[str, Any], reader: Reader) -> list[Content]:
    keys = [key for key in ("input", "messages") if body.get(key) is not None]
    if len(keys) != 1:
        raise refused("input", "or messages must be given, and not both")
    key = keys[0]
    given = body[key]
    continues = bool(body.get("continue_final_message"))
    if key == "messages" or _is_chat(given) or _are_chats(given):
        return _chats(given, key, reader, continues)
    if isinstance(given, str):
        return [reader.text(given, key)]
    if not isinstance(given, list):
        raise refused(key, f"is {describe(given)}; give a text, token ids, or a list of these")
    if not given:
        raise refused(key, "is empty")
    if is_number(given[0], int):
        return [reader.token_ids(given, key)]
    return [_content(one, f"{key}[{i}]", reader) for i, one in enumerate(given)]


def _content(given: Any, name: str, reader: Reader) -> Content:
    """One of several inputs."""
    if isinstance(given, str):
        return reader.text(given, name)
    if isinstance(given, Mapping):
        check_keys(given, ("content",), name)
        return reader.content(given.get("content"), name)
    if isinstance(given, list) and given:
        return reader.token_ids(given, name)
    raise refused(name, f"is {describe(given)}; give a text, token ids, or a content")


def _is_chat(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(map(_is_message, given))


def _are_chats(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(map(_is_chat, given))


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and "role" in given


def _chats(given: Any, key: str, reader: Reader, continues: bool) -> list[Content]:
    """One chat, or several."""
    if isinstance(given, list) and given and isinstance(given[0], list):
        named = [(one, f"{key}[{i}]") for i, one in enumerate(given)]
    else:
        named = [(given, key)]
    return [reader.chat(_asking(one, name, continues), name) for one, name in named]


def _asking(chat: Any, name: str, continues: bool) -> Any:
    """A chat that ends where its answer would begin.

    To continue an empty answer is to begin it. What an answer has said already is not supported.
    """
    last = chat[-1] if isinstance(chat, list) and chat else None
    if not continues or not isinstance(last, Mapping) or last.get("role") != "assistant":
        return chat
    if last.get("content") not in ("", [], [{"type": "text", "text": ""}], None):
        what = "is an answer that has begun; with continue_final_message it must be empty"
        raise refused(f"{name}[{len(chat) - 1}]", what)
    return chat[:-1]


# ---- answers


def answer(asked: Asked, vectors: np.ndarray, tokens: int, model: str) -> bytes:
    """The answer. vectors: float32 [N, D], unit length. tokens: of all inputs together."""
    about = {
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    data = ",".join(_data(shortened(vectors, asked.dimensions), asked.encoding))
    return f'{json.dumps(about)[:-1]}, "data": [{data}]}}'.encode()


def _data(vectors: np.ndarray, encoding: str) -> Iterator[str]:
    """The JSON of each vector, one at a time: other threads get their turn in between."""
    for index, vector in enumerate(vectors):
        numbers = json.dumps(encoded(vector) if encoding == "base64" else vector.tolist())
        yield f'{{"object": "embedding", "index": {index}, "embedding": {numbers}}}'


def encoded(vector: np.ndarray) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def models(names: Sequence[str], created: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of `GET /v1/models`."""
    shared = {"object": "model", "created": created, "owned_by": "lco-jax", **about}
    return {"object": "list", "data": [{"id": name, **shared} for name in names]}
