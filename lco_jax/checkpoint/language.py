"""A language model on disk, as what an MLLM's decoder is made of: a folder of the hub, or a GGUF.

Llama's and Qwen2's architectures are read. They are the decoder of Qwen2.5 but for the biases of
queries, keys and values, which Llama does not have, and which are 0 then.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from lco_jax.checkpoint.parts import Source, source_of
from lco_jax.checkpoint.shapes import abstract_params, per_layer
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import check_is_file, read_json, resolve
from lco_jax.core.wheels import fetch
from lco_jax.models.config import DecoderConfig

FILES = ["*.json", "*.jinja", "*.safetensors", "README.md"]
PUBLISHED = "smollm2-135m"
# what a config.json may leave out, as transformers' classes of configurations have it
_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "qwen2": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
}
HEAD = "lm_head.weight"
_UNUSED = re.compile(r".*rotary_emb\.inv_freq")  # constants that old files store


@dataclass(frozen=True)
class Language:
    """A language model.

    sizes: of its decoder. tokenizer: adds nothing to a text, and cuts nothing. ends: bos_token_id,
    pad_token_id, and eos_token_id, which may be a list. read: a key of the hub, such as
    model.norm.weight, -> the values in float32. where: names it in errors.
    """

    sizes: DecoderConfig
    tokenizer: Tokenizer
    chat_template: str
    ends: dict[str, Any]
    read: Callable[[str], np.ndarray]
    source: Source
    where: Path

    @property
    def text(self) -> dict[str, Any]:
        """The sizes in the hub's words, without vocab_size."""
        return {
            "hidden_size": self.sizes.hidden_size,
            "intermediate_size": self.sizes.intermediate_size,
            "num_hidden_layers": self.sizes.num_layers,
            "num_attention_heads": self.sizes.num_heads,
            "num_key_value_heads": self.sizes.num_kv_heads,
            "max_position_embeddings": self.sizes.max_position_embeddings,
            "rms_norm_eps": self.sizes.rms_norm_eps,
            "head_dim": self.sizes.head_dim,
            "rope_theta": self.sizes.rope_theta,
            "tie_word_embeddings": self.sizes.tie_word_embeddings,
        }

    @property
    def end_tokens(self) -> dict[str, str]:
        """The tokens of `ends`, by their names in a tokenizer's files: bos_token and so on."""
        tokens = {}
        for key, value in self.ends.items():
            first = value[0] if isinstance(value, list) else value
            tokens[key.removesuffix("_id")] = self.tokenizer.id_to_token(first)
        return tokens


def read_language(path_or_id: str | Path) -> Language:
    """Open `PUBLISHED`, which is fetched, a .gguf file, a folder or a hub id.

    Raises for another architecture, and for a tensor that is missing, misshapen or unknown.
    """
    path = path_or_id
    if str(path) == PUBLISHED:
        path = next(fetch(PUBLISHED).glob("*.gguf"))
    if not str(path).endswith(".gguf"):
        return _read_folder(resolve(path, FILES), path_or_id)
    # here: the package takes a third of a second to import, and few need it
    from lco_jax.checkpoint.gguf import read_gguf

    file = Path(path).expanduser()
    if not file.exists():
        raise LcoError(f"{file} does not exist")
    check_is_file(file)
    return read_gguf(file, path_or_id)


# ---- what folders and GGUF files have in common


