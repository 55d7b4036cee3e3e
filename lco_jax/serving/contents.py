"""What clients write -> inputs of `encode`. No path of this machine is ever read for a client.

A text is always text, whatever it is called. A medium is a data: URI, or an http(s) address where
the server allows it. Chats, whose messages have roles, stay as they are; a content without a role
gets the prompt, as in `encode`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from typing import Any, NamedTuple

from lco_jax.core.errors import is_number
from lco_jax.data.content import check_text, describe
from lco_jax.data.prompts import Prompt
from lco_jax.serving.engine import Content
from lco_jax.serving.refusals import Refused

MEDIA = {"image_url": "image", "audio_url": "audio", "video_url": "video", "input_audio": "audio"}
PART_TYPES = ("text", *MEDIA)
Fetch = Callable[[str, str], bytes]  # (address, what errors call it) -> what is there


class PromptRoom(NamedTuple):
    """A prompt, None for the engine's, and how many tokens a text with it may have."""

    prompt: Prompt | None
    room: int


@dataclass(frozen=True)
class Reader:
    """Reads the inputs of requests.

    modalities: that the model takes. tokenizer: the checkpoint's. room: how many tokens a text with
    the engine's prompt may have. fetch: gets what an http(s) address has; None where nothing may be
    fetched. prompts: of the model, by Cohere's `input_type`.
    """

    modalities: tuple[str, ...]
    tokenizer: Any
    room: int
    fetch: Fetch | None = None
    prompts: Mapping[str, PromptRoom] = field(default_factory=dict)

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return len(self.tokenizer)

    def prompt_room(self, input_type: str | None) -> PromptRoom:
        """Of inputs of a type of Cohere's; None: of those that say nothing."""
        return self.prompts.get(input_type or "", PromptRoom(None, self.room))

    def text(self, given: str, name: str, cut: Callable[[str], str] = str) -> Content:
        """A text. cut: shortens it, in the engine's time."""
        return Content(name, lambda: {"text": cut(given)}, has_media=False)

    def cut(self, text: str, end: str, room: int) -> str:
        """A text without the "START" or the "END" of it that is beyond so many tokens."""
        # a letter has at most four bytes, of which NFC makes three at most; a token has one or more
        if end == "NONE" or 12 * len(text) <= room:
            return text
        check_text(text, "the text")
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= room:
            return text
        return self.tokenizer.decode(ids[:room] if end == "END" else ids[-room:])

    def token_ids(self, given: Sequence[Any], name: str) -> Content:
        """A text that is given as the token ids of the model's own tokenizer."""
        for i, one in enumerate(given):
            if not is_number(one, Integral) or not 0 <= one < self.vocabulary:
                least_and_most = f"a token id is a whole number from 0 to {self.vocabulary - 1:,}"
                raise refused(f"{name}[{i}]", f"is {describe(one)}; {least_and_most}")
        return Content(name, lambda: {"text": self.tokenizer.decode(given)}, has_media=False)

    def image(self, given: Any, name: str) -> Content:
        """An image by its address."""
        load, _ = self._part({"type": "image_url", "image_url": given}, name)
        return Content(name, lambda: {"content": [load()]}, has_media=True)

    def content(self, given: Any, name: str) -> Content:
        """A text, or parts, that get the prompt."""
        if isinstance(given, str):
            return self.text(given, name)
        parts = self._parts(given, f"{name}.content")
        return Content(
            name,
            lambda: {"content": [load() for load, _ in parts]},
            any(is_medium for _, is_medium in parts),
        )

    def chat(self, given: Any, name: str) -> Content:
        """Messages that have roles."""
        if not isinstance(given, list) or not given:
            raise refused(name, f"is {describe(given)}; give a list of messages")
        messages = []
        has_media = False
        for i, message in enumerate(given):
            label = f"{name}[{i}]"
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise refused(label, "is no message; give its role and its content")
            check_keys(message, ("role", "content"), label)
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts = self._parts(content, f"{label}.content")
            has_media = has_media or any(is_medium for _, is_medium in parts)
            messages.append((role, parts))

        def load() -> list[dict[str, Any]]:
            return [
                {"role": role, "content": [load() for load, _ in parts]} for role, parts in messages
            ]

        return Content(name, load, has_media)

    def _parts(self, given: Any, label: str) -> list[tuple[Callable[[], Any], bool]]:
        """(what makes a part, whether it is a medium) of each."""
        if not isinstance(given, list) or not given:
            raise refused(label, f"is {describe(given)}; give a text or a list of parts")
        return [self._part(part, f"{label}[{i}]") for i, part in enumerate(given)]

    def _part(self, part: Any, label: str) -> tuple[Callable[[], Any], bool]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PART_TYPES:
            types = ", ".join(PART_TYPES)
            raise refused(label, f"is {describe(part)}; the type of a part is one of: {types}")
        check_keys(part, ("type", kind), label)
        value = part.get(kind)
        if kind == "text":
            if not isinstance(value, str):
                raise refused(f"{label}.text", f"is {describe(value)}, and must be a string")
            return partial(dict, type="text", text=value), False
        medium = MEDIA[kind]
        if medium not in self.modalities:
            takes = ", ".join(self.modalities)
            raise refused(label, f"has {medium}, and this model takes {takes}")
        label = f"{label}.{kind}"
        address = _sound(value, label) if kind == "input_audio" else _address(value, label)
        return partial(self._medium, medium, address, self._way(address, label), label), True

    def _way(self, address: str, label: str) -> Fetch | None:
        """How to get what an address has: None for a data: URI, which decoders read."""
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            return None
        if not scheme.startswith(("http://", "https://")):
            raise refused(label, "must be a data: URI, or an http or https address")
        if self.fetch is None:
            raise refused(label, "is an address, and this server fetches none; give a data: URI")
        return self.fetch

    @staticmethod
    def _medium(kind: str, address: str, fetch: Fetch | None, label: str) -> dict[str, Any]:
        return {"type": kind, kind: address if fetch is None else fetch(address, label)}


def refused(param: str, what: str) -> Refused:
    """The refusal of a part of a request. what: the rest of a sentence that begins with `param`."""
    return Refused(400, f"{param} {what}", param)


def check_keys(given: Mapping, known: Sequence[str], label: str) -> None:
    """Refuse a key that is not among the known ones. None counts as left out."""
    for key, value in given.items():
        if key not in known and value is not None:
            takes = ", ".join(known)
            where = f"{label}.{key}" if label else key
            raise refused(f"{where:.100}", f"is unknown here; known are: {takes}")


def _address(given: Any, label: str) -> str:
    """Of {"url": …}, or the address itself."""
    if isinstance(given, Mapping):
        check_keys(given, ("url", "detail"), label)
        if given.get("detail") not in (None, "auto"):
            raise refused(f"{label}.detail", "must be auto: the server decides on sizes")
        given = given.get("url")
    if not isinstance(given, str):
        raise refused(label, f"is {describe(given)}, and must hold an address under url")
    return given


def _sound(given: Any, label: str) -> str:
    """Of {"data": base64, "format": …}, as a data: URI. Decoders find the format by themselves."""
    data = given.get("data") if isinstance(given, Mapping) else None
    if not isinstance(data, str):
        raise refused(label, 'must be {"data": base64, "format": "wav"}')
    check_keys(given, ("data", "format"), label)
    return f"data:audio/wav;base64,{data}"
