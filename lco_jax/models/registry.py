"""The checkpoint families we read: config.json's `model_type` -> backbone, towers, table of keys.

A key table lists (pattern of a key, our name for it, or None if an embedder has no use for it). The
first pattern that matches the whole key counts. Our names are the checkpoint's own below `decoder`,
`visual`, `audio_tower` and `vision_tower`.

| written by         | decoder                  | head                       | towers             |
|--------------------|--------------------------|----------------------------|--------------------|
| transformers 4.x   | `model.*`                | `lm_head.*`                | `visual.*`         |
| transformers 5.x   | `model.language_model.*` | `lm_head.*`                | `model.visual.*`   |
| full Qwen2.5-Omni  | `thinker.model.*`        | `thinker.lm_head.*`        | `thinker.visual.*` |
| LLaVA-NeXT, on hub | `language_model.model.*` | `language_model.lm_head.*` | `vision_tower.*`   |

The full Qwen2.5-Omni also has `talker.*` and `token2wav.*`, which we ignore.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
_BUFFER = r".*\.(rotary_(pos_)?emb\.inv_freq|position_ids)"  # constants that old files store
_AUDIO = r"(?:model\.)?audio_tower\."
_VISUAL = r"(?:model\.)?visual\."
_CLIP = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"

QWEN_KEYS: KeyTable = (
    (_BUFFER, None),
    (rf"model\.(?:language_model\.)?{_DECODER}", r"decoder.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
    (rf"{_VISUAL}patch_embed\.proj\.weight", "visual.patch_embed.weight"),
    # torch numbers the layers of an nn.Sequential
    (rf"{_VISUAL}merger\.mlp\.0\.(.+)", r"visual.merger.mlp.linear_1.\1"),
    (rf"{_VISUAL}merger\.mlp\.2\.(.+)", r"visual.merger.mlp.linear_2.\1"),
    (rf"{_VISUAL}(.+)", r"visual.\1"),
    (rf"{_AUDIO}audio_bos_eos_token\.weight", None),  # stored and never used
    (rf"{_AUDIO}(.+)", r"audio_tower.\1"),
)
LLAVA_KEYS: KeyTable = (
    (_BUFFER, None),
    (rf"(?:language_model\.model|model\.language_model)\.{_DECODER}", r"decoder.\1"),
    (r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    (r"(?:model\.)?image_newline", "vision_tower.image_newline"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"vision_tower.projector.\1"),
    (rf"{_CLIP}post_layernorm\..+", None),  # the features come from before it
    (rf"{_CLIP}encoder\.(.+)", r"vision_tower.\1"),
    (rf"{_CLIP}(.+_embedding)\.weight", r"vision_tower.\1"),
    (rf"{_CLIP}(.+)", r"vision_tower.\1"),
)

# (config.json's content, its name in errors, the decoder's sizes) -> the tower's sizes
TowerConfig = Callable[[dict[str, Any], str, DecoderConfig], Any]


@dataclass(frozen=True)
class Backbone:
    """A checkpoint family.

    keys: its key table, for keys without `prefix`. prefix: what every key begins with.
    inner_config: the key in config.json under which the model's configuration is, if there is one.
    towers: name -> (module, reader of its sizes). reads: name -> the modalities it takes.
    ignored: parts of a full checkpoint that an embedder has no use for.
    """

    model_type: str
    keys: KeyTable
    towers: dict[str, tuple[type[nn.Module], TowerConfig]]
    reads: dict[str, tuple[str, ...]]
    prefix: str = ""
    inner_config: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the family takes."""
        return ("text", *(kind for kinds in self.reads.values() for kind in kinds))

    @property
    def in_sentence_transformers(self) -> bool:
        """Whether sentence-transformers can load the family: transformers' AutoModel has no full
        Qwen2.5-Omni.
        """
        return not self.prefix

    def towers_for(self, modalities: Iterable[str]) -> list[str]:
        """The towers that read any of these modalities."""
        wanted = set(modalities)
        return [tower for tower, kinds in self.reads.items() if wanted & set(kinds)]

    def name_of(self, key: str) -> str | None:
        """Our name of a key without prefix, or None if it is not needed.

        Raises KeyError for an unknown key.
        """
        for pattern, name in self.keys:
            match = re.fullmatch(pattern, key)
            if match:
                return None if name is None else match.expand(name)
        raise KeyError(key)


def _vision(
    config: dict[str, Any], where: str, decoder: DecoderConfig, fused: bool
) -> VisionConfig:
    if len(decoder.mrope_section) != 3:
        raise LcoError(
            f"{where}: the rope of its text decoder has no mrope_section, which images need"
        )
    vision = VisionConfig.from_hf(config, where, fused)
    _check_width(vision.out_hidden_size, "vision_config.out_hidden_size", where, decoder)
    return vision


def _audio(config: dict[str, Any], where: str, decoder: DecoderConfig) -> AudioConfig:
    audio = AudioConfig.from_hf(config, where)
    _check_width(audio.out_hidden_size, "audio_config.output_dim", where, decoder)
    return audio


def _clip(config: dict[str, Any], where: str, decoder: DecoderConfig) -> ClipConfig:
    return ClipConfig.from_hf(config, where, decoder.hidden_size)


def _check_width(width: int, key: str, where: str, decoder: DecoderConfig) -> None:
    if width != decoder.hidden_size:
        raise LcoError(f"{where}: {key} is {width}, and hidden_size {decoder.hidden_size}")


_VL = Backbone(
    "qwen2_5_vl",
    keys=QWEN_KEYS,
    towers={"visual": (QwenVision, partial(_vision, fused=True))},
    reads={"visual": ("image", "video")},
)
_THINKER = Backbone(
    "qwen2_5_omni_thinker",
    keys=QWEN_KEYS,
    towers={
        "visual": (QwenVision, partial(_vision, fused=False)),
        "audio_tower": (QwenAudio, _audio),
    },
    reads={"visual": ("image", "video"), "audio_tower": ("audio",)},
)
_OMNI = replace(
    _THINKER,
    model_type="qwen2_5_omni",
    prefix="thinker.",
    inner_config="thinker_config",
    ignored=("talker", "token2wav"),
)
_LLAVA = Backbone(
    "llava_next",
    keys=LLAVA_KEYS,
    towers={"vision_tower": (LlavaVision, _clip)},
    reads={"vision_tower": ("image",)},
)
BACKBONES = {backbone.model_type: backbone for backbone in (_VL, _THINKER, _OMNI, _LLAVA)}


def find_backbone(config: dict[str, Any], where: str) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a config.json's content, and the part of it that describes the model.

    where: names the file in errors.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise LcoError(
            f"{where}: model_type {model_type!r:.60} is not supported; these are: {known}"
        )
    backbone = BACKBONES[model_type]
    key = backbone.inner_config
    if key:
        if not isinstance(config.get(key), dict):
            raise LcoError(f"{where} has no {key!r}, which a {model_type} checkpoint needs")
        config = {"model_type": f"{model_type}_thinker", **config[key]}
    return backbone, hf_config.complete(config)
