"""Tiny random checkpoints as on the hub, and their torch models, which the ports are compared with.

The structure is real, and the sizes are small: three query heads to a key-value head, a head_dim
that is not hidden / heads where the family allows it, windowed and full vision blocks, several
audio chunks a clip. Every parameter is random, also biases and norms.
"""

import copy
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from benchmarks.peer import import_torchvision

import_torchvision()  # before anything of transformers looks for it

from reference_files import PINPOINTS, write_files  # noqa: E402
from reference_media import Golden, golden, mean_of  # noqa: E402, F401 (tests take them from here)

from lco_jax.checkpoint import builtin  # noqa: E402
from lco_jax.core.files import read_json, write_json  # noqa: E402

FAMILIES = ("vl", "vl_tied", "omni", "omni_full")
LLAVA = ("llava_mistral", "llava_llama", "llava_qwen2")
LAYERS = 3
TEXT = {
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}
TEXTS = [
    "A short line.",
    "The quick brown fox jumps over the lazy dog near the river bank at 07:45, "
    "and then it sleeps for an hour.",
    "今天天气很好，我们去公园散步吧。",
    "numbers 12345 and\n\nblank lines, é, e\u0301 and <|im_start|> in a text",
    "x",
    "An old man is reading a newspaper on a bench.",
]


def _vision(hidden: int, **extra) -> dict:
    return {
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 61,
        "num_heads": 3,
        "in_channels": 3,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        **extra,
    }


def _config(family: str, base: dict, ids: dict[str, int], tokens: int) -> dict:
    """config.json: `vl` flat as on the hub, `vl_tied` nested as of transformers 5, Omni of 4.x."""
    if family.startswith("vl"):
        return _vl_config(family, base)
    return (
        _omni_config(family, ids, tokens)
        if family.startswith("omni")
        else _llava_config(family, ids, tokens)
    )


def _vl_config(family: str, base: dict) -> dict:
    ids = {key: base[key] for key in base if key.endswith("token_id")}
    text = {
        **TEXT,
        "vocab_size": base["vocab_size"],
        "bos_token_id": base["bos_token_id"],
        "hidden_size": 96,
    }
    vision = _vision(96, in_chans=3, tokens_per_second=2 if family == "vl" else 3)
    top = {
        "architectures": base["architectures"],
        "model_type": "qwen2_5_vl",
        **ids,
        "vision_config": vision,
    }
    if family == "vl":  # head_dim 16
        rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        return {**text, **rope, **top, "tie_word_embeddings": False, "torch_dtype": "float32"}
    rope = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    }
    nested = {**text, **rope, "model_type": "qwen2_5_vl_text", "tie_word_embeddings": True}
    return {**top, "text_config": nested, "dtype": "float32"}


def _omni_config(family: str, ids: dict[str, int], tokens: int) -> dict:
    text = {
        **TEXT,
        "vocab_size": tokens,
        "hidden_size": 80,
        "head_dim": 16,
        "model_type": "qwen2_5_omni_text",
    }
    text |= {
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    }
    thinker = {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "torch_dtype": "float32",
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": _vision(
            80, model_type="qwen2_5_omni_vision_encoder", tokens_per_second=25
        ),
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": 40,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 67,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
            "n_window": 20,
            "output_dim": 80,
            "activation_function": "gelu",
            "scale_embedding": False,
        },
    }
    if family == "omni":
        return thinker
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
    }


def _llava_config(family: str, ids: dict[str, int], tokens: int) -> dict:
    """As on the hub: most settings of the text model are its class's defaults.

    The vocabulary is padded.
    """
    text = {key: TEXT[key] for key in TEXT if key not in ("hidden_act", "use_sliding_window")}
    text |= {
        "vocab_size": tokens + 3,
        "rms_norm_eps": 1e-5,
        "model_type": family.removeprefix("llava_"),
    }
    text |= {
        "llava_mistral": {
            "hidden_size": 72,
            "head_dim": 16,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        "llava_llama": {"hidden_size": 96},
        "llava_qwen2": {
            "hidden_size": 96,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "use_sliding_window": False,
        },
    }[family]
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "torch_dtype": "float32",
        "ignore_index": -100,
        "image_token_index": ids["<image>"],
        "image_seq_length": 16,
        "projector_hidden_act": "gelu",
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 91,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 32,
            "vocab_size": 32000,
        },
    }


