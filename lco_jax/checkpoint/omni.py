"""What the Omni checkpoints that we make have in common: configuration, tokens, fresh weights.

Such a checkpoint is the thinker of Qwen2.5-Omni in the files and with the keys of the hub, so that
transformers loads it, too. Its parts have sizes of their own. `checkpoint/assembly.py` makes one of
a language model, and the laboratory one that has learned nothing.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lco_jax.checkpoint.shapes import abstract_params, per_layer, tower_module
from lco_jax.models.config import DecoderConfig
from lco_jax.models.registry import find_backbone

TOKENS = {  # what Omni's processor asks its tokenizer for
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
MARKERS = {  # of media in a conversation
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}
_HUB = (  # our names of parameters -> the hub's keys
    (r"decoder\.", "model."),
    (r"visual\.patch_embed\.", "visual.patch_embed.proj."),
    (r"visual\.merger\.mlp\.linear_1\.", "visual.merger.mlp.0."),
    (r"visual\.merger\.mlp\.linear_2\.", "visual.merger.mlp.2."),
)


@dataclass(frozen=True)
class VisionSizes:
    """Of a vision tower.

    patch, window: pixels of the side of a patch, and of an attention window. merge: patches of the
    side of a token. frames: of a clip in a patch. full_blocks: those that attend to whole pictures;
    by default the last.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int = 14
    window: int = 112
    merge: int = 2
    frames: int = 2
    full_blocks: tuple[int, ...] | None = None

    def config(self, width: int) -> dict[str, Any]:
        """`vision_config`. width: of the decoder."""
        last = (self.layers - 1,)
        return {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": self.layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_heads": self.heads,
            "in_channels": 3,
            "out_hidden_size": width,
            "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "spatial_patch_size": self.patch,
            "temporal_patch_size": self.frames,
            "tokens_per_second": 25,
            "window_size": self.window,
            "fullatt_block_indexes": list(last if self.full_blocks is None else self.full_blocks),
        }


@dataclass(frozen=True)
class AudioSizes:
    """Of an audio tower. window: mel frames that it sees at once; 100 are a second.

    It is a multiple of 4, so that pairs of tokens do not reach across windows.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    mel_bins: int = 128
    window: int = 200

    def config(self, width: int) -> dict[str, Any]:
        """`audio_config`. width: of the decoder."""
        return {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": self.hidden,
            "encoder_layers": self.layers,
            "num_hidden_layers": self.layers,
            "encoder_attention_heads": self.heads,
            "encoder_ffn_dim": self.mlp,
            "num_mel_bins": self.mel_bins,
            "max_source_positions": 1500,
            "n_window": self.window // 2,
            "output_dim": width,
            "activation_function": "gelu",
            "scale_embedding": False,
        }


def thinker_config(
    text: dict[str, Any],
    vision: dict[str, Any],
    audio: dict[str, Any],
    ids: dict[str, int],
    ends: dict[str, int],
) -> dict[str, Any]:
    """What config.json holds.

    text: the decoder's sizes, `head_dim` and `rope_theta` among them, in the hub's words. vision,
    audio: the sections of the towers. ids: of `TOKENS`. ends: bos_token_id, eos_token_id and
    pad_token_id.
    """
    head_dim = text["head_dim"]
    rope = {
        "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        "type": "default",
        "rope_type": "default",
    }
    return {
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
        **ends,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            **text,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_scaling": rope,
        },
        "vision_config": vision,
        "audio_config": audio,
    }


def picture_settings(processor: str, patch: int) -> dict[str, Any]:
    """The settings of Qwen2.5's image processor. processor: the class that has it."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def preprocessor_config(patch: int, mel_bins: int) -> dict[str, Any]:
    """What preprocessor_config.json holds: the hub's, for other patches and mel bins."""
    return {
        **picture_settings("Qwen2_5OmniProcessor", patch),
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": mel_bins,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 300,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }


def hub_key(name: str) -> str:
    """The hub's key of a parameter of this name."""
    for ours, hub in _HUB:
        name = re.sub(f"^{ours}", hub, name)
    return name


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(the hub's key, the shape) of every tensor but an untied head, as the modules have it.

    config: of `thinker_config`.
    """
    backbone, model_config = find_backbone(config, "config.json")
    decoder = DecoderConfig.from_hf(model_config, "config.json")
    modules: dict[str, Any] = {"decoder": decoder}
    for name, (_, read) in backbone.towers.items():
        modules[name] = tower_module(backbone, name, read(model_config, "config.json", decoder))
    for part, module in modules.items():
        for _, name, leaf, layer in per_layer(abstract_params(module)):
            yield hub_key(f"{part}.{name}"), leaf.shape[layer is not None :]
    # stored and never used
    yield "audio_tower.audio_bos_eos_token.weight", (2, decoder.hidden_size)


def draw(
    key: str,
    shape: tuple[int, ...],
    config: dict[str, Any],
    rng: np.random.Generator,
    embedding: float,
) -> np.ndarray:
    """A tensor's first value, float32.

    Matrices have the variance 1 / fan-in, and those that write to the residual stream 1 / (2 ·
    layers) of it (GPT-2's rule), so that its size does not grow with depth. What the towers put
    among the token embeddings is about as large as these. embedding: the deviation of these.
    """
    if len(shape) == 1:
        return np.full(shape, 0.0 if key.endswith("bias") else 1.0, np.float32)
    deviation = math.prod(shape[1:]) ** -0.5
    if "embed_tokens" in key or "bos_eos" in key:
        deviation = embedding
    elif "visual.merger.mlp.2" in key:  # after a gelu, which halves
        deviation = 2.0 * embedding * shape[1] ** -0.5
    elif "audio_tower.proj" in key:  # after a norm
        deviation = embedding * shape[1] ** -0.5
    elif "audio_tower.conv" in key:  # stands above the sinusoids that are added to it
        deviation = 2.0 * math.prod(shape[1:]) ** -0.5
    elif re.search(r"(o_proj|out_proj|down_proj|fc2|attn\.proj)\.weight$", key):
        depths = {
            "model": config["text_config"]["num_hidden_layers"],
            "visual": config["vision_config"]["depth"],
            "audio_tower": config["audio_config"]["encoder_layers"],
        }
        deviation *= (2 * depths[key.partition(".")[0]]) ** -0.5
    return rng.normal(0.0, deviation, shape).astype(np.float32)