def read_sizes(config: dict[str, Any], where: Path) -> DecoderConfig:
    """The decoder's sizes in a config.json's content. Raises for what Qwen2.5's cannot have."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        known = " and ".join(_DEFAULTS)
        raise LcoError(f"{where}: the architecture {kind!r:.60} is not supported; {known} are")
    stated = {key: value for key, value in config.items() if value is not None}
    text = {**_DEFAULTS[kind], **stated, "model_type": "qwen2_5_omni_text"}
    sizes = DecoderConfig.from_hf(text, str(where))
    if sizes.head_dim % 16:
        raise LcoError(
            f"{where}: a head has {sizes.head_dim} numbers, and M-RoPE needs a multiple of 16"
        )
    return replace(sizes, qkv_bias=kind == "qwen2")


def check_tensors(found: Mapping[str, tuple[int, ...]], sizes: DecoderConfig, where: Path) -> None:
    """Raise for a tensor that is missing, misshapen or unknown. found: shapes by the hub's keys."""
    if sizes.num_layers > len(found):
        raise LcoError(f"{where}: {sizes.num_layers} layers, and only {len(found)} tensors")
    wanted = {
        f"model.{name}": leaf.shape[layer is not None :]
        for _, name, leaf, layer in per_layer(abstract_params(sizes))
    }
    if not sizes.tie_word_embeddings:
        wanted[HEAD] = wanted["model.embed_tokens.weight"]
    for key, shape in wanted.items():
        if key not in found:
            hint = ", which its configuration does not tie to the embeddings" * (key == HEAD)
            raise LcoError(f"{where} has no {key}{hint}")
        if found[key] != shape:
            raise LcoError(f"{where}: {key} has shape {found[key]}, and must have {shape}")
    for key in sorted(found.keys() - wanted.keys() - {HEAD}):
        if not _UNUSED.fullmatch(key):
            raise LcoError(f"{where}: {key:.80} has no place in Qwen2.5's decoder")


def plain(tokenizer: Tokenizer, rows: int, where: Path) -> Tokenizer:
    """The tokenizer without what cuts, pads or adds: the chat template says how a text begins.

    rows: of the embeddings. Raises for a token that has none.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= rows:
        token = tokenizer.id_to_token(last)
        raise LcoError(
            f"{where}: the token {token!r:.40} has the number {last}, and the embeddings "
            f"are of {rows} tokens"
        )
    return tokenizer


def check_ends(ends: dict[str, Any], tokenizer: Tokenizer, where: Path) -> dict[str, Any]:
    """`Language.ends`. Raises for what is no token."""
    for key, value in ends.items():
        numbers = value if isinstance(value, list) and value else [value]
        for number in numbers:
            is_number = type(number) is int and 0 <= number < 2**32
            if not is_number or tokenizer.id_to_token(number) is None:
                raise LcoError(f"{where}: {key} is {value!r:.60}, and must be a token's number")
    return ends


# ---- folders


def _read_folder(folder: Path, given: str | Path) -> Language:
    config = folder / "config.json"
    sizes = read_sizes(read_json(config), config)
    tensors = TensorFolder(folder)
    check_tensors({key: tensors.shape(key) for key in tensors}, sizes, folder)
    tokenizer = plain(_tokenizer(folder), sizes.vocab_size, folder)
    return Language(
        sizes=sizes,
        tokenizer=tokenizer,
        chat_template=_template(folder),
        ends=check_ends(_ends(folder), tokenizer, folder),
        read=lambda key: tensors.read(key).astype(np.float32),
        source=source_of(given, folder, FILES),
        where=folder,
    )


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise LcoError(
            f"{file} does not exist; save_pretrained of transformers' tokenizer makes it"
        )
    check_is_file(file)
    with explained(f"{file} does not load", Exception):  # which is what tokenizers raises
        return Tokenizer.from_file(str(file))


def _template(folder: Path) -> str:
    """The chat template, where transformers looks for it."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        check_is_file(jinja)
        with explained(f"{jinja} is not UTF-8", UnicodeDecodeError):
            return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several, with names
            named = [one for one in template if isinstance(one, dict)]
            template = {one.get("name"): one.get("template") for one in named}.get("default")
        if isinstance(template, str):
            return template
    raise LcoError(f"{folder} has no chat template; an instruction-tuned model has one")


def _ends(folder: Path) -> dict[str, Any]:
    """The tokens that begin, end and pad a text. Where there is no such token, it is the end."""
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():
        config |= read_json(generation)
    end = config.get("eos_token_id")
    first = end[0] if isinstance(end, list) and end else end
    begin, pad = config.get("bos_token_id"), config.get("pad_token_id")
    return {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": first if pad is None else pad,
    }
