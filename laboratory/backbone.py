"""A tiny omnimodal model that has learned nothing: a thinker-only Qwen2.5-Omni in real Hugging Face
layout.

Its weights are drawn so that it can be trained from scratch. A state after the final norm has root
mean square 1, so the logits of its tied head have the deviation `EMBEDDING · sqrt(hidden)`, 0.55 by
default: the loss begins near log(vocabulary). Matrices have the variance 1 / fan-in, and those that
write to the residual stream 1 / (2 · layers) of it (GPT-2's rule): its size does not grow with
depth.

What made it look at pictures within minutes was their share of a prompt: attention is even at
first, so there is no system turn (a system prompt of twenty tokens hid four of a picture), and
patches are of 7 pixels (16 tokens a picture).
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lco_jax import MediaConfig
from lco_jax.checkpoint.shapes import abstract_params, per_layer, tower_module
from lco_jax.core.files import write_json, written_aside
from lco_jax.data.prompts import PROMPTS, QUESTIONS
from lco_jax.models.config import DecoderConfig
from lco_jax.models.registry import find_backbone
from tools.make_tiny import PREPROCESSOR, PROMPT, chat_template, make_tokenizer, tokenizer_config

MEDIA = MediaConfig(
    video_min_pixels=3136
)  # to be loaded with: Omni's own least would enlarge clips thirty times
EMBEDDING = (
    0.04  # deviation of the token embeddings, and about that of what the towers put in their place
)
NAMES = {  # what Omni's processor asks its tokenizer for
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMES.values())
TEMPLATE = chat_template(
    {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    },
    system="",
)
WHISPER = {  # as in the hub's preprocessor_config.json
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
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
HUB = (  # our names of parameters -> the hub's keys
    (r"decoder\.", "model."),
    (r"visual\.patch_embed\.", "visual.patch_embed.proj."),
    (r"visual\.merger\.mlp\.linear_1\.", "visual.merger.mlp.0."),
    (r"visual\.merger\.mlp\.linear_2\.", "visual.merger.mlp.2."),
)


@dataclass(frozen=True)
class Geometry:
    """Sizes. vocabulary: of the BPE, its 256 bytes among it; window: mel frames that the audio
    tower sees at once.
    """

    vocabulary: int = 600
    hidden: int = 192
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 384
    patch: int = 7
    vision_hidden: int = 96
    vision_depth: int = 2
    vision_heads: int = 3
    vision_mlp: int = 256
    audio_hidden: int = 96
    audio_layers: int = 2
    audio_heads: int = 3
    audio_mlp: int = 256
    window: int = 120


def write(folder: Path, texts: Iterable[str], seed: int, geometry: Geometry | None = None) -> None:
    """Make a checkpoint in `folder`, its tokenizer trained on `texts` and our prompts; the same
    input, the same bytes.

    Raises for a folder that holds something else.
    """
    geometry = Geometry() if geometry is None else geometry
    prompts = [*PROMPTS.values(), *QUESTIONS.values(), PROMPT]
    tokenizer = make_tokenizer([*texts, *prompts * 100], geometry.vocabulary, SPECIALS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    config = _config(geometry, ids, tokenizer.get_vocab_size())
    ends = {"bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<|im_end|>"]}
    with written_aside(Path(folder)) as aside:
        tokenizer.save(str(aside / "tokenizer.json"), pretty=False)
        write_json(
            aside / "tokenizer_config.json", tokenizer_config(ids) | {"extra_special_tokens": NAMES}
        )
        write_json(aside / "chat_template.json", {"chat_template": TEMPLATE})
        preprocessor = {"processor_class": "Qwen2_5OmniProcessor", "patch_size": geometry.patch}
        write_json(aside / "preprocessor_config.json", PREPROCESSOR | WHISPER | preprocessor)
        write_json(aside / "config.json", config)
        write_json(aside / "generation_config.json", {**ends, "pad_token_id": ids["<|endoftext|>"]})
        rng = np.random.default_rng(seed)
        tensors = {name: _draw(name, shape, config, rng) for name, shape in _shapes(config)}
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})


def _config(g: Geometry, ids: dict[str, int], tokens: int) -> dict[str, Any]:
    """What config.json holds."""
    head_dim = g.hidden // g.heads
    rope = {
        "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        "type": "default",
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
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": tokens,
            "hidden_size": g.hidden,
            "head_dim": head_dim,
            "intermediate_size": g.mlp,
            "num_hidden_layers": g.layers,
            "num_attention_heads": g.heads,
            "num_key_value_heads": g.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "rope_scaling": {**rope, "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": g.vision_depth,
            "hidden_act": "silu",
            "hidden_size": g.vision_hidden,
            "intermediate_size": g.vision_mlp,
            "num_heads": g.vision_heads,
            "in_channels": 3,
            "out_hidden_size": g.hidden,
            "patch_size": g.patch,
            "spatial_merge_size": 2,
            "spatial_patch_size": g.patch,
            "temporal_patch_size": 2,
            "tokens_per_second": 25,
            "window_size": 112,
            "fullatt_block_indexes": [g.vision_depth - 1],
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": g.audio_hidden,
            "encoder_layers": g.audio_layers,
            "num_hidden_layers": g.audio_layers,
            "encoder_attention_heads": g.audio_heads,
            "encoder_ffn_dim": g.audio_mlp,
            "num_mel_bins": WHISPER["feature_size"],
            "max_source_positions": 1500,
            "n_window": g.window // 2,
            "output_dim": g.hidden,
            "activation_function": "gelu",
            "scale_embedding": False,
        },
    }


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(the hub's key, the shape) of every tensor, as the modules that read them say."""
    backbone, model_config = find_backbone(config, "config.json")
    decoder = DecoderConfig.from_hf(model_config, "config.json")
    modules: dict[str, Any] = {"decoder": decoder}
    for name, (_, read) in backbone.towers.items():
        modules[name] = tower_module(backbone, name, read(model_config, "config.json", decoder))
    for part, module in modules.items():
        for _, name, leaf, layer in per_layer(abstract_params(module)):
            key = f"{part}.{name}"
            for ours, hub in HUB:
                key = re.sub(f"^{ours}", hub, key)
            yield key, leaf.shape[layer is not None :]
    yield (
        "audio_tower.audio_bos_eos_token.weight",
        (2, decoder.hidden_size),
    )  # stored and never used


