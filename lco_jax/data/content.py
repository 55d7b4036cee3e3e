"""What users give as an input -> content. One reader serves `encode`, jsonl, parquet and records.

A content is a text (`str`) or, where it holds media, a tuple of parts in their order, such as
({"type": "image", "image": "/data/a.png"}, {"type": "text", "text": "a cat"}). Texts without media
become one text, as chat templates join them.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError, check_keys
from lco_jax.data.arrays import decoder_kind, medium_of_array, with_arrays, with_rate
from lco_jax.data.foreign_parts import in_our_words
from lco_jax.data.lazy import LazyImage
from lco_jax.data.names import kind_named, kind_of_bytes, media_kind

Part = dict[str, Any]
Content = str | tuple[Part, ...]
Messages = list[dict[str, Any]]  # a chat: {"role": …, "content": [part, …]}

MEDIA = ("image", "video", "audio")  # their order in a content, before its text
KINDS = ("text", *MEDIA)
FIELDS = ("text", *(key for kind in MEDIA for key in (kind, f"{kind}_path")))  # of a mapping
SOURCES = {  # the keys of a part, one of which holds its text or medium
    "text": ("text",),
    **{kind: (kind, f"{kind}_path", "url", "path") for kind in MEDIA},
}
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OPTIONS = {  # what a part may set for its own medium, in place of `MediaConfig`; Qwen's words
    "text": (),
    "image": SIZES,
    "video": (
        *(*SIZES, "total_pixels", "fps", "max_frames", "nframes"),
        *("video_start", "video_end"),
    ),
    "audio": (),
}
FIELD_KEYS = (*FIELDS, "content")
PART_KEYS = {kind: ("type", *SOURCES[kind], *OPTIONS[kind]) for kind in KINDS}
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)  # no path of this machine


@dataclass(frozen=True)
class Reader:
    """Reads one input. Errors name a value by a `label`, such as data.jsonl:3: anchor.image[1].

    where: names the input in errors, for example by its file and line.
    root: the folder that relative paths start from, for inputs that come from a file. Their media
    are paths, addresses or encoded bytes. With None the input is a Python object: its media stay
    as they are, and the decoders check them.
    exists: whether a local file is there; None looks for no file.
    """

    where: str
    root: str | None = None
    exists: Callable[[str], bool] | None = None

    def read(self, given: Any, name: str = "") -> Content | Messages:
        """A content, or a chat. Raises if nothing is given. name: as for `side`, if any."""
        label = f"{self.where}: {name}" if name else self.where
        if isinstance(given, Mapping) and "role" in given:
            given = [given]
        if is_conversation(given):
            return self._messages(given, label)
        parts = self._parts(given, label)
        content = _joined(parts)
        if content is None:
            fields = ", ".join(FIELDS)
            raise LcoError(f"{self.where} holds nothing to embed; it needs one of: {fields}")
        return content

    def side(self, given: Any, name: str) -> Content | None:
        """A content, "" if its text is empty, or None if nothing is given.

        given: a text; a mapping of `FIELDS`, each a value or a list of them, or with all parts
        under "content"; a part; or a list of parts. name: what the input's record calls it.
        """
        return _joined(self._parts(given, f"{self.where}: {name}"))

    def _parts(self, given: Any, label: str) -> list[Part]:
        if isinstance(given, str):
            return [_text(given, label)]
        if isinstance(given, Mapping) and "type" in given:
            return [self._part(given, label)]
        if isinstance(given, Mapping):
            return self._fields(given, label)
        if is_parts(given):
            return [self._part(part, f"{label}[{i}]") for i, part in enumerate(given)]
        forms = 'a text, {"text": …, "image": …} or a list of parts that have a type'
        raise LcoError(f"{label} is {describe(given)}; give {forms}")

    def _messages(self, chat: Sequence[Any], label: str) -> Messages:
        """The turns of a chat, which stay as they are but for the spelling of their media."""
        messages = []
        for i, message in enumerate(chat):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise LcoError(f"{label}[{i}].role is {role!r:.60}, and must be a string")
            content = message.get("content")
            parts = self._parts(content, f"{label}[{i}].content")
            if not parts:
                raise LcoError(f"{label}[{i}].content is empty")
            messages.append({**message, "content": parts})
        return messages

    def _fields(self, fields: Mapping, label: str) -> list[Part]:
        """The media and then the text of a mapping."""
        check_keys(fields, FIELD_KEYS, label)
        given = {key: _unwrapped(value) for key, value in fields.items() if value is not None}
        if self.root is None:
            _refuse_empty(given, label)
        given = {key: value for key, value in given.items() if not _is_empty(value)}
        if "content" in given:
            _check_single(given, label)
            return self._parts(given["content"], f"{label}.content")
        parts = []
        for kind in MEDIA:
            keys = (kind, f"{kind}_path")
            media = {key: given[key] for key in keys if key in given}
            _check_single(media, label)
            for key, value in media.items():
                parts += self._media(kind, value, f"{label}.{key}")
        text = fields.get("text")
        if text is not None:
            parts.append(_text(text, f"{label}.text"))
        return parts

    def _part(self, part: Mapping, label: str) -> Part:
        part = in_our_words(part, label)
        kind = part["type"]
        if kind not in KINDS:
            types = ", ".join(KINDS)
            raise LcoError(f"{label} has the unknown type {kind!r:.60}; the types are {types}")
        sources = SOURCES[kind]
        given = {key: value for key, value in part.items() if value is not None}
        check_keys(given, PART_KEYS[kind], label)
        keys = [key for key in sources if key in given]
        if len(keys) != 1:
            what = "text" if kind == "text" else "medium"
            places = " or ".join(sources)
            raise LcoError(
                f"{label} is a part of type {kind!r}; it must hold its {what} once, under {places}"
            )
        key = keys[0]
        value = _unwrapped(given[key])
        if kind == "text":
            return _text(value, f"{label}.{key}")
        medium = self._medium(kind, value, f"{label}.{key}")
        settings = {key: given[key] for key in OPTIONS[kind] if key in given}
        return {**medium, **settings}

    def _media(self, kind: str, value: Any, label: str) -> list[Part]:
        """The media under a key: one, or a list of them. A list may also be one video's frames."""
        if not isinstance(value, list):
            return [self._medium(kind, value, label)]
        if kind == "video" and any(self._is_frame(one) for one in value):
            return [self._medium(kind, value, label)]
        return [self._medium(kind, one, f"{label}[{i}]") for i, one in enumerate(value)]

    def _is_frame(self, value: Any) -> bool:
        """Whether one of several values under "video" is a frame, and not a video."""
        if isinstance(value, Mapping | list) or getattr(value, "ndim", 0) == 4:
            return False
        if media_kind(value) is None:  # in a file, bytes and addresses without an ending are videos
            return self.root is None
        return _is_still(value)

    def _medium(self, kind: str, value: Any, label: str) -> Part:
        if self.root is not None:
            return {"type": kind, kind: self._stored(kind, value, label)}
        value = with_arrays(value, label)
        return {"type": kind, kind: with_rate(value, label) if kind == "video" else value}

    def _stored(self, kind: str, value: Any, label: str) -> Any:
        """A medium as a file may give it: encoded, or as an address or a path, or as frames."""
        if kind == "video" and isinstance(value, list) and value:
            return [self._stored("image", one, f"{label}[{i}]") for i, one in enumerate(value)]
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise LcoError(f"{label} must be a path (a string), and is {value!r:.60}")
        check_text(value, label)
        if kind == "video" and _is_still(value):  # decoders take it for a video of one frame
            give = "give a video file, or a list of frames"
            raise LcoError(f"{label} is an image, {value!r:.200}; {give}")
        return value if ADDRESS.match(value) else self._path(value, label)

    def _path(self, value: str, label: str) -> str:
        path = os.path.join(self.root or "", os.path.expanduser(value))
        if self.exists and not self.exists(path):
            start = "at the folder of the file that names them, or at media_root"
            raise LcoError(f"{label}: there is no file {path}; relative paths start {start}")
        return path


