"""Content -> chat messages -> token ids, byte-equal to the reference's prompts.

An input is a user turn whose content is followed by an instruction to say it in one word. The
first token of the answer is generated from the hidden state that we take as the embedding (the
paper, section 3; cf. PromptEOL).
"""

import warnings
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedConfig

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import read_json
from lco_jax.core.prefixes import Prefixes, common_length
from lco_jax.data import foreign
from lco_jax.data.content import KINDS, MEDIA, Messages, Part, Reader, check_text
from lco_jax.data.instructions import PLACES, Instruction
from lco_jax.data.tokenizer_files import check_files

# what follows a content, or a function that makes it of the kinds of the content's parts; or an
# instruction, with the reference's prompt
Prompt = str | Instruction | Callable[[Set[str]], str]
PROMPT = "\nSummarize the above {kind} in one word:"
PROMPTS = {kind: PROMPT.format(kind=kind) for kind in KINDS}
PROMPTS["mixed"] = "\nSummarize the above in one word:"
QUESTIONS = {kind: f"\nDescribe the above {kind}." for kind in MEDIA}
QUESTIONS["mixed"] = "\nDescribe the above."
_PROBE = "A text that every template puts somewhere."
_INSTRUCTION = "What the text is for.\n"
TOKENIZED_AT_ONCE = 1024  # texts in one call of the tokenizer


def summed_up(kinds: Set[str]) -> str:
    """The reference's prompt after a content of these `KINDS`; an empty text is none of them."""
    if len(kinds) > 1:
        return PROMPTS["mixed"]
    return PROMPTS[min(kinds, default="text")]


def asked(kinds: Set[str]) -> str:
    """What a generator is asked about a content of these `KINDS`. A text asks for itself."""
    if "text" in kinds or not kinds:
        return ""
    return QUESTIONS[min(kinds) if len(kinds) == 1 else "mixed"]


def as_messages(
    given: Any,
    where: str,
    prompt: Prompt | None = None,
    cut: Callable[[str], str] = str,
) -> Messages:
    """Chat messages of one input, which may be anything that a `content.Reader` reads.

    A content becomes one user turn with the prompt after it. A chat stays as it is.
    where: names the input in errors. prompt: in place of the reference's (`summed_up`), or an
    instruction. cut: shortens the texts of a content; those of a chat keep their length, and so do
    prompts.
    """
    content = Reader(where).read(given)
    if isinstance(content, list):
        return content
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for i, part in enumerate(parts):
        if part["type"] == "text":
            parts[i] = {"type": "text", "text": cut(part["text"])}
    kinds = {part["type"] for part in parts if part.get("text") != ""}
    if isinstance(prompt, Instruction):
        return _instructed(parts, prompt, summed_up(kinds))
    if not isinstance(prompt, str):
        prompt = (prompt or summed_up)(kinds)
    return [_turn("user", _then(parts, prompt))]


def _instructed(parts: list[Part], instruction: Instruction, prompt: str) -> Messages:
    """A content with an instruction at its place. prompt: the reference's for this content."""
    text, place = instruction.text, instruction.place
    if place == "instead":
        return [_turn("user", _then(parts, text))]
    if place == "after":
        return [_turn("user", _then(parts, text + prompt))]
    if place == "system":
        return [_turn("system", _then([], text)), _turn("user", _then(parts, prompt))]
    if parts[0]["type"] == "text":
        first, *others = parts
        parts = [{"type": "text", "text": text + first["text"]}, *others]
    else:
        parts = [{"type": "text", "text": text}, *parts]
    return [_turn("user", _then(parts, prompt))]


def _then(parts: list[Part], text: str) -> list[Part]:
    """The parts, followed by a text."""
    if parts and parts[-1]["type"] == "text":
        *parts, last = parts
        text = last["text"] + text
    return [*parts, {"type": "text", "text": text}]


def _turn(role: str, parts: list[Part]) -> dict[str, Any]:
    return {"role": role, "content": parts}


