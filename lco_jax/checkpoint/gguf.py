"""Language models in GGUF files, the format of llama.cpp, read by the package `gguf`.

A quantised tensor is dequantised to float32. llama.cpp orders the rows of Llama's queries and keys
for its own kind of rope; here they are put back in the hub's order.
"""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lco_jax.checkpoint.language import HEAD, Language, check_ends, check_tensors, plain, read_sizes
from lco_jax.checkpoint.parts import Source, licence_of
from lco_jax.checkpoint.tensors import check_finite
from lco_jax.core.errors import LcoError, explained
from lco_jax.models.config import DecoderConfig

_SIZES = {  # the hub's names of what <architecture>.* holds
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_TENSORS = {  # llama.cpp's names of tensors -> the hub's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {  # within a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# how Qwen2 splits text before BPE, a constant of the tokenizer's file format
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(file: Path, given: str | Path) -> Language:
    """Open a GGUF file. Raises for an architecture, rope or tokenizer that is not supported.

    given: what the user calls it.
    """
    with explained(f"{file} is no GGUF file that can be read", Exception):  # gguf raises anything
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {_hub_key(tensor.name): tensor for tensor in reader.tensors}
    sizes = _sizes(fields, tensors, file)
    check_tensors({key: _shape(tensor) for key, tensor in tensors.items()}, sizes, file)
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise LcoError(f"{file} has no chat template; an instruction-tuned model has one")
    tokenizer = plain(_tokenizer(fields, file), sizes.vocab_size, file)
    in_pairs = fields["general.architecture"] == "llama"
    licence = fields.get("general.license") or licence_of(file.parent)
    return Language(
        sizes=sizes,
        tokenizer=tokenizer,
        chat_template=template,
        ends=check_ends(_ends(fields), tokenizer, file),
        read=partial(_read, file, tensors, in_pairs=in_pairs, sizes=sizes),
        source=Source(given, (file,), str(licence) if licence else None),
        where=file,
    )


# ---- tensors


def _read(
    file: Path, tensors: dict[str, ReaderTensor], key: str, in_pairs: bool, sizes: DecoderConfig
) -> np.ndarray:
    """A tensor in float32. in_pairs: whether rows of queries and keys are in llama.cpp's order."""
    tensor = tensors[key]
    # what gguf raises for a type that it writes and does not read
    with explained(f"{file}: {tensor.name} cannot be dequantised", NotImplementedError):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    check_finite(values, f"{file}: {tensor.name}")
    return _in_hub_order(key, values, sizes) if in_pairs else values


def _hub_key(name: str) -> str:
    """The hub's key of a tensor; an unknown one keeps its name."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if layer and layer[2] in _LAYER_TENSORS:
        return f"model.layers.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.{kind}"
    return f"{_TENSORS[stem]}.{kind}" if stem in _TENSORS else name


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Its shape in the hub's order of axes; llama.cpp's is the reverse."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _in_hub_order(key: str, values: np.ndarray, sizes: DecoderConfig) -> np.ndarray:
    """Rows of queries and keys: from pairs side by side to the hub's halves of a head."""
    for part, heads in (("q_proj", sizes.num_heads), ("k_proj", sizes.num_kv_heads)):
        if f".{part}." in key:
            pairs = values.reshape(heads, sizes.head_dim // 2, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _sizes(fields: dict[str, Any], tensors: dict[str, ReaderTensor], file: Path) -> DecoderConfig:
    """The decoder's sizes. Raises for a rope that is not supported."""
    kind = fields.get("general.architecture")
    config = {ours: fields.get(f"{kind}.{theirs}") for ours, theirs in _SIZES.items()}
    for key in ("rms_norm_eps", "rope_theta"):
        if isinstance(config[key], float):
            # stored in float32, in which 1e-5 has other digits
            config[key] = float(f"{config[key]:.6g}")
    table = tensors.get("model.embed_tokens.weight")
    config["vocab_size"] = None if table is None else _shape(table)[0]
    config |= {"model_type": kind, "tie_word_embeddings": HEAD not in tensors}
    sizes = read_sizes(config, file)
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise LcoError(f"{file}: a rope that is scaled is not supported")
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.get(f"{kind}.{key}", sizes.head_dim) != sizes.head_dim:
            raise LcoError(f"{file}: {kind}.{key} must be the width of a head, {sizes.head_dim}")
    # llama.cpp adds biases wherever a file has them
    biased = any(key.endswith("q_proj.bias") for key in tensors)
    return dataclasses.replace(sizes, qkv_bias=biased)


# ---- the tokenizer


def _tokenizer(fields: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer, a byte-level BPE."""
    split = _split(fields, file)
    tokens, types, merges = (
        fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
    )
    lists = isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list)
    if not lists or len(tokens) != len(types):
        raise LcoError(f"{file} has no tokens with their types and merges")
    numbers = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED  # rows of the embeddings that no token has
    }
    pairs = [tuple(merge.split(" ")) for merge in merges]
    with explained(f"{file}: its tokens and merges make no tokenizer", Exception):
        tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=pairs))
    if fields["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added = AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer


def _split(fields: dict[str, Any], file: Path) -> pre_tokenizers.PreTokenizer:
    """What splits text before BPE."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "gpt-2": [byte_level],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(split, str) or split not in splits:
        raise LcoError(
            f"{file}: the tokenizer {kind!r:.40}, {split!r:.40} is not supported; give the "
            "folder of the hub instead"
        )
    return pre_tokenizers.Sequence(splits[split])


def _ends(fields: dict[str, Any]) -> dict[str, Any]:
    """The tokens that begin, end and pad a text. Where there is no such token, it is the end."""
    end = fields.get("tokenizer.ggml.eos_token_id")
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id", end),
        "eos_token_id": end,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", end),
    }
