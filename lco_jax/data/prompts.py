"""Content -> chat messages -> token ids, byte-equal to the reference's prompts.

An input is a user turn whose content is followed by an instruction to say it in one word; the answer's first token
is generated from the hidden state that we take as the embedding (the paper, section 3; cf. PromptEOL).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json

Messages = list[dict[str, Any]]
PROMPTS = {"text": "\nSummarize the above text in one word:", "mixed": "\nSummarize the above in one word:"}
RENDERED_AT_ONCE = 1024  # conversations in memory as text
MEDIA = ("image", "audio", "video")  # what a later version embeds, and this one turns away by name
MEDIA_KEYS = (*MEDIA, *(f"{kind}_path" for kind in MEDIA))


def as_messages(item: Any, where: str, prompt: str | None = None) -> Messages:
    """One user turn for a string or {"text": …}, with the prompt after it; a list of chat messages as it is.

    where: names the input in errors. prompt: instead of the reference's.
    """
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, list) and item and all(isinstance(message, dict) and "role" in message for message in item):
        for message in item:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            for part in parts:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    raise LcoError(f"{where}: a message part of type {kind!r} is not supported yet; only text is")
                check_text(part["text"], where)
        return item
    if isinstance(item, dict):
        if media := [key for key in MEDIA_KEYS if item.get(key) not in (None, "")]:
            raise LcoError(f"{where} has {media[0]!r}, which is not supported yet; only text is")
        if isinstance(item.get("text"), str):
            check_text(item["text"], where)
            text = item["text"] + (PROMPTS["text"] if prompt is None else prompt)
            return [{"role": "user", "content": [{"type": "text", "text": text}]}]
    raise LcoError(f'{where} is {type(item).__name__}: {item!r:.80}; give a string, {{"text": …}} or chat messages')


def check_text(text: str, where: str) -> None:
    """Raise if a string cannot be written as UTF-8 (JSON lets half a surrogate pair through)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LcoError(f"{where} holds half of a surrogate pair, which is no text") from None


class ChatTokenizer:
    """The checkpoint's own tokenizer and chat template.

    folder: a checkpoint folder. max_tokens: what the model's context holds; longer inputs raise by name.
    """

    def __init__(self, folder: str | Path, max_tokens: int = 32768):
        folder = Path(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns about its own processors' future
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except (OSError, ValueError) as error:
                raise LcoError(f"{folder} has no tokenizer that loads: {str(error).splitlines()[0]}") from None
        self.max_tokens = max_tokens
        if not len(self.tokenizer.get_vocab()) > len(self.tokenizer.get_added_vocab()):
            raise LcoError(f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is missing")
        # the precedence of the checkpoints' own processors; AutoTokenizer does not read the .json one
        if not (folder / "chat_template.jinja").exists() and (folder / "chat_template.json").exists():
            self.tokenizer.chat_template = _template_file(folder / "chat_template.json")
        if self.tokenizer.chat_template is None:
            raise LcoError(f"{folder} has no chat template (chat_template.jinja, .json, or in tokenizer_config.json)")

    def render(self, messages: Messages) -> str:
        """The templated text, ending where the assistant's answer would begin."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def cut(self, text: str, max_length: int | None) -> str:
        """The first `max_length` tokens of a text, decoded again, as the reference cuts; shorter texts as they are."""
        if max_length is None:
            return text
        if max_length < 1:
            raise LcoError(f"max_length is {max_length}; it must be at least 1, or None to cut nothing")
        if 3 * len(text.encode()) <= max_length:  # a token is at least a byte, and NFC makes at most three of one
            return text
        ids = self.tokenizer(text).input_ids
        return text if len(ids) <= max_length else self.tokenizer.decode(ids[:max_length])

    def __call__(self, conversations: Sequence[Messages], names: Sequence[str] | None = None) -> list[np.ndarray]:
        """Token ids (int32) of each conversation, nothing padded. Raises, by name, for one that exceeds the context."""
        ids: list[list[int]] = []
        for i in range(0, len(conversations), RENDERED_AT_ONCE):
            texts = [self.render(messages) for messages in conversations[i : i + RENDERED_AT_ONCE]]
            ids += self.tokenizer(texts).input_ids
        for i, sequence in enumerate(ids):
            if len(sequence) > self.max_tokens:
                name = names[i] if names else f"input {i}"
                raise LcoError(
                    f"{name}: {len(sequence)} tokens (template included), and the model takes {self.max_tokens}; "
                    "cut it with max_length"
                )
        return [np.asarray(sequence, np.int32) for sequence in ids]


def _template_file(path: Path) -> str:
    """The template in a chat_template.json (Qwen2.5-VL and Omni keep it there)."""
    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise LcoError(f"{path} holds no chat_template string")
    return template
