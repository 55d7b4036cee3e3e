"""Model sizes to measure with, and checkpoints of them with random weights.

The small ones are written to disk as Hugging Face has them, so that both sides load the same
numbers. 3b and 7b have the text dimensions of Qwen2.5-VL and Qwen2.5-Omni; each side draws its own
weights on its device.
"""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params, per_layer, tower_module
from lco_jax.checkpoint.tensors import write_tensors
from lco_jax.core import lora
from lco_jax.core.files import write_json, written_aside
from lco_jax.models.config import DecoderConfig
from lco_jax.models.registry import find_backbone

LORA = lora.LoraConfig(rank=64, alpha=128.0)  # the released code's


@dataclass(frozen=True)
class Preset:
    """Geometry of a Qwen2.5-VL text decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, with the smallest vision tower: text is measured."""
        half = self.hidden // self.heads // 2
        special = {
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
            "image_token_id": 9,
            "video_token_id": 10,
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **special,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "bos_token_id": 5,
            "eos_token_id": 6,
            "rope_theta": 1e6,
            "rope_scaling": {
                "type": "mrope",
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": self.hidden,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [0],
                "in_chans": 3,
                "hidden_act": "silu",
                "tokens_per_second": 2,
            },
        }

    @property
    def decoder(self) -> DecoderConfig:
        """What our decoder makes of it."""
        return DecoderConfig.from_hf(self.config, "preset")


PRESETS = {
    "tiny": Preset(256, 4, 4, 2, 1024, 4096, True),
    "small": Preset(512, 12, 4, 2, 2752, 8192, True),
    "3b": Preset(2048, 36, 16, 2, 11008, 151_936, True),
    "7b": Preset(3584, 28, 28, 4, 18_944, 152_064, False),
}
ON_DEVICE = ("3b", "7b")


def write_checkpoint(preset: Preset, folder: Path, seed: int = 0) -> None:
    """Write random parameters, norms and biases too, and the built-in checkpoint's tokenizer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for prefix, tree in _parts(preset).items():
        for _, name, leaf, layer in per_layer(tree):
            shape = leaf.shape if layer is None else leaf.shape[1:]
            tensors[_hub_name(prefix + name)] = _draw(rng, name, shape)
    if not preset.tied:
        tensors["lm_head.weight"] = _draw(rng, "lm_head.weight", (preset.vocab, preset.hidden))
    source = builtin.build()
    with written_aside(folder) as aside:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".txt") and "safetensors" not in file.name:
                shutil.copy(file, aside / file.name)
        write_json(aside / "config.json", preset.config)
        write_tensors(aside / "model.safetensors", tensors)


def _parts(preset: Preset) -> dict[str, Any]:
    """The parameters of decoder and vision tower as shapes, by the prefix of their hub names."""
    backbone, config = find_backbone(preset.config, "preset")
    read_tower = backbone.towers["visual"][1]
    tower = tower_module(backbone, "visual", read_tower(config, "preset", preset.decoder))
    return {"model.": abstract_params(preset.decoder), "visual.": abstract_params(tower)}


def _hub_name(name: str) -> str:
    name = name.replace("visual.patch_embed.weight", "visual.patch_embed.proj.weight")
    return name.replace("mlp.linear_1", "mlp.0").replace("mlp.linear_2", "mlp.2")


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return (0.1 * rng.standard_normal(shape) + name.endswith("weight")).astype(np.float32)
    scale = 0.5 if "embed_tokens" in name else np.prod(shape[1:]) ** -0.5
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def write_adapter(preset: Preset, folder: Path, base: str, dropout: float, seed: int = 1) -> None:
    """Write a PEFT adapter of random A and B, so that both have a gradient from the first step on.

    dropout: as the adapter states it; PEFT makes its modules by it.
    """
    rng = np.random.default_rng(seed)
    params = abstract_params(preset.decoder)
    shapes = jax.eval_shape(partial(lora.init, params=params, config=LORA), jax.random.key(0))

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return (0.3 * x.shape[-1] ** -0.5 * rng.standard_normal(x.shape)).astype(np.float32)

    write_peft(folder, jax.tree.map(draw, shapes), replace(LORA, dropout=dropout), base)
