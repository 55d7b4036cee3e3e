"""Tiny random language models and Whispers, in each layout that `lco_jax.assemble` reads."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from reference_files import CHATML
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from lco_jax.core.files import ASSETS, read_json, write_json

TEMPLATE = CHATML.replace("SYSTEM", "true")  # begins with a system turn
DIGITS = [["1", "2"], ["12", "3"], ["Ġ", "1"]]  # merges
PADDING = 10  # rows of the embeddings that no token has
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
KINDS = {  # the class, and whether the head is tied
    "llama_tied": ("Llama", True),
    "llama": ("Llama", False),
    "qwen2": ("Qwen2", False),
}
SPLITS = {  # as in the hub's tokenizer.json of SmolLM2, GPT-2 and Qwen2
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ],
}
GGUF_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
CT2_LAYER = {
    "self_attn_layer_norm.weight": "self_attention/layer_norm/gamma",
    "self_attn_layer_norm.bias": "self_attention/layer_norm/beta",
    "self_attn.out_proj.weight": "self_attention/linear_1/weight",
    "self_attn.out_proj.bias": "self_attention/linear_1/bias",
    "final_layer_norm.weight": "ffn/layer_norm/gamma",
    "final_layer_norm.bias": "ffn/layer_norm/beta",
    "fc1.weight": "ffn/linear_0/weight",
    "fc1.bias": "ffn/linear_0/bias",
    "fc2.weight": "ffn/linear_1/weight",
    "fc2.bias": "ffn/linear_1/bias",
}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random: matrices by their fan-in, gains around 1, biases around 0."""
    torch.manual_seed(seed)
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            continue
        noise = torch.randn(parameter.shape)
        if parameter.ndim == 1:
            is_gain = name.endswith("weight")
            parameter.copy_(0.2 * noise + is_gain)
        else:
            parameter.copy_(1.3 * parameter[0].numel() ** -0.5 * noise)
    return model


def tokenizer(split: str = "qwen2") -> Tokenizer:
    """That of `builtin:tiny`, which also joins digits, with another way to split text."""
    content = read_json(ASSETS / "tiny" / "tokenizer.json")
    bpe = content["model"]
    last = ["".join(pair) for pair in bpe["merges"][-len(DIGITS) :]]
    bpe["merges"][-len(DIGITS) :] = DIGITS
    for old, pair in zip(last, DIGITS, strict=True):
        bpe["vocab"]["".join(pair)] = bpe["vocab"].pop(old)
    made = Tokenizer.from_str(json.dumps(content))
    made.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    made.normalizer = normalizers.NFC() if split == "qwen2" else normalizers.Sequence([])
    return made


def build_language(
    kind: str, folder: Path, split: str = "qwen2", **more: object
) -> torch.nn.Module:
    """Write a language model as on the hub, and return it."""
    name, tied = KINDS[kind]
    words = tokenizer(split)
    ends = {name: words.token_to_id(token) for name, token in
            (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|endoftext|>"))}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        **{
            **SIZES,
            "vocab_size": words.get_vocab_size() + PADDING,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
            **{f"{end}_token_id": number for end, number in ends.items()},
        }
    )
    config._attn_implementation = "eager"
    model = randomise(getattr(transformers, f"{name}ForCausalLM")(config), 0)
    model.tie_weights()
    model.save_pretrained(folder)
    write_words(folder, words)
    return model


def write_words(folder: Path, words: Tokenizer, template: str = TEMPLATE) -> None:
    """A folder's tokenizer and chat template."""
    words.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        },
    )