def as_content(given: Any, where: str) -> Content | Messages:
    """Read what `encode` takes: all that a `Reader` reads, and media without their kind.

    A string that ends like a media file is one (as in sentence-transformers), and must then exist.
    So is a data: URI of a kind. A string that names any other file is an error; {"text": …} is
    always text. Arrays of 3 axes are images and of 4 axes videos; sound needs its sampling rate.
    {"bytes": …, "path": …} is of the kind that its path ends like, or its bytes begin like.
    """
    check_not_open(given, f"{where} is {type(given).__name__}")
    given = with_arrays(given, where)
    if isinstance(given, Image.Image | LazyImage):
        given = {"image": given}
    elif isinstance(given, np.ndarray):
        given = {_array_kind(given, where): given}
    elif isinstance(given, Mapping) and "array" in given:
        given = medium_of_array(given)
    elif isinstance(given, Mapping) and given and given.keys() <= {"bytes", "path"}:
        given = _undecoded(given, where)
    elif decoder_kind(given):
        given = {decoder_kind(given): given}
    elif isinstance(given, str | os.PathLike):
        name = given.strip() if isinstance(given, str) else given  # a line may have its end
        kind = kind_named(name, where)
        given = {kind: name} if kind else given
    return Reader(where).read(given)


def check_not_open(given: Any, what: str) -> None:
    """Raise for an open file, which would be taken for its lines. what: the error's beginning."""
    if isinstance(given, io.TextIOBase):
        give = 'give its text, or its lines as a list: [line.rstrip("\\n") for line in file]'
        raise LcoError(f"{what}, a text file that is open; {give}")
    if hasattr(given, "read"):
        give = 'give {"image": …}, {"audio": …} or {"video": …} with it'
        raise LcoError(f"{what}, a file that is open; {give}")


