"""Which checkpoints we read: config.json's `model_type` -> backbone."""

from dataclasses import dataclass
from typing import Any

from lco_jax.core.errors import LcoError
from lco_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Backbone:
    """A checkpoint family.

    prefix: what stands before `model.`, `visual.` … in its key names.
    text_config: where in config.json the decoder's configuration lies, as a path of keys.
    towers: the parts that turn other modalities into the decoder's tokens, carried along untouched for now.
    modalities: what the family takes.
    ignored: parts of a full checkpoint that an embedder has no use for.
    """

    model_type: str
    prefix: str = ""
    text_config: tuple[str, ...] = ()
    towers: tuple[str, ...] = ("visual",)
    modalities: tuple[str, ...] = ("text", "image", "video")
    ignored: tuple[str, ...] = ()


OMNI_TOWERS = ("visual", "audio_tower")
OMNI_MODALITIES = ("text", "image", "video", "audio")
BACKBONES = {
    backbone.model_type: backbone
    for backbone in (
        Backbone("qwen2_5_vl"),
        Backbone("qwen2_5_omni_thinker", towers=OMNI_TOWERS, modalities=OMNI_MODALITIES),
        Backbone(
            "qwen2_5_omni",
            prefix="thinker.",
            text_config=("thinker_config",),
            towers=OMNI_TOWERS,
            modalities=OMNI_MODALITIES,
            ignored=("talker", "token2wav"),
        ),
    )
}


def find_backbone(config: dict[str, Any], where: str) -> tuple[Backbone, DecoderConfig]:
    """The backbone and decoder geometry of a config.json's content. `where` names the file in errors."""
    model_type = config.get("model_type")
    if model_type not in BACKBONES:
        raise LcoError(f"{where}: model_type {model_type!r} is not supported; these are: {', '.join(BACKBONES)}")
    backbone = BACKBONES[model_type]
    for key in backbone.text_config:
        if key not in config:
            raise LcoError(f"{where} has no {key!r}, which a {model_type} checkpoint needs")
        config = config[key]
    return backbone, DecoderConfig.from_hf(config, where)
