"""A language model on disk, as what an MLLM's decoder is made of: a folder of the hub, or a GGUF.

Llama's and Qwen2's architectures are read. They are the decoder of Qwen2.5 but for the biases of
queries, keys and values, which Llama does not have, and which are 0 then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.deadline import deadline
from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import check_is_file, read_json, resolve

FILES = ["*.json", "*.jinja", "*.safetensors"]
ARCHITECTURES = ("llama", "qwen2")
TEMPLATE_SECONDS = 5.0
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Language:
    """A language model.

    text: its sizes in the hub's words, as `omni.thinker_config` takes them, without vocab_size.
    ends: bos_token_id, eos_token_id and pad_token_id. read: a hub key, such as model.norm.weight,
    -> its values as float32, or None if the model has no such tensor. source: names it in errors.
    """

    text: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: str
    ends: dict[str, int]
    read: Callable[[str], np.ndarray | None]
    source: str

    def beginning(self) -> str:
        """What its chat template puts before the first turn of a user, such as a system turn.

        Raises if the template is not ChatML, as the one is that we give the assembled model.
        """
        text = "some text of a user"
        rendered = _render(self, [{"role": "user", "content": text}])
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        if not rendered.endswith(turn):
            raise LcoError(
                f"{self.source}: the chat template is not ChatML (<|im_start|>user …), "
                "and no other one is supported here"
            )
        return rendered.removesuffix(turn)


def _render(language: Language, messages: list[dict[str, str]]) -> str:
    vocabulary = language.tokenizer
    tokens = {key[:-3]: vocabulary.id_to_token(i) for key, i in language.ends.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    what = f"{language.source}: the chat template"
    with (
        deadline(TEMPLATE_SECONDS, what),
        explained(what, jinja2.TemplateError, TypeError, ValueError, KeyError),
    ):
        template = environment.from_string(language.chat_template)
        return template.render(messages=messages, add_generation_prompt=True, **tokens)


def read_language(path_or_id: str | Path) -> Language:
    """Open a folder, a hub id or a .gguf file. Raises for another architecture."""
    if str(path_or_id).endswith(".gguf"):
        # here: the package takes a third of a second to import, and few need it
        from lco_jax.checkpoint.gguf import read_gguf

        file = Path(path_or_id).expanduser()
        if not file.exists():
            raise LcoError(f"{file} does not exist")
        check_is_file(file)
        return read_gguf(file)
    return _read_folder(resolve(path_or_id, FILES))


def _read_folder(folder: Path) -> Language:
    file = folder / "config.json"
    config = read_json(file)
    _check_architecture(config, file)
    tensors = TensorFolder(folder)

    def read(key: str) -> np.ndarray | None:
        return tensors.read(key).astype(np.float32) if key in set(tensors) else None

    for key in tensors:
        if key.endswith((".o_proj.bias", "down_proj.bias", "up_proj.bias", "gate_proj.bias")):
            raise LcoError(f"{folder}: {key} has no place in Qwen2.5's decoder")
    missing = [key for key in (*_SIZES, "rms_norm_eps") if key not in config]
    if missing:
        raise LcoError(f"{file} has no {missing[0]}")
    rope = {**config, **(config.get("rope_parameters") or {})}
    text = {key: config[key] for key in (*_SIZES, "rms_norm_eps")}
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    text["rope_theta"] = rope.get("rope_theta", 10_000.0)
    text["tie_word_embeddings"] = read("lm_head.weight") is None
    with explained(f"{folder}/tokenizer.json does not load", Exception):  # tokenizers raises it
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_head(text, str(file))
    return Language(text, tokenizer, _template(folder), _ends(folder), read, str(folder))


def _check_architecture(config: dict[str, Any], file: Path) -> None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise LcoError(f"{file}: model_type {kind!r:.60} is not supported; {known} are")
    if config.get("hidden_act", "silu") != "silu":
        raise LcoError(f"{file}: hidden_act {config['hidden_act']!r:.60} is not supported")
    if config.get("use_sliding_window"):
        raise LcoError(f"{file}: a sliding window is not supported")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise LcoError(f"{file}: {key} of type {kind!r:.60} is not supported")
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") not in (None, width // heads):
        raise LcoError(f"{file}: a head_dim that is not hidden_size / heads is not supported")


def check_head(text: dict[str, Any], where: str) -> None:
    """Raise if the width of a head has no M-RoPE sections of Qwen's proportions."""
    if text["head_dim"] % 16:
        raise LcoError(
            f"{where}: a head has {text['head_dim']} numbers, and M-RoPE needs a multiple of 16"
        )


def _template(folder: Path) -> str:
    """The chat template, where transformers looks for it."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        check_is_file(jinja)
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise LcoError(f"{folder} has no chat template; an instruction-tuned model has one")


def _ends(folder: Path) -> dict[str, int]:
    """The tokens that begin, end and pad a text."""
    file = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    if file.exists():
        config |= read_json(file)
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            value = found.get("eos_token_id", config.get("eos_token_id"))
        if not isinstance(value, int):
            raise LcoError(f"{file}: {key} is {value!r:.60}, and must be a token")
        found[key] = value
    return found