def _array_kind(array: np.ndarray, where: str) -> str:
    kinds = {3: "image", 4: "video"}
    if array.ndim not in kinds:
        raise LcoError(
            f'{where} is {describe(array)}; give sound as {{"array": …, "sampling_rate": …}}, '
            'a grey picture as {"image": array}'
        )
    return kinds[array.ndim]


def _undecoded(given: Mapping, where: str) -> dict[str, Any]:
    """A medium of datasets that is not decoded, {"bytes": …, "path": …}, with its kind."""
    kind = media_kind(given.get("path")) or kind_of_bytes(given.get("bytes"))
    if kind is None:
        give = 'give {"image": …}, {"audio": …} or {"video": …} with it'
        raise LcoError(
            f"{where} is encoded, and neither its path nor its bytes tell its kind; {give}"
        )
    return {kind: given}


def is_conversation(given: Any) -> bool:
    """Whether this is a list of chat messages."""
    return isinstance(given, list | tuple) and any(
        isinstance(message, Mapping) and "role" in message for message in given
    )


def is_parts(given: Any) -> bool:
    """Whether this is a list of parts, perhaps an empty one, and so one content."""
    return isinstance(given, list | tuple) and all(
        isinstance(part, Mapping) and "type" in part for part in given
    )


def media_parts(messages: Messages) -> list[Part]:
    """The media parts of a chat, in the order in which its template renders them."""
    return [part for message in messages for part in message["content"] if part["type"] != "text"]


def describe(value: Any) -> str:
    """A value in a few words on one line, for errors."""
    kind = type(value).__name__
    if hasattr(value, "shape"):
        return f"{kind} of shape {value.shape}"
    words = f"{value!r:.60}".split()
    return f"{kind} {' '.join(words)}"


def check_text(text: str, where: str) -> None:
    """Raise if a string cannot be written as UTF-8. JSON lets half a surrogate pair through."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LcoError(f"{where} holds half of a surrogate pair, which is no text") from error


def _joined(parts: list[Part]) -> Content | None:
    """The content of these parts."""
    if not parts:
        return None
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return tuple(part for part in parts if part.get("text") != "")


def _text(text: Any, label: str) -> Part:
    if isinstance(text, list | tuple | np.ndarray):
        give = 'one input has one text; give a list of inputs, as [{"text": …}, …]'
        raise LcoError(f"{label} is {describe(text)}; {give}")
    if not isinstance(text, str):
        raise LcoError(f"{label} must be a string, and is {describe(text)}")
    check_text(text, label)
    return {"type": "text", "text": text}


def _is_empty(value: Any) -> bool:
    """Whether this is what tables write where a row holds nothing."""
    return value is None or (isinstance(value, str | bytes | list) and not value)


def _refuse_empty(fields: Mapping, label: str) -> None:
    """Raise for empty lists and bytes, which are mistakes where no table wrote them."""
    for key, value in fields.items():
        if isinstance(value, list | bytes) and not value:
            kind = "an empty list" if isinstance(value, list) else "empty"
            raise LcoError(f"{label}: its {key} is {kind}")


def _check_single(given: Mapping, label: str) -> None:
    """Raise for a second key where one excludes the other."""
    if len(given) > 1:
        first, second, *_ = sorted(given)
        raise LcoError(f"{label} has both {first} and {second}; keep one")


def _unwrapped(value: Any) -> Any:
    """Hugging Face's {"bytes": …, "path": …} as the one of them that is there, in lists, too."""
    if isinstance(value, list):
        return [_unwrapped(one) for one in value]
    if not isinstance(value, Mapping) or "array" in value or not value.keys() & {"bytes", "path"}:
        return value
    encoded = value.get("bytes")
    return (encoded or value.get("path")) if isinstance(encoded, bytes | None) else value


def _is_still(source: Any) -> bool:
    """Whether a path or an address ends like an image that does not move."""
    return media_kind(source) == "image" and not str(source).lower().endswith(".gif")


def chosen_modalities(modalities: Iterable[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The modalities that are asked for, and text; None: all that are known."""
    if modalities is None:
        return known
    if isinstance(modalities, str) or not isinstance(modalities, Iterable):
        modalities = (modalities,)
    chosen = ["text", *modalities]
    for kind in chosen:
        if kind not in known:
            takes = ", ".join(known)
            raise LcoError(f"modalities has {kind!r:.60}; this checkpoint takes {takes}")
    return tuple(kind for kind in known if kind in chosen)