def _draw(
    key: str, shape: tuple[int, ...], config: dict[str, Any], rng: np.random.Generator
) -> np.ndarray:
    """A tensor's first value."""
    if len(shape) == 1:
        return np.full(shape, 0.0 if key.endswith("bias") else 1.0, np.float32)
    deviation = math.prod(shape[1:]) ** -0.5
    if "embed_tokens" in key or "bos_eos" in key:
        deviation = EMBEDDING
    elif re.search(
        r"visual\.merger\.mlp\.2|audio_tower\.proj", key
    ):  # as large as the embeddings among which it goes
        deviation = (
            EMBEDDING * shape[1] ** -0.5 * (2.0 if "merger" in key else 1.0)
        )  # after a gelu; after a norm
    elif "audio_tower.conv" in key:  # stands above the sinusoids that are added to it
        deviation = 2.0 * math.prod(shape[1:]) ** -0.5
    elif re.search(r"(o_proj|out_proj|down_proj|fc2|attn\.proj)\.weight$", key):
        text, vision, audio = (config[f"{part}_config"] for part in ("text", "vision", "audio"))
        depths = {
            "mod": text["num_hidden_layers"],
            "vis": vision["depth"],
            "aud": audio["encoder_layers"],
        }
        deviation *= (2 * depths[key[:3]]) ** -0.5
    return rng.normal(0.0, deviation, shape).astype(np.float32)
