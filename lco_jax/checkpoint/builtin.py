"""`builtin:tiny`: a small random Qwen2.5-VL checkpoint with its own tokenizer, made on first use.

In real Hugging Face layout: config.json as the hub spells it, safetensors with the hub's key names (vision tower
included, so that transformers loads it whole), a byte-level BPE tokenizer trained on the bundled triplets, a chat
template. It makes everything run without a network; it has learned nothing, and says so by its retrieval scores.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lco_jax.core.files import write_json, written_aside

NAME = "builtin:tiny"
VERSION = 1  # part of the cache's name: raise it when what is written changes
SEED = 0
BPE_VOCABULARY = 1024
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 3, 4, 2, 256
VISION_HIDDEN, VISION_DEPTH, VISION_MLP, PATCH = 32, 2, 64, 14
TRIPLETS = Path(__file__).parent.parent / "assets" / "triplets_train.jsonl"
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# how Qwen2 splits text before BPE, a constant of the tokenizer's file format
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def build(folder: Path | None = None) -> Path:
    """The checkpoint's folder; written on the first call, by default under ~/.cache/lco_jax."""
    cached = folder is None
    if folder is None:
        cache = Path(os.environ.get("LCO_JAX_CACHE", Path.home() / ".cache" / "lco_jax"))
        corpus = hashlib.sha256(TRIPLETS.read_bytes()).hexdigest()[:8]
        folder = cache / f"tiny-{VERSION}-{corpus}"
        if (folder / "config.json").exists():
            return folder
    with written_aside(folder, first_wins=cached) as aside:
        ids = _write_tokenizer(aside)
        _write_configs(aside, ids)
        save_file(_weights(len(ids["vocabulary"])), aside / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> dict[str, dict[str, int]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    with open(TRIPLETS, encoding="utf-8") as file:
        texts = [side["text"] for line in file for side in json.loads(line).values()]
    template = "system\nYou are a helpful assistant. user\nSummarize the above text image in one word: assistant\n"
    tokenizer.train_from_iterator([*texts, *[template] * 100], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False, "added_tokens_decoder": {str(i): {"content": t, **flags} for t, i in ids.items()},
        "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return {"specials": ids, "vocabulary": tokenizer.get_vocab()}


def _write_configs(folder: Path, ids: dict[str, dict[str, int]]) -> None:
    special = ids["specials"]
    head_dim = HIDDEN // HEADS
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "float32",
        "vocab_size": len(ids["vocabulary"]), "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu", "max_position_embeddings": 32768, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0, "use_cache": True, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": LAYERS, "rope_theta": 1e6, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]},
        "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
        "vision_token_id": special["<|vision_pad|>"], "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": VISION_DEPTH, "hidden_act": "silu", "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP, "num_heads": 2, "in_channels": 3, "in_chans": 3,
            "out_hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": 2, "spatial_patch_size": PATCH,
            "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    write_json(folder / "config.json", config)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    """Every tensor by its hub name: matrices normal with variance 1 / fan-in, gains 1, biases 0, embeddings normal."""
    head_dim = HIDDEN // HEADS
    kv, vision, merged = KV_HEADS * head_dim, VISION_HIDDEN, 4 * VISION_HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (HIDDEN,)
        for name, size in (("q", HIDDEN), ("k", kv), ("v", kv)):
            shapes |= {
                f"{layer}self_attn.{name}_proj.weight": (size, HIDDEN),
                f"{layer}self_attn.{name}_proj.bias": (size,),
            }
        shapes |= {f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN), f"{layer}mlp.down_proj.weight": (HIDDEN, MLP)}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
    linears = {"attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision), "mlp.gate_proj": (VISION_MLP, vision),
               "mlp.up_proj": (VISION_MLP, vision), "mlp.down_proj": (vision, VISION_MLP)}  # fmt: skip
    towers = {f"visual.blocks.{i}.{name}": shape for i in range(VISION_DEPTH) for name, shape in linears.items()}
    towers |= {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (HIDDEN, merged)}
    for name, shape in towers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"visual.blocks.{i}.norm{j}.weight": (vision,) for i in range(VISION_DEPTH) for j in (1, 2)}
    shapes |= {"visual.merger.ln_q.weight": (vision,), "visual.patch_embed.proj.weight": (vision, 3, 2, PATCH, PATCH)}

    rng = np.random.default_rng(SEED)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        else:
            fan_in = 1 if "embed_tokens" in name else int(np.prod(shape[1:]))
            value = rng.normal(0.0, fan_in**-0.5, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
