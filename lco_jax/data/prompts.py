"""Content -> chat messages -> token ids, byte-equal to the reference's prompts.

An input is a user turn whose content is followed by an instruction to say it in one word; the answer's first token
is generated from the hidden state that we take as the embedding (the paper, section 3; cf. PromptEOL).
"""

import os
import warnings
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedConfig

from lco_jax.core.errors import LcoError, check_keys, explained
from lco_jax.core.files import read_json
from lco_jax.core.packing import common_length

Messages = list[dict[str, Any]]
Prompt = (
    str | Callable[[Set[str]], str]
)  # what follows a content: itself, or what to say after these kinds of parts
EXTENSIONS = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"),
    "video": ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac"),
}
MEDIA = (
    "image",
    "video",
    "audio",
)  # the order in which the media of one content stand before its text
KINDS = ("text", *MEDIA)
PROMPTS = {kind: f"\nSummarize the above {kind} in one word:" for kind in KINDS}
PROMPTS["mixed"] = "\nSummarize the above in one word:"
QUESTIONS = {kind: f"\nDescribe the above {kind}." for kind in MEDIA} | {
    "mixed": "\nDescribe the above."
}
OPTIONS = {  # what a part may say of its medium, in the place of `MediaConfig`
    "image": ("min_pixels", "max_pixels"),
    "video": ("min_pixels", "max_pixels", "fps", "max_frames"),
    "audio": (),
}
SOURCES = ("url", "path")  # other names that a part's medium may go by, as in transformers
TOKENIZED_AT_ONCE = 1024  # texts that the tokenizer is given


def summed_up(kinds: Set[str]) -> str:
    """The reference's prompt after a content that holds these of `KINDS` (a text that is empty does not count)."""
    return PROMPTS[min(kinds or {"text"}) if len(kinds) < 2 else "mixed"]


def asked(kinds: Set[str]) -> str:
    """What a generator is asked about a content that holds these of `KINDS`: nothing more where there is a text, which
    asks for itself."""
    return (
        ""
        if "text" in (kinds or {"text"})
        else QUESTIONS[min(kinds) if len(kinds) == 1 else "mixed"]
    )


def as_messages(
    item: Any,
    where: str,
    prompt: Prompt | None = None,
    cut: Callable[[str], str] = lambda text: text,
) -> Messages:
    """Chat messages of one input.

    A string, {"text": …, "image": …, "video": …, "audio": …} (any of them, each a medium or a list) or a sequence of
    chat parts becomes one user turn with the prompt after it; a list of chat messages stays as it is, but for media
    parts, which all become {"type": kind, kind: medium, …}.
    where: names the input in errors. prompt: instead of the reference's (`summed_up`). cut: shortens texts; those of
    chat messages stay as long as they are.
    """
    item = [item] if isinstance(item, dict) and "role" in item else item
    if is_conversation(item):
        if strange := [message["role"] for message in item if not isinstance(message["role"], str)]:
            raise LcoError(f"{where}: a message's role is {strange[0]!r:.60}, and must be a string")
        return [{**message, "content": _parts(message.get("content"), where)} for message in item]
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, dict) and item and not item.keys() - set(KINDS):
        kinds = (*MEDIA, "text")
        item = [
            {"type": kind, kind: x} for kind in kinds for x in _media(item.get(kind), kind, where)
        ]
    if (
        not isinstance(item, list | tuple)
        or not item
        or not all(isinstance(x, dict) and "type" in x for x in item)
    ):
        raise LcoError(
            f'{where} is {describe(item)}; give a string, a medium, {{"text": …}} or chat messages'
        )
    parts = [
        {**x, "text": cut(x["text"])} if x["type"] == "text" else x
        for x in _parts(list(item), where)
    ]
    if not isinstance(prompt, str):
        prompt = (prompt or summed_up)(
            {part["type"] for part in parts if part["type"] != "text" or part["text"]}
        )
    last = parts.pop()["text"] if parts[-1]["type"] == "text" else ""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": last + prompt}]}]


def is_conversation(item: Any) -> bool:
    """Whether this is a list of chat messages."""
    return (
        isinstance(item, list | tuple)
        and bool(item)
        and all(isinstance(x, dict) and "role" in x for x in item)
    )


def _media(given: Any, kind: str, where: str) -> list[Any]:
    """The media under a key: one, a list of them, or none. A list of pictures under "video" is one clip's frames."""
    if given is None or (
        kind != "text" and isinstance(given, str) and not given
    ):  # "": absent, as in the reference
        return []
    if isinstance(given, list) and not given:
        raise LcoError(f"{where}: its {kind} is an empty list")
    if not isinstance(given, list) or kind == "text":
        return [given]
    clips = [
        isinstance(x, dict) or getattr(x, "ndim", 0) == 4 or is_media_file(x) == "video"
        for x in given
    ]
    return given if kind != "video" or all(clips) else [given]


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A message's content as a list of parts whose media go by their kind. Raises for what no part can be."""
    parts = []
    for part in (
        content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    ):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in KINDS:
            raise LcoError(
                f"{where}: a message part is {describe(part)}; its type is one of: {', '.join(KINDS)}"
            )
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise LcoError(
                    f"{where}: a text part holds {describe(part.get('text'))}, and must hold a string"
                )
            check_text(part["text"], where)
            parts.append({"type": "text", "text": part["text"]})
            continue
        given = [key for key in (kind, *SOURCES) if part.get(key) is not None]
        if len(given) != 1:
            raise LcoError(
                f"{where}: a part of type {kind!r} must hold its medium once, under {kind!r}"
            )
        options = {
            key: x
            for key, x in part.items()
            if key not in ("type", *SOURCES, kind) and x is not None
        }
        check_keys(options, (kind, *SOURCES, *OPTIONS[kind]), f"{where}: a part of type {kind!r}")
        parts.append({"type": kind, kind: part[given[0]], **options})
    if not parts:
        raise LcoError(f"{where}: a message has no content")
    return parts


