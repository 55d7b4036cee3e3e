"""Tiny random checkpoints in hub layout and their torch models: what the ports are held against.

Structure is real, geometry is small: three query heads to a key-value head, a head_dim that is not hidden / heads where
the family allows it, and every parameter drawn at random, biases and norms included.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

try:
    import torchvision
except RuntimeError:  # the registry's build is for CUDA; on a CPU torch its operators must at least have a schema
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # nothing here calls them
        _operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

from lco_jax.checkpoint import builtin
from lco_jax.core.files import read_json, write_json

FAMILIES = ("vl", "vl_tied", "omni", "omni_full")
LAYERS = 3
TEXT = {
    "intermediate_size": 88, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "use_sliding_window": False,
}  # fmt: skip
TEXTS = [
    "A short line.",
    "The quick brown fox jumps over the lazy dog near the river bank at 07:45, and then it sleeps for an hour.",
    "今天天气很好，我们去公园散步吧。",
    "numbers 12345 and\n\nblank lines, é, e\u0301 and <|im_start|> in a text",
    "x",
    "An old man is reading a newspaper on a bench.",
]


def _vision(hidden: int, **extra) -> dict:
    return {
        "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1], **extra,
    }  # fmt: skip


def _config(family: str, base: dict) -> dict:
    """config.json: `vl` flat as the hub has it, `vl_tied` nested and spelt as transformers 5 does, Omni nested 4.x."""
    ids = {key: base[key] for key in base if key.endswith("token_id")}
    text = {**TEXT, "vocab_size": base["vocab_size"], "bos_token_id": base["bos_token_id"]}
    if family.startswith("vl"):
        text |= {"hidden_size": 96}  # head_dim 16
        top = {
            "architectures": base["architectures"],
            "model_type": "qwen2_5_vl",
            **ids,
            "vision_config": _vision(96, in_chans=3),
        }
        if family == "vl":
            rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
            return {**text, **rope, **top, "tie_word_embeddings": False, "torch_dtype": "float32"}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        nested = {**text, **rope, "model_type": "qwen2_5_vl_text", "tie_word_embeddings": True}
        return {**top, "text_config": nested, "dtype": "float32"}
    text |= {"hidden_size": 80, "head_dim": 16, "model_type": "qwen2_5_omni_text", "rope_theta": 1e6}
    text["rope_scaling"] = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    thinker = {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"], "model_type": "qwen2_5_omni_thinker",
        "torch_dtype": "float32", "audio_token_index": 1, "image_token_index": ids["image_token_id"],
        "video_token_index": ids["video_token_id"], "vision_start_token_id": ids["vision_start_token_id"],
        "tie_word_embeddings": False, "text_config": text,
        "vision_config": _vision(80, model_type="qwen2_5_omni_vision_encoder"),
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder", "d_model": 32, "encoder_layers": 1, "num_hidden_layers": 1,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 128, "n_window": 20, "output_dim": 80,
        },
    }  # fmt: skip
    if family == "omni":
        return thinker
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
    }


def model_class(family: str) -> type:
    """The transformers class of a family."""
    name = "Qwen2_5_VL" if family.startswith("vl") else "Qwen2_5OmniThinker"
    return getattr(transformers, f"{name}ForConditionalGeneration")


def hub_key(key: str) -> str:
    """transformers-5 module path -> the key that the hub's files have."""
    key = re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", key)
    return re.sub(r"^model\.language_model\.", "model.", key)


def build(family: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Write a checkpoint of `family` to `folder` and return its torch model."""
    builtin.build(folder)  # tokenizer and template; weights and config are replaced
    (folder / "model.safetensors").unlink()
    config = _config(family, read_json(folder / "config.json"))
    write_json(folder / "config.json", config)
    thinker = config.get("thinker_config", config)
    settings = transformers.CONFIG_MAPPING[thinker["model_type"]].from_dict(json.loads(json.dumps(thinker)))
    settings._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(family)(settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.5 if "embed_tokens" in name else 0.2 if parameter.ndim == 1 else 1.3 * parameter[0].numel() ** -0.5
        gain = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.copy_(gain + spread * torch.randn(parameter.shape))
    model.tie_weights()
    prefix = "thinker." if family == "omni_full" else ""
    tied = family == "vl_tied"
    state = {
        prefix + hub_key(key): value.numpy().copy()
        for key, value in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    if family == "omni_full":
        state |= {"talker.model.weight": np.zeros((2, 2), np.float32), "token2wav.x": np.zeros(2, np.float32)}
    _save(state, folder, shards=1 if tied else 2)
    return model


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


def embed(model: torch.nn.Module, tokens: list[np.ndarray]) -> np.ndarray:
    """The reference's pooling: left padding, last position after the final norm, unit length."""
    width = max(map(len, tokens))
    ids = torch.tensor(np.stack([np.pad(t, (width - len(t), 0)) for t in tokens]), dtype=torch.long)
    mask = torch.tensor(np.stack([np.pad(np.ones_like(t), (width - len(t), 0)) for t in tokens]), dtype=torch.long)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.nn.functional.normalize(out.hidden_states[-1][:, -1], dim=-1)
