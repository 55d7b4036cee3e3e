"""The vision tower of a Qwen2.5-VL or Qwen2.5-Omni on disk, as that of another Qwen2.5-Omni."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint.omni import VisionSizes, hub_key
from lco_jax.checkpoint.parts import Source, source_of
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve
from lco_jax.data.processor_files import PICTURE_RULES, read_settings
from lco_jax.models.qwen_vision import VisionConfig
from lco_jax.models.registry import Backbone, find_backbone

FILES = ["*.json", "*.safetensors", "README.md"]
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# of an image processor, which decide what a tower sees of a picture
_SETTINGS = (
    "image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_rescale",
    "do_normalize", "min_pixels", "max_pixels",
)  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    tensors: float32, by the hub's keys of Omni, without the projector's last matrix, which makes
    vectors of another width. processor: what its image processor has of `_SETTINGS`.
    """

    sizes: VisionSizes
    tensors: dict[str, np.ndarray]
    processor: dict[str, Any]
    source: Source


def read_vision(path_or_id: str | Path) -> Tower:
    """Open a folder or a hub id. Raises for a checkpoint with another vision tower or none."""
    folder = resolve(path_or_id, FILES)
    file = folder / "config.json"
    backbone, config = find_backbone(read_json(file), str(file))
    if "visual" not in backbone.towers:
        raise LcoError(f"{file}: the vision tower of a {backbone.model_type} is not supported")
    fused = backbone.model_type == "qwen2_5_vl"
    vision = VisionConfig.from_hf(config, str(file), fused)
    if vision.in_channels != 3:
        raise LcoError(f"{file}: its vision tower takes {vision.in_channels} channels, not 3")
    stored, tensors = TensorFolder(folder), {}
    for key in stored:
        name = _name_of(backbone, key)
        if name is not None and not name.startswith("visual.merger.mlp.linear_2."):
            tensors |= _split(hub_key(name), stored.read(key).astype(np.float32), folder)
    return Tower(_sizes(vision), tensors, _processor(folder), source_of(path_or_id, folder, FILES))


def _sizes(vision: VisionConfig) -> VisionSizes:
    return VisionSizes(
        hidden=vision.hidden_size,
        layers=vision.depth,
        heads=vision.num_heads,
        mlp=vision.intermediate_size,
        patch=vision.patch_size,
        window=vision.window_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
        full_blocks=vision.full_blocks,
    )


def _name_of(backbone: Backbone, key: str) -> str | None:
    """Our name of a tensor of the vision tower; None of any other."""
    try:
        name = backbone.name_of(key.removeprefix(backbone.prefix))
    except KeyError:
        return None
    return name if name and name.startswith("visual.") else None


def _split(key: str, values: np.ndarray, where: Path) -> dict[str, np.ndarray]:
    """Qwen2.5-VL has queries, keys and values in one matrix, Omni in three."""
    if ".attn.qkv." not in key:
        return {key: values}
    if len(values) % 3:
        raise LcoError(f"{where}: {key} has {len(values)} rows, and must have a multiple of 3")
    parts = zip("qkv", np.split(values, 3), strict=True)
    return {key.replace(".qkv.", f".{kind}."): part for kind, part in parts}


def _processor(folder: Path) -> dict[str, Any]:
    """What the image processor of a checkpoint has of `_SETTINGS`; nothing where it has none."""
    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        return {}
    config, _ = read_settings(folder, "image_processor", PICTURE_RULES)
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    size = config.get("size")
    if isinstance(size, dict):  # as transformers 5 spells the limits
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if theirs in size:
                settings.setdefault(ours, size[theirs])
    return settings