def model_class(family: str) -> type:
    """The transformers class of a family."""
    name = {"vl": "Qwen2_5_VL", "omni": "Qwen2_5OmniThinker", "llava": "LlavaNext"}[
        family.split("_")[0]
    ]
    return getattr(transformers, f"{name}ForConditionalGeneration")


def hub_key(key: str, family: str = "vl") -> str:
    """transformers-5 module path -> the key that the hub's files have."""
    if not family.startswith("llava"):
        key = re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", key)
        return re.sub(r"^model\.language_model\.", "model.", key)
    key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
    key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
    key = re.sub(r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key)
    return re.sub(r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1", key)


def build(family: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Write a checkpoint of `family` to `folder` and return its torch model."""
    builtin.build(folder)  # tokenizer, template and processor; weights and config are replaced
    (folder / "model.safetensors").unlink()
    config = _config(family, read_json(folder / "config.json"), *write_files(family, folder))
    write_json(folder / "config.json", config)
    thinker = config.get("thinker_config", config)
    settings = transformers.CONFIG_MAPPING[thinker["model_type"]].from_dict(copy.deepcopy(thinker))
    settings._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(family)(settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw(name, parameter))
    model.tie_weights()
    prefix = "thinker." if family == "omni_full" else ""
    tied = family == "vl_tied"
    state = {
        prefix + hub_key(key, family): value.numpy().copy()
        for key, value in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    if family == "omni_full":
        state |= {
            "talker.model.weight": np.zeros((2, 2), np.float32),
            "token2wav.x": np.zeros(2, np.float32),
        }
    _save(state, folder, shards=1 if tied else 2)
    return model


def _draw(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A random value: matrices scaled by their fan-in, gains around 1, everything else around 0.

    What the vision towers add to their residual is small, so that the epsilon of their norms can be
    seen in the result.
    """
    noise = torch.randn(parameter.shape)
    if re.search(r"patch_embed|visual.*(attn\.proj|down_proj)", name):
        noise = noise * 0.2
    if re.search(r"vision_tower.*(pre_layrnorm|out_proj|fc2)", name):
        noise = noise * 0.2
    if re.search(
        r"embed_tokens|position_embedding|class_embedding|bos_eos_token|image_newline", name
    ):
        return 0.5 * noise
    if parameter.ndim == 1:
        return 0.2 * noise + _centre(name)
    return _gain(name) * parameter[0].numel() ** -0.5 * noise


def _centre(name: str) -> float:
    """The mean of a vector's values."""
    if "pre_layrnorm.weight" in name:
        return 0.2
    return 1.0 if name.endswith("weight") else 0.0


def _gain(name: str) -> float:
    if "projector.linear_1" in name:
        return 5.0  # CLIP's features are small
    if "audio_tower.conv" in name:
        return 2.5  # the signal stands above the sinusoid that is added to it
    if re.search(r"\.([qk]_proj|qkv|q|k)\.", name):
        return 1.6  # sharper attention
    return 1.3


def _save(state: dict[str, np.ndarray], folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in sorted(state)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def embed(model: torch.nn.Module, tokens: list[np.ndarray], pooling: str = "last") -> np.ndarray:
    """The reference's pooling: left padding, last position after the final norm, unit length.

    pooling: or the "mean" of all positions but padding.
    """
    width = max(map(len, tokens))

    def padded(rows: list[np.ndarray]) -> torch.Tensor:
        rows = [np.pad(row, (width - len(row), 0)) for row in rows]
        return torch.tensor(np.stack(rows), dtype=torch.long)

    ids, mask = padded(tokens), padded([np.ones_like(row) for row in tokens])
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    states = out.hidden_states[-1]
    pooled = states[:, -1] if pooling == "last" else mean_of(states, mask)
    return torch.nn.functional.normalize(pooled, dim=-1)
