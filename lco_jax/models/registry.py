"""Which checkpoints we read: config.json's `model_type` -> backbone, its towers, and its table of key names.

A key table lists (pattern of a whole key, our name for it or None for what an embedder has no use for); the first
pattern that matches counts. Names are the checkpoint's own below `decoder`, `visual`, `audio_tower` and `vision_tower`.

| written by                       | decoder                  | head                 | towers                          |
|----------------------------------|--------------------------|----------------------|---------------------------------|
| the hub, transformers ≤ 4.57     | `model.*`                | `lm_head.*`          | `visual.*`, `audio_tower.*`     |
| transformers 5.x                 | `model.language_model.*` | `lm_head.*`          | `model.visual.*`, …             |
| a full Qwen2.5-Omni, before each | `thinker.`               |                      | `talker.*`, `token2wav.*` stay  |
| LLaVA-NeXT on the hub            | `language_model.model.*` | `language_model.lm…` | `vision_tower.vision_model.*` … |
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn

from lco_jax.core import hf_config
from lco_jax.core.errors import LcoError
from lco_jax.models.clip import ClipConfig, LlavaVision
from lco_jax.models.config import DecoderConfig
from lco_jax.models.qwen_audio import AudioConfig, QwenAudio
from lco_jax.models.qwen_vision import QwenVision, VisionConfig

KeyTable = tuple[tuple[str, str | None], ...]
_DECODER = r"((?:embed_tokens|layers|norm)\..+)"
_BUFFER = (
    r".*\.(rotary_(pos_)?emb\.inv_freq|position_ids)",
    None,
)  # constants that old files store

QWEN_KEYS: KeyTable = (
    _BUFFER,
    (rf"model\.(?:language_model\.)?{_DECODER}", r"decoder.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
    (r"(?:model\.)?visual\.patch_embed\.proj\.weight", "visual.patch_embed.weight"),
    (
        r"(?:model\.)?visual\.merger\.mlp\.0\.(.+)",
        r"visual.merger.mlp.linear_1.\1",
    ),  # torch numbers them
    (r"(?:model\.)?visual\.merger\.mlp\.2\.(.+)", r"visual.merger.mlp.linear_2.\1"),
    (r"(?:model\.)?visual\.(.+)", r"visual.\1"),
    (r"(?:model\.)?audio_tower\.audio_bos_eos_token\.weight", None),  # stored and never used
    (r"(?:model\.)?audio_tower\.(.+)", r"audio_tower.\1"),
)
LLAVA_KEYS: KeyTable = (
    _BUFFER,
    (rf"(?:language_model\.model|model\.language_model)\.{_DECODER}", r"decoder.\1"),
    (r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    (r"(?:model\.)?image_newline", "vision_tower.image_newline"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"vision_tower.projector.\1"),
    (
        r"(?:model\.)?vision_tower\.(?:vision_model\.)?post_layernorm\..+",
        None,
    ),  # features come from before it
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?encoder\.(.+)", r"vision_tower.\1"),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+_embedding)\.weight", r"vision_tower.\1"),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", r"vision_tower.\1"),
)

# (config.json's content, its name in errors, the decoder's geometry) -> the tower's geometry
TowerConfig = Callable[[dict[str, Any], str, DecoderConfig], Any]


@dataclass(frozen=True)
class Backbone:
    """A checkpoint family.

    keys: its key table, for keys without `prefix`. prefix: what stands before every key.
    inner_config: where in config.json the model's configuration lies, as a path of keys.
    towers: name -> (module, reader of its geometry). reads: name -> the modalities that go through it.
    ignored: parts of a full checkpoint that an embedder has no use for.
    """

    model_type: str
    keys: KeyTable
    towers: dict[str, tuple[type[nn.Module], TowerConfig]]
    reads: dict[str, tuple[str, ...]]
    prefix: str = ""
    inner_config: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the family takes."""
        return ("text", *(kind for kinds in self.reads.values() for kind in kinds))

    def name_of(self, key: str) -> str | None:
        """Our name of a key without prefix; None for one that is known and not needed. KeyError for an unknown one."""
        for pattern, name in self.keys:
            if match := re.fullmatch(pattern, key):
                return None if name is None else match.expand(name)
        raise KeyError(key)


def _vision(
    config: dict[str, Any], where: str, decoder: DecoderConfig, fused: bool
) -> VisionConfig:
    if len(decoder.mrope_section) != 3:
        raise LcoError(
            f"{where}: the rope of its text decoder has no mrope_section, which images need"
        )
    return _fits(
        VisionConfig.from_hf(config, where, fused), "vision_config.out_hidden_size", where, decoder
    )


def _audio(config: dict[str, Any], where: str, decoder: DecoderConfig) -> AudioConfig:
    return _fits(AudioConfig.from_hf(config, where), "audio_config.output_dim", where, decoder)


def _clip(config: dict[str, Any], where: str, decoder: DecoderConfig) -> ClipConfig:
    return ClipConfig.from_hf(config, where, decoder.hidden_size)


def _fits(tower: Any, key: str, where: str, decoder: DecoderConfig) -> Any:
    if tower.out_hidden_size != decoder.hidden_size:
        raise LcoError(
            f"{where}: {key} is {tower.out_hidden_size}, and hidden_size {decoder.hidden_size}"
        )
    return tower


_OMNI_TOWERS = {
    "visual": (QwenVision, partial(_vision, fused=False)),
    "audio_tower": (QwenAudio, _audio),
}
_OMNI_READS = {"visual": ("image", "video"), "audio_tower": ("audio",)}
_OMNI = partial(Backbone, keys=QWEN_KEYS, towers=_OMNI_TOWERS, reads=_OMNI_READS)
BACKBONES = {
    backbone.model_type: backbone
    for backbone in (
        Backbone(
            "qwen2_5_vl",
            keys=QWEN_KEYS,
            towers={"visual": (QwenVision, partial(_vision, fused=True))},
            reads={"visual": ("image", "video")},
        ),
        _OMNI("qwen2_5_omni_thinker"),
        _OMNI(
            "qwen2_5_omni",
            prefix="thinker.",
            inner_config=("thinker_config",),
            ignored=("talker", "token2wav"),
        ),
        Backbone(
            "llava_next",
            keys=LLAVA_KEYS,
            towers={"vision_tower": (LlavaVision, _clip)},
            reads={"vision_tower": ("image",)},
        ),
    )
}


def find_backbone(config: dict[str, Any], where: str) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a config.json's content, and the part of it that describes the model. `where` names the file."""
    model_type = config.get("model_type")
    if model_type not in BACKBONES:
        raise LcoError(
            f"{where}: model_type {model_type!r} is not supported; these are: {', '.join(BACKBONES)}"
        )
    backbone = BACKBONES[model_type]
    for key in backbone.inner_config:
        if not isinstance(config.get(key), dict):
            raise LcoError(f"{where} has no {key!r}, which a {model_type} checkpoint needs")
        config = {"model_type": f"{model_type}_thinker", **config[key]}
    return backbone, hf_config.complete(config)