def media_parts(messages: Messages) -> list[dict[str, Any]]:
    """The media parts of a conversation, in the order in which its template renders them."""
    return [part for message in messages for part in message["content"] if part["type"] != "text"]


def is_media_file(source: Any) -> str | None:
    """The kind of medium that a path or URL names by its extension, or None."""
    if not isinstance(source, str | os.PathLike) or len(str(source)) > 4096 or "\n" in str(source):
        return None
    name = str(source)
    if name.startswith("data:"):
        kind = name[5:].split("/")[0]
        return kind if kind in MEDIA else None
    if name.startswith(("http://", "https://")):
        name = name.split("?")[0].split("#")[0]
    suffix = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    return next((kind for kind, suffixes in EXTENSIONS.items() if suffix in suffixes), None)


def describe(value: Any) -> str:
    """A value in a few words, for errors."""
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else f" {value!r:.60}"
    return type(value).__name__ + shape


def check_text(text: str, where: str) -> None:
    """Raise if a string cannot be written as UTF-8 (JSON lets half a surrogate pair through)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LcoError(f"{where} holds half of a surrogate pair, which is no text") from None


class ChatTokenizer:
    """The checkpoint's own tokenizer and chat template; `folder` is its folder."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        # a plain config says which tokenizer; a model's own class would import much that is not needed
        config = PreTrainedConfig()
        config.model_type = read_json(folder / "config.json").get("model_type", "")
        with (
            warnings.catch_warnings(),
            explained(f"{folder} has no tokenizer that loads", OSError, ValueError),
        ):
            warnings.simplefilter("ignore")  # transformers warns about its own processors' future
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False, local_files_only=True
            )
        if not len(self.tokenizer.get_vocab()) > len(self.tokenizer.get_added_vocab()):
            raise LcoError(
                f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is missing"
            )
        # the precedence of the checkpoints' own processors; AutoTokenizer does not read the .json one
        if (
            not (folder / "chat_template.jinja").exists()
            and (folder / "chat_template.json").exists()
        ):
            template = read_json(folder / "chat_template.json").get("chat_template")
            if not isinstance(template, str):
                raise LcoError(f"{folder / 'chat_template.json'} holds no chat_template string")
            self.tokenizer.chat_template = template
        if self.tokenizer.chat_template is None:
            raise LcoError(
                f"{folder} has no chat template (chat_template.jinja, .json, or in tokenizer_config.json)"
            )

    @cached_property
    def prefix(self) -> np.ndarray:
        """Token ids with which every text of one user turn begins, but for the few that melt into its newline."""
        a, b = self([as_messages(text, "") for text in ("a", "b")])
        return a[: common_length(a, b)]

    def render(self, messages: Messages) -> str:
        """The templated text, ending where the assistant's answer would begin."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def _answer_frame(self) -> tuple[str, str]:
        """What the template puts before and after an answer, a space perhaps and what ends the turn."""
        turn, answer = as_messages("a", "", ""), [{"type": "text", "text": "b"}]
        answered = self.tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": answer}], tokenize=False
        )
        before, _, after = answered.removeprefix(self.render(turn)).partition("b")
        if before.strip():
            raise LcoError(
                "the checkpoint's chat template does not put an answer where it asks for one"
            )
        return before, after.rstrip()

    def answers(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each answer, the token that ends its turn among them."""
        before, after = self._answer_frame
        return self.ids([before + text + after for text in texts], begin=False)

    def cut(self, text: str, max_length: int | None) -> str:
        """The first `max_length` tokens of a text, decoded again, as the reference cuts; shorter texts as they are."""
        if max_length is None:
            return text
        if max_length < 1:
            raise LcoError(
                f"max_length is {max_length}; it must be at least 1, or None to cut nothing"
            )
        if (
            3 * len(text.encode()) <= max_length
        ):  # a token is at least a byte, and NFC makes at most three of one
            return text
        ids = self.tokenizer(
            text, add_special_tokens=False
        ).input_ids  # the template adds what begins a text
        return text if len(ids) <= max_length else self.tokenizer.decode(ids[:max_length])

    def ids(self, texts: Sequence[str], begin: bool = True) -> list[np.ndarray]:
        """Token ids (int32) of each rendered text, nothing padded. begin: with what begins a text, if anything does."""
        ids: list[list[int]] = []
        for i in range(0, len(texts), TOKENIZED_AT_ONCE):
            some = list(texts[i : i + TOKENIZED_AT_ONCE])
            ids += self.tokenizer(some, add_special_tokens=begin).input_ids
        return [np.asarray(sequence, np.int32) for sequence in ids]

    def __call__(self, conversations: Sequence[Messages]) -> list[np.ndarray]:
        """Token ids (int32) of each conversation, nothing padded."""
        return self.ids([self.render(messages) for messages in conversations])
