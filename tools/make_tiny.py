"""Make the tokenizer and configuration of `builtin:tiny`, which ship in `lco_jax/assets/tiny`.

A byte-level BPE tokenizer trained on the bundled triplets, a chat template, and the geometry of a
small Qwen2.5-VL, in the files of the hub. `lco_jax/checkpoint/builtin.py` adds random weights when
the checkpoint is first used.

Usage: ``python tools/make_tiny.py`` after a change here or of the bundled triplets.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lco_jax.checkpoint.chat_template import chat_template
from lco_jax.checkpoint.gguf import QWEN2_SPLIT
from lco_jax.checkpoint.omni import picture_settings
from lco_jax.core.files import write_json, write_text

ASSETS = Path(__file__).resolve().parent.parent / "lco_jax" / "assets"
BPE_VOCABULARY = 1024
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 3, 4, 2, 256
VISION_HIDDEN, VISION_DEPTH, VISION_MLP, PATCH = 32, 2, 64, 14
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
MEDIA = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
PROMPT = (
    "system\nYou are a helpful assistant. user\n"
    "Summarize the above text image in one word: assistant\n"
)


def write(folder: Path) -> None:
    """Write every file but the weights, and beside the folder the shapes of those."""
    with open(ASSETS / "triplets_train.jsonl", encoding="utf-8") as file:
        texts = [side["text"] for line in file for side in json.loads(line).values()]
    tokenizer = make_tokenizer([*texts, *[PROMPT] * 100], BPE_VOCABULARY, SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    write_json(folder / "tokenizer_config.json", tokenizer_config(ids))
    write_json(folder / "chat_template.json", {"chat_template": chat_template(MEDIA, SYSTEM)})
    config = model_config(ids, tokenizer.get_vocab_size())
    write_json(folder / "config.json", config)
    shapes = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(shape)}"
        for name, shape in tensor_shapes(config).items()
    )
    write_text(folder.with_name(f"{folder.name}_shapes.json"), f"{{\n{shapes}\n}}\n")
    pictures = picture_settings("Qwen2_5_VLProcessor", PATCH)
    write_json(folder / "preprocessor_config.json", pictures)


def tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    """What tokenizer_config.json holds. ids: the special tokens'."""
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": t, **flags} for t, i in ids.items()},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def make_tokenizer(texts: Iterable[str], vocabulary: int, specials: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of so many tokens, and the special ones after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    return tokenizer


def model_config(special: dict[str, int], vocabulary: int) -> dict:
    """What config.json holds."""
    head_dim = HIDDEN // HEADS
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": LAYERS,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        },
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "vision_token_id": special["<|vision_pad|>"],
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": VISION_DEPTH,
            "hidden_act": "silu",
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
    }


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by its hub name. Weights are drawn in this order."""
    hidden, mlp, tower = config["hidden_size"], config["intermediate_size"], config["vision_config"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    vision, vision_mlp, patch = (
        tower["hidden_size"],
        tower["intermediate_size"],
        tower["patch_size"],
    )
    merged = 4 * vision
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    linears = {
        "self_attn.o": (hidden, hidden),
        "mlp.down": (hidden, mlp),
        "mlp.gate": (mlp, hidden),
        "mlp.up": (mlp, hidden),
    }
    tower_linears = {
        "attn.qkv": (3 * vision, vision),
        "attn.proj": (vision, vision),
        "mlp.gate_proj": (vision_mlp, vision),
        "mlp.up_proj": (vision_mlp, vision),
        "mlp.down_proj": (vision, vision_mlp),
    }
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    with_bias: dict[str, tuple[int, int]] = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")
        }
        for name, shape in attention.items():
            shapes |= {
                f"{layer}.self_attn.{name}_proj.weight": shape,
                f"{layer}.self_attn.{name}_proj.bias": shape[:1],
            }
        shapes |= {f"{layer}.{name}_proj.weight": shape for name, shape in linears.items()}
    for i in range(tower["depth"]):
        with_bias |= {f"visual.blocks.{i}.{name}": shape for name, shape in tower_linears.items()}
        shapes |= {f"visual.blocks.{i}.norm{j}.weight": (vision,) for j in (1, 2)}
    with_bias |= {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (hidden, merged)}
    for name, shape in with_bias.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {
        "visual.merger.ln_q.weight": (vision,),
        "visual.patch_embed.proj.weight": (vision, 3, 2, patch, patch),
    }
    return shapes


if __name__ == "__main__":
    write(ASSETS / "tiny")
