"""Language models in GGUF files, the format of llama.cpp, read by the package `gguf`.

A quantised tensor is dequantised to float32. llama.cpp orders the rows of Llama's queries and keys
for its own kind of rope; here they are put back in the hub's order.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, TokenType, get_tensor_name_map
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lco_jax.checkpoint.language import Language, check_head
from lco_jax.checkpoint.tensors import check_finite
from lco_jax.core.errors import LcoError, explained

_SIZES = {  # the hub's names of what <architecture>.* holds
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
# how Qwen2 splits text before BPE, a constant of the tokenizer's file format
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(file: Path) -> Language:
    """Open a GGUF file. Raises for an architecture, rope or tokenizer that is not supported."""
    with explained(f"{file} is no GGUF file that can be read", Exception):  # gguf raises anything
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        known = " and ".join(_ARCHITECTURES)
        raise LcoError(f"{file}: the architecture {kind!r:.60} is not supported; {known} are")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    text = _text(fields, kind, tensors, file)
    names = get_tensor_name_map(_ARCHITECTURES[kind], text["num_hidden_layers"])

    def read(key: str) -> np.ndarray | None:
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name not in tensors:
            return None
        values = dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        check_finite(values, f"{file}: {name}")
        return _in_hub_order(key, values, text) if kind == "llama" else values

    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise LcoError(f"{file} has no chat template; an instruction-tuned model has one")
    return Language(text, _tokenizer(fields, file), template, _ends(fields, file), read, str(file))


def _text(
    fields: dict[str, Any], kind: str, tensors: dict[str, ReaderTensor], file: Path
) -> dict[str, Any]:
    """The sizes in the hub's words."""
    if "rope_freqs.weight" in tensors or f"{kind}.rope.scaling.type" in fields:
        raise LcoError(f"{file}: a rope that is scaled is not supported")
    text = {}
    for ours, theirs in _SIZES.items():
        value = fields.get(f"{kind}.{theirs}")
        if not isinstance(value, int | float) or value <= 0:
            raise LcoError(f"{file}: {kind}.{theirs} is {value!r:.60}, and must be a number")
        text[ours] = value
    # stored in float32, in which 1e-5 has other digits
    text["rms_norm_eps"] = float(f"{text['rms_norm_eps']:.6g}")
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    text["rope_theta"] = fields.get(f"{kind}.rope.freq_base", 10_000.0)
    text["tie_word_embeddings"] = "output.weight" not in tensors
    check_head(text, str(file))
    return text


def _in_hub_order(key: str, values: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    """Rows of queries and keys: from pairs side by side to the hub's halves of a head."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in key:
            pairs = values.reshape(text[heads], -1, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _tokenizer(fields: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer, a byte-level BPE."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "gpt-2": [byte_level],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if kind != "gpt2" or split not in splits:
        raise LcoError(
            f"{file}: the tokenizer {kind!r:.40}, {split!r:.40} is not supported; give the "
            "folder of the hub instead"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[split])
    tokenizer.decoder = decoders.ByteLevel()
    for token, number in zip(tokens, types, strict=True):
        if number in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added = AddedToken(token, special=number == TokenType.CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer


def _ends(fields: dict[str, Any], file: Path) -> dict[str, int]:
    """The tokens that begin, end and pad a text."""
    end = fields.get("tokenizer.ggml.eos_token_id")
    if not isinstance(end, int):
        raise LcoError(f"{file}: tokenizer.ggml.eos_token_id is {end!r:.60}, and must be a token")
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id", end),
        "eos_token_id": end,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", end),
    }