def write_gguf(
    file: Path,
    model: torch.nn.Module,
    words: Tokenizer,
    split: str = "qwen2",
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **fields: object,
) -> None:
    """Write a model as llama.cpp's converter does. matrices: how they are stored. fields: strings
    that replace its own; None leaves one out."""
    config = model.config
    kind = config.model_type
    own = {"tokenizer.ggml.pre": split, "tokenizer.chat_template": TEMPLATE}
    writer = gguf.GGUFWriter(file, fields.pop("general.architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_words(writer, words, config)
    for key, value in (own | fields).items():
        if value is not None:
            writer.add_string(key, value)
    for key, value in model.state_dict().items():
        if not (key == "lm_head.weight" and config.tie_word_embeddings):
            values = value.numpy()
            if kind == "llama":
                values = _in_pairs(key, values, config)
            stored = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                gguf_name(key), gguf.quants.quantize(values, stored), raw_dtype=stored
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(key: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = key.removeprefix("model.").rpartition(".")
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, layer, name = stem.split(".", 2)
    return f"blk.{layer}.{GGUF_LAYER[name]}.{kind}"


def _in_pairs(key: str, values: np.ndarray, config: object) -> np.ndarray:
    """The rows of queries and keys in llama.cpp's order (its convert_hf_to_gguf.py, `permute`)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = key.split(".")[-2]
    if part not in heads:
        return values
    halves = values.reshape(heads[part], 2, values.shape[0] // heads[part] // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _add_words(writer: gguf.GGUFWriter, words: Tokenizer, config: object) -> None:
    """The tokenizer. Rows of the embeddings that no token has are tokens that are not used."""
    content = json.loads(words.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    by_number = {number: token for token, number in words.get_vocab().items()}
    tokens, types = [], []
    for number in range(config.vocab_size):
        tokens.append(by_number.get(number, f"[PAD{number}]"))
        if number not in by_number:
            types.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number]["special"]
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)


def build_whisper(folder: Path, mel_bins: int = 80) -> torch.nn.Module:
    """Write a Whisper as on the hub, and return it. It sees 120 mel frames at once."""
    config = transformers.WhisperConfig(
        d_model=40,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=67,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=20,
        num_mel_bins=mel_bins,
        max_source_positions=60,
        max_target_positions=20,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    config._attn_implementation = "eager"
    model = randomise(transformers.WhisperForConditionalGeneration(config), 1)
    model.save_pretrained(folder)
    return model


def write_ctranslate2(file: Path, model: torch.nn.Module, dtype: type = np.float32) -> None:
    """Write a Whisper's encoder as CTranslate2's converter does, and a variable of its decoder."""
    state = {key: value.numpy() for key, value in model.model.encoder.state_dict().items()}
    found = {
        "encoder/num_heads": np.array(model.config.encoder_attention_heads, np.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "encoder/layer_norm/gamma": state["layer_norm.weight"],
        "encoder/layer_norm/beta": state["layer_norm.bias"],
        "decoder/scale_embeddings": np.array(0, np.int8),
    }
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"encoder/{name}/{part}"] = state[f"{name}.{part}"]
    for i in range(model.config.encoder_layers):
        ours, theirs = f"layers.{i}", f"encoder/layer_{i}"
        for name, other in CT2_LAYER.items():
            found[f"{theirs}/{other}"] = state[f"{ours}.{name}"]
        attention = f"{ours}.self_attn"
        queries = state[f"{attention}.q_proj.bias"]
        biases = [queries, np.zeros_like(queries), state[f"{attention}.v_proj.bias"]]
        weights = [state[f"{attention}.{part}_proj.weight"] for part in "qkv"]
        found[f"{theirs}/self_attention/linear_0/weight"] = np.concatenate(weights)
        found[f"{theirs}/self_attention/linear_0/bias"] = np.concatenate(biases)
    numbers = {np.float32: 0, np.int8: 1, np.int16: 2, np.int32: 3, np.float16: 4}
    content = struct.pack("<I", 6) + _name("WhisperSpec") + struct.pack("<II", 3, len(found))
    for name, values in found.items():
        if values.dtype == np.float32:
            values = values.astype(dtype)
        content += _name(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        content += struct.pack("<BI", numbers[values.dtype.type], values.nbytes) + values.tobytes()
    file.write_bytes(content + struct.pack("<I", 0))


def _name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def change(file: Path, **values: object) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**read_json(file), **values}
    write_json(file, {key: value for key, value in content.items() if value is not None})
