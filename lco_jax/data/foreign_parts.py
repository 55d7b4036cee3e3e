"""Parts of chats as OpenAI, vLLM and Qwen spell them -> ours."""

from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from lco_jax.core.errors import LcoError, check_keys, explained

ADDRESSED = {f"{kind}_url": kind for kind in ("image", "video", "audio")}
SOUND = "input_audio"


def in_our_words(part: Mapping, label: str) -> Mapping:
    """A part, with {"type": "image", "image": …} in the place of each of these, and the like:

    {"type": "image_url", "image_url": {"url": …}}, whose address may also stand there bare;
    {"type": "image", "image_url": …}; {"type": "input_audio", "input_audio": {"data": base64,
    "format": "wav"}}. Keys beside these stay. Raises for what has no meaning here.
    """
    kind = part.get("type")
    if kind == SOUND:
        rest = {key: part[key] for key in part if key != SOUND}
        return {**rest, "type": "audio", "audio": _encoded(part.get(SOUND), f"{label}.{SOUND}")}
    is_address = isinstance(kind, str) and kind in ADDRESSED
    key = kind if is_address else f"{kind}_url"
    if part.get(key) is None:
        if is_address:
            raise LcoError(f"{label} is a part of type {kind!r}, and has no {kind}")
        return part
    if key not in ADDRESSED:
        return part
    kind = ADDRESSED[key]
    rest = {name: part[name] for name in part if name != key}
    if rest.get(kind) is not None:
        raise LcoError(f"{label} has both {kind} and {key}; keep one")
    return {**rest, "type": kind, kind: _address(part[key], f"{label}.{key}")}


def _address(given: Any, label: str) -> Any:
    """What {"url": …} holds, or the address itself."""
    if not isinstance(given, Mapping):
        return given
    check_keys(given, ("url", "detail"), label)
    if given.get("detail") not in (None, "auto"):
        instead = "a part's max_pixels says how big an image is"
        raise LcoError(
            f"{label}.detail is {given['detail']!r:.60}, which has no meaning here; {instead}"
        )
    return given.get("url")


def _encoded(given: Any, label: str) -> bytes:
    """The bytes of {"data": base64, "format": …}; decoders find the format by themselves."""
    data = given.get("data") if isinstance(given, Mapping) else None
    if not isinstance(data, str):
        raise LcoError(f'{label} must be {{"data": base64, "format": "wav"}}')
    check_keys(given, ("data", "format"), label)
    with explained(f"{label}.data is not valid base64", ValueError):
        return b64decode("".join(data.split()), validate=True)
