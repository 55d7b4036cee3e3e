"""What a config.json leaves unsaid: transformers has written only what differs from its classes' defaults."""

from typing import Any

TEXT: dict[str, dict[str, Any]] = {  # by the model_type of a text_config, or of a flat config
    "qwen2_5_vl": {"rms_norm_eps": 1e-5},
    "qwen2_5_vl_text": {"rms_norm_eps": 1e-5},
    "qwen2_5_omni_text": {"rms_norm_eps": 1e-6},
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
_QWEN_VISION = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 4,
}  # fmt: skip
_QWEN_AUDIO = {
    "encoder_layers": 32, "d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "n_window": 100,
    "output_dim": 3584, "num_mel_bins": 128,
}  # fmt: skip
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "num_channels": 3,
}  # fmt: skip
_OMNI = {
    "vision_config": _QWEN_VISION, "audio_config": _QWEN_AUDIO, "position_id_per_seconds": 25, "seconds_per_chunk": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # by the model_type of the whole
    "qwen2_5_vl": {"vision_config": _QWEN_VISION},
    "qwen2_5_omni_thinker": _OMNI,
    "llava_next": {
        "vision_config": _CLIP, "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
}  # fmt: skip


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes a model, with its class's defaults for what it leaves out.

    What is not there at all (no vision_config) stays absent: that is no class's default.
    """
    config = dict(config)
    for key, default in MODELS.get(config.get("model_type", ""), {}).items():
        if not isinstance(default, dict):
            config.setdefault(key, default)
        elif isinstance(config.get(key), dict):
            config[key] = {**default, **{k: v for k, v in config[key].items() if v is not None}}
    return config