class ChatTokenizer:
    """The tokenizer and chat template of the checkpoint in `folder`.

    Raises for a template that does not put a user's text into what it renders.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.tokenizer = _load_tokenizer(folder)
        template, file = _template(self.tokenizer, folder)
        self.tokenizer.chat_template = template
        self._what = f"the chat template of {file}"
        if _PROBE not in self.render(as_messages(_PROBE, "", "")):
            raise LcoError(f"{self._what} leaves out what a user says")

    @cached_property
    def prefix(self) -> Prefixes:
        """What texts begin with that get the reference's prompt alone."""
        return self.prefixes([None])

    def prefixes(self, prompts: Sequence[Prompt | None]) -> Prefixes:
        """What texts of one user turn begin with, with each of some prompts.

        A few texts lack the last token of it, because it merges with their first letters.
        """
        beginnings = []
        for prompt in prompts:
            a, b = self([as_messages(text, "", prompt) for text in ("a", "b")])
            beginnings.append(a[: common_length(a, b)])
        return Prefixes.of(*beginnings)

    def check_place(self, place: str) -> None:
        """Raise if the template leaves out an instruction at this place."""
        if place == "instead":  # of the prompt, which stands in what a user says
            return
        instruction = Instruction(_INSTRUCTION, place)
        (rendered,) = self.render_all([as_messages(_PROBE, "", instruction)])
        if isinstance(rendered, LcoError) or _INSTRUCTION.strip() not in rendered:
            others = ", ".join(one for one in PLACES if one not in (place, "system"))
            raise LcoError(
                f"{self._what} leaves out an instruction whose place is {place!r}; choose another "
                f"place: {others}"
            )

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The chat as text, which ends where the assistant's answer would begin.

        add_generation_prompt: whether it does. Raises if the template does not take the messages.
        """
        (text,) = self.render_all([messages], add_generation_prompt)
        if isinstance(text, LcoError):
            raise text
        return text

    def render_all(
        self, chats: Sequence[Messages], add_generation_prompt: bool = True
    ) -> list[str | LcoError]:
        """Each chat as `render` has it, or an error where the template does not take it."""
        settings = {
            **self.tokenizer.special_tokens_map,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self.tokenizer.chat_template
        rendered = foreign.render(template, chats, settings, self._what) if chats else []
        for text in rendered:
            if isinstance(text, str):
                check_text(text, f"what {self._what} renders")
        return rendered

    @cached_property
    def _around_answers(self) -> tuple[str, str]:
        """What the template puts before an answer, perhaps a space, and after it."""
        turn = as_messages("a", "", "")
        answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
        answered = self.render([*turn, answer], add_generation_prompt=False)
        before, _, after = answered.removeprefix(self.render(turn)).partition("b")
        if before.strip():
            raise LcoError(
                "the checkpoint's chat template does not put an answer where it asks for one"
            )
        return before, after.rstrip()

    def answers(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each answer, with the token that ends its turn."""
        before, after = self._around_answers
        return self.ids([before + text + after for text in texts], begin=False)

    def cut(self, text: str, max_length: int | None) -> str:
        """The first `max_length` tokens of a text, decoded again as the reference does it."""
        if max_length is None:
            return text
        if max_length < 1:
            raise LcoError(
                f"max_length is {max_length}; it must be at least 1, or None to cut nothing"
            )
        # a token has at least one byte, and NFC makes at most three bytes of one
        if 3 * len(text.encode()) <= max_length:
            return text
        # the template adds what begins a text
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return text if len(ids) <= max_length else self.tokenizer.decode(ids[:max_length])

    def ids(self, texts: Sequence[str], begin: bool = True) -> list[np.ndarray]:
        """Token ids (int32) of each rendered text, without padding.

        begin: put the tokenizer's token for the beginning of a text first, if it has one.
        """
        ids: list[list[int]] = []
        for i in range(0, len(texts), TOKENIZED_AT_ONCE):
            some = list(texts[i : i + TOKENIZED_AT_ONCE])
            ids += self.tokenizer(some, add_special_tokens=begin).input_ids
        return [np.asarray(sequence, np.int32) for sequence in ids]

    def __call__(self, conversations: Sequence[Messages]) -> list[np.ndarray]:
        """Token ids (int32) of each chat, without padding."""
        texts = []
        for text in self.render_all(conversations):
            if isinstance(text, LcoError):
                raise text
            texts.append(text)
        return self.ids(texts)


def _load_tokenizer(folder: Path) -> Any:
    check_files(folder)
    # a plain config names the tokenizer; a model's config class would import much more
    config = PreTrainedConfig()
    config.model_type = read_json(folder / "config.json").get("model_type", "")
    with (
        warnings.catch_warnings(),
        # for files of other types and shapes, transformers and tokenizers raise anything
        explained(f"{folder} has no tokenizer that loads", Exception),
    ):
        warnings.simplefilter("ignore")  # transformers warns about the future of its processors
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        files = "tokenizer.json, or vocab.json and merges.txt, is missing"
        raise LcoError(f"{folder} has no tokenizer: {files}")
    return tokenizer


def _template(tokenizer: Any, folder: Path) -> tuple[str, Path]:
    """A checkpoint's chat template, and the file that has it. Raises if there is none.

    The checkpoints' processors prefer the .json to the tokenizer's template. AutoTokenizer does not
    read it.
    """
    for name in ("chat_template.jinja", "chat_template.json"):
        file = folder / name
        if file.exists():
            break
    else:
        file = folder / "tokenizer_config.json"
    template = tokenizer.chat_template
    if file.name == "chat_template.json":
        template = read_json(file).get("chat_template")
    if isinstance(template, dict):
        template = _default(template, file)
    if template is None and file.name == "tokenizer_config.json":
        files = "chat_template.jinja, .json, or in tokenizer_config.json"
        raise LcoError(f"{folder} has no chat template ({files})")
    if not isinstance(template, str):
        raise LcoError(f"{file}: chat_template is {template!r:.60}, and must be a string")
    return template, file


def _default(templates: dict[str, Any], file: Path) -> Any:
    """Of several named templates the one that transformers takes."""
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        raise LcoError(f"{file} has the chat templates {names}, and none is called default")
    return templates["default"]
